"""Seconds of each stage of a search on a model, and masks a minute.

    python benchmarks/stage_speed.py --model smollm2-135m-instruct [--prompts builtin:chat] [--masks 40]

Compiles first; then records 16 prompts x 96 tokens, profiles at two context lengths, makes the reference, skips every
sublayer alone, and scores random masks of few skips: on the whole trace, and as trials do, which give most masks up
early. At last some masks are scored by windows and walked block by block, to say how far the two are apart. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from skipsearch import SkipMask, load_model
from skipsearch.compiled.backend import with_backend
from skipsearch.evaluate.mask_replay import MaskReplay
from skipsearch.evaluate.objective import best_policy, score, score_policy
from skipsearch.evaluate.prompts import PromptSource
from skipsearch.evaluate.scorer import Scorer
from skipsearch.evaluate.windows import WindowReplay
from skipsearch.model.device import device_name
from skipsearch.search.budget import Budget
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import prepare
from skipsearch.search.seeds import single_skip_loss


def quiet(*_: Any) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--masks", type=int, default=40)
    args = parser.parse_args()
    loaded, budget = load_model(args.model), Budget()
    options = SearchOptions(prompts=16, held_out=4, source=PromptSource(name=args.prompts))
    with_backend(loaded.target, options.backend)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(loaded, Path(scratch), options, quiet, budget)
    windows, point, space = prepared.windows, prepared.point, prepared.space
    few = windows.few(8, options.trial_tokens)
    with budget.stage("sensitivity"):
        loss = single_skip_loss(windows, few, space, quiet)
    rng, layers = random.Random(0), space.num_layers
    masks = [
        SkipMask.from_bits([rng.random() < density for _ in range(2 * layers)])
        for density in (rng.choice((0.05, 0.1, 0.2, 0.3)) for _ in range(args.masks))
    ]
    with budget.stage("whole"):
        for mask in masks[:10]:
            score(WindowReplay(windows, mask), point)
    scorer = Scorer(windows, point)
    with budget.stage("trials"):
        for mask in masks:
            scorer(mask)
    apart = []
    for mask in masks[:4]:
        found = best_policy(WindowReplay(windows, mask).outcomes(), mask, point)
        drafts = MaskReplay(windows.replay.with_length(found.policy.max_length), mask)
        begin = time.perf_counter()
        exact = score_policy(drafts, found.policy, point)
        seconds = time.perf_counter() - begin
        apart.append({"skipped": len(mask), "windows": round(found.speedup, 4), "walk": round(exact.speedup, 4),
                      "walk_s": round(seconds, 1)})  # fmt: skip
    row = {
        "benchmark": "stage_speed", "model": args.model, "prompts": args.prompts,
        "device": device_name(loaded.target.device),
        "seconds": {name: round(took, 1) for name, took in budget.spent.items()}, "tokens": prepared.trace.tokens,
        "longest_prompt": max(map(len, prepared.trace.prompts)), "sublayers": len(loss),
        "sensitivity_s_a_sublayer": round(budget.spent["sensitivity"] / len(loss), 3),
        "masks_a_minute_whole": round(600 / budget.spent["whole"], 1),
        "masks_a_minute": round(60 * len(masks) / budget.spent["trials"], 1), "fidelity": dict(scorer.counts),
        "apart": apart,
    }  # fmt: skip
    for name, value in row.items():
        print(f"{name}: {value}")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
