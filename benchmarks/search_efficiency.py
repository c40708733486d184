"""Our search beside others': what masks they find, after how many seconds and evaluations.

    python benchmarks/search_efficiency.py --out results/measured/search-demo [--seeds 5] [--arm ours ...]

Every arm runs on the same trace, costs and runtime; its clock covers all that it does, the shared record and profile
stages excepted. Afterwards each mask that was the best of an arm for a while is given the policy that suits it best on
the calibration prompts, and is scored by exact replay on held-out prompts under the measured costs; the final masks
are decoded on those prompts as well, against plain decoding, all in one race. Runs are rows of runs.jsonl in the
folder: those that are there are not run again, so that a long comparison may be made in parts. Writes table.csv and
curves.svg too. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rivals import hidden, selfsd, swift

from skipsearch import SkipMask, load_model
from skipsearch.decoding.backend import backend_name, warm_mask
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.files import write_json, write_text
from skipsearch.model.sublayers import find_sublayers
from skipsearch.report.curves import curves_picture
from skipsearch.search.cost import device_name
from skipsearch.search.objective import Scorer, exact, score
from skipsearch.search.options import MAX_LENGTH, TRIAL_LANES, TRIAL_LENGTH, SearchOptions
from skipsearch.search.prepare import Prepared, prepare
from skipsearch.search.replay import Replay
from skipsearch.search.run import rescore, search_trials
from skipsearch.search.seeds import uniform
from skipsearch.search.trace import record
from skipsearch.search.validate import our_arm, race

Stream = Iterator[tuple[int, SkipMask, float]]
EVALUATIONS = {
    "ours": 200, "gp": 60, "tpe": 60, "random": 60, "flips": 80, "self-sd": 45, "swift": 600, "clasp": 1,
    "knapspec": 5, "uniform": 4, "ours, 10 times": 2000, "self-sd, 10 times": 450,
}  # fmt: skip


class Bench:
    """What the arms share."""

    def __init__(self, model: str, dtype: str, options: SearchOptions) -> None:
        self.loaded = load_model(model, dtype=dtype)
        self.model, self.path = self.loaded.model, find_sublayers(self.loaded.model).path
        self.options = options
        with tempfile.TemporaryDirectory() as scratch:
            self.prepared: Prepared = prepare(self.loaded, Path(scratch), self.options, lambda *_: None)
        self.compiled, self.space = self.prepared.compiled, self.prepared.space
        # Compiled here, so that no arm pays for another: the layers that lack one sublayer.
        layers = self.space.num_layers
        for mask in (
            SkipMask(attention=range(layers), num_layers=layers),
            SkipMask(mlp=range(layers), num_layers=layers),
        ):
            warm_mask(self.compiled, self.model, mask)
        held_out = record(
            self.model, self.prepared.prompts.held_out, self.options.new_tokens, lambda *_: None, self.compiled
        )
        self.calibration = Replay(self.model, self.prepared.trace, MAX_LENGTH)
        self.held_out = Replay(self.model, held_out, MAX_LENGTH)
        self.known: dict[SkipMask, tuple[float, DraftPolicy]] = {}

    def worth(self, mask: SkipMask) -> tuple[float, DraftPolicy]:
        """Speed-up on held-out prompts by exact replay, with the policy that calibration prompts choose."""
        if mask not in self.known:
            found = score(self.calibration, mask, self.prepared.point, thorough=True)
            result = exact(self.held_out.of(mask), found.policy, self.prepared.point)
            self.known[mask] = result.speedup, found.policy
        return self.known[mask]


def ours(bench: Bench, seed: int, evaluations: int, sampler: str = "trust-region") -> list[dict[str, Any]]:
    """Our search: seeds, storage and the finalists' second look included."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        options = replace(bench.options, trials=evaluations, sampler=sampler, seed=seed)
        start, best = time.perf_counter(), [0.0]

        def note(done: int, value: float) -> None:
            if value > best[0]:
                best[0] = value
                rows.append({"seconds": time.perf_counter() - start, "evaluations": done})

        study = search_trials(bench.loaded, bench.prepared, Path(scratch), options, lambda *_: None, note)
        top, masks = 0.0, []
        for trial in study.finished():
            value = trial.user_attrs.get("tokens_per_second", 0.0)
            if value > top:
                top = value
                masks.append(study.mask_of(trial))
        for row, mask in zip(rows, masks, strict=True):
            row["mask"] = mask
        found, _, _ = rescore(bench.model, bench.prepared, study, lambda *_: None)
        spent = time.perf_counter() - start
        rows.append({"seconds": spent, "evaluations": evaluations, "mask": found.mask})
    return rows


