"""Whole runs in forked processes, small and with costs that no clock measures, so that two of them find the same."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from counts import times
from transformers import AutoTokenizer

from skipsearch.errors import SkipsearchError
from skipsearch.evaluate.design import Arm, choose_design
from skipsearch.evaluate.prompts import PromptSource
from skipsearch.model.families import tiny_model
from skipsearch.model.load import DEMO, Loaded
from skipsearch.search.options import MAX_LENGTH, SearchOptions
from skipsearch.search.run import search
from skipsearch.search.storage import open_storage, storage_url

NAMES = ("take", "drop", "split", "join", "sort", "find")
TEXTS = tuple(f"def {name}(items, count):\n    return [count" for name in NAMES)
OPTIONS = SearchOptions(
    trials=times(16, 24), prompts=3, held_out=2, prompt_tokens=8, new_tokens=12, trial_tokens=6, rounds=1,
    backend="eager", time_budget=None, source=PromptSource(name="texts", texts=TEXTS),
)  # fmt: skip
STAGES = ("start", "record", "profile", "reference", "sensitivity", "trials", "finalists", "validate")
Act = Callable[[Callable[..., None]], Any]


def made_small(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """A random model of four layers whose costs are those of a made-up machine."""
    with tempfile.TemporaryDirectory() as folder:  # Optuna imports much at its first storage; once, not in each child
        open_storage(storage_url(Path(folder))).engine.dispose()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    loaded = Loaded(name="tiny", model=model, tokenizer=tokenizer, preset=None)
    design = choose_design(loaded.target, MAX_LENGTH)

    def timed(_sequence: Any, arm: Arm | None) -> list[tuple[float, float]]:
        if arm is None:
            return [(0.0, 1e-2)]
        costs = [1e-3, 1e-4, 1e-4, 1e-4, *[1.1e-3] * len(design.groups)]
        drafting = sum(n * cost for n, cost in zip(design.steps(arm, 0.5), costs, strict=True))
        return [(drafting, 1e-2 * (1 + 0.05 * arm.verified))]

    monkeypatch.setattr("skipsearch.evaluate.profile.timed_arm", timed)
    monkeypatch.setattr("skipsearch.search.prepare.form_seconds", lambda _target: {"run": 0.0})
    return loaded


def run(loaded: Loaded, folder: Path, say: Callable[..., None], **changes: Any) -> dict[str, Any]:
    """A run, what it found, and its trials without their seconds; `say` is told of each step."""
    result = search(
        loaded, out=folder, options=replace(OPTIONS, **changes), progress=lambda stage, done, _total: say(stage, done),
        report=lambda done, _best: say("finished", done),
    )  # fmt: skip
    rows = [{**row, "seconds": None, "trial": None} for row in result.front]
    predicted = result.predicted
    return {
        "plan": result.plan.to_dict(), "policy": repr(predicted.policy), "front": rows,
        "predicted": [predicted.tokens_per_second, predicted.acceptance_rate, predicted.speedup],
        "trials": trials_in(folder),
    }  # fmt: skip


def trials_in(folder: Path) -> list[Any]:
    """Finished trials in order, with parameters, value and attributes; read without Optuna, and without staying open.

    Their numbers are left out: a plan that is tried again has another one.
    """
    if not (folder / "study.db").exists():
        return []
    with closing(sqlite3.connect(folder / "study.db")) as base:
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if not base.execute("SELECT 1 FROM sqlite_master WHERE name = 'trial_values'").fetchone():
            return []
        found = []
        for (key,) in base.execute("SELECT trial_id FROM trials WHERE state = 'COMPLETE' ORDER BY number").fetchall():
            row: list[Any] = []
            for what in (
                "param_name, param_value FROM trial_params", "objective, value FROM trial_values",
                "key, value_json FROM trial_user_attributes",
            ):  # fmt: skip
                pairs = base.execute(f"SELECT {what} WHERE trial_id = ?", (key,)).fetchall()
                row.append(sorted(list(pair) for pair in pairs if pair[0] not in ("seconds", "check")))
            found.append(row)
        return found


@dataclass
class Ended:
    """How a child ended: the signal that killed it, its value, what it raised, what it wrote to stderr."""

    killed: int = 0
    value: Any = None
    kind: str = ""
    raised: str = ""
    ours: bool = False
    stderr: str = ""
    said: list[list[Any]] = field(default_factory=list)
    at: dict[str, list[float]] = field(default_factory=dict)  # seconds of what was said, by its first word

    def assert_one_sentence(self, *words: str) -> None:
        """It raised one of our errors, in one sentence, and no thread wrote a traceback."""
        assert self.ours and len(self.raised.splitlines()) == 1, (self.kind, self.raised, self.stderr)
        assert "Traceback" not in self.stderr, self.stderr
        assert any(word in self.raised for word in words), self.raised

    def assert_finished(self) -> Any:
        assert self.value is not None, (self.killed, self.kind, self.raised, self.stderr)
        return self.value


def forked(act: Act, kill: tuple[str, float] | None = None, heard: Callable[[list[Any]], None] | None = None) -> Ended:
    """Run `act` in a child of this process, which has imported everything.

    Args:
        act: given a function that tells this process something.
        kill: the first word of what the child says, and the seconds after it at which the child is killed.
        heard: called with what the child says.
    """
    read, write = os.pipe()
    with tempfile.TemporaryFile() as errors, warnings.catch_warnings(action="ignore"):
        begin, pid = time.monotonic(), os.fork()
        if pid == 0:
            os.close(read)
            _child(act, write, errors.fileno())
        os.close(write)
        ended = Ended()
        with open(read) as lines:
            for line in lines:
                try:
                    word, *rest = json.loads(line)
                except ValueError:
                    break  # killed in the middle of it
                ended.at.setdefault(word, []).append(time.monotonic() - begin)
                if word == "end":
                    ended.value, ended.kind, ended.raised, ended.ours = rest
                else:
                    ended.said.append([word, *rest])
                    if heard is not None:
                        heard([word, *rest])
                if kill is not None and word == kill[0]:
                    time.sleep(kill[1])
                    os.kill(pid, signal.SIGKILL)
                    kill = None
        ended.killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        errors.seek(0)
        ended.stderr = errors.read().decode(errors="replace")
    return ended


def _child(act: Act, write: int, errors: int) -> None:
    def say(*words: Any) -> None:
        os.write(write, (json.dumps(words) + "\n").encode())

    try:
        os.dup2(errors, 2)
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        threading.excepthook = threading.__excepthook__
        try:
            say("start", 0)
            say("end", act(say), "", "", False)
        except BaseException as error:
            ours = isinstance(error, SkipsearchError)
            text = str(error) if ours else "".join(traceback.format_exception(error))[-9000:]
            say("end", None, type(error).__name__, text, ours)
    finally:
        os._exit(0)


class Points:
    """Counts the moments at which files and the study change; the process is killed at one of them."""

    def __init__(self, last: tuple[str, int] | None = None) -> None:
        self.last, self.counts = last, dict[str, int]()

    def pass_by(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if (kind, self.counts[kind]) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """In a child alone: nothing puts it back."""
        for name in ("fsync", "replace"):
            setattr(os, name, self._around(name, getattr(os, name)))
        for event in ("before_cursor_execute", "commit"):
            sqlalchemy.event.listen(sqlalchemy.engine.Engine, event, lambda *_, event=event: self.pass_by(event))

    def _around(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.pass_by(f"before {name}")
            found = original(*args)
            self.pass_by(f"after {name}")
            return found

        return call


def assert_whole(folder: Path) -> None:
    """Every file that is there is complete."""
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


def assert_tidy(folder: Path) -> None:
    """Every file is complete, and nothing temporary is left."""
    assert_whole(folder)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert {"mask.json", "trials.csv", "front.json", "summary.json"} <= {path.name for path in folder.iterdir()}
