"""Progress of the stages of a run on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_WHAT = {
    "compile": "compile: about a minute once, then read from the disk",
    "drafts": "compile: drafts of each form",
    "warm-up": "warm-up: each arm once",
    "record": "record: output of the full model",
    "profile": "profile: seconds of each sublayer, in percent",
    "reference": "search: keys and values of the recorded text",
    "sensitivity": "search: one sublayer skipped at a time",
    "trials": "search: trials",
    "finalists": "search: finalists on the whole trace",
    "calibrate": "calibrate: real decoding, sparse to dense plans",
    "validate": "validate: real decoding, held-out prompts",
    "audit": "audit: drafted against plain decoding",
}


class Stages:
    """Reports stages: a bar for each in `bars`, else lines on `console`, else nothing."""

    def __init__(self, bars: Progress | None = None, console: Console | None = None) -> None:
        self.bars, self.console = bars, console
        self.tasks: dict[str, TaskID] = {}
        self.notes: dict[str, str] = {}
        self.begun: dict[str, tuple[float, int]] = {}  # when a stage was first heard of, and where it was then
        self.last, self.said = time.monotonic(), ""  # when a line was printed, and which

    def stage(self, name: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of a stage are finished."""
        done, note = min(done, total), self.notes.get(name, "")
        if self.bars is not None:
            if name not in self.tasks:
                self.tasks[name] = self.bars.add_task(_WHAT.get(name, name), total=total, note="")
            self.bars.update(self.tasks[name], completed=done, total=total, note=note)
        elif self.console is not None:
            left = self._left(name, done, total)
            line = f"{_WHAT.get(name, name)} {done}/{total}{left} {note}".rstrip()
            # Few lines, so that a log file stays readable; what several models compile is one of them.
            if line != self.said and (done >= total or time.monotonic() - self.last > 10):
                self.last, self.said = time.monotonic(), line
                self.console.print(line, highlight=False)

    def _left(self, name: str, done: int, total: int) -> str:
        """What is left of a stage at its pace so far, in words."""
        at, before = self.begun.setdefault(name, (time.monotonic(), done))
        if done >= total or done <= before:
            return ""
        return f", about {(time.monotonic() - at) / (done - before) * (total - done):.0f} s left"

    def best(self, _trials: int, best: float) -> None:
        """Note the best predicted tokens per second, shown beside the trials."""
        self.notes["trials"] = f"best {best:.0f} tokens/s"


@contextmanager
def stages(console: Console, quiet: bool) -> Iterator[Stages]:
    """Bars on a terminal, plain lines elsewhere, nothing if `quiet`."""
    if quiet or not console.is_terminal:
        yield Stages(console=None if quiet else console)
        return
    columns = (
        TextColumn("{task.description:<48}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        yield Stages(bars)
