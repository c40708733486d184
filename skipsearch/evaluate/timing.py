"""Timing: ways to decode as arms, timed side by side on the same prompts.

Promises interleaved arms, warm-up, synchronised clocks, and the prefill left out of all arms alike.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from skipsearch.compiled.backend import Progress
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.rule import GREEDY, SelectionRule
from skipsearch.decoding.scheduler import Scheduler
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats, Trail
from skipsearch.decoding.tuner import Tuner
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.energy import Energy, EnergyMeter
from skipsearch.evaluate.looks import interval, ratio_interval
from skipsearch.evaluate.prompt_row import Ids
from skipsearch.evaluate.trace import DecodeSettings
from skipsearch.mask import SkipMask
from skipsearch.model.device import synchronize
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan
from skipsearch.policy import DraftPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One prompt decoded once.

    Attributes:
        seconds, tokens: of decoding, behind the prefill and the tokens that came with it.
        prefill: seconds before that.
        ids: all new tokens.
        stats: raw counts, where the decoder keeps them.
        marks, rejected: see `Trail`; empty where the decoder keeps none.
        joules: of the prefill and the tokens, where there is a counter.
    """

    seconds: float
    tokens: int
    prefill: float
    ids: tuple[int, ...]
    stats: DecodeStats
    marks: str = ""
    rejected: tuple[int, ...] = ()
    joules: float | None = None


Arm = Callable[[Ids, int], Run]


@dataclass(slots=True, kw_only=True)
class OurArm:
    """Our own decoding as an arm: call it with a prompt and the number of new tokens.

    Attributes:
        target: decides the output.
        draft: the draft view; None decodes plainly.
        policy: how to draft.
        scheduler: estimates that go on from prompt to prompt, as they do for a served model.
        rule: how tokens are chosen.
        tuner: chooses in place of `policy` and `scheduler`.
        aligned: see `Batch`.
    """

    target: Target
    draft: PreTrainedModel | None = None
    policy: DraftPolicy | None = None
    scheduler: Scheduler = field(default_factory=Scheduler)
    rule: SelectionRule = GREEDY
    tuner: Tuner | None = None
    aligned: int = 0

    def __call__(self, prompt: Ids, new_tokens: int) -> Run:
        """Decode. The clock starts when the prefill has given its token."""
        target = self.target
        ending = Ending(max_length=len(prompt) + new_tokens, eos_ids=target.eos_ids)
        stats, ids, start = DecodeStats(), list[int](), 0.0
        synchronize(target.device)
        begin = time.perf_counter()
        prompt_ids = target.ids(prompt)
        sequences = Sequences(
            target, prompt_ids, capacity=ending.max_length, draft=self.draft, aligned=self.aligned,
            selection=self.rule.selection(target.model, prompt_ids, new_tokens, len(prompt)),
        )  # fmt: skip
        for block in decode(
            sequences, ending, policy=self.policy, stats=stats, scheduler=self.scheduler, tuner=self.tuner,
            temperature=self.rule.temperature,
        ):  # fmt: skip
            if not ids:
                synchronize(target.device)
                start = time.perf_counter()
            ids += block.tokens
        synchronize(target.device)
        seconds, trail = time.perf_counter() - start, stats.trails.get(0, Trail())
        return Run(
            seconds=seconds, tokens=len(ids) - 1, prefill=start - begin, ids=tuple(ids), marks=trail.marks,
            rejected=tuple(trail.rejected), stats=replace(stats, trails={}),
        )  # fmt: skip


