"""Scorer: scores the masks of trials, each on as much of the trace as its rank needs."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace

from scipy.stats import spearmanr

from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.mask_replay import MaskReplay
from skipsearch.evaluate.objective import Fidelity, Score, estimate_drafts, throughput
from skipsearch.evaluate.replay import Replay
from skipsearch.mask import SkipMask
from skipsearch.policy import DraftPolicy

AGREEMENT = 0.9  # rank correlation with whole scores from which a stage may give up
CHECK_FIRST, CHECKED = 20, 15  # masks that are scored whole in any case: the first ones, and then one in so many
FAR_BEHIND = 0.92  # of the best
LEAST = 0.25  # of the segments; fewer are left unfinished, since small passes cost more a draft
# Segments scored of each prompt, and the share of the best below which a mask is given up then.
PARTS = ((2, 0.97), (3, 0.985))


class Scorer:
    """Scores trials, on as much of the trace as each deserves.

    There are stages: the first tokens of a sample of the trace, the sample, more of it, all of it. A mask that is far
    behind the best at a stage is given up there, and its score is scaled to the whole. Masks near the best are scored
    whole, so that none is best by luck. A stage gives up masks only while its scores rank them as whole scores do. This
    is measured on the first masks and then on one in `CHECKED`: those are scored whole in any case.

    Args:
        replay: of the calibration prompts, in several segments.
        point: costs.
        first: tokens of each segment that the first stage scores.
        front: score for a front of acceptance rate and cost ratio: no mask is given up, and both figures are those of
            drafts of one fixed length, so that they can be compared.

    Attributes:
        checked: of masks scored whole in any case, tokens per second at every stage, the whole last.
    """

    def __init__(self, replay: Replay, point: Point, first: int = 6, front: bool = False) -> None:
        self.replay, self.point, self.first, self.front = replay, point, first, front
        self.samples = [replay.sample(segments) for segments, _ in PARTS]
        self.checked: list[tuple[float, ...]] = []
        self.best: Score | None = None
        self.best_stages: list[float] = []  # its tokens per second at each of them
        self.counts = Counter[str]()

    def agreement(self, stage: int) -> float:
        """Spearman's rank correlation of a stage's scores with whole ones; 0 before there are enough."""
        if len(self.checked) < CHECK_FIRST:
            return 0.0
        early, whole = [row[stage] for row in self.checked], [row[-1] for row in self.checked]
        return float(spearmanr(early, whole).statistic) if min(len(set(early)), len(set(whole))) > 2 else 0.0

    def __call__(self, mask: SkipMask) -> Score:
        found = self._score(mask)
        self.counts[found.fidelity] += 1
        return found

    def _score(self, mask: SkipMask) -> Score:
        drafts, best = MaskReplay(self.replay, mask), self.best
        longest = DraftPolicy(max_length=self.replay.max_length)
        if self.front:
            fixed = throughput(drafts.walk(longest), mask, longest, self.point)
            return replace(
                estimate_drafts(drafts, self.point), acceptance_rate=fixed.acceptance_rate, cost_ratio=fixed.cost_ratio
            )
        done = self.counts.total()
        check = done < CHECK_FIRST or done % CHECKED == 0
        stages: list[float] = []
        for number, near in enumerate((FAR_BEHIND, *(near for _, near in PARTS))):
            if number == 0:
                found = throughput(drafts.walk(longest, self.first, self.samples[0], LEAST), mask, longest, self.point)
            else:
                drafts.walk(longest, None, self.samples[number - 1], LEAST)
                found = estimate_drafts(drafts, self.point, self.samples[number - 1])
            stages.append(found.tokens_per_second)
            behind = best is not None and stages[-1] < near * self.best_stages[number]
            if behind and not check and self.agreement(number) >= AGREEMENT:
                assert best is not None
                # Never above what it was given up for, however lucky the best was at this stage.
                scale = min(near * best.tokens_per_second / stages[-1], self._scale(number))
                return _scaled(found, scale, "first" if number == 0 else "part")
        drafts.walk(longest, None, None, LEAST)
        whole = estimate_drafts(drafts, self.point)
        if check:
            self.checked.append((*stages, whole.tokens_per_second))
        if best is None or whole.tokens_per_second > best.tokens_per_second:
            self.best, self.best_stages = whole, stages
        return whole

    def _scale(self, stage: int) -> float:
        """The median ratio of whole scores to those of a stage."""
        return statistics.median(row[-1] / row[stage] for row in self.checked)


def _scaled(found: Score, scale: float, fidelity: Fidelity) -> Score:
    return replace(
        found, tokens_per_second=scale * found.tokens_per_second, speedup=scale * found.speedup, fidelity=fidelity
    )  # fmt: skip
