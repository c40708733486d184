"""Seconds for the trials of a default search on the demo model, storage included.

    python benchmarks/search_speed.py [--trials 300] [--sampler trust-region]

Counts everything from opening the study to the exported table: seeds, sampler, replay, SQLite. The trace
and the costs are made before the clock starts; their seconds are reported beside it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from skipsearch import load_model
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import prepare
from skipsearch.search.run import rescore, search_trials


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--sampler", default="trust-region")
    args = parser.parse_args()
    options = SearchOptions(trials=args.trials, sampler=args.sampler)
    loaded = load_model("demo")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        begin = time.perf_counter()
        prepared = prepare(loaded, folder, options, lambda *_: None)
        before = time.perf_counter() - begin
        begin = time.perf_counter()
        study = search_trials(loaded, prepared, folder, options, lambda *_: None)
        study.export_csv(folder / "trials.csv")
        seconds = time.perf_counter() - begin
        best, _, _ = rescore(prepared, study, lambda *_: None)
        plans = len(study.memo)
    print(
        f"{args.trials} trials ({plans} different plans) in {seconds:.1f} s; record and profile {before:.1f} s before"
    )
    print(json.dumps({
        "benchmark": "search_speed", "trials": args.trials, "sampler": args.sampler, "seconds": round(seconds, 1),
        "prepare_s": round(before, 1), "plans": plans, "predicted_speedup": round(best.speedup, 3),
        "threads": torch.get_num_threads(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
