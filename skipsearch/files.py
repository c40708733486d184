"""Atomic writing of files, reading back those that stages leave, and which processes have ended in the middle of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from skipsearch.errors import ResultsError

T = TypeVar("T")
SUM = "sha256"  # the field of a checked file
_TOKEN = secrets.token_hex(4)  # numbers of processes are used again


def this_process() -> str:
    """The name of this process, to be stored with what it has not finished yet."""
    return f"{os.getpid()}-{_TOKEN}@{platform.node()}"


def has_ended(process: str) -> bool:
    """Whether the process of this name has ended; False where that cannot be known, as on another host."""
    number, _, rest = process.partition("-")
    token, _, host = rest.partition("@")
    if os.name != "posix" or host != platform.node() or not number.isdigit():
        return False
    if int(number) == os.getpid():
        return token != _TOKEN
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's
    return False


def open_folder(folder: Path) -> None:
    """Make a results folder, find out before the work whether it can be written to, and remove what the killed left.

    Raises:
        ResultsError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a name of our own might be a link to another file
            pass
    except OSError as error:
        raise ResultsError(
            f"results folder {folder} cannot be written to ({error.strerror}); choose another with --out"
        ) from error
    for path in folder.glob(".*~*@*"):  # temporary files of `write_text`
        if has_ended(path.name.rpartition("~")[2]):
            with suppress(OSError):
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: readers see the old file or the new one, never a part of it.

    Raises:
        ResultsError: the folder cannot be written to, or the disk is full; the old file stays as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="utf-8",
            dir=path.parent,
            prefix=f".{path.name}.",
            suffix=f"~{this_process()}",
            delete=False,
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
            f"cannot write {path} ({error.strerror or error}); free some space or choose another folder with --out"
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
