"""Validation: a mask against plain decoding, really decoded and timed, on prompts that no search saw.

Promises interleaved arms, warm-up, synchronisation, prefill left out of both arms alike, equal tokens,
an interval, and a verdict that may be no.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import bootstrap
from transformers import PreTrainedModel

from skipsearch.compiled.model import CompiledModel
from skipsearch.decoding.loop import decode
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.processors import at_temperature
from skipsearch.decoding.scheduler import Pace
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats
from skipsearch.decoding.tuner import Tuner
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.cost import device_name
from skipsearch.evaluate.profile import synchronize
from skipsearch.evaluate.prompts import Ids, fingerprint
from skipsearch.evaluate.trace import Progress, eos_ids
from skipsearch.mask import SkipMask
from skipsearch.maskfile import Evidence
from skipsearch.model.sublayers import input_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One prompt decoded once.

    Attributes:
        seconds, tokens: of decoding, behind the prefill and the tokens that came with it.
        prefill: seconds before that.
        ids: all new tokens.
        stats: raw counts, where the decoder keeps them.
    """

    seconds: float
    tokens: int
    prefill: float
    ids: tuple[int, ...]
    stats: DecodeStats


Arm = Callable[[Ids, int], Run]


def timed_decode(
    model: PreTrainedModel, prompt: Ids, new_tokens: int, mask: SkipMask | None, policy: DraftPolicy | None,
    draft: PreTrainedModel | None = None, aligned: int = 0, compiled: CompiledModel | None = None,
    pace: Pace | None = None, temperature: float = 0.0, tuner: Tuner | None = None,
) -> Run:  # fmt: skip
    """Decode, greedily or sampling; the clock starts when the prefill has given its token."""
    device = input_device(model)
    limit = len(prompt) + new_tokens
    stats = DecodeStats()
    synchronize(device)
    begin = time.perf_counter()
    sequences = Sequences(
        model, torch.tensor([prompt], device=device), capacity=limit, mask=mask, draft=draft, aligned=aligned,
        compiled=compiled, **at_temperature(temperature, len(prompt), device),
    )  # fmt: skip
    start = 0.0
    ids: list[int] = []
    for block in decode(
        sequences, max_length=limit, policy=policy, eos_ids=eos_ids(model), stats=stats, pace=pace, tuner=tuner,
        temperature=temperature,
    ):  # fmt: skip
        if not ids:
            synchronize(device)
            start = time.perf_counter()
        ids += block.tokens
    synchronize(device)
    seconds = time.perf_counter() - start
    return Run(seconds=seconds, tokens=len(ids) - 1, prefill=start - begin, ids=tuple(ids), stats=stats)


