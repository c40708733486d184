"""Storage: the database of a study, opened so that several workers may share it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

from skipsearch.errors import ResultsError, SkipsearchError
from skipsearch.search.prepare import STUDY

HEARTBEAT, GRACE = 5, 15  # seconds; the trial of a killed worker is run again after the grace period
# Heartbeats, metric names and deterministic objectives are experimental in Optuna: its warnings about them.
EXPERIMENTAL = optuna.exceptions.ExperimentalWarning
FAULTS = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError)


class _Storage(RDBStorage):
    """Heartbeats that cannot be written are left out: the trial's own writes tell what is wrong, and in its thread."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(*FAULTS, MemoryError):
            super().record_heartbeat(trial_id)


@contextmanager
def storage_faults(url: str) -> Iterator[None]:
    """Around all use of a study.

    Raises:
        ResultsError: the database could not be read or written, whatever Optuna made of that.
    """
    try:
        yield
    except SkipsearchError:
        raise
    except Exception as error:
        found: BaseException | None = None
        link: BaseException | None = error
        while link is not None:  # the first fault is the reason; Optuna fails anew where it reports it
            found = link if isinstance(link, FAULTS) else found
            link = link.__cause__ or link.__context__
        if found is None:
            raise
        reason = str(getattr(found, "orig", None) or found).strip().splitlines()[0]
        raise ResultsError(
            f"storage {url} cannot be used ({reason}); free some space, or choose another with --storage or --out"
        ) from None


def storage_url(folder: Path) -> str:
    """The URL of a results folder's own storage."""
    return f"sqlite:///{(folder / STUDY).resolve()}"


def open_storage(url: str) -> RDBStorage:
    """An RDB storage with heartbeat; SQLite runs in WAL mode, which made our trials twelve times faster.

    Raises:
        ResultsError: the database cannot be opened or is not one.
    """
    try:
        sqlite = url.startswith("sqlite")
        with warnings.catch_warnings(action="ignore", category=EXPERIMENTAL):
            storage = _Storage(
                url, heartbeat_interval=HEARTBEAT, grace_period=GRACE,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
                engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else None,
            )  # fmt: skip
        if sqlite:
            sqlalchemy.event.listen(storage.engine, "connect", _write_ahead)
            storage.engine.dispose()  # close the connections that were made without the listener
            with storage.engine.connect():
                pass
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ResultsError(
            f"storage {url} cannot be opened ({reason}); choose another with --storage or --out"
        ) from None
    return storage


def _write_ahead(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()
