"""Atomic writing of files, and reading back those that stages leave: a changed one counts as missing."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from skipsearch.errors import ResultsError

T = TypeVar("T")
SUM = "sha256"  # the field of a checked file


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: readers see the old file or the new one, never a part of it.

    Raises:
        ResultsError: the folder cannot be written to, or the disk is full; the old file stays as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise ResultsError(
            f"cannot write {path}: {error.strerror or error}; choose another folder with --out"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON; ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def checksum(value: Any) -> str:
    """SHA-256 of a value as JSON gives it back; ValueError for NaN and infinity."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # keys are text now, and tuples lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """`write_json` with the checksum of the rest in a field, for `read_checked`."""
    write_json(path, {**value, SUM: checksum(value)})


def read_checked(path: Path, take: Callable[[Any], T | None]) -> T | None:
    """What `take` makes of a file of `write_checked`. None if it is missing, was changed or is of another form.

    Files of earlier versions hold no checksum, and are taken as they are.
    """
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        data = json.loads(path.read_text(encoding="utf-8"))
        known = data.pop(SUM, None)
        if known is None or known == checksum(data):
            return take(data)
    return None


def results_folder(name: str) -> Path:
    """The folder for the results on a model: inside results/, whatever its name holds."""
    inside = "".join("--" if c in "/\\" else "-" if not c.isprintable() else c for c in name).strip(". ")
    return Path("results") / (inside or "model")
