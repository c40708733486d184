"""The objective: tokens per second, from replay's counts and the cost model's seconds. They meet here alone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

from skipsearch.decoding.policy import DraftPolicy
from skipsearch.evaluate.cost import Point, draft_step
from skipsearch.evaluate.mask_replay import Lane, MaskReplay, Outlook
from skipsearch.evaluate.replay import Replay
from skipsearch.mask import SkipMask

Array = NDArray[Any]

BINS = 16  # of the confidence, in a calibrated exit
AGREEMENT = 0.9  # rank correlation with whole scores from which a stage may give up
CHECK_FIRST, CHECKED = 20, 15  # masks that are scored whole in any case: the first ones, and then one in so many
FAR_BEHIND = 0.92  # of the best
LEAST = 0.25  # of the lanes; fewer are left unfinished, since small passes are dear
PARTS = ((2, 0.97), (3, 0.985))  # so many lanes of a prompt are looked at, and given up below this share of the best
TRIED = (1, 2, 3, 4, 6)  # lengths, in trials
THRESHOLDS = (None, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85)

Fidelity = Literal["first", "part", "whole"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a mask is worth with its best policy, predicted.

    Attributes:
        tokens_per_second, speedup: the latter against plain decoding in the same runtime.
        acceptance_rate: accepted / drafted.
        tau: tokens committed a verify.
        cost_ratio: c, seconds of a draft step over those of a plain step; no speed-up exceeds 1/c.
        fidelity: how much of the trace was looked at; scores of parts are scaled.
    """

    mask: SkipMask
    policy: DraftPolicy
    tokens_per_second: float
    speedup: float
    acceptance_rate: float
    tau: float
    cost_ratio: float
    fidelity: Fidelity = "whole"


def join(blocks: Counter[tuple[int, int]], mask: SkipMask, policy: DraftPolicy, point: Point) -> Score:
    """Tokens over seconds: sum of (n + 1) over sum of (k draft steps, what begins them, a verify of k), all blocks."""
    step = draft_step(point, mask, policy.asks)
    verifies = sum(blocks.values())
    drafted = sum(k * count for (k, _), count in blocks.items())
    accepted = sum(n * count for (_, n), count in blocks.items())
    begun = sum(count for (k, _), count in blocks.items() if k)
    seconds = (drafted + point.first * begun) * step + sum(point.verify[k] * n for (k, _), n in blocks.items())
    speed = (accepted + verifies) / seconds if seconds else 1 / point.verify[0]
    return Score(
        mask=mask, policy=policy, tokens_per_second=speed, speedup=speed * point.verify[0],
        acceptance_rate=accepted / drafted if drafted else 0.0, tau=accepted / verifies + 1 if verifies else 1.0,
        cost_ratio=step / point.verify[0],
    )  # fmt: skip


def score(replay: Replay, mask: SkipMask, point: Point, *, thorough: bool = False) -> Score:
    """The best policy for a mask and what it reaches.

    A walk with the longest drafts shows where the mask is right and how sure it is; arithmetic on that ranks fixed
    drafts and thresholds. A trial takes the estimate of the best. Thorough scoring walks it exactly, and the calibrated
    exit, and the adaptive threshold from where the best one stands.
    """
    drafts = replay.of(mask)
    longest = DraftPolicy(max_length=replay.max_length)
    known = {longest: join(drafts.walk(longest), mask, longest, point)}
    best = _estimate(drafts, point, neighbours=thorough)
    if not thorough:
        return best
    policies = {best.policy, calibrated(drafts, best.tokens_per_second, point), *_adaptive(best.policy)}
    for policy in policies - known.keys():
        known[policy] = join(drafts.walk(policy), mask, policy, point)
    return max(known.values(), key=lambda s: s.tokens_per_second)


def _estimate(
    drafts: MaskReplay, point: Point, lanes: Sequence[Lane] | None = None, neighbours: bool = False
) -> Score:  # fmt: skip
    """The best policy and what it would reach, by arithmetic on the drafts run so far."""
    longest = drafts.replay.max_length
    # Trials cannot tell neighbouring policies apart, and foresee longer drafts than they run.
    lengths = [k for k in (range(1, longest + 1) if neighbours else TRIED) if k < len(point.verify)]
    thresholds = THRESHOLDS if neighbours else THRESHOLDS[::2]
    return foreseen(drafts.outlook(lanes), drafts.mask, point, lengths, thresholds)


