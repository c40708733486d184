"""Where the time of a block goes: draft forwards, verify forwards, and the host between them.

    python benchmarks/block_profile.py --mask results/measured/demo.mask.json [--model demo --dtype float32]

Each arm decodes the same held-out prompts; a clock around every forward tells model time from the rest: choosing
what to draft, accepting, bookkeeping. What compiling took is told too: the whole of it at the first use on a machine
(point XDG_CACHE_HOME at an empty folder to have that again), reading it back afterwards. On a GPU each forward is
synchronised for this, so shares there are upper bounds of the forwards' part. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from skipsearch.compiled.backend import warm_plan, with_backend
from skipsearch.decoding.sequences import Sequences
from skipsearch.evaluate.timing import our_arm
from skipsearch.maskfile import load_mask
from skipsearch.model.device import device_name, synchronize
from skipsearch.model.load import load_model
from skipsearch.policy import DraftPolicy
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import chosen_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--mask", type=Path, required=True)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    loaded, file = load_model(args.model, dtype=args.dtype), load_mask(args.mask)
    policy = file.draft
    start = time.perf_counter()
    target = with_backend(loaded.target, args.backend)
    warm_plan(target, file.mask)
    compiling = time.perf_counter() - start
    print(f"compiled, or read back, in {compiling:.1f} s", flush=True)
    device = target.device
    options = SearchOptions(held_out=args.prompts, new_tokens=args.tokens)
    prompts = chosen_prompts(target, loaded.tokenizer, options).held_out
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)

    def clocked(name: Any, method: Any) -> Any:
        def run(self: Any, *given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            out = method(self, *given, **named)
            synchronize(device)
            part = name(self, *given)
            spent[part] += time.perf_counter() - start
            calls[part] += 1
            return out

        return run

    forward, several = Sequences._forward, None
    Sequences._forward = clocked(  # type: ignore[method-assign]
        lambda self, which, *_: "verify" if which is self.target.model else "draft", forward
    )
    if target.compiled is not None:
        Sequences._compiled = clocked(  # type: ignore[method-assign]
            lambda self, of_target, *_: "verify" if of_target else "draft", Sequences._compiled
        )
        several = type(target.compiled).draft
        type(target.compiled).draft = clocked(lambda *_: "draft", several)  # type: ignore[method-assign]
        Sequences._forward = forward  # type: ignore[method-assign]
    arms = {
        "plain": our_arm(target),
        "mask": our_arm(target, file.mask, policy.mask_alone()),
        "n-gram": our_arm(target, None, DraftPolicy(max_length=1, ngram=10, never_slower=True)),
        "hybrid": our_arm(target, file.mask, replace(policy, ngram=10, never_slower=True)),
    }
    rows = {}
    for name, arm in arms.items():
        arm(prompts[0], args.tokens)
        spent.clear()
        calls.clear()
        runs = [arm(prompt, args.tokens) for prompt in prompts]
        seconds, tokens = sum(run.seconds for run in runs), sum(run.tokens for run in runs)
        prefill = sum(run.prefill for run in runs)
        verifies = sum(run.stats.verifies for run in runs)
        # The prefill's forwards are clocked too; it holds nothing else to speak of.
        model_time = {"draft": spent["draft"], "verify": max(0.0, spent["verify"] - prefill)}
        row = {
            "tokens_per_second": tokens / seconds, "ms_a_block": 1e3 * seconds / verifies,
            "tokens_a_block": tokens / verifies, "draft_forwards_a_block": calls["draft"] / verifies,
            **{f"{part}_ms": 1e3 * value / verifies for part, value in model_time.items()},
            "host_ms": 1e3 * (seconds - sum(model_time.values())) / verifies,
        }  # fmt: skip
        rows[name] = row
        print(name, {key: round(value, 3) for key, value in row.items()}, flush=True)
    print(
        json.dumps(
            {
                "benchmark": "block_profile", "device": device_name(device), "model": args.model,
                "dtype": str(target.dtype), "backend": target.backend,
                "compile_s": round(compiling, 1), "arms": rows,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
