"""Fuzzing: masks, spaces and prompt files of any content load, or are refused in one sentence."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import quiet  # noqa: F401 (the profile of hypothesis)
from counts import tell, times
from documents import DOCUMENT
from faulty import PLAN, as_json, files, mutated, prompt_files, spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipsearch import load_mask
from skipsearch.errors import PromptWarning, SkipsearchError
from skipsearch.evaluate.prompts import PromptSource, load_prompts
from skipsearch.model.preset import _read_preset, read_space

SETTINGS = settings(
    max_examples=times(120, 5000), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


def try_out(read: Callable[[], Any], found: Counter[str]) -> Any:
    """What is read, or None; anything but one of our sentences is a failure."""
    try:
        value = read()
    except SkipsearchError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 3000, message[:500]
        message.encode()  # it can be printed
        found["refused"] += 1
        return None
    found["read"] += 1
    return value


def test_masks(tmp_path: Path) -> None:
    """Prevents a traceback for a mask of a stranger, and a mask that is another one after it is saved."""
    path, again, found = tmp_path / "mask.json", tmp_path / "again.json", Counter[str]()

    @SETTINGS
    @given(data=files(as_json(mutated([DOCUMENT, PLAN]))))
    def run(data: bytes) -> None:
        path.write_bytes(data)
        file = try_out(lambda: load_mask(path), found)
        if file is not None:
            file.save(again)
            assert load_mask(again) == file and load_mask(again).plan == file.plan

    run()
    tell("fuzzed masks", found.total(), **found)
    assert found["read"] and found["refused"]


def test_spaces(tmp_path: Path) -> None:
    """Prevents a traceback for a space file of a stranger."""
    path, found = tmp_path / "space.toml", Counter[str]()

    @SETTINGS
    @given(data=files(spaces()), layers=st.integers(1, 5))
    def run(data: bytes, layers: int) -> None:
        path.write_bytes(data)
        space = try_out(lambda: read_space(path, layers), found)
        if space is not None:
            assert len(space.bounds) < 20 and space.plan(space.params(space.fixed)).num_layers == layers
        try_out(lambda: _read_preset(path), found)

    run()
    tell("fuzzed spaces", found.total(), **found)
    assert found["read"] and found["refused"]


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_files(chat: bool, tokenizer: Any, chatty: Any, tmp_path: Path) -> None:
    """Prevents a traceback for a prompt file of any content, with a chat template or without."""
    found = Counter[str]()

    @SETTINGS
    @given(file=prompt_files())
    def run(file: tuple[str, bytes]) -> None:
        path = tmp_path / f"prompts{file[0]}"
        path.write_bytes(file[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)
            try_out(
                lambda: load_prompts(
                    PromptSource(name=str(path)), chatty if chat else tokenizer, calibration=4, held_out=4,
                    max_tokens=None, room=400, seed=0,
                ), found,
            )  # fmt: skip

    run()
    tell(f"fuzzed prompt files, {'chat' if chat else 'plain'}", found.total(), **found)
    assert found["read"] and found["refused"]
