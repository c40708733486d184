"""Patience: a database server that does not answer for a while is asked again, so that its restart ends no worker."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError

from skipsearch.errors import StudyWarning, first_line

PATIENCE, LONGEST_PAUSE = 300.0, 5.0  # seconds for which a server is asked again; the longest pause between two times
T = TypeVar("T")


class Patience:
    """Calls what uses a server until it answers.

    A call that the server has carried out without being able to say so is repeated too: what it adds twice is refused
    by the database, or is a running trial that nobody runs, as that of a dead worker.

    Args:
        url: of the storage, as it may be shown.
        active: False for a file, whose faults do not pass by themselves.

    Attributes:
        seconds: for which the server did not answer so far.
    """

    def __init__(self, url: str, active: bool) -> None:
        self.url, self.active, self.seconds = url, active, 0.0

    def __call__(self, action: Callable[[], T]) -> T | None:
        """What the action returns; None if it had been carried out when the server was lost."""
        begin, pause = 0.0, 0.1
        while True:
            try:
                found = action()
            except Exception as error:
                if begin and any(isinstance(link, IntegrityError) for link in _chain(error)):
                    found = None
                else:
                    reason = lost(error) if self.active else None
                    if reason is None or (begin and time.monotonic() - begin > PATIENCE):
                        raise
                    if not begin:
                        begin = time.monotonic()
                        text = f"storage {self.url} does not answer ({reason}); asked again for {PATIENCE:.0f} s"
                        warnings.warn(text, StudyWarning, stacklevel=2)
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                    continue
            if begin:
                self.seconds += time.monotonic() - begin
            return found


def lost(error: BaseException) -> str | None:
    """Why a server did not answer; None if the error says something else."""
    for link in _chain(error):
        if isinstance(link, (OperationalError, InterfaceError)) or getattr(link, "connection_invalidated", False):
            return first_line(link.orig or link) if isinstance(link, DBAPIError) else first_line(link)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
