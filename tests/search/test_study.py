"""The study under faults: killed, interrupted, repeated, or pointed at the wrong set-up."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from skipsearch import DraftPlan, SkipMask
from skipsearch.errors import ResultsError, StudyMismatch
from skipsearch.evaluate.objective import Score
from skipsearch.model.space import Space
from skipsearch.policy import DraftPolicy
from skipsearch.search.options import SAMPLERS
from skipsearch.search.storage import open_storage, storage_url
from skipsearch.search.study import Study

SPACE = Space(num_layers=4, fixed=SkipMask(attention=[0], num_layers=4))
IDENTITY = {"model": "abc", "prompts": "def"}
EMPTY = DraftPlan(SkipMask(num_layers=4))
BEST = DraftPlan(SkipMask(attention=[1, 3], mlp=[2], num_layers=4))


def scorer(plan: DraftPlan) -> Score:
    """A smooth hill with its top at BEST."""
    return Score(
        plan=plan, policy=DraftPolicy(max_length=3, exit_threshold=0.4),
        tokens_per_second=100.0 - len(plan.skip ^ BEST.skip), speedup=1.0, acceptance_rate=0.5, tau=2.0, cost_ratio=0.5,
    )  # fmt: skip


def open_study(folder: Path, sampler: str = "random", identity: dict[str, str] = IDENTITY) -> Study:
    return Study(storage_url(folder), "search", SPACE, identity, sampler, seed=0)


def nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_finds_the_top_of_a_small_hill(sampler: str, tmp_path: Path) -> None:
    """The contract of a sampler: proposes masks of the space, gets better, stops at the number of trials."""
    study = open_study(tmp_path, sampler)
    study.enqueue([("empty", EMPTY)])
    study.optimize(scorer, trials=40, time_budget=None, report=nothing)
    assert len(study.finished()) == 40
    plan, number = study.best(1)[0]
    assert scorer(plan).tokens_per_second >= (100 if sampler == "trust-region" else 97)
    attributes = study.finished()[number].user_attrs
    assert (attributes["max_length"], attributes["exit_threshold"]) == (3, 0.4)
    assert all(not study.plan_of(t).skip.skips("attention", 0) for t in study.finished())


def test_seeds_come_first_and_once(tmp_path: Path) -> None:
    """Prevents warm starts from being tried late, or again on resuming."""
    seeds = [("empty", EMPTY), ("best", BEST)]
    study = open_study(tmp_path)
    study.enqueue(seeds)
    study.enqueue(seeds)
    study.optimize(scorer, trials=3, time_budget=None, report=nothing)
    plans = [study.plan_of(t) for t in study.finished()]
    assert plans[:2] == [plan for _, plan in seeds] and plans.count(BEST) == 1
    assert study.finished()[1].user_attrs["seed"] == "best"


def test_two_workers_share_the_seeds(tmp_path: Path) -> None:
    """Prevents a worker's own queue from repeating, or from letting the sampler overtake, what another has begun."""
    seeds = [(str(layer), DraftPlan(SkipMask(mlp=[layer], num_layers=4))) for layer in range(4)]
    workers = [open_study(tmp_path, "trust-region") for _ in range(2)]
    for worker in workers:
        worker.enqueue(seeds)
    for trials in range(1, 7):
        workers[trials % 2].optimize(scorer, trials=trials, time_budget=None, report=nothing)
    trials_now = workers[0].finished()
    assert [t.user_attrs.get("seed") for t in trials_now[:4]] == ["0", "1", "2", "3"]
    assert len({workers[0].plan_of(t) for t in trials_now}) == 6


def test_plans_are_scored_once(tmp_path: Path) -> None:
    """Prevents replay from being paid twice for one plan, within a run and after resuming."""
    calls: list[DraftPlan] = []

    def counting(plan: DraftPlan) -> Score:
        calls.append(plan)
        return scorer(plan)

    for trials in (60, 90):
        open_study(tmp_path).optimize(counting, trials=trials, time_budget=None, report=nothing)
    assert len(calls) == len(set(calls))


