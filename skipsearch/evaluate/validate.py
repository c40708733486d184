"""Validation: ways to draft against plain decoding, really decoded and timed, on prompts that no search saw.

Promises equal tokens (checked), intervals, and a verdict that may be no. `timing` interleaves the arms; `looks` says
when enough prompts are timed.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skipsearch.compiled.backend import Progress
from skipsearch.decoding.rule import GREEDY, SelectionRule
from skipsearch.decoding.stats import DecodeStats
from skipsearch.evaluate.cost import set_up
from skipsearch.evaluate.energy import Energy, EnergyMeter, devices_of
from skipsearch.evaluate.looks import LAST_LOOK, LEAST, decides, look_after
from skipsearch.evaluate.prompt_row import Ids
from skipsearch.evaluate.prompts import fingerprint
from skipsearch.evaluate.timing import Interleaved, Run, Timing, our_arm
from skipsearch.evaluate.trace import DecodeSettings
from skipsearch.files import read_checked, write_checked
from skipsearch.maskfile import Evidence
from skipsearch.model.device import device_name
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan
from skipsearch.policy import DraftPolicy

PLAIN, MASK, PLAN, SERVED, NGRAMS = "plain", "mask", "plan", "served", "n-grams"
Plans = dict[str, tuple[DraftPlan | None, DraftPolicy]]  # by name of the arm: what drafts, and how


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """One way to draft against plain decoding on the same prompts; the interval is a 95 % one."""

    speedup: float
    speedup_ci: tuple[float, float]
    tokens_per_second: float
    stats: DecodeStats

    @property
    def pays(self) -> bool:
        return self.speedup_ci[0] > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was timed.

    Attributes:
        arms: by name: "mask" or "plan" (with its exit rule alone), "served" (with n-grams and fallback), "n-grams".
        prompts, tokens: that were decoded; fewer than there are if the timing ended early.
        greedy_equal: whether all arms gave the same tokens; None with sampling.
        decided: whether the intervals decided, or each prompt was timed once at least; else time was lacking.
        energy: of each arm and of plain decoding.
    """

    arms: dict[str, ArmResult]
    plain_tokens_per_second: float
    prompts: int
    tokens: int
    greedy_equal: bool | None
    decided: bool = True
    energy: dict[str, Energy] = field(default_factory=dict)


def arm_of(plan: DraftPlan) -> str:
    """The name of the arm that drafts with a plan alone."""
    return MASK if plan.only_skips else PLAN


class Validation:
    """Arms on held-out prompts.

    Args:
        plans: the arms beside plain decoding.
        path: where runs are kept, so that a validation that is stopped goes on; None keeps none.
        identity: of the model, for the runs that are kept.
    """

    def __init__(
        self, target: Target, prompts: tuple[Ids, ...], plans: Plans, settings: DecodeSettings,
        path: Path | None = None, identity: str = "",
    ) -> None:  # fmt: skip
        arms = {PLAIN: our_arm(target, rule=settings.rule)}
        arms |= {name: our_arm(target, plan, policy, settings.rule) for name, (plan, policy) in plans.items()}
        self.timing = Interleaved(dict(arms), prompts, settings, EnergyMeter(target.device, devices_of(target.model)))
        self.settings, self.path = settings, path
        what = hashlib.sha256(repr(plans).encode()).hexdigest()  # a plan may name many tokens
        key = [identity, fingerprint(prompts), what, repr(settings), set_up(target)]
        self.key = " | ".join(key)
        if path is not None:
            _read(path, self.key, self.timing)

    def run(self, progress: Progress, seconds: float = math.inf) -> Measured:
        """Time prompt after prompt until the intervals of all arms decide, or the seconds are spent."""
        timing, settings, prompts = self.timing, self.settings, len(self.timing.prompts)
        timing.warm_up()
        miss, decided, begin = LAST_LOOK, True, time.monotonic()
        seen: tuple[int | None, int | None] = None, None  # prompts and rounds that the interval is about
        steps = settings.rounds * prompts
        for step in range(steps):
            turn, i = divmod(step, prompts)
            timing.turn(turn, i)
            if self.path is not None:
                _write(self.path, self.key, timing)
            pace = (time.monotonic() - begin) / (step + 1)
            within = step + 1 + max(0.0, seconds - (time.monotonic() - begin)) / pace  # what the seconds suffice for
            progress("validate", step + 1, round(min(steps, max(LEAST, within))))
            look = look_after(i + 1, prompts) if turn == 0 and step + 1 < steps else None
            if look is not None and all(map(decides, self._intervals(look, i + 1, 1).values())):
                miss, seen = look, (i + 1, 1)
                break
            spent = time.monotonic() - begin
            if step + 1 >= LEAST and step + 1 < steps and spent * (1 + 1 / (step + 1)) > seconds:
                decided = step + 1 >= prompts  # then each prompt is timed, if only once
                break
        progress("validate", step + 1, step + 1)
        return self._measured(miss, decided, *seen)

    def _intervals(
        self, miss: float, prompts: int | None = None, rounds: int | None = None
    ) -> dict[str, tuple[float, float]]:
        """Of the arms, over the first so many prompts and rounds."""
        timed = self.timing.timings(prompts, rounds)
        plain = timed.pop(PLAIN)
        return {name: found.speedup_interval(plain, miss) for name, found in timed.items()}

    def _measured(self, miss: float, decided: bool, prompts: int | None, rounds: int | None) -> Measured:
        timed, intervals = self.timing.timings(prompts, rounds), self._intervals(miss, prompts, rounds)
        energy = {name: found.energy for name, found in timed.items()}
        plain = timed.pop(PLAIN)
        equal = None if self.settings.rule.temperature else all(found.ids() == plain.ids() for found in timed.values())
        return Measured(
            arms={name: _result(found, plain, intervals[name]) for name, found in timed.items()},
            plain_tokens_per_second=plain.tokens_per_second, prompts=len(plain.runs), tokens=plain.tokens,
            greedy_equal=equal, decided=decided, energy=energy,
        )  # fmt: skip


