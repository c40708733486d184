"""Our search beside others': what masks they find, after how many seconds and evaluations.

    python benchmarks/search_efficiency.py --out results/measured/search-demo [--seeds 5] [--arm ours ...]

Every arm searches masks, since no rival knows quantised forms, and runs on the same trace, costs and runtime; its clock
covers all that it does, the shared record and profile stages excepted. Masks that were the best of an arm for a while
are given the policy that suits them best on the calibration prompts, and replayed on held-out prompts; their counts are
rows of runs.jsonl in the folder. Runs that are there are not run again, so that a long comparison may be made in parts.
At the end all counts are priced by one new set of profiles, which no search has seen and so none can have profited from
its errors, and the final mask of every run is decoded on the held-out prompts, against plain decoding, all timed side
by side. Writes table.csv, summary.json and curves.svg. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from curves import curves_picture
from rivals import hidden, selfsd, swift
from scipy.stats import bootstrap

from skipsearch import SkipMask, load_model
from skipsearch.compiled.backend import warm_plan, with_backend
from skipsearch.evaluate.cost import Point, combine_points
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.objective import best_policy, score, throughput
from skipsearch.evaluate.profile import profile
from skipsearch.evaluate.prompts import PromptSource
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.scorer import Scorer
from skipsearch.evaluate.timing import Arm, Timing, our_arm, time_interleaved
from skipsearch.evaluate.trace import DecodeSettings, record
from skipsearch.evaluate.windows import WindowReplay
from skipsearch.files import write_json, write_text
from skipsearch.mask import KINDS
from skipsearch.model.device import device_name
from skipsearch.model.load import Loaded
from skipsearch.plan import DraftPlan
from skipsearch.policy import DraftPolicy
from skipsearch.search.options import MAX_LENGTH, SearchOptions
from skipsearch.search.prepare import Prepared, prepare
from skipsearch.search.run import rescore, search_trials
from skipsearch.search.seeds import uniform

Stream = Iterator[tuple[int, SkipMask, float]]
EVALUATIONS = {
    "ours": 200, "gp": 100, "tpe": 100, "nsga2": 100, "our seeds": 100, "random": 100, "flips": 120, "self-sd": 45,
    "swift": 1000, "clasp": 1, "clasp by sublayers": 3, "knapspec": 63, "uniform": 4, "ours, 10 times": 2000,
    "self-sd, 10 times": 450,
}  # fmt: skip


def masks_alone(loaded: Loaded, path: Path) -> Path:
    """A space file: the model's own space, in which a sublayer runs or is skipped."""
    fixed = SkipMask(num_layers=loaded.target.num_layers) if loaded.preset is None else loaded.preset.space.fixed
    sets = (f"fixed_{kind} = {sorted(getattr(fixed, kind))}" for kind in KINDS)
    write_text(path, "\n".join(["[space]", 'forms = ["skip"]', *sets, ""]))
    return path


class Bench:
    """What the arms share."""

    def __init__(self, model: str, dtype: str, options: SearchOptions, folder: Path) -> None:
        self.loaded = load_model(model, dtype=dtype)
        self.options = options = replace(options, space=masks_alone(self.loaded, folder / "space.toml"))
        with_backend(self.loaded.target, options.backend)  # compiling is no part of anybody's search
        begin = time.perf_counter()
        self.prepared: Prepared = prepare(self.loaded, folder, self.options, lambda *_: None)
        self.prepared_s = round(time.perf_counter() - begin, 1)
        self.target, self.space = self.prepared.target, self.prepared.space
        # Compiled here, so that no arm pays for another: the layers that lack one sublayer.
        layers = self.space.num_layers
        for mask in (
            SkipMask(attention=range(layers), num_layers=layers),
            SkipMask(mlp=range(layers), num_layers=layers),
        ):
            warm_plan(self.target, mask)
        held_out = record(self.target, self.prepared.prompts.held_out, options.decoding(), lambda *_: None)
        self.held_out = Replay(self.target, held_out, MAX_LENGTH)
        self.known: dict[SkipMask, dict[str, Any]] = {}
        sizes = f"{options.prompts} + {options.held_out} prompts x {options.new_tokens}"
        self.setting = (
            f"{self.loaded.name} {self.prepared.identity['weights'][:12]} {self.prepared.identity['set_up']} {sizes}"
        )

    def profile(self) -> Point:
        """Costs at the calibration prompts' context, measured now."""
        context = round(self.prepared.trace.mean_context)
        (point,) = profile(self.target, contexts=[context], max_length=MAX_LENGTH, progress=lambda *_: None)
        print(f"profile: {point}", flush=True)
        return point

    def worth(self, mask: SkipMask) -> dict[str, Any]:
        """The policy that calibration prompts choose, what they promise, and the blocks on held-out prompts."""
        if mask not in self.known:
            outcomes = WindowReplay(self.prepared.windows, mask).outcomes()
            found = best_policy(outcomes, mask, self.prepared.point)
            blocks = DraftReplay(self.held_out, mask).walk(found.policy)
            self.known[mask] = {
                "mask": "".join(map(str, mask.bits())), "policy": asdict(found.policy),
                "calibration": round(found.speedup, 4), "blocks": [[k, n, count] for (k, n), count in blocks.items()],
            }  # fmt: skip
        return self.known[mask]


