"""Contest: the mask that serves some domains, and what is compared with it.

Incumbent and challenger are scored on the same window; a challenger that is not ahead by far has to win again on other
windows, so that none is chosen for its luck. Where nothing wins for long, the search comes to rest.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from skipsearch.decoding.policy import DraftPolicy
from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.mask_replay import Outlook
from skipsearch.evaluate.objective import Score
from skipsearch.mask import SkipMask
from skipsearch.online.candidates import Candidates
from skipsearch.online.window import EXIT, LENGTH, score

PAYS = 1.03  # speed-up on a window from which a first mask is served
GROUP = 4  # proposals on a window; the best of them challenges
SURE = 0.12  # log-ratio that is no luck on one window, even of the best of several
MARGIN = 0.06  # mean log-ratio from which a challenger takes over on one window; on n of them the n-th part will do
LAST = 5  # windows that a challenger has
BEHIND = -0.01  # mean log-ratio below which it is given up
KEPT = 4  # windows that an incumbent's policy is chosen on
PATIENCE = 40  # proposals without a winner: the search comes to rest
DRIFT, RECENT = 4.0, 240  # standard errors of acceptance that are no chance, over so many drafted tokens

Read = Callable[[SkipMask], tuple[Score, Outlook]]


@dataclass
class Challenger:
    """A mask that was faster than the incumbent once, and has to show it again.

    Attributes:
        gains: log-ratios of speeds on later windows.
        outlooks: what drafts with it look like there.
    """

    mask: SkipMask
    gains: list[float] = field(default_factory=list)
    outlooks: Outlook = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Contest:
    """One incumbent and its search.

    Attributes:
        mask, policy: the incumbent; without a mask there is none yet.
        queue: masks to try before others are proposed.
        tried: masks that were scored.
        challenger: what has to win once more.
        outlooks: what the incumbent's drafts looked like on the latest windows.
        rejected: proposals since the last that won.
        rested_at: tokens served in all when the search came to rest; None while it goes on.
        expected: acceptance since then, once that is known from `recent` tokens.
        won: the incumbent was found here.
    """

    policy: DraftPolicy
    mask: SkipMask | None = None
    queue: list[SkipMask] = field(default_factory=list)
    tried: set[SkipMask] = field(default_factory=set)
    challenger: Challenger | None = None
    outlooks: Outlook = field(default_factory=list)
    rejected: int = 0
    rested_at: int | None = None
    expected: float | None = None
    won: bool = False
    recent: Counter[str] = field(default_factory=Counter)

    @property
    def passes(self) -> int:
        """How many a window needs at least: a score of the incumbent serves several proposals better than one."""
        if self.mask is None:
            return 1
        return 2 if self.challenger is not None or self.queue else 1 + GROUP

    def look(self, read: Read, candidates: Candidates | None, may: Callable[[], bool]) -> str | None:
        """One window.

        Args:
            read: scores a mask on it.
            candidates: who proposes, once that is known.
            may: whether there is time for one pass more; for `passes` of them there is.

        Returns: what has changed.
        """
        if self.mask is None:
            return self._first(read, candidates, may)
        held, outlook = read(self.mask)
        self.outlooks = [*self.outlooks[1 - KEPT :], *outlook]
        if self.challenger is not None:
            return self._compare(self.challenger, held, read, candidates)
        return None if candidates is None else self._challenge(held, read, candidates, may)

    def reconsider(self, point: Point) -> str | None:
        """The incumbent on its latest windows: another policy may suit it better, or it may no longer pay."""
        if self.mask is None or len(self.outlooks) < KEPT:
            return None
        found = score(self.outlooks, self.mask, point, choose=True)
        if found.speedup < 1:
            self.tried.add(self.mask)
            self._hold(None, [])
            return "no longer pays"
        if self.won:  # a given policy was chosen on more than this
            self._draft(found.policy.max_length, found.policy.exit_threshold)
        return None

    def rest(self, tokens: int) -> bool:
        """Whether it is time to, and then do."""
        if self.rejected < PATIENCE or self.challenger is not None:
            return False
        self.rested_at = tokens
        self.recent.clear()
        return True

    def wake(self) -> None:
        """Search again: what did not pay on other text may pay on this."""
        self.rested_at, self.expected, self.rejected = None, None, 0
        self.tried.clear()

    def apart(self) -> Contest:
        """Another with the same incumbent, to be searched for on its own."""
        return Contest(self.policy, self.mask, won=self.won)

    def drifts(self, drafted: int, accepted: int) -> bool:
        """Whether a domain's acceptance is below what it was when the search came to rest, and that is no chance."""
        if self.expected is None:
            self.recent.update(drafted=drafted, accepted=accepted)
            if self.recent["drafted"] >= RECENT:
                self.expected = self.recent["accepted"] / self.recent["drafted"]
            return False
        error = math.sqrt(max(self.expected * (1 - self.expected), 0.01) / drafted)
        return accepted / drafted < self.expected - DRIFT * error

    def _first(self, read: Read, candidates: Candidates | None, may: Callable[[], bool]) -> str | None:
        """No mask is served yet: one that pays on this window is."""
        for _ in range(GROUP):
            if not may() or (mask := self._next(candidates)) is None:
                break
            found, outlook = read(mask)
            self.tried.add(mask)
            if found.speedup >= PAYS:
                self._hold(mask, outlook)
                return "first mask"
            self.rejected += 1
        return None

    def _challenge(self, held: Score, read: Read, candidates: Candidates, may: Callable[[], bool]) -> str | None:
        """Several proposals on one window: the one that gains most on the incumbent's score challenges it."""
        assert self.mask is not None
        gains, outlooks = dict[SkipMask, float](), dict[SkipMask, Outlook]()
        while len(gains) < GROUP and (not gains or may()):
            if (mask := self._next(candidates)) is None:
                break
            found, outlooks[mask] = read(mask)
            gains[mask] = math.log(found.tokens_per_second / held.tokens_per_second)
            candidates.learn(self.mask, mask, gains[mask])
            self.tried.add(mask)
        if not gains:
            self.rejected = PATIENCE  # there is nothing left to try
            return None
        best = max(gains, key=gains.__getitem__)
        if gains[best] > SURE:
            self._hold(best, outlooks[best])
            return "better mask"
        self.challenger = Challenger(best) if gains[best] > 0 else None
        self.rejected += len(gains) - (gains[best] > 0)
        return None

    def _compare(
        self, challenger: Challenger, held: Score, read: Read, candidates: Candidates | None
    ) -> str | None:  # fmt: skip
        """The challenger against the incumbent's score, on a window that it was not chosen on."""
        assert self.mask is not None
        found, outlook = read(challenger.mask)
        challenger.gains.append(math.log(found.tokens_per_second / held.tokens_per_second))
        challenger.outlooks += outlook
        if candidates is not None:
            candidates.learn(self.mask, challenger.mask, challenger.gains[-1])
        mean = statistics.fmean(challenger.gains)
        if mean > MARGIN / len(challenger.gains):
            self._hold(challenger.mask, challenger.outlooks)
            return "better mask"
        if mean < BEHIND or len(challenger.gains) >= LAST:
            self.challenger = None
            self.rejected += 1
        return None

    def _next(self, candidates: Candidates | None) -> SkipMask | None:
        """What was put down to be tried, else a proposal; None before there are candidates, or after all were tried."""
        while self.queue:
            mask = self.queue.pop(0)
            if mask not in self.tried and mask != self.mask:
                return mask
        if candidates is None:
            return None
        emptiest = min(self.tried, key=len, default=SkipMask(num_layers=candidates.layers))
        return candidates.propose(self.mask or emptiest, self.tried)

    def _hold(self, mask: SkipMask | None, outlooks: Outlook) -> None:
        self.mask, self.challenger, self.rejected, self.won = mask, None, 0, True
        self.outlooks = outlooks[-KEPT:]
        self.recent.clear()
        self._draft(LENGTH, EXIT)

    def _draft(self, length: int, threshold: float | None) -> None:
        adaptive = threshold is not None
        self.policy = replace(
            self.policy, max_length=length, exit_threshold=threshold, adaptive=adaptive, curve=(), prices=()
        )
