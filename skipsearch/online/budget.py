"""Budget: how much of the time search has taken, and whether its next step may begin."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

SAVED = 48  # plain steps
FIRST_GUESS = {"prices": 12.0, "states": 22.0, "pass": 6.0}  # seconds, in plain steps, before any was timed


class Budget:
    """Time is spent on decoding and on searching; of the seconds that masks can shorten the latter may take a share.

    Attributes:
        decoding, searching: seconds so far.
        improvable: those of decoding that no n-gram drafted for, which a mask could have made fewer.
        counts: steps of each kind that were taken.
    """

    def __init__(self, share: float) -> None:
        self.share, self.decoding, self.improvable, self.searching = share, 0.0, 0.0, 0.0
        self.seconds: dict[str, float] = {}  # of a step of each kind
        self.counts = Counter[str]()
        self._begun = self._forgone = 0.0

    @contextmanager
    def search(self) -> Iterator[None]:
        """Whatever is done here is searching."""
        self._begun = time.perf_counter()
        try:
            yield
        finally:
            self.searching += time.perf_counter() - self._begun

    def may(self, kind: str, plain_seconds: float, part: float = 1.0, times: int = 1) -> bool:
        """Whether so many steps of a kind fit into that part of the share, with what was searched since `search`.

        What was not spent is not saved up beyond `SAVED` plain steps, so that no request pays for many others' rest.
        """
        wanted = self.seconds.get(kind, FIRST_GUESS[kind] * plain_seconds) * times
        searching = self.searching + self._forgone + time.perf_counter() - self._begun
        allowed = self.share * part * self.improvable
        if (more := allowed - searching - max(wanted, SAVED * plain_seconds)) > 0:
            self._forgone += more
            searching += more
        return searching + wanted <= allowed

    @contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Note what a step of a kind takes."""
        begun = time.perf_counter()
        yield  # one that fails is not counted
        seconds = time.perf_counter() - begun
        self.seconds[kind] = 0.7 * self.seconds.get(kind, seconds) + 0.3 * seconds
        self.counts[kind] += 1

    @property
    def spent(self) -> float:
        """Searching over decoding seconds."""
        return self.searching / self.decoding if self.decoding else 0.0
