"""Storage: the database of a study, opened so that several workers may share it."""

from __future__ import annotations

import json
import random
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import sqlalchemy
from optuna.storages import RDBStorage

from skipsearch.errors import ResultsError, SkipsearchError, first_line, out_of_memory
from skipsearch.search.integrity import check_database
from skipsearch.search.prepare import STUDY

HEARTBEAT, GRACE = 5, 15  # seconds; the trial of a killed worker is run again after the grace period
ATTEMPTS, RACED = 10, ("already exists", "locked")  # to make the tables; what databases say when another one makes them
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
        mend = "free some space, or choose another with --storage or --out"
        raise ResultsError(f"storage {_shown(url)} cannot be used ({reason}); {mend}") from None


def storage_url(folder: Path) -> str:
    """The URL of a results folder's own storage.

    Raises:
        ResultsError: it is a link, and might lead to a file of another program.
    """
    path = folder.resolve() / STUDY
    if path.is_symlink():
        raise ResultsError(f"database {path} is a link to {path.readlink()}; name that file with --storage")
    for name in (str(path), quote(str(path))):
        if sqlalchemy.engine.make_url(f"sqlite:///{name}").database == str(path):
            return f"sqlite:///{name}"
    raise ResultsError(f"database {path} cannot be named in a URL; choose another folder with --out")


def open_storage(url: str) -> RDBStorage:
    """An RDB storage with heartbeat; SQLite runs in WAL mode, which made our trials twelve times faster.

    Raises:
        ResultsError: the database cannot be opened or is not one.
    """
    try:
        sqlite = url.startswith("sqlite")
        if sqlite and sqlalchemy.engine.make_url(url).database in (None, "", ":memory:"):
            raise ValueError("it is in memory, where no study is kept")
        if sqlite:
            check_database(url)
        storage = _made_with_tables(url, {"connect_args": {"timeout": 60}} if sqlite else None)
        if sqlite:
            sqlalchemy.event.listen(storage.engine, "connect", _write_ahead)
            storage.engine.dispose()  # close the connections that were made without the listener
            with storage.engine.connect():
                pass
    except Exception as error:  # a damaged database raises anything
        if out_of_memory(error):
            raise
        raise ResultsError(f"storage {_shown(url)} cannot be opened ({first_line(error)}); {_mend(error)}") from None
    return storage


def _shown(url: str) -> str:
    """A URL without its password."""
    try:
        return str(sqlalchemy.engine.make_url(url).render_as_string(hide_password=True))
    except sqlalchemy.exc.ArgumentError:
        return url


def _mend(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install its driver, for PostgreSQL `pip install 'skipsearch[postgres]'`"
    return "choose another with --storage or --out"


def _made_with_tables(url: str, engine: dict[str, Any] | None) -> RDBStorage:
    """The storage. Of several workers that make the tables of a new database at once, some fail and look again."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with warnings.catch_warnings(action="ignore", category=EXPERIMENTAL):
                return _Storage(url, heartbeat_interval=HEARTBEAT, grace_period=GRACE, engine_kwargs=engine)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError) as e:
            raced = isinstance(e, sqlalchemy.exc.IntegrityError) or any(word in str(e) for word in RACED)
            if not raced or attempt == ATTEMPTS:
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError("unreachable")


def set_once(study: optuna.Study, name: str, value: Any) -> None:
    """Store a user attribute of the study, unless it has one of this name."""
    with suppress(sqlalchemy.exc.IntegrityError):  # study and key are unique: another worker was faster
        _insert(study, "study", study._study_id, {name: value})


def set_attributes(study: optuna.Study, trial_id: int, attributes: Mapping[str, Any]) -> None:
    """Store new user attributes of a running trial at once; Optuna takes a transaction for each."""
    _insert(study, "trial", trial_id, attributes)


def _insert(study: optuna.Study, kind: str, number: int, attributes: Mapping[str, Any]) -> None:
    columns = (f"{kind}_id", "key", "value_json")
    table = sqlalchemy.table(f"{kind}_user_attributes", *map(sqlalchemy.column, columns))
    rows = [dict(zip(columns, (number, key, json.dumps(value)), strict=True)) for key, value in attributes.items()]
    with _engine(study).begin() as connection:
        connection.execute(table.insert(), rows)


def never_beaten(study: optuna.Study, trial_ids: Collection[int]) -> set[int]:
    """Those of the trials whose worker has not told once that it is alive; Optuna never takes these for dead."""
    beats = sqlalchemy.table("trial_heartbeats", sqlalchemy.column("trial_id"))
    with _engine(study).connect() as connection:
        found = connection.execute(sqlalchemy.select(beats.c.trial_id).where(beats.c.trial_id.in_(trial_ids)))
        return set(trial_ids) - {row[0] for row in found}


def _engine(study: optuna.Study) -> Any:
    storage: Any = study._storage
    return getattr(storage, "_backend", storage).engine  # Optuna may wrap the storage in a cache


def _write_ahead(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()
