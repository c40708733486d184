"""Traces: the target's own text, kept for this model and these prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quiet

from skipsearch.evaluate.trace import LEAST, DecodeSettings, record_or_load
from skipsearch.model.target import Target


def test_trace_is_greedy_generate_and_kept(tiny: Any, tmp_path: Path) -> None:
    """Prevents a trace of another model or prompt set from being taken for this one's."""
    model, path, settings = tiny("llama"), tmp_path / "trace.json", DecodeSettings(new_tokens=12)
    target = Target.of(model)
    prompts = ((5, 6, 7), (8, 9, 10, 11))
    trace = record_or_load(path, target, prompts, settings, "a", quiet)
    for prompt, continuation in zip(trace.prompts, trace.continuations, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert list(continuation) == expected.tolist()
    calls: list[str] = []
    note = lambda stage, *_: calls.append(stage)
    assert record_or_load(path, target, prompts, settings, "a", note) == trace and not calls
    record_or_load(path, target, prompts, settings, "b", note)
    record_or_load(path, target, prompts[:1], settings, "b", note)
    assert calls == ["record"] * 3
    assert trace.head(1, 4).continuations == (trace.continuations[0][:4],)


def test_a_stopped_recording_goes_on(tiny: Any, tmp_path: Path) -> None:
    """Prevents prompts from being recorded twice after a stop, and a trace cut short from growing under a study."""
    target, settings = Target.of(tiny("llama")), DecodeSettings(new_tokens=8)
    prompts, path = tuple((5, 6, 7 + i) for i in range(8)), tmp_path / "trace.json"
    whole = record_or_load(tmp_path / "other.json", target, prompts, settings, "a", quiet)
    done: list[int] = []

    def stop(_stage: str, number: int, _total: int) -> None:
        done.append(number)
        if number == 3 and len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_or_load(path, target, prompts, settings, "a", stop)
    assert record_or_load(path, target, prompts, settings, "a", stop) == whole
    assert done == [1, 2, 3, 4, 5, 6, 7, 8]
    cut = tmp_path / "few.json"
    few = record_or_load(cut, target, prompts, settings, "a", quiet, seconds=0.0)
    assert few.prompts == prompts[:LEAST] and few.continuations == whole.continuations[:LEAST]
    assert record_or_load(cut, target, prompts, settings, "a", quiet, may_grow=False) == few
    assert record_or_load(cut, target, prompts, settings, "a", quiet) == whole
