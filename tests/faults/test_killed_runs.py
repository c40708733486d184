"""Runs that are killed at any moment: the same command goes on, and finds what an undisturbed run finds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from counts import FULL, tell, times
from small_runs import STAGES, Points, assert_tidy, assert_whole, forked, made_small, run, trials_in

MOMENTS = times(6, 100)


def test_a_killed_run_goes_on_as_if_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents lost trials, half-written files, leftovers, and a search that depends on when it was killed."""
    loaded, points = made_small(monkeypatch), Points()

    def undisturbed(say: Any) -> Any:
        points.install()
        found = run(loaded, tmp_path / "undisturbed", say)
        say("points", points.counts)
        return found

    quiet = forked(undisturbed)
    expected = quiet.assert_finished()
    counts: dict[str, int] = quiet.said[-1][1]
    begins = {stage: quiet.at[stage][0] for stage in STAGES}
    begins |= {"writing": quiet.at["validate"][-1], "end": quiet.at["end"][0]}
    spans = {a: end - begin for (a, begin), end in zip(begins.items(), list(begins.values())[1:], strict=False)}
    rng, killed, kept = random.Random(0), 0, 0
    for moment in range(MOMENTS):
        folder = tmp_path / str(moment)
        if moment % 2:
            stage = rng.choice(STAGES)
            ended = forked(lambda say, f=folder: run(loaded, f, say), kill=(stage, rng.uniform(0, spans[stage])))
        else:
            kind = rng.choice(sorted(counts))
            last = Points((kind, rng.randrange(counts[kind]) + 1))
            ended = forked(lambda say, f=folder, last=last: (last.install(), run(loaded, f, say))[1])
        killed += ended.killed == -9
        folder.mkdir(exist_ok=True)
        assert_whole(folder)
        before = trials_in(folder)
        kept += len(before)
        assert len(before) >= max((done for word, done in ended.said if word == "finished"), default=0)
        found = forked(lambda say, f=folder: run(loaded, f, say)).assert_finished()
        assert [trial for trial in found["trials"] if trial in before] == before
        assert found == expected, (moment, ended.said[-3:])
        assert_tidy(folder)
    tell("run killed and continued", MOMENTS, killed=killed, trials_kept=kept)
    assert killed >= 0.9 * MOMENTS


def command(folder: Path) -> subprocess.Popen[str]:
    """`skipsearch run` as a process of its own, with next to nothing to do; Ctrl-C counts in the background too."""
    few = "--trials 14 --num-prompts 2 --num-held-out 2 --prompt-tokens 8 --new-tokens 8 --rounds 1 --time-budget 2"
    return subprocess.Popen(
        [sys.executable, "-m", "skipsearch.cli", "run", "-m", str(folder.parent / "model"), "--backend", "eager",
         "--space", str(folder.parent / "space.toml"), "--out", str(folder), *few.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def wait_for(folder: Path, name: str, process: subprocess.Popen[str]) -> None:
    while not (folder / name).exists() and process.poll() is None:
        time.sleep(0.02)


def test_the_command_is_killed_interrupted_twice_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback from a second Ctrl-C, and a command that does not go on after it or after a kill."""
    loaded = made_small(monkeypatch)
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "space.toml").write_text('[space]\nforms = ["skip"]\n')
    folder = tmp_path / "results"
    with command(folder) as killed:
        wait_for(folder, "trace.json", killed)
        killed.kill()
    assert killed.returncode == -9
    assert_whole(folder)
    for first_wait in ("costs.json", "sensitivity.json", "study.db") if FULL else ("study.db",):
        for old in folder.glob(f"{first_wait}*"):  # so that it is waited for
            old.unlink()
        with command(folder) as interrupted:
            wait_for(folder, first_wait, interrupted)
            interrupted.send_signal(signal.SIGINT)
            time.sleep(0.2)
            interrupted.send_signal(signal.SIGINT)
            said = interrupted.communicate()[1]
        assert interrupted.returncode == 130, said
        assert said.count("interrupted; what was done is kept") == 1 and "Traceback" not in said, said
        assert_whole(folder)
    with command(folder) as last:
        said = last.communicate()[1]
    assert last.returncode in (0, 1) and "Traceback" not in said and "error" not in said, said
    assert_tidy(folder)
    tell("command killed, interrupted twice, continued", 3)
