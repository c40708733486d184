"""Several workers on one study: at once on a new database, killed, paused."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import postgres_server
import pytest
from optuna.trial import TrialState, create_trial

from skipsearch import DraftPlan, SkipMask
from skipsearch.errors import StudyMismatch, StudyWarning
from skipsearch.evaluate.objective import Score
from skipsearch.files import has_ended, this_process
from skipsearch.model.space import Space
from skipsearch.policy import DraftPolicy
from skipsearch.search import storage as storages
from skipsearch.search import worker as workers
from skipsearch.search.attributes import backend, set_once
from skipsearch.search.integrity import CHECK, sum_of
from skipsearch.search.storage import storage_url
from skipsearch.search.study import Study

SPACE = Space(num_layers=6, fixed=SkipMask(attention=[0], num_layers=6))
FORK = multiprocessing.get_context("fork")  # a fresh interpreter takes seconds to import
PATIENCE = 300  # seconds


def slow_scorer(plan: DraftPlan) -> Score:
    time.sleep(0.05)
    return Score(
        plan=plan, policy=DraftPolicy(max_length=3), tokens_per_second=50.0 + len(plan.skip), speedup=1.0,
        acceptance_rate=0.5, tau=2.0, cost_ratio=0.5,
    )  # fmt: skip


def work(url: str, trials: int, go: Any, number: int, told: Any) -> None:
    """One worker's process; it tells its own value of what all must share, and what it got."""
    go.wait()
    study = opened(url)
    told.put((number, study.shared("costs", {"made by": number})["made by"]))
    study.enqueue([(str(layer), DraftPlan(SkipMask(mlp=[layer], num_layers=6))) for layer in range(4)])
    warnings.simplefilter("ignore", StudyWarning)  # of dead and paused workers
    study.optimize(slow_scorer, trials=trials, time_budget=None, report=lambda *_: None)


def begin(url: str, count: int, trials: int) -> tuple[list[Any], Any]:
    go, told = FORK.Event(), FORK.Queue()
    found = [FORK.Process(target=work, args=(url, trials, go, number, told)) for number in range(count)]
    for process in found:
        process.start()
    go.set()
    return found, told


def opened(url: str) -> Study:
    return Study(url, "search", SPACE, {"model": "abc"}, "trust-region", seed=0)


def assert_whole(url: str, trials: int) -> None:
    """As many trials as were wanted, each plan once, none left running."""
    assert_whole_of(opened(url), trials)


def assert_whole_of(study: Study, trials: int) -> None:
    finished = study.finished()
    assert len(finished) == trials and len({study.plan_of(t) for t in finished}) == trials
    states = {t.state.name for t in study.study.get_trials(deepcopy=False)}
    backend(study.study).engine.dispose()
    assert states <= {"COMPLETE", "FAIL"}, states


def claimed_elsewhere(study: Study, params: dict[str, int]) -> None:
    """A trial that a worker on another host has begun; nothing is heard of it."""
    study.study.add_trial(
        create_trial(
            state=TrialState.RUNNING, params=params, distributions=study.distributions,
            system_attrs={workers.WORKER: "1-abc@another host"},
        )
    )  # fmt: skip


def test_workers_that_come_at_once_share_a_new_database(tmp_path: Path) -> None:
    """Prevents: 2 of 20 workers died of tables that another one made, or of one trial that two had taken; a study
    whose trials are scored with the costs of several workers; more trials than were wanted."""
    for attempt in range(2):
        processes, told = begin(f"sqlite:///{tmp_path / str(attempt)}.db", 4, 30)
        costs = {told.get(timeout=PATIENCE)[1] for _ in processes}
        for process in processes:
            process.join(PATIENCE)
        assert [p.exitcode for p in processes] == [0] * 4
        assert len(costs) == 1
        assert_whole(f"sqlite:///{tmp_path / str(attempt)}.db", 30)


def test_killed_workers_lose_nothing(tmp_path: Path) -> None:
    """Prevents: a plan whose worker was killed is never tried, or blocks the end of the others."""
    processes, told = begin(storage_url(tmp_path), 3, 40)
    told.get(timeout=PATIENCE)
    time.sleep(0.3)
    os.kill(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.join(PATIENCE)
    assert [p.exitcode for p in processes] == [-signal.SIGKILL, 0, 0]
    assert_whole(storage_url(tmp_path), 40)


def test_a_paused_worker_is_taken_for_dead_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a process that was stopped for longer than the grace period from dying of its own trial's end."""
    for module in (storages, workers):
        monkeypatch.setattr(module, "HEARTBEAT", 1)
    monkeypatch.setattr(storages, "GRACE", 2)
    processes, told = begin(storage_url(tmp_path), 2, 150)
    told.get(timeout=PATIENCE)
    study = opened(storage_url(tmp_path))
    begun = time.monotonic()
    while len(study.finished()) < 10 and time.monotonic() < begun + PATIENCE:
        time.sleep(0.1)
    os.kill(processes[0].pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(processes[0].pid, signal.SIGCONT)
    assert processes[0].is_alive() and processes[1].is_alive(), "the study ended before the pause did"
    for process in processes:
        process.join(PATIENCE)
    assert [p.exitcode for p in processes] == [0, 0]
    assert_whole(storage_url(tmp_path), 150)


def test_the_first_identity_holds(tmp_path: Path) -> None:
    """Prevents a second worker of another model from overwriting what the study was made with."""
    first = opened(storage_url(tmp_path))
    set_once(first.study, "identity", {"model": "xyz"})
    assert first.known("identity")["model"] == "abc"
    with pytest.raises(StudyMismatch, match="another model"):
        Study(storage_url(tmp_path), "search", SPACE, {"model": "xyz"}, "trust-region", seed=0)


@pytest.mark.filterwarnings("ignore::skipsearch.errors.StudyWarning")
def test_a_result_that_comes_after_its_trial_was_failed_is_kept_once(tmp_path: Path) -> None:
    """Prevents: a finished score is thrown away, or stands in the study twice, because others gave its worker up."""
    study, calls = opened(storage_url(tmp_path)), []

    def given_up(plan: DraftPlan) -> Score:
        calls.append(plan)
        if len(calls) <= 2:
            running = study.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))[0]
            study.study._storage.set_trial_state_values(running._trial_id, TrialState.FAIL)
            if len(calls) == 2:  # the one that gave it up has tried the plan too
                total = sum_of(running.params, running.distributions, [1.0], {})
                study.study.add_trial(
                    create_trial(
                        value=1.0, params=running.params, distributions=running.distributions,
                        user_attrs={CHECK: total},
                    )
                )  # fmt: skip
        return slow_scorer(plan)

    study.optimize(given_up, trials=6, time_budget=None, report=lambda *_: None)
    assert_whole(storage_url(tmp_path), 6)
    by_plan = {study.plan_of(t): t for t in study.finished()}
    assert by_plan[calls[0]].user_attrs["fidelity"] == "whole" and by_plan[calls[1]].value == 1.0


