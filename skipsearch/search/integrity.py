"""Integrity of a study: a database, attribute or trial that was damaged is refused in one sentence, never scored with.

Attributes of the study hold their checksum, and finished trials have one as an attribute. Studies of earlier versions
have neither, and are taken as they are.
"""

from __future__ import annotations

import functools
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sqlalchemy.engine import make_url

from skipsearch.errors import ResultsError, SkipsearchError, first_line, out_of_memory
from skipsearch.files import checksum
from skipsearch.search.attributes import unpacked

CHECK = "check"  # a trial's attribute
NO_DAMAGE = ("disk is full", "disk I/O error", "readonly database", "unable to open", "database is locked")
SEALS = ({"value", "sha256"}, {"parts", "sha256"})
P = ParamSpec("P")
T = TypeVar("T")


def tells_damage(opens: Callable[P, T]) -> Callable[P, T]:
    """Turn whatever reading a damaged study raises into one sentence: each layer of the libraries has its own kinds."""

    @functools.wraps(opens)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return opens(*args, **kwargs)
        except SkipsearchError:
            raise
        except Exception as error:
            if out_of_memory(error) or any(word in said for said in _chain(error) for word in NO_DAMAGE):
                raise
            raise _damaged(f"cannot be read ({first_line(error)})") from error

    return told


def _chain(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def _damaged(what: str) -> ResultsError:
    return ResultsError(f"the study {what}; delete its database if it is damaged, or choose another with --out")


def check_database(url: str) -> None:
    """Check the whole structure of a SQLite database, if there is one.

    Raises:
        ValueError, sqlite3.Error: it is damaged.
    """
    path = make_url(url).database
    if not path or not Path(path).is_file():
        return
    with closing(sqlite3.connect(path, timeout=60)) as connection:
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        orphans = connection.execute("PRAGMA foreign_key_check").fetchone()
    if found != "ok" or orphans is not None:
        raise ValueError(f"its database is damaged: {found if found != 'ok' else 'rows belong to nothing'}")


def kept(study: Any, name: str) -> Any:
    """An attribute of the study; None if there is none yet.

    Raises:
        ResultsError: it was changed or lost.
    """
    scored = any(_is_finished(trial) for trial in study.get_trials(deepcopy=False))  # first: others may be at work
    attributes = study.user_attrs
    stored, new = attributes.get(name), _is_sealed(attributes.get("identity"))
    if stored is None:
        if attributes if name == "identity" else new and scored:
            raise _damaged(f"has lost its {name}")
        return None
    if not new and not _is_sealed(stored):
        return stored
    with suppress(LookupError, ValueError, TypeError, RecursionError, zlib.error):
        if _is_sealed(stored) and stored.keys() in SEALS:
            value = unpacked(study, name, stored["parts"]) if "parts" in stored else stored["value"]
            if stored["sha256"] == checksum(value):
                return value
    raise _damaged(f"holds another {name} than was stored")


def _is_sealed(stored: Any) -> bool:
    return isinstance(stored, dict) and any(stored.keys() & seal for seal in SEALS)


def _is_finished(trial: Any) -> bool:
    return bool(trial.state.name == "COMPLETE")


def sum_of(
    params: Mapping[str, Any], distributions: Mapping[str, Any], values: Sequence[float], attributes: Mapping[str, Any]
) -> str:
    """The checksum of a trial."""
    ranges = {name: [d.low, d.high, d.step, d.log] for name, d in distributions.items()}
    others = {name: value for name, value in attributes.items() if name != CHECK}
    return checksum([params, ranges, [float(value) for value in values], others])[:16]


def check_trials(study: Any, bounds: Mapping[str, tuple[int, int]]) -> None:
    """Check all trials of a study.

    Raises:
        ResultsError: one was changed after it was finished, is missing, or is not of this space.
    """
    new = _is_sealed(study.user_attrs.get("identity"))
    for number, trial in enumerate(study.get_trials(deepcopy=False)):
        if trial.number != number:
            raise _damaged(f"has lost trial {number}")
        for name, value in trial.params.items():
            if name not in bounds or not bounds[name][0] <= value <= bounds[name][1]:
                raise _damaged(f"holds trial {number} with {name} = {value}, which is not of its space")
        checked = _is_finished(trial) and (new or CHECK in trial.user_attrs)
        found = sum_of(trial.params, trial.distributions, trial.values, trial.user_attrs) if checked else None
        if checked and trial.user_attrs.get(CHECK) != found:
            raise _damaged(f"holds trial {number}, which was changed after it was finished")
