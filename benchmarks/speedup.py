"""A mask's speed-up on held-out prompts, beside an A/A check and plain `generate`.

    python benchmarks/speedup.py [--mask results/demo/mask.json]

Three ratios, each with a 95 % bootstrap interval over 20 prompts x 96 tokens, arms interleaved: plain / plain
(must hold 1), plain / mask, and `generate` of transformers / our plain loop (so that the baseline is seen not to be
a slow one; prefill included in both arms of that one). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipsearch import load_mask, load_model, self_speculative
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import chosen_prompts
from skipsearch.search.validate import interval, measure

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mask", type=Path, default=Path("results/demo/mask.json"))
    path = parser.parse_args().mask
    file, loaded = load_mask(path), load_model("demo")
    model, options = loaded.model, SearchOptions()
    prompts = chosen_prompts(loaded, options).held_out
    settings: dict[str, Any] = {
        "new_tokens": options.new_tokens, "rounds": ROUNDS, "seed": 0, "progress": lambda *_: None,
    }  # fmt: skip
    again = measure(model, prompts, None, None, **settings)
    masked = measure(model, prompts, file.mask, self_speculative(file).policy, **settings)
    rows = {
        "A/A (plain / plain)": (again.speedup, again.speedup_ci),
        "plain / mask": (masked.speedup, masked.speedup_ci),
        "generate / our plain loop": against_generate(model, prompts, options.new_tokens),
    }
    for name, (ratio, (low, high)) in rows.items():
        print(f"{name:27} {ratio:.3f}  ({low:.3f} to {high:.3f})")
    print(f"same tokens: {masked.greedy_equal}; {masked.tokens_per_second:.1f} against "
          f"{masked.plain_tokens_per_second:.1f} tokens/s")  # fmt: skip
    print(json.dumps({
        "benchmark": "speedup", "prompts": len(prompts), "tokens": masked.tokens, "greedy_equal": masked.greedy_equal,
        "tokens_per_second": round(masked.tokens_per_second, 1),
        "plain_tokens_per_second": round(masked.plain_tokens_per_second, 1),
        "ratios": {
            name: {"ratio": round(ratio, 4), "ci": [round(low, 4), round(high, 4)]}
            for name, (ratio, (low, high)) in rows.items()
        },
    }))  # fmt: skip


def against_generate(model: Any, prompts: Any, new_tokens: int) -> tuple[float, tuple[float, float]]:
    """Seconds of transformers' own greedy `generate` over those of the same call through our plain loop."""
    rng, plain = random.Random(0), self_speculative(None)
    seconds: dict[str, list[list[float]]] = {"theirs": [[] for _ in prompts], "ours": [[] for _ in prompts]}
    for _ in range(ROUNDS):
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            call: dict[str, Any] = {
                "attention_mask": torch.ones_like(ids),
                "max_new_tokens": new_tokens,
                "do_sample": False,
            }
            for name in rng.sample(sorted(seconds), 2):
                begin = time.perf_counter()
                model.generate(ids, **call, **({"custom_generate": plain} if name == "ours" else {}))
                seconds[name][i].append(time.perf_counter() - begin)
    theirs, ours = (np.array([statistics.median(s) for s in seconds[n]]) for n in ("theirs", "ours"))
    return float(theirs.sum() / ours.sum()), interval(theirs, ours, 0)


if __name__ == "__main__":
    main()
