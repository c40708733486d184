"""Scheduler: which source drafts next, by running estimates of its tokens per second.

No source drafts while plain steps are faster. A source that was slower is tried again once enough time has passed
that its expected loss is a small share of it; so probing has a bounded cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from skipsearch.decoding.sources import MASK, PLAIN, Part, TokenSource

MEMORY_OF_MASK, MEMORY_OF_SOURCE = 0.85, 0.92  # weight of the old estimate at each new block of its source
MARGIN = 0.9  # on the mask's estimate: it is made from blocks chosen for the mask, so it is too high
PROBE_SHARE, PROBE_PLAIN = 0.02, 0.002  # of the time, for trying slower sources; plain steps vary little
GUESS_WEIGHT = 3.0  # tokens that the first guess of a source's acceptance counts for
FAR_OFF = 3.0  # times the expected seconds: a block counts for no more


class Scheduler:
    """Estimates for plain steps, mask drafts and token sources.

    Args:
        costs: seconds of a draft step, then of verifying 0, 1, 2, ... drafted tokens, if they were measured before.
        clock: whether seconds are measured while decoding. Without it the given costs are used, so that the choice of
            sources, and with it sampled output, depends on the seed alone.
    """

    def __init__(self, costs: Sequence[float] = (), clock: bool = True) -> None:
        self.clock = clock
        self.step = costs[0] if costs else 0.0
        self.verify: dict[int, float] = dict(enumerate(costs[1:]))
        self.forget_mask()
        # By token source and class of reliability: tokens accepted, and tokens verified up to the first rejected one.
        self._tried: dict[tuple[str, int], tuple[float, float]] = {}
        self._best = 0.0  # the rate that the last choice had to beat
        self._since: dict[str, float] = {}
        self._loss: dict[str, float] = {}

    def forget_mask(self) -> None:
        """Start the mask's estimates anew: another mask drafts from now on."""
        self.tokens, self.seconds = 0.0, 0.0  # of blocks that a mask drafted
        self.accepted, self.drafted = 2.0, 3.0  # of mask drafts, up to the first rejected one

    @property
    def knows_plain(self) -> bool:
        """Whether a plain step's cost is known, without which nothing can be compared."""
        return 0 in self.verify

    def verify_seconds(self, drafted: int) -> float:
        """Seconds of a verify of so many tokens: linear between known ones, beyond them as the nearest."""
        if drafted in self.verify:
            return self.verify[drafted]
        lengths = list(self.verify)  # other sequences may add to them meanwhile
        below = max((k for k in lengths if k < drafted), default=None)
        above = min((k for k in lengths if k > drafted), default=None)
        if below is None or above is None:
            known = below if above is None else above
            return self.verify[known] if known is not None else 1.0
        part = (drafted - below) / (above - below)
        return (1 - part) * self.verify[below] + part * self.verify[above]

    def fill_in(self, verify: dict[int, float]) -> None:
        """Take over the seconds of verifies that are not known yet."""
        for drafted, seconds in verify.items():
            self.verify.setdefault(drafted, seconds)

    def observe_verify(self, drafted: int, seconds: float) -> None:
        """Take in the seconds of one verify of so many tokens."""
        old = self.verify.get(drafted)
        if old is None:
            self.verify[drafted] = seconds
            return
        # Disturbances only add time, so a faster reading gets more weight.
        seconds = min(seconds, FAR_OFF * old)
        self.verify[drafted] = old + (0.3 if seconds < old else 0.1) * (seconds - old)

    @property
    def plain_rate(self) -> float:
        return 1 / self.verify_seconds(0)

    @property
    def mask_rate(self) -> float:
        """Tokens per second of mask drafting; infinite before the first block, so that it is tried."""
        seconds = self.seconds  # other sequences may change it meanwhile
        return MARGIN * self.tokens / seconds if seconds else math.inf

    @property
    def mask_acceptance(self) -> float:
        return self.accepted / self.drafted

    def acceptance(self, source: TokenSource, reliability: int) -> float:
        """Chance that the next token of a source is accepted if those before it were."""
        first = (GUESS_WEIGHT * source.first_guess[reliability], GUESS_WEIGHT)
        accepted, verified = self._tried.setdefault((source.name, reliability), first)
        return min(0.99, accepted / verified)

    def plan(self, acceptance: float, longest: int) -> tuple[int, float]:
        """How many tokens of a source to draft for the most tokens per second, and that rate."""
        a = acceptance
        rates = {
            k: (1 - a ** (k + 1)) / (1 - a) / self.verify_seconds(k) for k in range(1, longest + 1)
        }  # fmt: skip
        best = max(rates, key=rates.__getitem__)
        return best, rates[best]

    def tail(self, chance: float, drafted: int, acceptance: float, longest: int) -> int:
        """How many tokens of a source to append to a draft that is accepted whole with this chance."""
        rate = max(self.plain_rate, 0.0 if math.isinf(self.mask_rate) else self.mask_rate)
        base, gain, best, gained = self.verify_seconds(drafted), 0.0, 0, 0.0
        for t in range(1, longest + 1):
            gain += chance * acceptance**t
            worth = gain - (self.verify_seconds(drafted + t) - base) * rate
            if worth > gained:
                best, gained = t, worth
        return best

    def choose(self, rates: dict[str, float]) -> str:
        """The source with the best rate, or one that is due to be tried again."""
        best = max(rates, key=rates.__getitem__)
        self._best = 0.0 if math.isinf(rates[best]) else rates[best]
        if not self._best:
            return best  # never tried
        for source in rates:
            share = PROBE_SHARE if source != "plain" else PROBE_PLAIN if self.clock else 0.0
            waited, loss = self._since.get(source, math.inf), self._loss.get(source, 0.0)
            if source != best and share and waited * share > loss:
                return source
        return best

    def learn(self, parts: Sequence[Part], accepted: int, seconds: float, verify_seconds: float | None) -> None:
        """Update the estimates with one block.

        Args:
            parts: of its draft; none: a plain step.
            accepted: how many of the drafted tokens.
            seconds: of the whole block.
            verify_seconds: of its verify; None if the clock could not separate it.
        """
        drafted, source = sum(part.tokens for part in parts), parts[0].source if parts else PLAIN
        of_mask = sum(part.tokens for part in parts if part.source == MASK)
        if not self.clock:
            seconds = of_mask * self.step + self.verify_seconds(drafted)
        elif self.verify and (self.step or not of_mask):
            # A block in which something was compiled or captured is no estimate of the next one.
            seconds = min(seconds, FAR_OFF * (of_mask * self.step + self.verify_seconds(drafted)))
        if self.clock and verify_seconds is not None:
            self.observe_verify(drafted, verify_seconds)
        if source == MASK:
            self.tokens = MEMORY_OF_MASK * self.tokens + accepted + 1
            self.seconds = MEMORY_OF_MASK * self.seconds + seconds
            self.accepted = MEMORY_OF_MASK * self.accepted + min(accepted, of_mask)
            self.drafted = MEMORY_OF_MASK * self.drafted + min(accepted + 1, of_mask)
        self._learn_acceptance(parts, accepted)
        for other in list(self._since):  # to which other sequences may add
            self._since[other] += seconds
        self._since[source] = 0.0
        best = self._best
        self._loss[source] = max(0.0, seconds - (accepted + 1) / best) if best else 0.0

    def _learn_acceptance(self, parts: Sequence[Part], accepted: int) -> None:
        """Update the acceptance of each token source whose tokens were reached."""
        before = 0
        for part in parts:
            if (key := (part.source, part.reliability)) in self._tried and accepted >= before:
                right, verified = self._tried[key]
                new = min(accepted - before, part.tokens)
                self._tried[key] = (
                    MEMORY_OF_SOURCE * right + new, MEMORY_OF_SOURCE * verified + min(new + 1, part.tokens),
                )  # fmt: skip
            before += part.tokens
