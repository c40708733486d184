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
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from skipsearch import SkipMask, load_model
from skipsearch.compiled.backend import with_backend
from skipsearch.evaluate.cost import draft_step
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.objective import best_policy, score, score_policy
from skipsearch.evaluate.profile import profile
from skipsearch.evaluate.prompts import PromptSource
from skipsearch.evaluate.scorer import Scorer
from skipsearch.evaluate.windows import WindowReplay
from skipsearch.model.device import device_name
from skipsearch.plan import DraftPlan
from skipsearch.search.budget import Budget
from skipsearch.search.options import MAX_LENGTH, SearchOptions
from skipsearch.search.prepare import Prepared, prepare
from skipsearch.search.sensitivity import single_losses


def quiet(*_: Any) -> None:
    pass


def profiles_apart(prepared: Prepared, count: int) -> list[dict[str, float]]:
    """Of each of several profiles, how far its prices lie from the median of all, and the seconds it took."""
    context, layers = round(prepared.trace.mean_context), prepared.space.num_layers
    half, found, took = SkipMask(attention=range(0, layers, 2), mlp=range(1, layers, 2), num_layers=layers), [], []
    for _ in range(count):
        begin = time.perf_counter()
        (point,) = profile(prepared.target, contexts=[context], max_length=MAX_LENGTH, progress=quiet)
        took.append(time.perf_counter() - begin)
        found.append([point.verify[0], draft_step(point, half, False), point.verify[5], point.verify[12]])
    names, middle = (
        ("plain", "half step", "verify 5", "verify 12"),
        [statistics.median(c) for c in zip(*found, strict=True)],
    )
    return [
        {name: round(value / of_all - 1, 4) for name, value, of_all in zip(names, prices, middle, strict=True)}
        | {"seconds": round(seconds, 1)}
        for prices, seconds in zip(found, took, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--masks", type=int, default=40)
    parser.add_argument("--profiles", type=int, default=0, help="profile so often, and say how far each is from all")
    args = parser.parse_args()
    loaded, budget = load_model(args.model), Budget()
    options = SearchOptions(prompts=16, held_out=4, source=PromptSource(name=args.prompts))
    with_backend(loaded.target, options.backend)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(loaded, Path(scratch), options, quiet, budget)
    windows, point, space = prepared.windows, prepared.point, prepared.space
    few = windows.few(8, options.trial_tokens)
    with budget.stage("sensitivity"):
        loss = single_losses(windows, few, replace(space, forms=("skip",)), quiet)["skip"]
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
            scorer(DraftPlan(mask))
    apart = []
    for mask in masks[:4]:
        found = best_policy(WindowReplay(windows, mask).outcomes(), mask, point)
        drafts = DraftReplay(windows.replay.with_length(found.policy.max_length), mask)
        begin = time.perf_counter()
        exact = score_policy(drafts, found.policy, point)
        seconds = time.perf_counter() - begin
        apart.append({"skipped": len(mask), "windows": round(found.speedup, 4), "walk": round(exact.speedup, 4),
                      "walk_s": round(seconds, 1)})  # fmt: skip
    spread = profiles_apart(prepared, args.profiles)
    row = {
        "benchmark": "stage_speed", "model": args.model, "prompts": args.prompts,
        "device": device_name(loaded.target.device),
        "seconds": {name: round(took, 1) for name, took in budget.spent.items()}, "tokens": prepared.trace.tokens,
        "longest_prompt": max(map(len, prepared.trace.prompts)), "sublayers": len(loss),
        "sensitivity_s_a_sublayer": round(budget.spent["sensitivity"] / len(loss), 3),
        "masks_a_minute_whole": round(600 / budget.spent["whole"], 1),
        "masks_a_minute": round(60 * len(masks) / budget.spent["trials"], 1), "fidelity": dict(scorer.counts),
        "apart": apart, "profiles_apart": spread,
    }  # fmt: skip
    for name, value in row.items():
        print(f"{name}: {value}")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
