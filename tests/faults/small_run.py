"""A small run: its files, and the calls with which its stages read them back."""

from __future__ import annotations

import functools
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_tiny
from transformers import AutoTokenizer

from skipsearch import search
from skipsearch.evaluate import validate
from skipsearch.model.load import DEMO
from skipsearch.search import prepare, run
from skipsearch.search.options import SearchOptions
from skipsearch.search.study import Study

SMALL = SearchOptions(
    trials=4, prompts=3, held_out=2, prompt_tokens=12, new_tokens=8, trial_tokens=6, rounds=1, backend="eager",
    time_budget=None,
)  # fmt: skip


class Anew(Exception):
    """The file counts as missing."""


def anew(*_: Any, **__: Any) -> Any:
    raise Anew


@functools.cache
def small_run(folder: Path) -> Any:
    """The folder after a small run, and the arguments of the calls by name of the function."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = make_tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=64)
    calls: dict[str, Any] = {}

    def noting(place: Any, name: str) -> None:
        function = getattr(place, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = args, kwargs
            return function(*args, **kwargs)

        patch.setattr(place, name, call)

    with pytest.MonkeyPatch.context() as patch:
        for place, name in (
            (prepare, "record_or_load"), (prepare, "profile_or_load"), (prepare, "priced_forms"),
            (run, "sensitivity_or_load"), (run, "Study"), (validate, "_read"),
        ):  # fmt: skip
            noting(place, name)
        search(model, tokenizer, out=folder, options=SMALL)
    with closing(sqlite3.connect(folder / "study.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return SimpleNamespace(folder=folder, calls=calls, model=model)


def opened(kept: Any, path: Path) -> Any:
    """What a study says that is read from this database."""
    (_, *args), kwargs = kept.calls["Study"]
    study = Study(f"sqlite:///{path}", *args, **kwargs)
    try:
        if not study.finished():
            raise Anew
        shared = {name: study.known(name) for name in ("identity", "space", "costs", "share", "job")}
        return study.best(9), study.memo, study.front(), shared, study.space
    finally:
        study.study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
