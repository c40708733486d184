"""Storage: the database of a study, opened so that several workers may share it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

from skipsearch.errors import ResultsError, first_line
from skipsearch.search.integrity import check_database
from skipsearch.search.prepare import STUDY

HEARTBEAT, GRACE = 5, 15  # seconds; the trial of a killed worker is run again after the grace period
# Heartbeats, metric names and deterministic objectives are experimental in Optuna: its warnings about them.
EXPERIMENTAL = optuna.exceptions.ExperimentalWarning


def storage_url(folder: Path) -> str:
    """The URL of a results folder's own storage.

    Raises:
        ResultsError: it is a link, and might lead to a file of another program.
    """
    path = folder.resolve() / STUDY
    if path.is_symlink():
        raise ResultsError(f"database {path} is a link to {path.readlink()}; name that file with --storage")
    return f"sqlite:///{path}"


def open_storage(url: str) -> RDBStorage:
    """An RDB storage with heartbeat; SQLite runs in WAL mode, which made our trials twelve times faster.

    Raises:
        ResultsError: the database cannot be opened or is not one.
    """
    try:
        sqlite = url.startswith("sqlite")
        if sqlite:
            check_database(url)
        with warnings.catch_warnings(action="ignore", category=EXPERIMENTAL):
            storage = RDBStorage(
                url, heartbeat_interval=HEARTBEAT, grace_period=GRACE,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
                engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else None,
            )  # fmt: skip
        if sqlite:
            sqlalchemy.event.listen(storage.engine, "connect", _write_ahead)
            storage.engine.dispose()  # close the connections that were made without the listener
            with storage.engine.connect():
                pass
    except Exception as error:  # a damaged database raises anything
        raise ResultsError(
            f"storage {url} cannot be opened ({first_line(error)}); choose another with --storage or --out"
        ) from None
    return storage


def _write_ahead(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()