def foreseen(
    outlook: Outlook, mask: SkipMask, point: Point, lengths: Sequence[int],
    thresholds: Sequence[float | None] = THRESHOLDS[::2],
) -> Score:  # fmt: skip
    """The best policy of those and what it would reach, if all depended on the position alone."""
    counts = _counts(outlook, np.array(lengths), np.array([threshold or 0.0 for threshold in thresholds]))
    scores = []
    for i, j in itertools.product(range(len(thresholds)), range(len(lengths))):
        blocks = Counter({(int(k), int(n)): int(counts[i, j, k, n]) for k, n in np.argwhere(counts[i, j])})
        scores.append(join(blocks, mask, DraftPolicy(max_length=lengths[j], exit_threshold=thresholds[i]), point))
    return max(scores, key=lambda s: s.tokens_per_second)


def _counts(outlook: Outlook, lengths_K: Array, thresholds_T: Array) -> Array:
    """Blocks [T, K, k, n] of drafted and accepted tokens, of each threshold with each length; all walk at once."""
    sizes_L, begins_L = np.array([(len(right), begins) for right, _, begins in outlook]).T
    wrong_LS, sure_LS = np.zeros((len(outlook), sizes_L.max()), dtype=bool), np.ones((len(outlook), sizes_L.max()))
    for i, (right, sure, _) in enumerate(outlook):
        wrong_LS[i, : len(right)], sure_LS[i, : len(sure)] = np.logical_not(right), sure

    def following(flags_LS: Array) -> Array:
        """Where the next one stands, from each position on; the lane's size if there is none."""
        places = np.where(flags_LS, np.arange(sizes_L.max()), sizes_L[:, None])
        return np.asarray(np.minimum.accumulate(places[..., ::-1], axis=-1)[..., ::-1])

    wrong_LS, unsure_TLS = following(wrong_LS), following(sure_LS < thresholds_T[:, None, None])
    at_TKL = np.zeros((len(thresholds_T), len(lengths_K), len(outlook)), dtype=int)
    most = lengths_K.max() + 1
    counts = np.zeros((*at_TKL.shape[:2], most, most), dtype=int)
    while (walking := np.nonzero(at_TKL < begins_L))[0].size:
        t, k, lane = walking
        at = at_TKL[walking]
        drafted = np.minimum(np.minimum(lengths_K[k], sizes_L[lane] - at - 1), unsure_TLS[t, lane, at] - at + 1)
        accepted = np.minimum(drafted, wrong_LS[lane, at] - at)
        np.add.at(counts, (t, k, drafted, accepted), 1)
        at_TKL[walking] = at + accepted + 1
    return counts


class Scorer:
    """Scores trials, on as much of the trace as each deserves.

    Stages: the first tokens of a sample of the trace, the sample, more of it, all of it. A mask that is far behind the
    best at a stage is given up there, and its score scaled to the whole; those near the best are looked at whole, so
    that nothing is best by luck. A stage may give up only while its scores rank as the whole ones do, which is measured
    on the first masks and on one in `CHECKED` after them: those are scored whole, whatever the stages say.

    Args:
        replay: of the calibration prompts, in several lanes.
        point: costs.
        first: tokens of each lane after which to look.
        front: the acceptance rate and the cost ratio are what counts: nothing is given up, and both are those of
            drafts of one fixed length, so that they can be compared.

    Attributes:
        checked: of masks scored whole in any case, tokens per second at every stage, the whole last.
    """

    def __init__(self, replay: Replay, point: Point, first: int = 6, front: bool = False) -> None:
        self.replay, self.point, self.first, self.front = replay, point, first, front
        self.samples = [replay.sample(lanes) for lanes, _ in PARTS]
        self.checked: list[tuple[float, ...]] = []
        self.best: Score | None = None
        self.best_stages: list[float] = []  # its tokens per second at each of them
        self.counts = Counter[str]()

    def agreement(self, stage: int) -> float:
        """Spearman's rank correlation of a stage's scores with whole ones; 0 before there are enough."""
        if len(self.checked) < CHECK_FIRST:
            return 0.0
        said, whole = [row[stage] for row in self.checked], [row[-1] for row in self.checked]
        return float(spearmanr(said, whole).statistic) if min(len(set(said)), len(set(whole))) > 2 else 0.0

    def __call__(self, mask: SkipMask) -> Score:
        found = self._score(mask)
        self.counts[found.fidelity] += 1
        return found

    def _score(self, mask: SkipMask) -> Score:
        drafts, best = self.replay.of(mask), self.best
        longest = DraftPolicy(max_length=self.replay.max_length)
        if self.front:
            fixed = join(drafts.walk(longest), mask, longest, self.point)
            return replace(
                _estimate(drafts, self.point), acceptance_rate=fixed.acceptance_rate, cost_ratio=fixed.cost_ratio
            )
        done = self.counts.total()
        check = done < CHECK_FIRST or done % CHECKED == 0
        stages: list[float] = []
        for number, near in enumerate((FAR_BEHIND, *(near for _, near in PARTS))):
            if number == 0:
                found = join(drafts.walk(longest, self.first, self.samples[0], LEAST), mask, longest, self.point)
            else:
                drafts.walk(longest, None, self.samples[number - 1], LEAST)
                found = _estimate(drafts, self.point, self.samples[number - 1])
            stages.append(found.tokens_per_second)
            behind = best is not None and stages[-1] < near * self.best_stages[number]
            if behind and not check and self.agreement(number) >= AGREEMENT:
                assert best is not None
                # Never above what it was given up for, however lucky the best was at this stage.
                scale = min(near * best.tokens_per_second / stages[-1], self._scale(number))
                return _scaled(found, scale, "first" if number == 0 else "part")
        drafts.walk(longest, None, None, LEAST)
        whole = _estimate(drafts, self.point)
        if check:
            self.checked.append((*stages, whole.tokens_per_second))
        if best is None or whole.tokens_per_second > best.tokens_per_second:
            self.best, self.best_stages = whole, stages
        return whole

    def _scale(self, stage: int) -> float:
        """What whole scores are, in scores of a stage."""
        return statistics.median(row[-1] / row[stage] for row in self.checked)


