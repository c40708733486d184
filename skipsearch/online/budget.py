"""Budget: how much of the time the search has taken, and whether its next step may begin."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

SAVED = 48  # plain steps that unused time may add up to
# Plain steps that a step of each kind takes, before any was timed.
FIRST_GUESS = {"costs": 12.0, "states": 22.0, "pass": 6.0}


class Budget:
    """Seconds of decoding and of searching. The search may take a share of those seconds that a mask can shorten.

    Attributes:
        decoding, searching: seconds so far.
        improvable: seconds of blocks that no n-gram drafted: a mask could have shortened them.
        counts: steps of each kind that were taken.
    """

    def __init__(self, share: float) -> None:
        self.share, self.decoding, self.improvable, self.searching = share, 0.0, 0.0, 0.0
        self.seconds: dict[str, float] = {}  # of a step of each kind
        self.counts = Counter[str]()
        self._begun = self._expired = 0.0

    @contextmanager
    def search(self) -> Iterator[None]:
        """Count the seconds spent inside as searching."""
        self._begun = time.perf_counter()
        try:
            yield
        finally:
            self.searching += time.perf_counter() - self._begun

    def allows(self, kind: str, plain_seconds: float, part: float = 1.0, times: int = 1) -> bool:
        """Whether so many steps of a kind fit into that part of the share, beside what was searched so far.

        Unused time adds up to `SAVED` plain steps at most, so that no request pays for the pauses of many others.
        """
        wanted = self.seconds.get(kind, FIRST_GUESS[kind] * plain_seconds) * times
        searching = self.searching + self._expired + time.perf_counter() - self._begun
        allowed = self.share * part * self.improvable
        if (more := allowed - searching - max(wanted, SAVED * plain_seconds)) > 0:
            self._expired += more
            searching += more
        return searching + wanted <= allowed

    @contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Time a step of a kind."""
        begun = time.perf_counter()
        yield  # one that fails is not counted
        seconds = time.perf_counter() - begun
        self.seconds[kind] = 0.7 * self.seconds.get(kind, seconds) + 0.3 * seconds
        self.counts[kind] += 1

    @property
    def spent(self) -> float:
        """Searching over decoding seconds."""
        return self.searching / self.decoding if self.decoding else 0.0
