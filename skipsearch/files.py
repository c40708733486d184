"""Atomic writing of files."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from skipsearch.errors import ResultsError


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