def flips(bench: Bench, seed: int, evaluations: int) -> Stream:
    """Hill climbing by one or two flips from the empty mask, on our objective."""
    scorer = Scorer(Replay(bench.model, bench.prepared.trace, TRIAL_LENGTH, lanes=TRIAL_LANES), bench.prepared.point)
    rng, layers = random.Random(seed), bench.space.num_layers
    best = SkipMask(num_layers=layers)
    top = scorer(best).tokens_per_second
    yield 1, best, top
    for count in range(2, evaluations + 1):
        mask = best ^ SkipMask.from_sublayers(rng.sample(bench.space.free, rng.choice((1, 1, 2))), layers)
        found = scorer(mask)
        if found.fidelity == "whole" and found.tokens_per_second > top:
            best, top = mask, found.tokens_per_second
        yield count, best, top


def strides(bench: Bench, seed: int, evaluations: int) -> Stream:
    """The best of a few uniform strides, by our objective."""
    best, top = SkipMask(num_layers=bench.space.num_layers), 0.0
    for count, (_, mask) in enumerate(uniform(bench.space), 1):
        found = score(bench.calibration, mask, bench.prepared.point).tokens_per_second
        if found > top:
            best, top = mask, found
        yield count, best, top


def streamed(search: Callable[[Bench, int, int], Stream]) -> Callable[[Bench, int, int], list[dict[str, Any]]]:
    """Rows of an arm that yields its best so far."""

    def run(bench: Bench, seed: int, evaluations: int) -> list[dict[str, Any]]:
        start, rows, last = time.perf_counter(), [], None
        for count, mask, _ in search(bench, seed, evaluations):
            row = {"seconds": time.perf_counter() - start, "evaluations": count, "mask": mask}
            if mask != last:
                rows.append(row)
            last = mask
        return [*rows, dict(row)]

    return run


ARMS: dict[str, Callable[[Bench, int, int], list[dict[str, Any]]]] = {
    "ours": ours,
    "gp": lambda b, s, n: ours(b, s, n, "gp"),
    "tpe": lambda b, s, n: ours(b, s, n, "tpe"),
    "random": lambda b, s, n: ours(b, s, n, "random"),
    "flips": streamed(flips), "self-sd": streamed(selfsd.search), "swift": streamed(swift.search),
    "clasp": streamed(hidden.clasp), "knapspec": streamed(hidden.knapspec), "uniform": streamed(strides),
    "ours, 10 times": ours, "self-sd, 10 times": streamed(selfsd.search),
}  # fmt: skip
SCORED = 5  # incumbents of a run that are scored on held-out prompts, evenly over its evaluations' logarithm
EQUAL = 60  # evaluations after which all are compared


