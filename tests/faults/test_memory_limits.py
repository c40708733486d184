"""Memory that does not suffice: replay makes do with less, all others say what to change."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counts import FULL, tell, times
from small_runs import Ended, assert_whole, forked, made_small, run

from skipsearch.compiled.backend import with_backend
from skipsearch.errors import BackendWarning
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.reference import Start

ALLOCATORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError("std::bad_alloc"),
)
# By stage: what fails there, and an option that the sentence must name.
FAILS = {
    "compile": ("skipsearch.search.prepare._warm", "--backend eager"),
    "record": ("skipsearch.evaluate.trace.decode", "--new-tokens"),
    "profile": ("skipsearch.evaluate.profile.sequence_at", "--dtype bfloat16"),
    "reference": ("skipsearch.search.prepare.Replay", "--memory"),
    "seeds": ("skipsearch.search.run.draft_states", "--num-prompts"),
    "trials": ("skipsearch.evaluate.scorer.score", "--memory"),
    "finalists": ("skipsearch.search.run.best_policy", "--memory"),
    "validate": ("skipsearch.evaluate.timing.decode", "--prompt-tokens"),
}


def test_replay_halves_its_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the end of a search, or other scores, where a pass of replay is too large for the memory."""
    loaded = made_small(monkeypatch)
    expected = forked(lambda say: run(loaded, tmp_path / "enough", say)).assert_finished()
    whole = DraftReplay._pass
    kinds = ALLOCATORS if FULL else ALLOCATORS[:1]
    for number, error in enumerate(kinds):

        def small(say: Callable[..., None], number: int = number, error: BaseException = error) -> Any:
            def few(self: DraftReplay, starts: list[Start]) -> Any:
                if len(starts) > 2:
                    raise error
                return whole(self, starts)

            monkeypatch.setattr(DraftReplay, "_pass", few)
            return run(loaded, tmp_path / str(number), say)

        found = forked(small).assert_finished()
        # Some seeds are chosen from the hidden states of one pass, so that not all plans are the same.
        scores, wanted = ({repr(t[0]): t[1] for t in each["trials"]} for each in (found, expected))
        both = scores.keys() & wanted.keys()
        assert len(both) >= 8 and all(scores[plan] == wanted[plan] for plan in both)
    tell("passes of replay without memory", len(kinds), same_scores=len(kinds))


def test_each_stage_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents tracebacks of allocators."""
    loaded, tried = made_small(monkeypatch), 0
    for number, (stage, (name, option)) in enumerate(FAILS.items()):
        for error in ALLOCATORS if FULL else ALLOCATORS[number % 3 :][:1]:

            def fails(*_: Any, error: BaseException = error, **__: Any) -> Any:
                raise error

            def short(say: Callable[..., None], name: str = name, fails: Any = fails) -> Any:
                monkeypatch.setattr(name, fails)
                return run(loaded, tmp_path / "results", say, trials=times(4, 14))

            ended = forked(short)
            ended.assert_one_sentence(option)
            assert ended.raised.startswith("memory does not suffice to "), stage
            assert_whole(tmp_path / "results")
            tried += 1
    forked(lambda say: run(loaded, tmp_path / "results", say, trials=times(4, 14))).assert_finished()
    tell("stages without memory", tried, one_sentence=tried)


def test_compiling_without_memory_decodes_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback of the compiler, where the model itself fits."""
    loaded = made_small(monkeypatch)

    def fails(*_: Any) -> Any:
        raise ALLOCATORS[1]

    monkeypatch.setattr("skipsearch.compiled.backend.compile_and_prove", fails)
    with pytest.warns(BackendWarning, match="decoding eagerly") as told:
        assert with_backend(loaded.target, "compiled").compiled is None
    assert len(told) == 1 and len(str(told[0].message).splitlines()) == 1


def with_room(more: int, loaded: Any, folder: Path, say: Callable[..., None], **changes: Any) -> Any:
    """A run in an address space that is larger than it is now by so many bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, resource.RLIM_INFINITY))
    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def told(word: str, *rest: Any) -> None:
        say(word, *rest)
        if word == "sensitivity":  # a database without memory waits a minute for its own locks
            resource.setrlimit(resource.RLIMIT_AS, free)

    try:
        return run(loaded, folder, told, **changes)
    finally:  # room to tell of it
        resource.setrlimit(resource.RLIMIT_AS, free)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of an address space is not known here")
def test_a_limited_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents what injected errors do not show: allocators that really fail."""
    loaded, finished = made_small(monkeypatch), 0
    rooms = [5e5, 1e6, *((2e5, 2e6, 4e6, 8e6, 16e6) if FULL else ())]
    for room in rooms:
        ended: Ended = forked(
            lambda say, room=room: with_room(int(room), loaded, tmp_path / str(room), say, new_tokens=100)
        )
        if "cannot allocate memory for thread-local data" in ended.stderr:
            continue  # the C library ends the process by itself
        if ended.value is None:
            ended.assert_one_sentence("memory does not suffice", "memory")
        else:
            finished += 1
    tell("address spaces too small", len(rooms), finished_all_the_same=finished)
    assert not FULL or finished < len(rooms)  # what an allocator has in reserve differs