def test_another_set_up_is_refused_by_name(tmp_path: Path) -> None:
    """Prevents scores of two models or prompt sets from being mixed in one study."""
    open_study(tmp_path)
    with pytest.raises(StudyMismatch, match=r"another prompts \(prompts: 'def' then, 'xyz' now\)"):
        open_study(tmp_path, identity={**IDENTITY, "prompts": "xyz"})
    open_study(tmp_path)


def test_write_ahead_log_is_on(tmp_path: Path) -> None:
    """Prevents SQLite's default, twelve times slower for trials of many parameters."""
    storage = open_storage(storage_url(tmp_path))
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1


def test_unusable_storage_is_one_sentence(tmp_path: Path) -> None:
    """Prevents a SQLAlchemy traceback for a file that is no database, or a driver that is missing."""
    (tmp_path / "study.db").write_text("this is not a database, and long enough to be read as a header")
    for url in (storage_url(tmp_path), "nonsense", "postgresql+nodriver://host/db"):
        with pytest.raises(ResultsError, match="cannot be opened") as caught:
            open_storage(url)
        assert "\n" not in str(caught.value)


def test_time_budget_ends_the_search(tmp_path: Path) -> None:
    """Prevents a budget from being ignored."""

    def slow(plan: DraftPlan) -> Score:
        time.sleep(0.05)
        return scorer(plan)

    study = open_study(tmp_path)
    study.optimize(slow, trials=10_000, time_budget=1.0, report=nothing)
    assert 1 <= len(study.finished()) < 100


def test_an_interruption_keeps_what_is_finished(tmp_path: Path) -> None:
    """Prevents Ctrl-C from losing trials, or the plan it hit."""
    study, done = open_study(tmp_path), []

    def interrupted(plan: DraftPlan) -> Score:
        if len(done) == 5:
            done.append(plan)
            raise KeyboardInterrupt
        done.append(plan)
        return scorer(plan)

    with pytest.raises(KeyboardInterrupt):
        study.optimize(interrupted, trials=20, time_budget=None, report=nothing)
    again = open_study(tmp_path)
    assert len(again.finished()) == 5
    again.enqueue([])
    again.optimize(scorer, trials=20, time_budget=None, report=nothing)
    assert len(again.finished()) == 20 and done[5] in again.memo


WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_study import open_study, scorer, nothing
def slow(plan):
    time.sleep(0.05)
    return scorer(plan)
open_study(Path({folder!r})).optimize(slow, trials=400, time_budget=None, report=lambda n, best: print(n, flush=True))
"""


def test_kill_nine_loses_no_finished_trial(tmp_path: Path) -> None:
    """Prevents a torn write from costing the study: killed in mid-search, it opens and goes on."""
    code = WORKER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    reported = 0
    for line in worker.stdout:
        reported = int(line)
        if reported >= 7:
            os.kill(worker.pid, signal.SIGKILL)
            break
    worker.wait()
    worker.stdout.close()
    study = open_study(tmp_path)
    finished = len(study.finished())
    assert finished >= reported >= 7
    assert sqlite3.connect(tmp_path / "study.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)
    study.optimize(scorer, trials=finished + 5, time_budget=None, report=nothing)
    assert len(study.finished()) == finished + 5


def test_csv_holds_every_finished_trial(tmp_path: Path) -> None:
    """Prevents an export that lacks trials or their policies."""
    import pandas as pd

    study = open_study(tmp_path)
    study.optimize(scorer, trials=6, time_budget=None, report=nothing)
    study.export_csv(tmp_path / "trials.csv")
    table = pd.read_csv(tmp_path / "trials.csv")
    assert len(table) == 6 and {"tokens_per_second", "acceptance_rate", "max_length"} <= set(table.columns)


def test_a_space_that_is_used_up_ends_the_search(tmp_path: Path) -> None:
    """Prevents the same eight masks from being proposed for hours."""
    small = Space(num_layers=4, fixed=SkipMask(attention=range(4), mlp=[1, 2, 3], num_layers=4))  # one MLP is free
    assert small.size == 2
    study = Study(storage_url(tmp_path), "search", small, {"a": "b"}, "trust-region", seed=0)
    study.optimize(scorer, trials=40, time_budget=None, report=nothing)
    assert study.used_up and 2 <= len(study.finished()) < 40
    before = len(study.finished())
    study.optimize(scorer, trials=40, time_budget=None, report=nothing)
    assert len(study.finished()) == before