@pytest.mark.filterwarnings("ignore::skipsearch.errors.StudyWarning")
def test_a_sampler_that_is_taken_for_dead_while_it_proposes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback where Optuna's sampler takes longer than the grace period, or its process is paused."""
    study, calls = Study(storage_url(tmp_path), "search", SPACE, {"a": "b"}, "random", seed=0), []
    ask = study.study.ask

    def slow(*args: Any) -> Any:
        trial = ask(*args)
        calls.append(trial)
        if len(calls) == 1:
            study.study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return trial

    monkeypatch.setattr(study.study, "ask", slow)
    study.optimize(slow_scorer, trials=3, time_budget=60, report=lambda *_: None)
    assert_whole_of(study, 3)


@pytest.mark.filterwarnings("ignore::skipsearch.errors.StudyWarning")
def test_a_worker_that_never_told_that_it_lives_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: all wait for ever for a trial whose worker, on another host, was killed before its first heartbeat."""
    monkeypatch.setattr(workers, "HEARTBEAT", 0.1)
    monkeypatch.setattr(workers, "GRACE", 0.3)
    study = opened(storage_url(tmp_path))
    params = study.space.params(SkipMask(mlp=[1], num_layers=6))
    claimed_elsewhere(study, params)
    study.optimize(slow_scorer, trials=3, time_budget=60, report=lambda *_: None)
    assert_whole(storage_url(tmp_path), 3)
    assert params in [t.params for t in study.finished()]


@pytest.mark.skipif(not postgres_server.usable(), reason="PostgreSQL or psycopg is not installed here")
def test_workers_share_a_postgres_server() -> None:
    """Prevents a study on PostgreSQL that works only for one worker, or loses what killed workers had begun."""
    with postgres_server.running() as server:
        for killed in (False, True):
            url = f"{server.url}{'2' if killed else ''}"
            processes, told = begin(url, 3, 24)
            told.get(timeout=PATIENCE)
            if killed:
                time.sleep(0.5)
                os.kill(processes[0].pid, signal.SIGKILL)
            for process in processes:
                process.join(PATIENCE)
            assert [p.exitcode for p in processes[1:]] == [0, 0]
            assert_whole(url, 24)
            gc.collect()


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_a_sampler_that_proposes_what_others_run_ends(sampler: str, tmp_path: Path) -> None:
    """Prevents an endless loop of failed trials where a sampler proposes a plan again that another worker runs."""
    small = Space(num_layers=3, fixed=SkipMask(attention=range(3), num_layers=3))
    study = Study(storage_url(tmp_path), "search", small, {"a": "b"}, sampler, seed=0)
    plans = [{name: bits >> place & 1 for place, name in enumerate(small.bounds)} for bits in range(5)]
    for params in plans:
        claimed_elsewhere(study, params)
    study.optimize(slow_scorer, trials=100, time_budget=3, report=lambda *_: None)
    done = {study.plan_of(t) for t in study.finished()}  # it may repeat its own
    assert len(done) == 3 and not done & set(map(study.space.plan, plans))
    assert len(study.study.get_trials(deepcopy=False)) < 40


@pytest.mark.parametrize("name", ["a?b", "a%20b", "a b", "a#c"])
def test_a_folder_of_any_name_holds_its_study(name: str, tmp_path: Path) -> None:
    """Prevents a database beside the results folder, where a URL reads its name otherwise."""
    folder = tmp_path / name
    folder.mkdir()
    opened(storage_url(folder))
    assert (folder / "study.db").is_file() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("process", ["", "7", "²-x@h", "99999999999999999999-x@h", "1-x", "-1-x@h"])
def test_names_of_processes_from_strangers(process: str) -> None:
    """Prevents a traceback from a number of a process that is none."""
    here = this_process().partition("@")[2]
    assert not has_ended(process) and not has_ended(process.replace("@h", f"@{here}"))
    assert not has_ended(this_process())