def our_arm(
    target: Target, plan: SkipMask | DraftPlan | None = None, policy: DraftPolicy | None = None,
    rule: SelectionRule = GREEDY,
) -> OurArm:  # fmt: skip
    """The arm that drafts with a plan; without one, plain decoding."""
    draft = None if plan is None else draft_view(target.model, plan)
    scheduler = Scheduler(() if policy is None else policy.costs)
    return OurArm(target=target, draft=draft, policy=policy, scheduler=scheduler, rule=rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """An arm's runs over all prompts.

    Attributes:
        seconds: of each prompt, the median of its rounds.
        prefill: likewise.
        runs: the last one of each prompt.
        energy: of all rounds.
    """

    seconds: np.ndarray
    prefill: np.ndarray
    runs: tuple[Run, ...]
    energy: Energy = field(default_factory=Energy)

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
        return self.speedup_over(baseline), interval(*self._seconds_for_same_tokens(baseline), seed)

    def speedup_over(self, baseline: Timing) -> float:
        """Tokens per second over those of another arm."""
        other, mine = self._seconds_for_same_tokens(baseline)
        return float(other.sum() / mine.sum())

    def speedup_interval(self, baseline: Timing, miss: float) -> tuple[float, float]:
        """An interval that misses the true speed-up with this chance; see `looks.ratio_interval`."""
        return ratio_interval(*self._seconds_for_same_tokens(baseline), miss)

    def _seconds_for_same_tokens(self, baseline: Timing) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the other arm and of this one for the other's tokens of each prompt: sampled texts differ."""
        weights = np.array([max(1, run.tokens) for run in baseline.runs])
        mine, other = (t.seconds / np.array([max(1, r.tokens) for r in t.runs]) * weights for t in (self, baseline))
        return other, mine


class Interleaved:
    """Arms timed prompt by prompt, in random order within each prompt and round.

    Args:
        meter: read before and after each run; None measures no energy.

    Attributes:
        measured: of each arm, runs of each prompt, one a round.
    """

    def __init__(
        self, arms: dict[str, Arm], prompts: Sequence[Ids], settings: DecodeSettings, meter: EnergyMeter | None = None
    ) -> None:
        self.arms, self.prompts, self.settings, self.meter = arms, prompts, settings, meter
        self.measured: dict[str, list[list[Run]]] = {name: [[] for _ in prompts] for name in arms}

    def warm_up(self) -> None:
        """First calls choose kernels and fill caches."""
        for arm in self.arms.values():
            arm(self.prompts[0], min(16, self.settings.new_tokens))

    def turn(self, round_: int, i: int) -> None:
        """Run every arm on prompt i; a round that is known already is not repeated."""
        rng = random.Random(f"{self.settings.seed} {round_} {i}")
        if torch.cuda.is_available() and not any(runs[i] for runs in self.measured.values()):
            for arm in self.arms.values():  # on a GPU each length captures graphs
                arm(self.prompts[i], self.settings.new_tokens)
        for name in rng.sample(sorted(self.arms), len(self.arms)):
            if len(self.measured[name][i]) <= round_:
                self.measured[name][i].append(self._run(name, i))

    def _run(self, name: str, i: int) -> Run:
        before = None if self.meter is None else self.meter.joules()
        run = self.arms[name](self.prompts[i], self.settings.new_tokens)
        after = None if self.meter is None else self.meter.joules()
        return run if before is None or after is None else replace(run, joules=after - before)

    def timings(self, prompts: int | None = None, rounds: int | None = None) -> dict[str, Timing]:
        """Of the prompts that every arm has run; of the first so many, and of so many of their rounds."""
        done = [i for i in range(len(self.prompts))[:prompts] if all(runs[i] for runs in self.measured.values())]
        reason = "not measured" if self.meter is None else self.meter.reason
        return {
            name: Timing(
                seconds=np.array([statistics.median(run.seconds for run in runs[i][:rounds]) for i in done]),
                prefill=np.array([statistics.median(run.prefill for run in runs[i][:rounds]) for i in done]),
                runs=tuple(runs[i][:rounds][-1] for i in done),
                energy=Energy.of(
                    ((r.joules, r.prefill + r.seconds, len(r.ids)) for i in done for r in runs[i][:rounds]), reason
                ),
            )
            for name, runs in self.measured.items()
        }


def time_interleaved(
    arms: dict[str, Arm], prompts: Sequence[Ids], settings: DecodeSettings, progress: Progress, stage: str,
    meter: EnergyMeter | None = None,
) -> dict[str, Timing]:  # fmt: skip
    """Time arms on every prompt and in every round, after a warm-up of each."""
    timing = Interleaved(arms, prompts, settings, meter)
    timing.warm_up()
    for turn in range(settings.rounds):
        for i in range(len(prompts)):
            timing.turn(turn, i)
            progress(stage, turn * len(prompts) + i + 1, settings.rounds * len(prompts))
    return timing.timings()
