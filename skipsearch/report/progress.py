"""Progress bars on stderr for the stages of a run; silent when nobody watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_WHAT = {
    "compile": "compile: about a minute once, then read from the disk",
    "warm-up": "warm-up: each way once",
    "record": "record: what the full model says",
    "profile": "profile: seconds of each part",
    "sensitivity": "search: one sublayer left out at a time",
    "trials": "search: trials",
    "finalists": "search: finalists on the whole trace",
    "calibrate": "calibrate: real decoding, sparse to dense masks",
    "validate": "validate: real decoding, held-out prompts",
    "audit": "audit: both ways of decoding, compared",
}


class Stages:
    """A bar for each stage, made when the stage first reports."""

    def __init__(self, bars: Progress | None, console: Console | None) -> None:
        self.bars, self.console = bars, console
        self.tasks: dict[str, TaskID] = {}
        self.last = time.monotonic()

    def stage(self, name: str, done: int, total: int, note: str = "") -> None:
        """Report `done` of `total` steps of a stage."""
        if self.bars is not None:
            if name not in self.tasks:
                self.tasks[name] = self.bars.add_task(_WHAT.get(name, name), total=total, note="")
            self.bars.update(self.tasks[name], completed=done, total=total, note=note)
        elif self.console is not None and (done >= total or time.monotonic() - self.last > 10):
            self.last = time.monotonic()  # a log file wants lines, not bars, and few of them
            self.console.print(f"{_WHAT.get(name, name)} {done}/{total} {note}".rstrip(), highlight=False)

    def trials(self, total: int) -> Callable[[int, float], None]:
        """A reporter of trials with the best prediction so far."""
        return lambda done, best: self.stage("trials", min(done, total), total, f"best {best:.0f} tokens/s")


@contextmanager
def stages(console: Console, quiet: bool) -> Iterator[Stages]:
    """Bars on a terminal, plain lines elsewhere, nothing when quiet."""
    if quiet or not console.is_terminal:
        yield Stages(None, None if quiet else console)
        return
    columns = (
        TextColumn("{task.description:<46}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        yield Stages(bars, console)
