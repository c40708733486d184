"""Atomic writing of files, reading back those that stages leave, and which processes have ended in the middle of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
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
    return f"{os.getpid()}-{_TOKEN}@{_here()}"


def has_ended(process: str) -> bool:
    """Whether the process of this name has ended; False where that cannot be known, as on another host."""
    number, _, rest = process.partition("-")
    token, _, host = rest.partition("@")
    if os.name != "posix" or host != _here() or not re.fullmatch("[0-9]{1,9}", number):
        return False
    if int(number) == os.getpid():
        return token != _TOKEN
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # another user's
    return False


def _here() -> str:
    """Where numbers of processes mean the same: the host, and which of its containers."""
    with suppress(OSError):
        return f"{platform.node()}.{os.stat('/proc/self/ns/pid').st_ino}"
    return platform.node()


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
    # Keys are text now, tuples lists, and 1.0 is 1: tools that rewrite JSON spell these otherwise.
    plain = json.loads(json.dumps(value, allow_nan=False), parse_float=_whole)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _whole(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value


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