def our_arm(
    model: PreTrainedModel, mask: SkipMask | None = None, policy: DraftPolicy | None = None,
    compiled: CompiledModel | None = None, temperature: float = 0.0,
) -> Arm:  # fmt: skip
    """Our own decoding as an arm. Its estimates go on from prompt to prompt, as those of a served model do."""
    draft = None if mask is None else draft_view(model, mask)
    pace = Pace() if policy is None else Pace(policy.costs)
    return lambda prompt, new_tokens: timed_decode(
        model, prompt, new_tokens, mask, policy, draft, compiled=compiled, pace=pace, temperature=temperature
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """An arm's runs over all prompts.

    Attributes:
        seconds: of each prompt, the median of its rounds.
        prefill: likewise.
        runs: the last one of each prompt.
    """

    seconds: np.ndarray
    prefill: np.ndarray
    runs: tuple[Run, ...]

    @property
    def tokens(self) -> int:
        return sum(run.tokens for run in self.runs)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / float(self.seconds.sum())

    @property
    def stats(self) -> DecodeStats:
        total = DecodeStats()
        for run in self.runs:
            total.add(run.stats)
        return total

    def ids(self) -> list[tuple[int, ...]]:
        """The new tokens of each prompt."""
        return [run.ids for run in self.runs]

    def speedup(self, baseline: Timing, seed: int = 0) -> tuple[float, tuple[float, float]]:
        """Tokens per second over those of another arm, with a 95 % interval (percentile bootstrap over prompts)."""
        mine, other = (t.seconds / np.array([max(1, r.tokens) for r in t.runs]) for t in (self, baseline))
        weights = np.array([max(1, run.tokens) for run in baseline.runs])
        return float((other * weights).sum() / (mine * weights).sum()), interval(other * weights, mine * weights, seed)


def race(
    arms: dict[str, Arm], prompts: Sequence[Ids], *, new_tokens: int, rounds: int, seed: int, progress: Progress,
    stage: str = "validate",
) -> dict[str, Timing]:  # fmt: skip
    """Time arms prompt by prompt, in random order within each prompt and round, after a warm-up of each."""
    rng = random.Random(seed)
    for arm in arms.values():  # first calls choose kernels and fill caches; on a GPU each length captures graphs
        if torch.cuda.is_available():
            for prompt in prompts:
                arm(prompt, new_tokens)
        arm(prompts[0], min(16, new_tokens))
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in prompts] for name in arms}
    prefill: dict[str, list[list[float]]] = {name: [[] for _ in prompts] for name in arms}
    runs: dict[tuple[str, int], Run] = {}
    for turn in range(rounds):
        for i, prompt in enumerate(prompts):
            for name in rng.sample(sorted(arms), len(arms)):
                run = arms[name](prompt, new_tokens)
                seconds[name][i].append(run.seconds)
                prefill[name][i].append(run.prefill)
                runs[name, i] = run
            progress(stage, turn * len(prompts) + i + 1, rounds * len(prompts))
    return {
        name: Timing(
            seconds=np.array([statistics.median(s) for s in seconds[name]]),
            prefill=np.array([statistics.median(s) for s in prefill[name]]),
            runs=tuple(runs[name, i] for i in range(len(prompts))),
        )
        for name in arms
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Plain decoding, the mask with its policy alone, and as it is served, on the same prompts.

    Attributes:
        served, served_ci: speed-up with n-grams and fallback to plain steps; None if that is not asked for.
    """

    speedup: float
    speedup_ci: tuple[float, float]
    tokens_per_second: float
    plain_tokens_per_second: float
    greedy_equal: bool | None
    stats: DecodeStats
    tokens: int
    served: float | None = None
    served_ci: tuple[float, float] | None = None


def measure(
    model: PreTrainedModel, prompts: tuple[Ids, ...], mask: SkipMask | None, policy: DraftPolicy | None, *,
    new_tokens: int, rounds: int, seed: int, progress: Progress, compiled: CompiledModel | None = None,
    served: DraftPolicy | None = None, temperature: float = 0.0,
) -> Measured:  # fmt: skip
    """Time plain decoding, the mask with `policy`, and with the policy `served` if there is one."""
    arms = {
        "plain": our_arm(model, compiled=compiled, temperature=temperature),
        "mask": our_arm(model, mask, policy, compiled, temperature),
    }
    if served is not None:
        arms["served"] = our_arm(model, mask, served, compiled, temperature)
    timed = race(arms, prompts, new_tokens=new_tokens, rounds=rounds, seed=seed, progress=progress)
    plain, masked = timed["plain"], timed["mask"]
    speedup, low_high = masked.speedup(plain, seed)
    as_served = timed["served"].speedup(plain, seed) if served is not None else (None, None)
    return Measured(
        speedup=speedup, speedup_ci=low_high, tokens_per_second=masked.tokens_per_second,
        plain_tokens_per_second=plain.tokens_per_second,
        greedy_equal=None if temperature else all(timing.ids() == plain.ids() for timing in timed.values()),
        stats=masked.stats, tokens=masked.tokens, served=as_served[0], served_ci=as_served[1],
    )  # fmt: skip


def interval(plain: np.ndarray, masked: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of sum(plain) / sum(masked), resampling prompts in pairs."""
    found = bootstrap(
        (plain, masked), lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis), paired=True,
        method="percentile", n_resamples=2000, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def evidence(
    model: PreTrainedModel, prompts: tuple[Ids, ...], measured: Measured, cost_ratio: float, backend: str,
    temperature: float = 0.0,
) -> Evidence:  # fmt: skip
    """What goes into mask.json. The verdict is "use" only if the whole interval lies above 1."""
    low, high = measured.speedup_ci
    return Evidence(
        acceptance_rate=round(measured.stats.acceptance_rate, 4), tau=round(measured.stats.tau, 4),
        cost_ratio=round(cost_ratio, 4), speedup=round(measured.speedup, 4),
        speedup_ci=(round(low, 4), round(high, 4)), baseline="plain decoding in the same runtime",
        tokens_per_second=round(measured.tokens_per_second, 2),
        baseline_tokens_per_second=round(measured.plain_tokens_per_second, 2), greedy_equal=measured.greedy_equal,
        backend=backend, dtype=str(model.dtype).removeprefix("torch."), device=device_name(input_device(model)),
        prompts=len(prompts), tokens=measured.tokens, prompts_sha256=fingerprint(prompts),
        temperature=temperature or None,
        verdict="use" if low > 1.0 else "do not use", served_speedup=measured.served and round(measured.served, 4),
        served_speedup_ci=measured.served_ci and (round(measured.served_ci[0], 4), round(measured.served_ci[1], 4)),
    )  # fmt: skip
