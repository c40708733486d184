"""Storage that fails in the middle of a run: no space, no permission, a clock that is set."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy
from counts import FULL, tell, times
from small_runs import assert_tidy, assert_whole, forked, made_small, run, trials_in

import skipsearch.files

FILES = (
    "trace.json", "costs.json", "sensitivity.json", "trials.csv", "front.json", "validation.json", "mask.json",
    "summary.json",
)  # fmt: skip


def limit(size: int) -> None:
    """No file may grow beyond so many bytes, in this child alone."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fails_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the time on when this file is written there is room for a few bytes only."""
    temporary = tempfile.NamedTemporaryFile

    def open_then_fail(*args: Any, **settings: Any) -> Any:
        if settings["prefix"] == f".{name}.":
            limit(10)
        return temporary(*args, **settings)

    monkeypatch.setattr(skipsearch.files.tempfile, "NamedTemporaryFile", open_then_fail)


def goes_on(loaded: Any, folder: Path, before: list[Any]) -> None:
    """The same command finishes once the fault is gone, with the trials that there were."""
    found = forked(lambda say: run(loaded, folder, say)).assert_finished()
    assert [trial for trial in found["trials"] if trial in before] == before
    assert_tidy(folder)


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.json")}


def test_no_space_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback, or the loss of an earlier run's file, where the disk is full at a stage."""
    loaded, names = made_small(monkeypatch), FILES if FULL else ("costs.json", "mask.json")
    for name in names:
        folder = tmp_path / name

        def full(say: Callable[..., None], name: str = name, folder: Path = folder) -> None:
            fails_at(name, monkeypatch)
            run(loaded, folder, say)

        forked(full).assert_one_sentence(name)
        assert not (folder / name).exists()
        assert_whole(folder)
        goes_on(loaded, folder, trials_in(folder))
        old = files_of(folder)
        if name in ("mask.json", "summary.json"):  # written by every run
            forked(full).assert_one_sentence(name)
            assert files_of(folder)[name] == old[name]
    tell("no space for a file", len(names), finished_later=len(names))


def test_no_space_for_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents Optuna's and SQLite's errors from reaching users, from a thread too, and the loss of finished trials."""
    loaded, rng, kept = made_small(monkeypatch), random.Random(0), 0
    sizes = [90_000, *(rng.randrange(4096, 400_000) for _ in range(times(0, 19)))]
    ended_early = 0
    for size in sizes:
        folder = tmp_path / str(size)

        def full(say: Callable[..., None], size: int = size, folder: Path = folder) -> Any:
            limit(size)
            return run(loaded, folder, say)

        ended = forked(full)
        if ended.value is None:
            ended.assert_one_sentence(f"storage sqlite:///{folder}/study.db")
            ended_early += 1
        assert_whole(folder)
        before = trials_in(folder)
        kept += len(before)
        goes_on(loaded, folder, before)
    tell("no space for the study", len(sizes), ended_early=ended_early, trials_kept=kept)
    assert ended_early >= len(sizes) / 3


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A file system of this size, where this user may mount one."""
    path = Path(tempfile.mkdtemp(prefix="small-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        path.rmdir()
        pytest.skip("this user may not mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
        path.rmdir()


def test_a_small_disk_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents what limits of files cannot show: a disk that is full for all files at once."""
    loaded, sizes = made_small(monkeypatch), ("300k",) if not FULL else ("8k", "150k", "200k", "300k", "360k", "420k")
    for size in sizes:
        with small_disk(size) as disk:
            ended = forked(lambda say, disk=disk: run(loaded, disk / "results", say))
            if ended.value is None:
                ended.assert_one_sentence(os.strerror(errno.ENOSPC), "disk is full", "disk I/O error", "unable to open")
            assert_whole(disk / "results")
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            goes_on(loaded, disk / "results", trials_in(disk / "results"))
    tell("disk full and enlarged", len(sizes))


def test_a_folder_that_loses_its_permissions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback where the folder cannot be written to any more."""
    loaded = made_small(monkeypatch)
    stages = ("record", "profile", "sensitivity", "trials", "validate") if FULL else ("sensitivity",)
    for stage in stages:
        folder = Path(tempfile.mkdtemp(prefix="lost-permissions-"))

        def lost(say: Callable[..., None], stage: str = stage, folder: Path = folder) -> Any:
            if os.getuid() == 0:  # modes do not bind root
                os.chown(folder, 65534, 65534)
                os.setgid(65534)
                os.setuid(65534)

            def told(word: str, *rest: Any) -> None:
                say(word, *rest)
                if word == stage and folder.stat().st_mode & 0o200:
                    folder.chmod(0o500)

            return run(loaded, folder, told)

        try:
            forked(lost).assert_one_sentence("Permission denied", "readonly", "unable to open")
            folder.chmod(0o700)
            assert_whole(folder)
            goes_on(loaded, folder, trials_in(folder))
        finally:
            shutil.rmtree(folder)
    tell("permissions lost", len(stages), finished_later=len(stages))


def test_a_clock_that_is_set_back_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a search that never ends, trials taken for dead, and negative seconds."""
    import pandas as pd

    loaded, jumps = made_small(monkeypatch), (-1,) if not FULL else (-1, 1)
    undisturbed = forked(lambda say: run(loaded, tmp_path / "undisturbed", say)).assert_finished()
    for days in jumps:
        folder = tmp_path / str(days)

        def jumping(say: Callable[..., None], days: int = days, folder: Path = folder) -> Any:
            moved = [timedelta(0)]

            class Clock(datetime):
                @classmethod
                def now(cls, tz: Any = None) -> datetime:
                    return datetime.now(tz) + moved[0]

            monkeypatch.setattr("optuna.storages._rdb.storage.datetime", Clock)
            monkeypatch.setattr("optuna.study._optimize.datetime", SimpleNamespace(datetime=Clock))
            wall = time.time
            monkeypatch.setattr(time, "time", lambda: wall() + moved[0].total_seconds())

            def of_database(_c: Any, _cursor: Any, text: str, given: Any, *_: Any) -> tuple[str, Any]:
                now = (datetime.utcnow() + moved[0]).strftime("'%Y-%m-%d %H:%M:%S'")
                return text.replace("CURRENT_TIMESTAMP", now), given

            sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", of_database, retval=True)

            def told(word: str, *rest: Any) -> None:
                say(word, *rest)
                if word == "trials" and rest[0] == 5:
                    moved[0] = timedelta(days=days)

            return run(loaded, folder, told, time_budget=3600.0)

        found = forked(jumping).assert_finished()
        assert found["trials"] == undisturbed["trials"]
        assert (pd.read_csv(folder / "trials.csv")["seconds"] >= 0).all()
    tell("clock set in mid-search", len(jumps), same_trials=len(jumps))
