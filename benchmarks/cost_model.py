"""Predicted against really measured tokens per second over random masks of the demo model.

    python benchmarks/cost_model.py [--masks 20] [--prompts 8] [--rounds 2]

Masks of random density, each with a random fixed K; predicted from replay counts and profiled costs,
measured by decoding the same prompts x 64 tokens, in rounds of random order (medians). Reports Spearman's rank
correlation with its bootstrap interval, and the median error. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics

import numpy as np
from scipy.stats import bootstrap, spearmanr

from skipsearch import SkipMask, load_model
from skipsearch.decoding.backend import backend_name, compiled_for
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.search.cost import profile
from skipsearch.search.objective import exact
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import chosen_prompts
from skipsearch.search.replay import Replay
from skipsearch.search.trace import record
from skipsearch.search.validate import timed_decode

TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--masks", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()
    count = args.masks
    loaded = load_model("demo")
    model, rng = loaded.model, random.Random(0)
    prompts = chosen_prompts(loaded, SearchOptions(new_tokens=TOKENS)).calibration[: args.prompts]
    compiled = compiled_for(model, args.backend)
    trace = record(model, prompts, TOKENS, lambda *_: None, compiled)
    costs = profile(model, "", contexts=[64, 96, 128], max_length=8, progress=lambda *_: None, compiled=compiled)
    replay, point = Replay(model, trace, 8), costs.at(trace.mean_context)
    chosen = []
    for _ in range(count):
        density = rng.uniform(0.05, 0.8)
        bits = [i % 20 > 0 and rng.random() < density for i in range(40)]
        chosen.append((SkipMask.from_bits(bits), DraftPolicy(max_length=rng.randint(1, 8))))
    predicted = [exact(replay.of(mask), policy, point).tokens_per_second for mask, policy in chosen]
    seconds: list[list[float]] = [[] for _ in chosen]
    tokens = [0] * count
    for _ in range(args.rounds):
        for i in rng.sample(range(count), count):
            runs = [timed_decode(model, prompt, TOKENS, *chosen[i], compiled=compiled) for prompt in prompts]
            seconds[i].append(sum(run.seconds for run in runs))
            tokens[i] = sum(run.tokens for run in runs)
    measured = [n / statistics.median(s) for n, s in zip(tokens, seconds, strict=True)]
    rank = float(spearmanr(predicted, measured).statistic)
    interval = bootstrap(
        (np.array(predicted), np.array(measured)), lambda a, b: spearmanr(a, b).statistic, paired=True,
        vectorized=False, n_resamples=1000, method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    error = statistics.median(abs(p - m) / m for p, m in zip(predicted, measured, strict=True))
    for (mask, policy), p, m in sorted(zip(chosen, predicted, measured, strict=True), key=lambda row: row[2]):
        print(f"{len(mask.attention):2d} attention, {len(mask.mlp):2d} MLP skipped, {policy!s:6}: "
              f"predicted {p:6.1f}, measured {m:6.1f} tokens/s")  # fmt: skip
    print(f"Spearman {rank:.3f} ({interval.low:.3f} to {interval.high:.3f}), median error {error:.1%}")
    print(json.dumps({
        "benchmark": "cost_model", "backend": backend_name(compiled), "masks": count,
        "prompts": args.prompts, "rounds": args.rounds,
        "spearman": round(rank, 4),
        "spearman_ci": [round(float(interval.low), 4), round(float(interval.high), 4)],
        "median_error": round(error, 4), "predicted": [round(p, 1) for p in predicted],
        "measured": [round(m, 1) for m in measured],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
