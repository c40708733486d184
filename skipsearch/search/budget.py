"""Budget: the seconds of a run, shared out over its stages, and where they went."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """Seconds that are left, and those that were spent, by stage.

    Args:
        seconds: of the whole run; None: no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds
        self.spent: dict[str, float] = {}

    def share(self, part: float, least: float = 1.0) -> float:
        """Seconds for a stage: a part of what is left, and never less than `least`."""
        return max(least, part * (self.end - time.monotonic()))

    @contextmanager
    def stage(self, name: str, on_top: bool = False) -> Iterator[None]:
        """Store how many seconds a stage takes.

        Args:
            on_top: they are added to the budget: others do not suffer from them.
        """
        begin = time.monotonic()
        yield
        seconds = time.monotonic() - begin
        self.spent[name] = self.spent.get(name, 0.0) + seconds
        if on_top:
            self.end += seconds