def _scaled(found: Score, scale: float, fidelity: Fidelity) -> Score:
    return replace(
        found, tokens_per_second=scale * found.tokens_per_second, speedup=scale * found.speedup, fidelity=fidelity
    )  # fmt: skip


def calibrated(drafts: MaskReplay, rate: float, point: Point) -> DraftPolicy:
    """The exit that stops when one more token is expected to bring less than its seconds bring elsewhere.

    A token drafted next is committed with the chance that all before it are right times its own acceptance; it
    costs a draft step and what its verify adds. At `rate` tokens per second those seconds are worth so many tokens,
    which is its price.
    """
    seen = [
        (draft.confidence[j], j < draft.matches)
        for draft in drafts.drafts.values()
        for j in range(min(draft.matches + 1, len(draft.confidence)))
    ]
    bins: list[list[bool]] = [[] for _ in range(BINS)]
    for confidence, right in seen:
        bins[min(int(confidence * BINS), BINS - 1)].append(right)
    # Two made-up tokens a bin, right as often as its confidence says, for bins that saw few.
    rates = [(sum(b) + 2 * (i + 0.5) / BINS) / (len(b) + 2) for i, b in enumerate(bins)]
    curve = isotonic_regression(rates, weights=[len(b) + 2 for b in bins]).x
    mean = sum(right for _, right in seen) / max(1, len(seen))
    step = draft_step(point, drafts.mask, exit_check=True)
    prices = [
        rate * (step + max(0.0, point.verify[k + 1] - point.verify[k])) / max(mean, 0.01)
        for k in range(1, len(point.verify) - 1)
    ]
    longest = drafts.replay.max_length
    return DraftPolicy(
        max_length=longest, curve=tuple(round(float(a), 4) for a in curve),
        prices=tuple(round(p, 4) for p in [*prices, prices[-1]][:longest]),
    )  # fmt: skip


def _adaptive(best: DraftPolicy) -> list[DraftPolicy]:
    return [] if best.exit_threshold is None else [replace(best, adaptive=True)]


def standard_error(drafts: MaskReplay, policy: DraftPolicy, point: Point) -> float:
    """Of the predicted speed-up, over prompts: the jackknife, since it is a ratio of sums."""
    drafts.walk(policy)
    lanes = drafts.by_lane
    if len(lanes) < 2:
        return math.nan
    without = [
        join(sum((b for j, b in enumerate(lanes) if j != i), Counter()), drafts.mask, policy, point).speedup
        for i in range(len(lanes))
    ]
    return statistics.pstdev(without) * math.sqrt(len(lanes) - 1)


def exact(drafts: MaskReplay, policy: DraftPolicy, point: Point) -> Score:
    """The score of a mask with a given policy."""
    return join(drafts.walk(policy), drafts.mask, policy, point)
