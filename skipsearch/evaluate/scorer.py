"""Scorer: scores the plans of trials, each on as much of the trace as its rank needs."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from scipy.stats import spearmanr

from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.objective import Fidelity, Score, estimate, score
from skipsearch.evaluate.windows import WindowReplay, Windows
from skipsearch.plan import DraftPlan

AGREEMENT = 0.9  # rank correlation with whole scores from which a stage may give up
CHECK_FIRST, CHECKED = 12, 15  # plans that are scored whole in any case: the first ones, and then one in so many
ENOUGH_TRIALS, LEAST_SHARE = 50, 0.25  # trials that a budget should suffice for; the least share of the trace
PACE_SHARE = 0.1  # of the trace, to find out how long a trial takes
# Shares of each prompt's windows, and the share of the best below which a plan is given up then.
STAGES: tuple[tuple[Fidelity, float, float], ...] = (("first", 0.2, 0.92), ("part", 0.5, 0.975))


class Scorer:
    """Scores trials, on as much of the trace as each deserves.

    There are stages: a stretch of each continuation, a longer one, all of it. A plan that is far behind the best at a
    stage is given up there, and its score is scaled to the whole. Plans near the best are scored whole, so that none is
    best by luck. A stage gives up plans only while its scores rank them as whole scores do. This is measured on the
    first plans and then on one in `CHECKED`: those are scored whole in any case.

    Args:
        windows: of the calibration prompts.
        point: costs.
        front: score for a front of acceptance rate and cost ratio: no plan is given up, and both figures are those of
            drafts of one fixed length, so that they can be compared.
        share: of the trace's windows, which count as the whole.
        known: stages of the plans that an interrupted search has scored, in order, so that it goes on as if it had not
            been interrupted.

    Attributes:
        checked: of plans scored whole in any case, tokens per second at every stage, the whole last.
        best: stages of the best plan, likewise; empty before there is one.
    """

    def __init__(
        self, windows: Windows, point: Point, front: bool = False, share: float = 1.0,
        known: Sequence[tuple[float, ...]] = (),
    ) -> None:  # fmt: skip
        self.windows, self.point, self.front = windows, point, front
        self.parts = [windows.part(share * part) for _, part, _ in STAGES]
        self.whole = windows.part(share)
        self.checked: list[tuple[float, ...]] = []
        self.best: tuple[float, ...] = ()
        self.counts = Counter[str]()
        for stages in known:
            self._learn(stages)

    def agreement(self, stage: int) -> float:
        """Spearman's rank correlation of a stage's scores with whole ones; 0 before there are enough."""
        if len(self.checked) < CHECK_FIRST:
            return 0.0
        early, whole = [row[stage] for row in self.checked], [row[-1] for row in self.checked]
        return float(spearmanr(early, whole).statistic) if min(len(set(early)), len(set(whole))) > 2 else 0.0

    def __call__(self, plan: DraftPlan) -> Score:
        found = self._score(plan)
        self._learn(found.stages)
        return found

    @property
    def _check(self) -> bool:
        """Whether the next plan is scored whole in any case."""
        done = self.counts.total()
        return done < CHECK_FIRST or done % CHECKED == 0

    def _learn(self, stages: tuple[float, ...]) -> None:
        """Take a plan's stages into account; those of a plan scored whole end with the whole."""
        whole = len(stages) in (0, len(STAGES) + 1)
        if stages and whole:
            if self._check:
                self.checked.append(stages)
            self.best = max(self.best, stages, key=lambda known: known[-1:])
        self.counts["whole" if whole else STAGES[len(stages) - 1][0]] += 1

    def _score(self, plan: DraftPlan) -> Score:
        drafts, best = WindowReplay(self.windows, plan), self.best
        if self.front:
            found = score(drafts, self.point, self.whole)
            lengths = [self.windows.replay.max_length]
            fixed = estimate(drafts.outcomes(self.whole), plan, self.point, lengths, [None])
            return replace(found, acceptance_rate=fixed.acceptance_rate, cost_ratio=fixed.cost_ratio)
        check, stages = self._check, list[float]()
        for number, (fidelity, _, near) in enumerate(STAGES):
            found = score(drafts, self.point, self.parts[number])
            stages.append(found.tokens_per_second)
            behind = bool(best) and stages[-1] < near * best[number]
            if behind and not check and self.agreement(number) >= AGREEMENT:
                # Never above what it was given up for, however lucky the best was at this stage.
                scale = min(near * best[-1] / stages[-1], self._scale(number))
                return replace(_scaled(found, scale, fidelity), stages=tuple(stages))
        whole = score(drafts, self.point, self.whole)
        return replace(whole, stages=(*stages, whole.tokens_per_second))

    def _scale(self, stage: int) -> float:
        """The median ratio of whole scores to those of a stage."""
        return statistics.median(row[-1] / row[stage] for row in self.checked)


def _scaled(found: Score, scale: float, fidelity: Fidelity) -> Score:
    return replace(
        found, tokens_per_second=scale * found.tokens_per_second, speedup=scale * found.speedup, fidelity=fidelity
    )  # fmt: skip


def affordable_share(windows: Windows, dearest: DraftPlan, seconds: float) -> float:
    """The share of the trace that trials are scored on, so that some tens of them fit into the seconds.

    Args:
        dearest: a plan that takes as long as any.
    """
    if not math.isfinite(seconds):
        return 1.0
    begin = time.monotonic()
    WindowReplay(windows, dearest).outcomes(windows.part(PACE_SHARE))
    whole = (time.monotonic() - begin) / PACE_SHARE
    return min(1.0, max(LEAST_SHARE, round(seconds / (ENOUGH_TRIALS * whole), 2)))
