"""Many workers on one study: killed, paused, with a server that restarts in the middle."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import postgres_server
import pytest
from counts import FULL, tell, times

from skipsearch import DraftPlan, SkipMask
from skipsearch.evaluate.objective import Score
from skipsearch.model.space import Space
from skipsearch.policy import DraftPolicy
from skipsearch.search.attributes import backend
from skipsearch.search.study import Study

SPACE = Space(num_layers=12, fixed=SkipMask(attention=[0], num_layers=12))
FORK = multiprocessing.get_context("fork")
WORKERS, TRIALS, KILLS = times(3, 8), times(60, 400), times(2, 20)
PAUSE, SECONDS = times(2, 30), 0.3 + 0.7 * FULL  # of one worker's pause; that a trial takes at least
PATIENCE = 900  # seconds


def scorer(plan: DraftPlan, least: float) -> Score:
    time.sleep(least + random.uniform(0.05, 0.15))
    return Score(
        plan=plan, policy=DraftPolicy(max_length=3), tokens_per_second=50.0 + len(plan.skip), speedup=1.0,
        acceptance_rate=0.5, tau=2.0, cost_ratio=0.5,
    )  # fmt: skip


def opened(url: str) -> Study:
    return Study(url, "search", SPACE, {"model": "abc"}, "trust-region", seed=0)


def work(url: str, said: Path, least: float) -> None:
    """A worker's process; what it tells goes to a file, a line each."""
    with said.open("w", buffering=1) as file, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: print(message, file=file)
        random.seed(os.getpid())
        study = opened(url)
        own = study.optimize(partial(scorer, least=least), trials=TRIALS, time_budget=None, report=lambda *_: None)
        print(f"ended, {own} trials, storage away for {study.waited:.1f} s", file=file)


class Workers:
    """Several processes on one study, and the finished trials as they were last seen."""

    def __init__(self, url: str, folder: Path, count: int, least: float = 0.0) -> None:
        self.url, self.folder, self.least = url, folder, least
        self.all: list[Any] = []
        self.killed: list[Any] = []
        self.kept: dict[int, tuple[Any, ...]] = {}
        folder.mkdir()
        for _ in range(count):
            self.start()

    def start(self) -> None:
        process = FORK.Process(target=work, args=(self.url, self.folder / str(len(self.all)), self.least))
        process.start()
        self.all.append(process)

    @property
    def alive(self) -> list[Any]:
        return [process for process in self.all if process.is_alive()]

    def look(self) -> int:
        """Look at the finished trials: those that were seen before must still be the same."""
        study = opened(self.url)
        now = {t.number: (t.params, t.values) for t in study.finished()}
        backend(study.study).engine.dispose()
        assert {number: now.get(number) for number in self.kept} == self.kept
        self.kept = now
        return len(now)

    def wait_until(self, true: Callable[[], bool]) -> None:
        begin = time.monotonic()
        while not true():
            assert time.monotonic() < begin + PATIENCE
            time.sleep(0.2)

    def wait_for(self, trials: int) -> None:
        self.wait_until(lambda: self.look() >= trials or not self.alive)

    def told(self, what: str, numbers: list[int]) -> list[int]:
        """How often each of these workers has said something."""
        return [(self.folder / str(number)).read_text().count(what) for number in numbers]

    def kill(self) -> None:
        process = random.choice(self.alive)
        os.kill(process.pid, signal.SIGKILL)
        self.killed.append(process)
        process.join(PATIENCE)
        self.start()

    def pause(self) -> None:
        paused = self.alive[0]
        os.kill(paused.pid, signal.SIGSTOP)
        time.sleep(PAUSE)
        os.kill(paused.pid, signal.SIGCONT)

    def end(self) -> list[str]:
        """Wait for all, check the study, and give what the survivors said."""
        for process in self.all:
            process.join(PATIENCE)
        survivors = [number for number, process in enumerate(self.all) if process not in self.killed]
        assert [self.all[number].exitcode for number in survivors] == [0] * len(survivors)
        assert self.look() == TRIALS
        study = opened(self.url)
        trials = study.study.get_trials(deepcopy=False)
        assert {t.state.name for t in trials} <= {"COMPLETE", "FAIL"}
        assert len({study.plan_of(t) for t in study.finished()}) == TRIALS, "a plan stands twice in the study"
        backend(study.study).engine.dispose()
        return [(self.folder / str(number)).read_text() for number in survivors]


@pytest.mark.skipif(not postgres_server.usable(), reason="PostgreSQL or psycopg is not installed here")
def test_workers_on_a_server_are_killed_paused_and_cut_off(tmp_path: Path) -> None:
    """Prevents: lost or doubled trials, a study that never ends, and a worker that dies of a server's restart."""
    random.seed(1)
    events = ["kill"] * KILLS
    events[KILLS // 3 : KILLS // 3] = ["pause"]
    events[2 * KILLS // 3 : 2 * KILLS // 3] = ["restart"]
    with postgres_server.running() as server:
        workers = Workers(server.url, tmp_path / "said", WORKERS, SECONDS)
        cut_off: list[int] = []  # the workers that were there when the server went
        for number, event in enumerate(events, 1):
            workers.wait_for(int(TRIALS * number / (len(events) + 3)))
            if event == "kill":
                time.sleep(random.uniform(0, 1 + SECONDS))
                workers.kill()
            elif event == "pause":
                workers.pause()
            else:
                cut_off = [number for number, process in enumerate(workers.all) if process.is_alive()]
                server.stop()
                time.sleep(times(1, 10))
                workers.wait_until(lambda who=cut_off: 0 not in workers.told("does not answer", who))
                server.start()
                assert all(workers.all[number].is_alive() for number in cut_off), "a worker died of the restart"
        said = workers.end()
        told = workers.told("does not answer", cut_off)
    tell(
        f"{WORKERS} workers on PostgreSQL, {TRIALS} trials", KILLS + 2, killed=len(workers.killed),
        survivors=len(said), cut_off_by_the_restart=len(cut_off), of_them_told_it_in_one_line=told.count(1),
        trials_kept=len(workers.kept),
    )  # fmt: skip
    if FULL:
        print("\n".join(line for text in said for line in text.splitlines()))
    assert told == [1] * len(cut_off)
    assert all(text.splitlines()[-1].startswith("ended, ") for text in said)


def test_workers_start_at_once_on_a_new_file(tmp_path: Path) -> None:
    """Prevents: workers die of tables or trials that another one makes at the same moment."""
    rounds = times(1, 10)
    for number in range(1, rounds + 1):
        workers = Workers(f"sqlite:///{tmp_path / str(number)}.db", tmp_path / f"said-{number}", 4)
        if number % 2:
            workers.wait_for(TRIALS // 4)
            workers.kill()
            workers.pause()
        workers.end()
    tell(f"4 workers at once on a new SQLite file, {TRIALS} trials each", rounds, lost=0)
