"""Runs that are killed at any moment: the same command goes on, and finds what an undisturbed run finds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from counts import tell, times
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