def priced(step: dict[str, Any], point: Point) -> float:
    """Speed-up of a row's blocks under these costs."""
    blocks = Counter({(k, n): count for k, n, count in step["blocks"]})
    return throughput(blocks, SkipMask.from_bits(map(int, step["mask"])), DraftPolicy(**step["policy"]), point).speedup


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
                masks.append(study.plan_of(trial).skip)
        for row, mask in zip(rows, masks, strict=True):
            row["mask"] = mask
        found, _, _ = rescore(bench.prepared, study, lambda *_: None)
        spent = time.perf_counter() - start
        rows.append({"seconds": spent, "evaluations": evaluations, "mask": found.mask})
    return rows


def climb(bench: Bench, evaluations: int, propose: Callable[[SkipMask], SkipMask]) -> Stream:
    """The best of what is proposed, by our objective, from the empty mask on."""
    scorer = Scorer(bench.prepared.windows, bench.prepared.point)
    best = SkipMask(num_layers=bench.space.num_layers)
    top, seen = scorer(DraftPlan(best)).tokens_per_second, {best}
    yield 1, best, top
    for count in range(2, evaluations + 1):
        while (mask := propose(best)) in seen:
            pass
        seen.add(mask)
        found = scorer(DraftPlan(mask))
        if found.fidelity == "whole" and found.tokens_per_second > top:
            best, top = mask, found.tokens_per_second
        yield count, best, top


def drawn(bench: Bench, seed: int, evaluations: int) -> Stream:
    """Random masks of random density, without seeds."""
    rng, free, layers = random.Random(seed), bench.space.free, bench.space.num_layers
    return climb(
        bench, evaluations, lambda _: SkipMask.from_sublayers(rng.sample(free, rng.randint(1, len(free) - 1)), layers)
    )


def flips(bench: Bench, seed: int, evaluations: int) -> Stream:
    """Hill climbing by one or two flips."""
    rng, free, layers = random.Random(seed), bench.space.free, bench.space.num_layers
    return climb(
        bench, evaluations, lambda best: best ^ SkipMask.from_sublayers(rng.sample(free, rng.choice((1, 1, 2))), layers)
    )


def strides(bench: Bench, seed: int, evaluations: int) -> Stream:
    """The best of a few uniform strides, by our objective."""
    best, top = SkipMask(num_layers=bench.space.num_layers), 0.0
    for count, (_, plan) in enumerate(uniform(bench.space), 1):
        found = score(WindowReplay(bench.prepared.windows, plan), bench.prepared.point).tokens_per_second
        if found > top:
            best, top = plan.skip, found
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
    "nsga2": lambda b, s, n: ours(b, s, n, "nsga2"),
    "our seeds": lambda b, s, n: ours(b, s, n, "random"),
    "random": streamed(drawn), "flips": streamed(flips),
    "self-sd": streamed(selfsd.search), "swift": streamed(swift.search),
    "clasp": streamed(hidden.clasp), "clasp by sublayers": streamed(hidden.by_sublayers),
    "knapspec": streamed(hidden.knapspec), "uniform": streamed(strides),
    "ours, 10 times": ours, "self-sd, 10 times": streamed(selfsd.search),
}  # fmt: skip
PROFILES = 3  # before the timing and as many after it; the median of each figure prices all arms
SCORED = 8  # incumbents of a run that are scored on held-out prompts, evenly over its evaluations' logarithm
EQUAL = (60, 100)  # evaluations after which arms are compared


