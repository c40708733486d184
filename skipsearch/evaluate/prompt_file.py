"""Prompt files: the rows of text, JSON, CSV and Parquet files, as people save them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

from skipsearch.errors import PromptError, first_line, shown

FORMATS = (".txt", ".json", ".jsonl", ".csv", ".parquet")
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, by column; of a text file, its lines as column "text".

    Raises:
        PromptError: it is missing, empty, not in UTF-8, or not in the format of its suffix.
    """
    check_file(path)
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            from pyarrow import parquet  # slow to import

            return cast(list[Row], parquet.read_table(path).to_pylist())
        if kind == ".csv":
            return _csv(text_of(path))
    except PromptError:
        raise
    except Exception as error:  # the readers raise kinds of their own
        raise PromptError(
            f"prompt file {path} cannot be read as {kind[1:]} ({first_line(error)}); give a .txt, .jsonl, .csv or "
            f".parquet file"
        ) from error
    text = text_of(path)
    return [{"text": line} for line in _lines(text)] if kind == ".txt" else _json(text, path)


def check_file(path: Path) -> None:
    """Raise PromptError if there is no such file, or nothing in it."""
    if not path.is_file():
        raise PromptError(f"prompt file {path} does not exist; check --prompts")
    if not path.stat().st_size:
        raise PromptError(f"prompt file {path} is empty; add at least 4 prompts")


def text_of(path: Path) -> str:
    """A file's text, without the byte-order mark that some editors write.

    Raises:
        PromptError: it is not in UTF-8.
    """
    data = path.read_bytes()
    try:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("it is in UTF-16")
        return data.decode("utf-8-sig")
    except ValueError as error:
        why = f"byte {error.start} is none" if isinstance(error, UnicodeDecodeError) else str(error)
        raise PromptError(f"prompt file {path} is not in UTF-8 ({why}); save it as UTF-8") from error


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")  # splitlines also cuts at separators in text


def _csv(text: str) -> list[Row]:
    import pandas as pd  # slow to import

    return cast(list[Row], pd.read_csv(io.StringIO(text), keep_default_na=False).to_dict("records"))


def _json(text: str, path: Path) -> list[Row]:
    """Objects one a line, or a list of them."""
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"prompt file {path} is no JSON list ({first_line(error)}); mend the file") from error
    else:
        rows = []
        for number, line in enumerate(_lines(text), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise PromptError(
                    f"line {number} of prompt file {path} is not JSON ({first_line(error)}); mend the line"
                ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise PromptError(
                f"row {number} of prompt file {path} is {shown(row, 40)}, must be an object with a column; "
                f'write {{"prompt": ".."}}'
            )
    return cast(list[Row], rows)
