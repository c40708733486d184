"""Storage: the database of a study, opened so that several workers may share it."""

from __future__ import annotations

import functools
import random
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage

from skipsearch.errors import ResultsError, SkipsearchError, StudyMismatch, first_line, out_of_memory
from skipsearch.search.integrity import check_database, kept, tells_damage
from skipsearch.search.patience import Patience, lost
from skipsearch.search.prepare import STUDY

HEARTBEAT, GRACE = 5, 15  # seconds; the trial of a killed worker is run again after the grace period
ATTEMPTS, RACED = 10, ("already exists", "locked")  # to make the tables; what databases say when another one makes them
# Heartbeats, metric names and deterministic objectives are experimental in Optuna: its warnings about them.
EXPERIMENTAL = optuna.exceptions.ExperimentalWarning
FAULTS = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError)


# What Optuna's cache asks of a database.
ASKED = (
    "create_new_study", "set_study_user_attr", "set_study_system_attr", "get_study_id_from_name",
    "get_study_name_from_id", "get_study_directions", "get_study_user_attrs", "get_study_system_attrs",
    "get_all_studies", "_create_new_trial", "_set_trial_param", "get_trial_id_from_study_id_trial_number",
    "_get_best_trial_id", "set_trial_state_values", "set_trial_user_attr", "set_trial_system_attr", "get_trial",
    "_get_trials", "_get_stale_trial_ids",
)  # fmt: skip


class _Storage(RDBStorage):
    """A storage that waits for its server.

    Heartbeats that cannot be written are left out: the trial's own writes tell what is wrong, and in its thread.
    """

    patience: Patience

    def __init__(self, url: str, **kwargs: Any) -> None:
        try:
            super().__init__(url, **kwargs)
        except BaseException:
            if (engine := getattr(self, "engine", None)) is not None:
                engine.dispose()  # a server's connections do not close by themselves
            raise

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(*FAULTS, MemoryError):
            super().record_heartbeat(trial_id)


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def ask(self: _Storage, *args: Any, **kwargs: Any) -> Any:
        return self.patience(lambda: method(self, *args, **kwargs))

    return ask


for _name in ASKED:
    setattr(_Storage, _name, _patient(getattr(RDBStorage, _name)))


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
        reason = first_line(getattr(found, "orig", None) or found)
        mend = "free some space, or choose another with --storage or --out"
        if not url.startswith("sqlite") and lost(found) and "does not exist" not in reason:
            mend = "start its server and run the same command again, which goes on"
        raise ResultsError(f"storage {shown_url(url)} cannot be used ({reason}); {mend}") from None


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


def open_storage(url: str, new: bool = True) -> RDBStorage:
    """An RDB storage with heartbeat; SQLite runs in WAL mode, which made our trials twelve times faster.

    Args:
        new: whether a file or tables may be made.

    Raises:
        ResultsError: the database cannot be opened or is not one.
    """
    try:
        sqlite = url.startswith("sqlite")
        if sqlite and sqlalchemy.engine.make_url(url).database in (None, "", ":memory:"):
            raise ValueError("it is in memory, where no study is kept")
        if sqlite and not new and not Path(sqlalchemy.engine.make_url(url).database or "").exists():
            raise ValueError("there is no such file")
        if sqlite:
            check_database(url)
        if not new:
            _check_tables(url)
        # Connections are tried before they are used: a server's restart ends them all.
        storage = _made_with_tables(url, {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True})
        if sqlite:
            sqlalchemy.event.listen(storage.engine, "connect", _write_ahead)
            storage.engine.dispose()  # close the connections that were made without the listener
            with storage.engine.connect():
                pass
    except Exception as error:  # a damaged database raises anything
        if out_of_memory(error):
            raise
        raise ResultsError(
            f"storage {shown_url(url)} cannot be opened ({first_line(error)}); {_mend(error, new)}"
        ) from None
    return storage


def _check_tables(url: str) -> None:
    engine = sqlalchemy.create_engine(url)
    try:
        if not sqlalchemy.inspect(engine).has_table("studies"):
            raise ValueError("it holds no studies")
    finally:
        engine.dispose()


def shown_url(url: str) -> str:
    """A URL without its password."""
    try:
        made = sqlalchemy.engine.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return re.sub("(?<=/)[^/@]*@", "***@", url)
    query = {name: "hidden" if "password" in name.lower() else value for name, value in made.query.items()}
    return str(made.set(query=query).render_as_string(hide_password=True))


def _mend(error: Exception, new: bool) -> str:
    if isinstance(error, ImportError):
        return "install its driver, for PostgreSQL `pip install 'skipsearch[postgres]'`"
    return "choose another with --storage or --out" if new else "check --storage"


def _made_with_tables(url: str, engine: dict[str, Any]) -> _Storage:
    """The storage. Of several workers that make the tables of a new database at once, some fail and look again."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with warnings.catch_warnings(action="ignore", category=EXPERIMENTAL):
                storage = _Storage(url, heartbeat_interval=HEARTBEAT, grace_period=GRACE, engine_kwargs=engine)
            storage.patience = Patience(shown_url(url), active=not url.startswith("sqlite"))
            return storage
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError) as e:
            raced = isinstance(e, sqlalchemy.exc.IntegrityError) or any(word in str(e) for word in RACED)
            if not raced or attempt == ATTEMPTS:
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError("unreachable")


@tells_damage
def check_study(url: str, name: str, identity: dict[str, str]) -> None:
    """Open a storage before the work, and refuse a study of this name that was made with something else.

    Args:
        identity: what is known of it so far.

    Raises:
        StudyMismatch, ResultsError: the study is damaged.
    """
    study = _existing(open_storage(url), name)
    known = None if study is None else kept(study, "identity")
    if known is not None:
        must_agree(name, known, identity, identity.keys())


def _existing(storage: BaseStorage, name: str) -> optuna.Study | None:
    if name not in (study.study_name for study in storage.get_all_studies()):
        return None
    with warnings.catch_warnings(action="ignore", category=EXPERIMENTAL):
        return optuna.load_study(study_name=name, storage=storage)


@tells_damage
def stored(url: str, name: str, names: Sequence[str]) -> dict[str, Any]:
    """What is stored with a study under these names; None where there is nothing yet.

    Raises:
        StudyMismatch: there is no such study.
        ResultsError: the study is damaged; or there is no such database, of which none is made.
    """
    storage = open_storage(url, new=False)
    study = _existing(storage, name)
    if study is None:
        known = ", ".join(sorted(study.study_name for study in storage.get_all_studies())) or "none"
        raise StudyMismatch(
            f"study {name} is not in this storage, which has {known}; pass another --study, or prepare it with "
            f"`skipsearch run --storage ... --study {name}`"
        )
    # Some may be missing: an older version has written none.
    return {name: kept(study, name) if name in study.user_attrs else None for name in names}


def must_agree(name: str, known: Mapping[str, str], identity: Mapping[str, str], keys: Iterable[str]) -> None:
    if different := sorted(key for key in keys if known.get(key) != identity.get(key)):
        field = different[0]
        raise StudyMismatch(
            f"study {name} was made with another {', '.join(different)} ({field}: {known.get(field)!r} then, "
            f"{identity.get(field)!r} now); run with the old settings, or start a new study with --out or --study"
        )


def _write_ahead(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()
