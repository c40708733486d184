"""Attributes of studies and trials that Optuna would write one by one: at once, once, and in parts where large."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import sqlalchemy

from skipsearch.files import checksum

LARGE = 2000  # characters; longer values are packed, where the dashboard does not show them
MOST = 10_000  # parts
PART = 60_000  # characters of a row: MySQL takes no longer ones
Rows = Mapping[str, Any]


def sealed(value: Any) -> dict[str, Any]:
    """A value as an attribute of the study, with its checksum."""
    return {"value": value, "sha256": checksum(value)}


def set_once(study: Any, name: str, value: Any) -> None:
    """Store an attribute of the study with its checksum, unless it has one of this name."""
    text = json.dumps(value)
    rows: Rows = {name: sealed(value)}
    parts: Rows = {}
    if len(text) > LARGE:
        packed = base64.b64encode(zlib.compress(text.encode())).decode()
        pieces = [packed[first : first + PART] for first in range(0, len(packed), PART)]
        rows = {name: {"parts": len(pieces), "sha256": rows[name]["sha256"]}}
        parts = _named(name, pieces)
    number = study._study_id
    with suppress(sqlalchemy.exc.IntegrityError):  # study and key are unique: another worker was faster
        _insert(study, ("study_user", number, rows), ("study_system", number, parts))


def unpacked(study: Any, name: str, parts: int) -> Any:
    """The value of an attribute that is stored in parts.

    Raises:
        LookupError, ValueError, zlib.error: a part is missing or damaged.
    """
    if not 0 < parts < MOST:
        raise ValueError(f"{parts} parts")
    found = study._storage.get_study_system_attrs(study._study_id)
    text = "".join(found[key] for key in _named(name, range(parts)))
    return json.loads(zlib.decompress(base64.b64decode(text, validate=True)))


def _named(name: str, pieces: Collection[Any]) -> dict[str, Any]:
    return {f"skipsearch:{name}:{number}": piece for number, piece in enumerate(pieces)}


def set_attributes(study: Any, trial_id: int, attributes: Rows) -> None:
    """Store new user attributes of a running trial at once; Optuna takes a transaction for each."""
    _insert(study, ("trial_user", trial_id, attributes))


def _insert(study: Any, *tables: tuple[str, int, Rows]) -> None:
    """Insert all rows in one transaction; each table is named by owner and kind, with the owner's id."""
    storage = backend(study)

    def insert() -> None:
        with storage.engine.begin() as connection:
            for name, number, values in tables:
                columns = (f"{name.partition('_')[0]}_id", "key", "value_json")
                table = sqlalchemy.table(f"{name}_attributes", *map(sqlalchemy.column, columns))
                rows = [dict(zip(columns, (number, k, json.dumps(v)), strict=True)) for k, v in values.items()]
                if rows:
                    connection.execute(table.insert(), rows)

    storage.patience(insert)


def never_beaten(study: Any, trial_ids: Collection[int]) -> set[int]:
    """Those of the trials whose worker has not told once that it is alive; Optuna never takes these for dead."""
    beats, storage = sqlalchemy.table("trial_heartbeats", sqlalchemy.column("trial_id")), backend(study)

    def select() -> set[int]:
        with storage.engine.connect() as connection:
            found = connection.execute(sqlalchemy.select(beats.c.trial_id).where(beats.c.trial_id.in_(trial_ids)))
            return set(trial_ids) - {row[0] for row in found}

    return storage.patience(select) or set()


def backend(study: Any) -> Any:
    """The storage that owns the database's connections; Optuna wraps it in a cache."""
    return getattr(study._storage, "_backend", study._storage)
