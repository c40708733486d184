"""Budget: the seconds of a run, shared out over its stages, and where they went."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from skipsearch.errors import enough_memory

LESS = "pass a smaller --new-tokens or --prompt-tokens, or --dtype bfloat16"
FEWER = "pass fewer --num-prompts, a smaller --new-tokens, or fewer GB with --memory"
# What a stage does, and what to change where memory does not suffice for it.
STAGES = {
    "compile": ("compile the model", "pass --backend eager, or --dtype bfloat16"),
    "record": ("record the model's output", LESS),
    "profile": ("time the model", "pass a smaller --context or --new-tokens, or --dtype bfloat16"),
    "reference": ("keep the recorded text's keys and values", FEWER),
    "seeds": ("score seeds", FEWER),
    "trials": ("score trials", FEWER),
    "finalists": ("score finalists", FEWER),
    "validate": ("decode held-out prompts", LESS),
}


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
        """Store how many seconds a stage takes, and say what to change where its memory does not suffice.

        Args:
            on_top: they are added to the budget: others do not suffer from them.
        """
        begin = time.monotonic()
        with enough_memory(*STAGES.get(name, (f"run stage {name}", LESS))):
            yield
        seconds = time.monotonic() - begin
        self.spent[name] = self.spent.get(name, 0.0) + seconds
        if on_top:
            self.end += seconds
