"""Incumbent: the mask that serves some domains, and the challengers that are compared with it.

Incumbent and challenger are scored on the same window; a challenger that is not ahead by far has to win again on other
windows, so that none is chosen by luck. When no challenger has won for long, the search pauses.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.objective import Score
from skipsearch.evaluate.windows import PositionOutcomes
from skipsearch.mask import SkipMask
from skipsearch.online.candidates import Candidates
from skipsearch.online.window import EXIT, LENGTH, score
from skipsearch.policy import DraftPolicy

PAYS = 1.03  # speed-up on a window from which a first mask is served
GROUP = 4  # proposals on a window; the best of them challenges
SIGNIFICANT = 0.12  # log-ratio that is significant on one window, even of the best of several
MARGIN = 0.06  # mean log-ratio from which a challenger takes over after one window; after n, the n-th part of it
LAST = 5  # windows that a challenger has
BEHIND = -0.01  # mean log-ratio below which it is given up
KEPT = 4  # windows that an incumbent's policy is chosen on
PATIENCE = 40  # proposals without a winner after which the search pauses
DRIFT, RECENT = 4.0, 240  # standard errors by which acceptance must fall, over so many drafted tokens

# Scores a mask on one window.
Evaluate = Callable[[SkipMask], tuple[Score, list[PositionOutcomes]]]


@dataclass
class Challenger:
    """A mask that was faster than the incumbent once, and has to win again.

    Attributes:
        gains: log-ratios of speeds on later windows.
        outcomes: of its drafts there.
    """

    mask: SkipMask
    gains: list[float] = field(default_factory=list)
    outcomes: list[PositionOutcomes] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Incumbent:
    """One incumbent and its search.

    Attributes:
        mask, policy: what serves; without a mask there is no incumbent yet.
        queue: masks to try before others are proposed.
        tried: masks that were scored.
        challenger: a mask that has to win once more.
        outcomes: of the incumbent's drafts on the latest windows.
        rejected: proposals since the last that won.
        paused_at: tokens served in all when the search paused; None while it goes on.
        expected: acceptance since then, once `recent` holds enough tokens to tell it.
        won: the incumbent was found here.
    """

    policy: DraftPolicy
    mask: SkipMask | None = None
    queue: list[SkipMask] = field(default_factory=list)
    tried: set[SkipMask] = field(default_factory=set)
    challenger: Challenger | None = None
    outcomes: list[PositionOutcomes] = field(default_factory=list)
    rejected: int = 0
    paused_at: int | None = None
    expected: float | None = None
    won: bool = False
    recent: Counter[str] = field(default_factory=Counter)

    @property
    def passes(self) -> int:
        """Passes that a window needs at least: one score of the incumbent is compared with several proposals."""
        if self.mask is None:
            return 1
        return 2 if self.challenger is not None or self.queue else 1 + GROUP

    def evaluate(self, read: Evaluate, candidates: Candidates | None, may: Callable[[], bool]) -> str | None:
        """One step of the search, on one window.

        Args:
            read: scores a mask on it.
            candidates: proposes masks, once it is there.
            may: whether there is time for another pass; there is for the first `passes`.

        Returns:
            what has changed, in words; None: nothing.
        """
        if self.mask is None:
            return self._first(read, candidates, may)
        held, found = read(self.mask)
        self.outcomes = [*self.outcomes[1 - KEPT :], *found]
        if self.challenger is not None:
            return self._compare(self.challenger, held, read, candidates)
        return None if candidates is None else self._challenge(held, read, candidates, may)

    def reconsider(self, point: Point) -> str | None:
        """Whether the incumbent still pays on its latest windows, and with which policy."""
        if self.mask is None or len(self.outcomes) < KEPT:
            return None
        found = score(self.outcomes, self.mask, point, choose=True)
        if found.speedup < 1:
            self.tried.add(self.mask)
            self._hold(None, [])
            return "no longer pays"
        if self.won:  # a given policy was chosen on more than this
            self._draft(found.policy.max_length, found.policy.exit_threshold)
        return None

    def pause(self, tokens: int) -> bool:
        """Pause the search if nothing has won for long; returns whether it did."""
        if self.rejected < PATIENCE or self.challenger is not None:
            return False
        self.paused_at = tokens
        self.recent.clear()
        return True

    def resume(self, likely: list[SkipMask]) -> None:
        """Search again: masks that did not pay on earlier text may pay now.

        Args:
            likely: what to try where there is no mask.
        """
        self.paused_at, self.expected, self.rejected = None, None, 0
        self.tried.clear()
        self.queue += likely if self.mask is None else []

    def copy(self) -> Incumbent:
        """Another with the same mask, with a search of its own."""
        return Incumbent(self.policy, self.mask, won=self.won)

    def drifts(self, drafted: int, accepted: int) -> bool:
        """Whether acceptance is significantly below what it was when the search paused."""
        if self.expected is None:
            self.recent.update(drafted=drafted, accepted=accepted)
            if self.recent["drafted"] >= RECENT:
                self.expected = self.recent["accepted"] / self.recent["drafted"]
            return False
        error = math.sqrt(max(self.expected * (1 - self.expected), 0.01) / drafted)
        return accepted / drafted < self.expected - DRIFT * error

    def _first(self, read: Evaluate, candidates: Candidates | None, may: Callable[[], bool]) -> str | None:
        """No mask is served yet: one that pays on this window is."""
        for _ in range(GROUP):
            if not may() or (mask := self._next(candidates)) is None:
                break
            found, outcomes = read(mask)
            self.tried.add(mask)
            if found.speedup >= PAYS:
                self._hold(mask, outcomes)
                return "first mask"
            self.rejected += 1
        return None

    def _challenge(self, held: Score, read: Evaluate, candidates: Candidates, may: Callable[[], bool]) -> str | None:
        """Several proposals on one window: the one that gains most on the incumbent's score challenges it."""
        assert self.mask is not None
        gains, outcomes = dict[SkipMask, float](), dict[SkipMask, list[PositionOutcomes]]()
        while len(gains) < GROUP and (not gains or may()):
            if (mask := self._next(candidates)) is None:
                break
            found, outcomes[mask] = read(mask)
            gains[mask] = math.log(found.tokens_per_second / held.tokens_per_second)
            candidates.learn(self.mask, mask, gains[mask])
            self.tried.add(mask)
        if not gains:
            self.rejected = PATIENCE  # there is nothing left to try
            return None
        best = max(gains, key=gains.__getitem__)
        if gains[best] > SIGNIFICANT:
            self._hold(best, outcomes[best])
            return "better mask"
        self.challenger = Challenger(best) if gains[best] > 0 else None
        self.rejected += len(gains) - (gains[best] > 0)
        return None

    def _compare(
        self, challenger: Challenger, held: Score, read: Evaluate, candidates: Candidates | None
    ) -> str | None:  # fmt: skip
        """The challenger against the incumbent's score, on a window that it was not chosen on."""
        assert self.mask is not None
        found, outcomes = read(challenger.mask)
        challenger.gains.append(math.log(found.tokens_per_second / held.tokens_per_second))
        challenger.outcomes += outcomes
        if candidates is not None:
            candidates.learn(self.mask, challenger.mask, challenger.gains[-1])
        mean = statistics.fmean(challenger.gains)
        if mean > MARGIN / len(challenger.gains):
            self._hold(challenger.mask, challenger.outcomes)
            return "better mask"
        if mean < BEHIND or len(challenger.gains) >= LAST:
            self.challenger = None
            self.rejected += 1
        return None

    def _next(self, candidates: Candidates | None) -> SkipMask | None:
        """The next mask of the queue, else a proposal; None before there are candidates, or after all were tried."""
        while self.queue:
            mask = self.queue.pop(0)
            if mask not in self.tried and mask != self.mask:
                return mask
        if candidates is None:
            return None
        emptiest = min(self.tried, key=len, default=SkipMask(num_layers=candidates.layers))
        return candidates.propose(self.mask or emptiest, self.tried)

    def _hold(self, mask: SkipMask | None, outcomes: list[PositionOutcomes]) -> None:
        self.mask, self.challenger, self.rejected, self.won = mask, None, 0, True
        self.outcomes = outcomes[-KEPT:]
        self.recent.clear()
        self._draft(LENGTH, EXIT)

    def _draft(self, length: int, threshold: float | None) -> None:
        adaptive = threshold is not None
        self.policy = replace(
            self.policy, max_length=length, exit_threshold=threshold, adaptive=adaptive, curve=(), prices=()
        )