def thinned(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last incumbent before each of a few places, and the last of all."""
    places = [*np.geomspace(1, steps[-1]["evaluations"], SCORED), EQUAL]
    kept = {max((i for i, s in enumerate(steps) if s["evaluations"] <= place), default=0) for place in places}
    return [steps[i] for i in sorted(kept | {len(steps) - 1})]


ONCE = {"clasp", "knapspec", "uniform"}  # deterministic: one run says all
LONG = {"ours, 10 times", "self-sd, 10 times"}  # once as well, and when asked for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arm", nargs="*", default=[a for a in ARMS if a not in LONG], choices=list(ARMS))
    parser.add_argument("--share", type=float, default=1.0, help="of each arm's evaluations: less for a slower model")
    for name in ("prompts", "held_out", "new_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(SearchOptions(), name))
    parser.add_argument("--validate-only", action="store_true", help="run no arm; decode and draw what is there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    options = SearchOptions(prompts=args.prompts, held_out=args.held_out, new_tokens=args.new_tokens)
    path, bench = args.out / "runs.jsonl", Bench(args.model, args.dtype, options)
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in range(args.seeds):
        for name in args.arm if not args.validate_only else []:
            count = math.ceil(args.share * EVALUATIONS[name])
            if (name in ONCE | LONG and seed) or any((r["arm"], r["seed"]) == (name, seed) for r in runs):
                continue
            steps = thinned(ARMS[name](bench, seed, count))
            for step in steps:
                mask = step.pop("mask")
                worth, policy = bench.worth(mask)
                step |= {"mask": "".join(map(str, mask.bits())), "speedup": round(worth, 4), "policy": str(policy)}
                step["seconds"] = round(step["seconds"], 3)
            runs.append({"arm": name, "seed": seed, "steps": steps})
            with path.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            last = steps[-1]
            print(f"{name:9} seed {seed}: {last['evaluations']} evaluations, {last['seconds']:.1f} s, "
                  f"held-out speed-up {last['speedup']:.3f}", flush=True)  # fmt: skip
    table = summary(bench, runs)
    write_text(args.out / "table.csv", table.to_csv(index=False))
    title = f"{args.model}, {backend_name(bench.compiled)}, {device_name(bench.model.device)}"
    write_text(args.out / "curves.svg", curves_picture(runs, title))
    data = {"benchmark": "search_efficiency", "model": args.model, "dtype": str(bench.model.dtype),
            "backend": backend_name(bench.compiled), "device": device_name(bench.model.device),
            "rows": table.to_dict("records")}  # fmt: skip
    write_json(args.out / "summary.json", data)
    print(table.to_string(index=False))
    print(json.dumps(data))


def summary(bench: Bench, runs: list[dict[str, Any]]) -> pd.DataFrame:
    """A row an arm: seconds, evaluations, speed-up by replay over seeds; and the median seed's mask really decoded."""
    finals: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        finals.setdefault(run["arm"], []).append(run["steps"][-1])
    chosen = {arm: sorted(steps, key=lambda s: s["speedup"])[len(steps) // 2] for arm, steps in finals.items()}
    arms = {"plain": our_arm(bench.model, compiled=bench.compiled)}
    for arm, step in chosen.items():
        mask = SkipMask.from_bits(map(int, step["mask"]))
        arms[arm] = our_arm(bench.model, mask, bench.worth(mask)[1], bench.compiled)
    timed = race(arms, bench.prepared.prompts.held_out, new_tokens=bench.options.new_tokens, rounds=2, seed=0,
                 progress=lambda *_: None)  # fmt: skip
    rows = []
    for arm, steps in finals.items():
        values = [s["speedup"] for s in steps]
        early = [[s["speedup"] for s in r["steps"] if s["evaluations"] <= EQUAL][-1] for r in runs if r["arm"] == arm]
        speedup, (low, high) = timed[arm].speedup(timed["plain"])
        rows.append({
            "arm": arm, "seeds": len(steps), "evaluations": steps[0]["evaluations"],
            "seconds": round(statistics.median(s["seconds"] for s in steps), 1),
            "speedup_replay_mean": round(float(np.mean(values)), 3),
            f"after_{EQUAL}_evaluations": round(float(np.mean(early)), 3),
            "lowest": min(values), "highest": max(values),
            "speedup_timed": round(speedup, 3), "timed_low": round(low, 3), "timed_high": round(high, 3),
            "greedy_equal": timed[arm].ids() == timed["plain"].ids(),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("speedup_replay_mean", ascending=False)


if __name__ == "__main__":
    main()
