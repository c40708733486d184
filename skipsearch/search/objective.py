"""The objective: tokens per second, from replay's counts and the cost model's seconds. They meet here alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from skipsearch.decoding.policy import DraftPolicy
from skipsearch.mask import SkipMask
from skipsearch.search.cost import Point, draft_step
from skipsearch.search.replay import MaskReplay, Replay

THRESHOLDS = (None, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a mask is worth with its best policy, predicted.

    Attributes:
        tokens_per_second, speedup: the latter against plain decoding in the same runtime.
        acceptance_rate: accepted / drafted.
        tau: tokens committed a verify.
        cost_ratio: c, seconds of a draft step over those of a plain step; no speed-up exceeds 1/c.
    """

    mask: SkipMask
    policy: DraftPolicy
    tokens_per_second: float
    speedup: float
    acceptance_rate: float
    tau: float
    cost_ratio: float


def join(blocks: Counter[tuple[int, int]], mask: SkipMask, policy: DraftPolicy, point: Point) -> Score:
    """Tokens over seconds: sum of (n + 1) over sum of (k draft steps + one verify of k), over all blocks."""
    step = draft_step(point, mask, policy.exit_threshold is not None)
    verifies = sum(blocks.values())
    drafted = sum(k * count for (k, _), count in blocks.items())
    accepted = sum(n * count for (_, n), count in blocks.items())
    seconds = drafted * step + sum(point.verify[k] * count for (k, _), count in blocks.items())
    speed = (accepted + verifies) / seconds if seconds else 1 / point.verify[0]
    return Score(
        mask=mask, policy=policy, tokens_per_second=speed, speedup=speed * point.verify[0],
        acceptance_rate=accepted / drafted if drafted else 0.0, tau=accepted / verifies + 1 if verifies else 1.0,
        cost_ratio=step / point.verify[0],
    )  # fmt: skip


def plain_score(num_layers: int, point: Point) -> Score:
    """The score of not drafting at all: the line that every mask has to beat."""
    return Score(
        mask=SkipMask(num_layers=num_layers), policy=DraftPolicy(max_length=1), tokens_per_second=1 / point.verify[0],
        speedup=1.0, acceptance_rate=0.0, tau=1.0, cost_ratio=1.0,
    )  # fmt: skip


def score(replay: Replay, mask: SkipMask, point: Point, *, thorough: bool = False) -> Score:
    """The best policy for a mask and what it reaches, by exact replay.

    A walk with the longest drafts shows where the mask is right and how sure it is; arithmetic on that
    ranks all policies; the best one is walked exactly.
    """
    drafts = replay.of(mask)
    longest = DraftPolicy(max_length=replay.max_length)
    known = {longest: join(drafts.walk(longest), mask, longest, point)}
    outlook = drafts.outlook()
    step = 1 if thorough else 2  # neighbouring policies differ by less than trials on part of the trace can tell
    policies = [
        DraftPolicy(max_length=k, exit_threshold=threshold)
        for threshold in THRESHOLDS[::step]
        for k in (*range(1, 5), *range(5, replay.max_length + 1, step))
    ]
    estimates = {p: join(_foresee(outlook, p), mask, p, point).tokens_per_second for p in policies}
    best = max(estimates, key=estimates.__getitem__)
    if best not in known:
        known[best] = join(drafts.walk(best), mask, best, point)
    return max(known.values(), key=lambda s: s.tokens_per_second)


def exact(drafts: MaskReplay, policy: DraftPolicy, point: Point) -> Score:
    """The score of a mask with a given policy."""
    return join(drafts.walk(policy), drafts.mask, policy, point)


def _foresee(outlook: list[tuple[list[bool], list[float]]], policy: DraftPolicy) -> Counter[tuple[int, int]]:
    """Blocks that a policy would make if rightness and confidence depended on the position alone."""
    blocks: Counter[tuple[int, int]] = Counter()
    threshold = policy.exit_threshold
    for right, sure in outlook:
        at, size = 0, len(right)
        while at < size:
            longest = min(policy.max_length, size - at - 1)
            k = longest
            if threshold is not None:
                k = next((j + 1 for j in range(longest) if sure[at + j] < threshold), longest)
            n = next((j for j in range(k) if not right[at + j]), k)
            blocks[k, n] += 1
            at += n + 1
    return blocks
