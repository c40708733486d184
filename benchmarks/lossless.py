"""Greedy output against `generate`, token by token, in fp32: random masks on the demo model.

    python benchmarks/lossless.py [--masks 100] [--tokens 128]

Masks of every density, layer 0, all attention, all MLP and everything included; random K and exit; a
different held-out prompt each. Exits 1 at any difference. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from typing import Any

import torch

from skipsearch import SkipMask, load_model, self_speculative
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import chosen_prompts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--masks", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    loaded, rng = load_model("demo"), random.Random(0)
    model = loaded.model
    layers = range(20)
    prompts = chosen_prompts(loaded, SearchOptions(held_out=20, new_tokens=args.tokens)).held_out
    special = [
        SkipMask(num_layers=20), SkipMask(attention=[0], num_layers=20), SkipMask(attention=layers, num_layers=20),
        SkipMask(mlp=layers, num_layers=20), SkipMask(attention=layers, mlp=layers, num_layers=20),
    ]  # fmt: skip
    expected: dict[int, torch.Tensor] = {}
    different, tokens, drafted, accepted = [], 0, 0, 0
    for number in range(args.masks):
        density = rng.random()
        mask = (
            special[number] if number < len(special) else SkipMask.from_bits(rng.random() < density for _ in range(40))
        )
        method = self_speculative(mask, max_length=rng.randint(1, 8), exit_threshold=rng.choice([None, 0.3, 0.6]))
        which = number % len(prompts)
        ids = torch.tensor([prompts[which]])
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids), "max_new_tokens": args.tokens, "do_sample": False,
        }  # fmt: skip
        if which not in expected:
            expected[which] = model.generate(ids, **options)
        out = model.generate(ids, custom_generate=method, **options)
        tokens += out.shape[1] - ids.shape[1]
        drafted, accepted = drafted + method.stats.drafted, accepted + method.stats.accepted
        if not torch.equal(out, expected[which]):
            different.append(number)
            print(f"mask {number} differs:\n{mask}")
    print(f"{args.masks} masks, {tokens} tokens ({accepted} of {drafted} drafted ones accepted): "
          f"{len(different)} divergences from generate")  # fmt: skip
    print(json.dumps({"benchmark": "lossless", "masks": args.masks, "tokens": tokens, "drafted": drafted,
                      "accepted": accepted, "divergences": len(different)}))  # fmt: skip
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
