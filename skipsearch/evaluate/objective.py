"""The objective: tokens per second, from replay's counts and the cost model's seconds. They meet here alone.

Shapes: L stretches of text; S positions of a stretch; T thresholds; K draft lengths.
"""

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

from skipsearch.decoding.exit_rule import ExitRule
from skipsearch.evaluate.cost import Point, draft_step
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.windows import Part, PositionOutcomes, WindowReplay
from skipsearch.mask import SkipMask
from skipsearch.plan import DraftPlan
from skipsearch.policy import DraftPolicy

Array = NDArray[Any]
Plan = SkipMask | DraftPlan

BINS = 16  # of the confidence, in a calibrated exit
TRIED = (1, 2, 3, 4, 6)  # lengths, in trials
THRESHOLDS = (None, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85)

Fidelity = Literal["first", "part", "whole"]  # how much of a trace a score is made on


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a plan is worth with its best policy, predicted.

    Attributes:
        tokens_per_second, speedup: the latter against plain decoding in the same runtime.
        acceptance_rate: accepted / drafted.
        tau: tokens committed per verify.
        cost_ratio: c, seconds of a draft step over those of a plain step; no speed-up exceeds 1/c.
        fidelity: how much of the trace was scored; scores of parts are scaled.
        stages: tokens per second at each stage of a scorer, not scaled; empty where there are none.
    """

    plan: DraftPlan
    policy: DraftPolicy
    tokens_per_second: float
    speedup: float
    acceptance_rate: float
    tau: float
    cost_ratio: float
    fidelity: Fidelity = "whole"
    stages: tuple[float, ...] = ()

    @property
    def mask(self) -> SkipMask:
        """What the plan skips."""
        return self.plan.skip


def throughput(blocks: Counter[tuple[int, int]], plan: Plan, policy: DraftPolicy, point: Point) -> Score:
    """Tokens over seconds: the sum of n + 1, over the sum of starting a draft, k draft steps and a verify of k.

    Args:
        blocks: how many blocks drafted k tokens and had n of them accepted, by (k, n).
    """
    step = draft_step(point, plan, policy.uses_confidence)
    verifies = sum(blocks.values())
    drafted = sum(k * count for (k, _), count in blocks.items())
    accepted = sum(n * count for (_, n), count in blocks.items())
    begun = sum(count for (k, _), count in blocks.items() if k)
    seconds = (drafted + point.first * begun) * step + sum(point.verify[k] * n for (k, _), n in blocks.items())
    speed = (accepted + verifies) / seconds if seconds else 1 / point.verify[0]
    return Score(
        plan=DraftPlan.of(plan), policy=policy, tokens_per_second=speed, speedup=speed * point.verify[0],
        acceptance_rate=accepted / drafted if drafted else 0.0, tau=accepted / verifies + 1 if verifies else 1.0,
        cost_ratio=step / point.verify[0],
    )  # fmt: skip


def score(drafts: WindowReplay, point: Point, part: Part | None = None) -> Score:
    """The best of some policies for a plan and what it would reach on this part of the trace, or on all of it."""
    # Trials cannot tell neighbouring policies apart. They estimate longer drafts than they run.
    lengths = [k for k in TRIED if k < len(point.verify)]
    return estimate(drafts.outcomes(part), drafts.plan, point, lengths)


def best_policy(outcomes: Sequence[PositionOutcomes], plan: Plan, point: Point) -> Score:
    """The best of all policies: fixed lengths, exits, the exit that adapts from the best one, the calibrated exit."""
    best = estimate(outcomes, plan, point, range(1, len(point.verify)), THRESHOLDS)
    others = [calibrated(outcomes, plan, best.tokens_per_second, point)]
    if best.policy.exit_threshold is not None:
        others.append(replace(best.policy, adaptive=True))
    scores = [throughput(follow(outcomes, policy), plan, policy, point) for policy in others]
    return max((best, *scores), key=lambda s: s.tokens_per_second)


def follow(outcomes: Sequence[PositionOutcomes], policy: DraftPolicy) -> Counter[tuple[int, int]]:
    """Blocks by (drafted, accepted) if a token's outcome depended on its position alone; any policy, one by one."""
    blocks: Counter[tuple[int, int]] = Counter()
    for found in outcomes:
        rule, at, size = ExitRule(policy), 0, len(found.correct)
        while at < found.starts:
            k = rule.length(found.confidence[at : at + policy.max_length], size - at - 1)
            n = next((j for j in range(k) if not found.correct[at + j]), k)
            rule.learn(k, n)
            blocks[k, n] += 1
            at += n + 1
    return blocks


