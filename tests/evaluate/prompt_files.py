"""Files of prompts in every format, and what is read from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from skipsearch.evaluate.prompts import Prompts

TEXTS = [f"def function_{i}(value):\n    return value * {i}" for i in range(8)]
LINES = [f"def function_{i}(value): return value * {i}" for i in range(8)]
Load = Callable[..., Prompts]


def everything(prompts: Prompts) -> set[tuple[int, ...]]:
    return {*prompts.calibration, *prompts.held_out}


def ids(tokenizer: Any, texts: list[str]) -> set[tuple[int, ...]]:
    return {tuple(tokenizer(text)["input_ids"]) for text in texts}


def write(path: Path, rows: dict[str, list[Any]]) -> Path:
    """A table by column, in the format of the suffix."""
    frame = pd.DataFrame(rows)
    match path.suffix:
        case ".txt":
            path.write_text("\n".join(next(iter(rows.values()))) + "\n")
        case ".json" | ".jsonl":
            lines = [json.dumps(dict(zip(rows, values, strict=True))) for values in zip(*rows.values(), strict=True)]
            path.write_text("\n".join(lines) + "\n")
        case ".csv":
            frame.to_csv(path, index=False)
        case ".parquet":
            frame.to_parquet(path)
    return path
