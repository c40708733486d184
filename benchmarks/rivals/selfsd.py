"""Self-SD (arXiv 2309.08168, section 3.2): Bayesian optimisation of really timed decoding.

As published: a Gaussian process over one value for each sublayer, 8 prompts x 32 tokens decoded once for an evaluation,
seconds a token as the objective, prefill inside, drafts of up to 12 tokens with an adaptive exit from 0.6 on.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import optuna

from skipsearch.compiled.backend import warm_plan
from skipsearch.evaluate.timing import our_arm
from skipsearch.mask import SkipMask
from skipsearch.policy import DraftPolicy

PROMPTS, TOKENS = 8, 32
POLICY = DraftPolicy(max_length=12, exit_threshold=0.6, adaptive=True)


def search(bench: Any, seed: int, evaluations: int) -> Iterator[tuple[int, SkipMask, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=10)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    ask = {name: optuna.distributions.IntDistribution(*b) for name, b in bench.space.bounds.items()}
    best, best_rate = SkipMask(num_layers=bench.space.num_layers), 0.0
    for count in range(1, evaluations + 1):
        trial = study.ask(ask)
        mask = bench.space.plan(trial.params).skip
        warm_plan(bench.target, mask)
        start, tokens = time.perf_counter(), 0
        for prompt in bench.prepared.trace.prompts[:PROMPTS]:
            tokens += len(our_arm(bench.target, mask, POLICY)(prompt, TOKENS).ids)
        rate = tokens / (time.perf_counter() - start)
        study.tell(trial, rate)
        if rate > best_rate:
            best, best_rate = mask, rate
        yield count, best, best_rate