def estimate(
    outcomes: Sequence[PositionOutcomes], plan: Plan, point: Point, lengths: Sequence[int],
    thresholds: Sequence[float | None] = THRESHOLDS[::2],
) -> Score:  # fmt: skip
    """The best of these policies and what it would reach, if a token's outcome depended on its position alone."""
    counts = _counts(outcomes, np.array(lengths), np.array([threshold or 0.0 for threshold in thresholds]))
    scores = []
    for i, j in itertools.product(range(len(thresholds)), range(len(lengths))):
        blocks = Counter({(int(k), int(n)): int(counts[i, j, k, n]) for k, n in np.argwhere(counts[i, j])})
        scores.append(throughput(blocks, plan, DraftPolicy(max_length=lengths[j], exit_threshold=thresholds[i]), point))
    return max(scores, key=lambda s: s.tokens_per_second)


def _counts(outcomes: Sequence[PositionOutcomes], lengths_K: Array, thresholds_T: Array) -> Array:
    """Blocks [T, K, k, n] by tokens drafted and accepted, of each threshold with each length; all walk at once."""
    sizes_L = np.array([len(found.correct) for found in outcomes])
    starts_L = np.array([found.starts for found in outcomes])
    shape = (len(outcomes), sizes_L.max())
    wrong_LS, confidence_LS = np.zeros(shape, dtype=bool), np.ones(shape)
    for i, found in enumerate(outcomes):
        wrong_LS[i, : sizes_L[i]] = np.logical_not(found.correct)
        confidence_LS[i, : sizes_L[i]] = found.confidence

    def following(flags_LS: Array) -> Array:
        """The place of the next flag, from each position on; the stretch's size if there is none."""
        places = np.where(flags_LS, np.arange(sizes_L.max()), sizes_L[:, None])
        return np.asarray(np.minimum.accumulate(places[..., ::-1], axis=-1)[..., ::-1])

    wrong_LS, unsure_TLS = following(wrong_LS), following(confidence_LS < thresholds_T[:, None, None])
    at_TKL = np.zeros((len(thresholds_T), len(lengths_K), len(outcomes)), dtype=int)
    most = lengths_K.max() + 1
    counts = np.zeros((*at_TKL.shape[:2], most, most), dtype=int)
    while (walking := np.nonzero(at_TKL < starts_L))[0].size:
        t, k, stretch = walking
        at = at_TKL[walking]
        drafted = np.minimum(np.minimum(lengths_K[k], sizes_L[stretch] - at - 1), unsure_TLS[t, stretch, at] - at + 1)
        accepted = np.minimum(drafted, wrong_LS[stretch, at] - at)
        np.add.at(counts, (t, k, drafted, accepted), 1)
        at_TKL[walking] = at + accepted + 1
    return counts


def calibrated(outcomes: Sequence[PositionOutcomes], plan: Plan, rate: float, point: Point) -> DraftPolicy:
    """The exit that stops when one more token is expected to bring less than its seconds bring elsewhere.

    The next token is committed with the chance that all before it are right, times its own acceptance. It costs a
    draft step and what its verify adds. Its price is the number of tokens that these seconds bring at `rate` tokens
    per second.
    """
    bins: list[list[bool]] = [[] for _ in range(BINS)]
    for found in outcomes:
        for confidence, right in zip(found.confidence, found.correct, strict=True):
            bins[min(int(confidence * BINS), BINS - 1)].append(right)
    # A prior of two tokens a bin, right as often as its confidence says, for bins that hold few.
    rates = [(sum(b) + 2 * (i + 0.5) / BINS) / (len(b) + 2) for i, b in enumerate(bins)]
    curve = isotonic_regression(rates, weights=[len(b) + 2 for b in bins]).x
    mean = sum(map(sum, bins)) / max(1, sum(map(len, bins)))
    step = draft_step(point, plan, exit_check=True)
    longest = len(point.verify) - 1
    adds = [
        max(0.0, point.verify[min(k + 1, longest)] - point.verify[min(k, longest - 1)]) for k in range(1, longest + 1)
    ]
    prices = [rate * (step + added) / max(mean, 0.01) for added in adds]
    return DraftPolicy(
        max_length=longest, curve=tuple(round(float(a), 4) for a in curve), prices=tuple(round(p, 4) for p in prices)
    )


def standard_error(drafts: DraftReplay, policy: DraftPolicy, point: Point) -> float:
    """Of the predicted speed-up, over prompts: the jackknife, since it is a ratio of sums."""
    drafts.walk(policy)
    prompts = drafts.by_prompt
    if len(prompts) < 2:
        return math.nan
    without = [
        throughput(sum((b for j, b in enumerate(prompts) if j != i), Counter()), drafts.plan, policy, point).speedup
        for i in range(len(prompts))
    ]
    return statistics.pstdev(without) * math.sqrt(len(prompts) - 1)


def score_policy(drafts: DraftReplay, policy: DraftPolicy, point: Point) -> Score:
    """The score of a plan with a given policy."""
    return throughput(drafts.walk(policy), drafts.plan, policy, point)