def _result(found: Timing, plain: Timing, interval: tuple[float, float]) -> ArmResult:
    return ArmResult(
        speedup=found.speedup_over(plain), speedup_ci=interval, tokens_per_second=found.tokens_per_second,
        stats=found.stats,
    )  # fmt: skip


def _write(path: Path, key: str, timing: Interleaved) -> None:
    """Keep all runs so far."""

    def row(run: Run) -> dict[str, Any]:
        counts = {name: list(getattr(run.stats, name).items()) for name in ("blocks", "accepted_from", "blocks_from")}
        return {**asdict(run), "stats": {**counts, "committed": run.stats.committed}}

    write_checked(path, {"key": key, "measured": {
        name: [[row(run) for run in runs] for runs in prompts] for name, prompts in timing.measured.items()
    }})  # fmt: skip


def _read(path: Path, key: str, timing: Interleaved) -> None:
    """Take over the runs of a validation of the same arms that was stopped."""

    def run(row: dict[str, Any]) -> Run:
        stats = row["stats"]
        blocks = Counter({(int(k), int(n)): count for (k, n), count in stats["blocks"]})
        accepted, begun = (Counter(dict(stats[name])) for name in ("accepted_from", "blocks_from"))
        counts = DecodeStats(
            blocks=blocks, committed=stats["committed"], accepted_from=accepted, blocks_from=begun
        )  # fmt: skip
        return Run(**{**row, "ids": tuple(row["ids"]), "stats": counts, "rejected": tuple(row.get("rejected", ()))})

    def take(data: dict[str, Any]) -> None:
        if data["key"] == key:
            found = {name: [[run(row) for row in runs] for runs in data["measured"][name]] for name in timing.measured}
            if all(len(prompts) == len(timing.prompts) for prompts in found.values()):
                timing.measured = found

    read_checked(path, take)


def evidence(
    target: Target, prompts: tuple[Ids, ...], measured: Measured, cost_ratio: float, arm: str = MASK,
    rule: SelectionRule = GREEDY,
) -> Evidence:  # fmt: skip
    """What goes into mask.json about an arm. The verdict is "use" only if the whole interval lies above 1."""
    found, served = measured.arms[arm], measured.arms.get(SERVED)
    energy, plain_energy = (measured.energy.get(name, Energy()) for name in (arm, PLAIN))
    return Evidence(
        acceptance_rate=round(found.stats.acceptance_rate, 4), tau=round(found.stats.tau, 4),
        cost_ratio=round(cost_ratio, 4), speedup=round(found.speedup, 4), speedup_ci=_rounded(found.speedup_ci),
        baseline="plain decoding in the same runtime",
        tokens_per_second=round(found.tokens_per_second, 2),
        baseline_tokens_per_second=round(measured.plain_tokens_per_second, 2), greedy_equal=measured.greedy_equal,
        backend=target.backend, dtype=str(target.dtype).removeprefix("torch."), device=device_name(target.device),
        prompts=measured.prompts, tokens=measured.tokens, prompts_sha256=fingerprint(prompts[: measured.prompts]),
        temperature=rule.temperature or None, decoding=str(rule),
        verdict="use" if found.pays else "do not use",
        joules_per_token=energy.per_token, baseline_joules_per_token=plain_energy.per_token,
        energy_reason=energy.unknown or plain_energy.unknown,
        served_speedup=round(served.speedup, 4) if served is not None and arm != NGRAMS else None,
        served_speedup_ci=_rounded(served.speedup_ci) if served is not None and arm != NGRAMS else None,
    )  # fmt: skip


def _rounded(interval: tuple[float, float]) -> tuple[float, float]:
    return round(interval[0], 4), round(min(interval[1], 1e6), 4)
