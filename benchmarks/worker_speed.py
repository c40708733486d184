"""Trials a minute of one process and of several workers on this machine, on one SQLite study.

    python benchmarks/worker_speed.py [--workers 1 2] [--trials 100] [--rounds 3]

One study is prepared and its seeds are tried; each arm goes on from a copy of it. The clock runs from the moment at
which all workers of an arm have finished a trial, so that loading the model is left out; it is reported beside.
Arms take turns; ratios are of rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from skipsearch import load_model
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import prepare
from skipsearch.search.run import search_trials
from skipsearch.search.worker import WORKER

SEEDS = 40


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--trials", type=int, default=100, help="in which the pace is measured, at least")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    options = SearchOptions(trials=SEEDS, time_budget=None)
    loaded = load_model("demo")
    rates: dict[int, list[float]] = {count: [] for count in args.workers}
    starts: dict[int, list[float]] = {count: [] for count in args.workers}
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch, "first")
        prepared = prepare(loaded, first, options, lambda *_: None)
        search_trials(loaded, prepared, first, options, lambda *_: None)
        for number in range(args.rounds):
            for count in args.workers if number % 2 == 0 else args.workers[::-1]:
                folder = Path(scratch, f"{number}-{count}")
                shutil.copytree(first, folder)
                # While the others load their model, this process alone runs trials.
                more = replace(options, trials=SEEDS + args.trials * (count + (count > 1)), workers=count)
                study = search_trials(loaded, prepared, folder, more, lambda *_: None)
                new = sorted(study.finished()[SEEDS:], key=lambda t: t.datetime_complete)
                seen: set[str] = set()
                at = [t.datetime_complete.timestamp() for t in new]
                for begin, trial in enumerate(new):  # noqa: B007 (used behind the loop)
                    seen.add(trial.system_attrs[WORKER])
                    if len(seen) == count:
                        break
                else:
                    raise SystemExit(f"only {len(seen)} of {count} workers had a trial; pass more --trials")
                rates[count].append(60 * (len(at) - 1 - begin) / (at[-1] - at[begin]))
                starts[count].append(at[begin] - at[0])
                print(f"round {number + 1}, {count} workers: {rates[count][-1]:.0f} trials a minute", flush=True)
    base = args.workers[0]
    ratios = {c: [mine / one for mine, one in zip(rates[c], rates[base], strict=True)] for c in args.workers}
    print(json.dumps({
        "benchmark": "worker_speed", "cores": os.cpu_count(),
        "trials_per_minute": {c: round(statistics.median(r), 1) for c, r in rates.items()},
        "ratio": {c: [round(x, 3) for x in (statistics.median(r), min(r), max(r))] for c, r in ratios.items()},
        "seconds_until_all_work": {c: round(statistics.median(s), 1) for c, s in starts.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