def thinned(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last incumbent before each of a few places, and the last of all."""
    places = [*np.geomspace(1, steps[-1]["evaluations"], SCORED), *EQUAL]
    kept = {max((i for i, s in enumerate(steps) if s["evaluations"] <= place), default=0) for place in places}
    return [steps[i] for i in sorted(kept | {len(steps) - 1})]


ONCE = {"clasp", "clasp by sublayers", "knapspec", "uniform"}  # deterministic: one run says all
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
    parser.add_argument("--prompts-from", default="builtin", help="as --prompts of `skipsearch run`")
    parser.add_argument("--validate-only", action="store_true", help="run no arm; decode and draw what is there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    options = SearchOptions(
        prompts=args.prompts, held_out=args.held_out, new_tokens=args.new_tokens,
        source=PromptSource(name=args.prompts_from),
    )  # fmt: skip
    path = args.out / "runs.jsonl"
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args.model, args.dtype, options, Path(scratch))
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if others := {run["setting"] for run in runs} - {bench.setting}:
        parser.error(
            f"{path} holds runs of another setting ({others.pop()}), now {bench.setting}; choose another --out"
        )
    for seed in range(args.seeds):
        for name in args.arm if not args.validate_only else []:
            count = math.ceil(args.share * EVALUATIONS[name])
            if (name in ONCE | LONG and seed) or any((r["arm"], r["seed"]) == (name, seed) for r in runs):
                continue
            steps = thinned(ARMS[name](bench, seed, count))
            steps = [step | bench.worth(step["mask"]) | {"seconds": round(step["seconds"], 3)} for step in steps]
            runs.append({"arm": name, "seed": seed, "setting": bench.setting, "steps": steps})
            with path.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            last = steps[-1]
            print(f"{name:9} seed {seed}: {last['evaluations']} evaluations, {last['seconds']:.1f} s, speed-up "
                  f"{last['calibration']:.3f} on calibration, {priced(last, bench.prepared.point):.3f} on held-out "
                  "prompts", flush=True)  # fmt: skip
    table, targets = summary(bench, runs)
    write_text(args.out / "table.csv", table.to_csv(index=False))
    title = f"{bench.loaded.name}, {bench.target.backend}, {device_name(bench.target.device)}"
    write_text(args.out / "curves.svg", curves_picture(runs, title))
    data = {"benchmark": "search_efficiency", "model": bench.loaded.name, "dtype": str(bench.target.dtype),
            "backend": bench.target.backend, "device": device_name(bench.target.device),
            "targets": targets, "rows": table.to_dict("records")}  # fmt: skip
    write_json(args.out / "summary.json", data)
    print(table.to_string(index=False))
    print(json.dumps(data))


def summary(bench: Bench, runs: list[dict[str, Any]]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A row an arm: means over seeds by replay under new costs, and really decoded; and what became of the targets."""
    finals = {(run["arm"], run["seed"]): run["steps"][-1] for run in runs}
    arms: dict[str, Arm] = {"plain": our_arm(bench.target)}
    for key, step in finals.items():
        mask = SkipMask.from_bits(map(int, step["mask"]))
        warm_plan(bench.target, mask)
        arms[str(key)] = our_arm(bench.target, mask, DraftPolicy(**step["policy"]))
    profiles = [bench.profile() for _ in range(PROFILES)]
    settings = DecodeSettings(new_tokens=bench.options.new_tokens, rounds=1)
    timed = time_interleaved(arms, bench.prepared.prompts.held_out, settings, lambda *_: None, "validate")
    point = combine_points(profiles + [bench.profile() for _ in range(PROFILES)], statistics.median)
    for run in runs:
        for step in run["steps"]:
            step["speedup"] = priced(step, point)
    rows, plain, ours = [], timed["plain"], [timed[key] for key in arms if key.startswith("('ours',")]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        steps = {seed: step for (name, seed), step in finals.items() if name == arm}
        decoded = [timed[str((arm, seed))] for seed in steps]
        speedup, (low, high) = _mean_speedup(decoded, [plain], plain)
        ahead, (ahead_low, ahead_high) = _mean_speedup(ours or [plain], decoded, plain)
        row: dict[str, Any] = {
            "arm": arm, "seeds": len(steps), "evaluations": round(_mean(s["evaluations"] for s in steps.values())),
            "seconds": round(_mean(s["seconds"] for s in steps.values()), 1),
            "decoded": round(speedup, 3), "decoded_low": round(low, 3), "decoded_high": round(high, 3),
            "ours_over_it": round(ahead, 3), "ours_low": round(ahead_low, 3), "ours_high": round(ahead_high, 3),
            "replay": round(_mean(s["speedup"] for s in steps.values()), 3),
            "replay_lowest": round(min(s["speedup"] for s in steps.values()), 3),
            "replay_highest": round(max(s["speedup"] for s in steps.values()), 3),
            "calibration": round(_mean(s["calibration"] for s in steps.values()), 3),
        }  # fmt: skip
        for place in EQUAL:
            at = [[s["speedup"] for s in r["steps"] if s["evaluations"] <= place][-1] for r in runs if r["arm"] == arm]
            row[f"replay_at_{place}_evaluations"] = round(_mean(at), 3)
        row["greedy_equal"] = all(arm_timed.ids() == plain.ids() for arm_timed in decoded)
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("decoded", ascending=False)
    verify = [round(seconds / point.verify[0], 3) for seconds in point.verify]
    return table, {"verify_over_plain": verify, **_targets(runs, table.set_index("arm"), bench.prepared_s)}


def _targets(runs: list[dict[str, Any]], table: pd.DataFrame, prepared_s: float) -> dict[str, Any]:
    """How ours stands to the best of all, and when it reaches what each rival ends at."""
    found: dict[str, Any] = {"best": table["replay"].idxmax()}
    if "ours" not in table.index:
        return found
    found["ours_over_best"] = round(float(table.loc["ours", "replay"] / table["replay"].max()), 3)
    found["prepared_before_s"] = prepared_s
    own = [run["steps"] for run in runs if run["arm"] == "ours"]
    for arm in table.index.drop("ours"):
        reached = [_for_good(steps, float(table.loc[arm, "replay"])) for steps in own]
        when = statistics.median(reached)
        ended = statistics.median(run["steps"][-1]["seconds"] for run in runs if run["arm"] == arm)
        found[arm] = {
            "ended_after_s": round(ended, 1),
            "by_seeds": f"{sum(r < math.inf for r in reached)} of {len(own)}",
        }
        if when < math.inf:  # medians; the record and the profile, which real timed decoding does without, told apart
            found[arm] |= {
                "reached_after_s": round(when, 1), "times_faster": round(ended / when, 1),
                "times_faster_with_preparation": round(ended / (when + prepared_s), 1),
            }  # fmt: skip
    return found


def _for_good(steps: list[dict[str, Any]], goal: float) -> float:
    """Seconds after which every later best mask reaches the goal: one that only passes it has not."""
    below = [n for n, step in enumerate(steps) if step["speedup"] < goal]
    first = below[-1] + 1 if below else 0
    return float(steps[first]["seconds"]) if first < len(steps) else math.inf


def _mean_speedup(arm: list[Timing], other: list[Timing], plain: Timing) -> tuple[float, tuple[float, float]]:
    """Of one arm's seeds over another's, by seconds for plain decoding's tokens; with a 95 % interval over prompts."""
    weights = np.array([max(1, run.tokens) for run in plain.runs])
    both = [t.seconds * weights / [max(1, run.tokens) for run in t.runs] for t in (*arm, *other)]

    def ratio(*columns: Any, axis: int = -1) -> Any:
        speeds = [1 / column.sum(axis=axis) for column in columns]
        return np.mean(speeds[: len(arm)], axis=0) / np.mean(speeds[len(arm) :], axis=0)

    found = bootstrap(
        both, ratio, paired=True, method="percentile", n_resamples=2000, rng=np.random.default_rng(0), vectorized=True
    ).confidence_interval
    return float(ratio(*both)), (float(found.low), float(found.high))


def _mean(values: Any) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
