"""Validation: a mask against plain decoding, really decoded and timed, on prompts that no search saw.

Promises interleaved arms, warm-up, synchronisation, prefill left out of both arms alike, equal tokens,
an interval, and a verdict that may be no.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import bootstrap
from transformers import PreTrainedModel

from skipsearch.decoding.loop import decode
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats
from skipsearch.mask import SkipMask
from skipsearch.maskfile import Evidence
from skipsearch.model.sublayers import input_device
from skipsearch.search.cost import device_name, synchronize
from skipsearch.search.prompts import Ids, fingerprint
from skipsearch.search.trace import Progress, eos_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One prompt decoded once: seconds and tokens behind the prefill's, the tokens, the counts."""

    seconds: float
    tokens: int
    ids: tuple[int, ...]
    stats: DecodeStats


def timed_decode(
    model: PreTrainedModel, prompt: Ids, new_tokens: int, mask: SkipMask | None, policy: DraftPolicy | None,
    draft: PreTrainedModel | None = None, aligned: int = 0,
) -> Run:  # fmt: skip
    """Decode greedily; the clock starts when the prefill has given its token."""
    device = input_device(model)
    limit = len(prompt) + new_tokens
    stats = DecodeStats()
    sequences = Sequences(
        model, torch.tensor([prompt], device=device), capacity=limit, mask=mask, draft=draft, aligned=aligned
    )
    start = 0.0
    ids: list[int] = []
    for block in decode(sequences, max_length=limit, policy=policy, eos_ids=eos_ids(model), stats=stats):
        if not ids:
            synchronize(device)
            start = time.perf_counter()
        ids += block.tokens
    synchronize(device)
    seconds = time.perf_counter() - start
    return Run(seconds=seconds, tokens=len(ids) - 1, ids=tuple(ids), stats=stats)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Plain decoding and a mask on the same prompts, each the median of several rounds a prompt."""

    speedup: float
    speedup_ci: tuple[float, float]
    tokens_per_second: float
    plain_tokens_per_second: float
    greedy_equal: bool
    stats: DecodeStats
    tokens: int


def measure(
    model: PreTrainedModel, prompts: tuple[Ids, ...], mask: SkipMask | None, policy: DraftPolicy | None, *,
    new_tokens: int, rounds: int, seed: int, progress: Progress, draft: PreTrainedModel | None = None,
) -> Measured:  # fmt: skip
    """Time both arms prompt by prompt, in random order within each prompt and round.

    The interval is a 95 % percentile bootstrap over prompts, of the ratio of summed seconds.
    """
    rng = random.Random(seed)
    arms = {"plain": (None, None, None), "mask": (mask, policy, draft)}
    for arm in arms.values():  # warm-up: first calls choose kernels and fill caches
        timed_decode(model, prompts[0], min(16, new_tokens), *arm)
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in prompts] for name in arms}
    runs: dict[tuple[str, int], Run] = {}
    for turn in range(rounds):
        for i, prompt in enumerate(prompts):
            for name in rng.sample(sorted(arms), len(arms)):
                run = timed_decode(model, prompt, new_tokens, *arms[name])
                seconds[name][i].append(run.seconds)
                runs[name, i] = run
            progress("validate", turn * len(prompts) + i + 1, rounds * len(prompts))
    plain, masked = (np.array([statistics.median(s) for s in seconds[name]]) for name in ("plain", "mask"))
    stats = DecodeStats(blocks=Counter())
    for i in range(len(prompts)):
        stats.blocks += runs["mask", i].stats.blocks
        stats.committed += runs["mask", i].stats.committed
    tokens = {name: sum(runs[name, i].tokens for i in range(len(prompts))) for name in arms}
    return Measured(
        speedup=float(plain.sum() / masked.sum()), speedup_ci=interval(plain, masked, seed),
        tokens_per_second=tokens["mask"] / float(masked.sum()),
        plain_tokens_per_second=tokens["plain"] / float(plain.sum()),
        greedy_equal=all(runs["plain", i].ids == runs["mask", i].ids for i in range(len(prompts))),
        stats=stats, tokens=tokens["mask"],
    )  # fmt: skip


def interval(plain: np.ndarray, masked: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of sum(plain) / sum(masked), resampling prompts in pairs."""
    found = bootstrap(
        (plain, masked), lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis), paired=True,
        method="percentile", n_resamples=2000, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def evidence(model: PreTrainedModel, prompts: tuple[Ids, ...], measured: Measured, cost_ratio: float) -> Evidence:
    """What goes into mask.json. The verdict is "use" only if the whole interval lies above 1."""
    low, high = measured.speedup_ci
    return Evidence(
        acceptance_rate=round(measured.stats.acceptance_rate, 4), tau=round(measured.stats.tau, 4),
        cost_ratio=round(cost_ratio, 4), speedup=round(measured.speedup, 4),
        speedup_ci=(round(low, 4), round(high, 4)), baseline="plain decoding in the same runtime",
        tokens_per_second=round(measured.tokens_per_second, 2),
        baseline_tokens_per_second=round(measured.plain_tokens_per_second, 2), greedy_equal=measured.greedy_equal,
        backend="eager", dtype=str(model.dtype).removeprefix("torch."), device=device_name(input_device(model)),
        prompts=len(prompts), tokens=measured.tokens, prompts_sha256=fingerprint(prompts),
        verdict="use" if low > 1.0 else "do not use",
    )  # fmt: skip
