"""Calls of `generate` that end, and the same calls cancelled by what the user hangs on them."""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from conftest import make_tiny
from counts import FULL, times
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from skipsearch import DraftPlan, SkipMask, load_model, self_speculative
from skipsearch.compiled.backend import with_backend
from skipsearch.compiled.model import WIDTHS
from skipsearch.model.target import Target

LONGEST_WAIT = 3600.0  # seconds until a thread counts as hanging
CANCELLED = ("streamer", "criterion", "processor")


class Enough(Exception):
    """What the user's object raises."""


class _After:
    """Raises at the call after `left` others."""

    def __init__(self, left: int) -> None:
        self.left = left

    def count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Enough


class Streamer(_After, BaseStreamer):
    def put(self, value: Tensor) -> None:
        self.count()

    def end(self) -> None:
        pass


class Criterion(_After, StoppingCriteria):
    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> bool:  # type: ignore[override]
        self.count()
        return False


class Processor(_After, LogitsProcessor):
    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.count()
        return scores


@dataclass(frozen=True)
class Call:
    """A prompt or a batch, options, and the tokens of plain decoding."""

    ids: Tensor
    options: dict[str, Any]
    plain: Tensor

    def same(self, model: Any, method: Any) -> bool:
        return torch.equal(model.generate(self.ids, custom_generate=method, **self.options), self.plain)

    def cancel(self, model: Any, method: Any, how: str, after: int) -> None:
        given: dict[str, Any] = {
            "streamer": lambda: {"streamer": Streamer(after)},
            "criterion": lambda: {"stopping_criteria": StoppingCriteriaList([Criterion(after)])},
            "processor": lambda: {"logits_processor": LogitsProcessorList([Processor(after)])},
        }[how]()
        model.generate(self.ids, custom_generate=method, **self.options, **given)


@functools.cache
def served_model(backend: str) -> Any:
    """A model of 4 layers, compiled for two widths, in half the time; with all counts the bundled one."""
    if FULL and backend == "compiled":
        return load_model("demo").model
    model = make_tiny("llama")
    if backend == "compiled":
        with patch.dict(WIDTHS, {"cpu": (1, 13)}):
            assert with_backend(Target.of(model), "compiled").compiled is not None
    return model


def methods(backend: Any, layers: int) -> list[Any]:
    """As different as they can be: a mask, a plan with quantised copies, n-grams with a mask, and a search."""
    half = SkipMask(attention=range(0, layers, 2), mlp=range(1, layers, 3), num_layers=layers)
    return [
        self_speculative(half, max_length=5, exit_threshold=0.05, backend=backend),
        self_speculative(DraftPlan.everywhere("int8", layers), max_length=4, backend=backend),
        self_speculative(half, max_length=5, ngram=6, never_slower=True, backend=backend),
        self_speculative("auto", share=0.5, backend=backend),
    ]


OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}, {"do_sample": True, "top_k": 1},
)  # fmt: skip


def calls(model: Any, count: int, *, new: int = times(8, 16), seed: int = 0) -> list[Call]:
    """Calls of several lengths and options, every fourth one a batch with padding."""
    rng, generator, found = random.Random(seed), torch.Generator().manual_seed(seed), list[Call]()
    for number in range(count):
        rows, length = (1, rng.randint(1, 70)) if number % 4 != 3 else (3, rng.randint(4, 20))
        ids = torch.randint(3, 97, (rows, length), generator=generator)
        for row in range(1, rows):
            ids[row, : rng.randrange(length)] = 0
        options = {
            "max_new_tokens": rng.randint(new // 2, new), "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
            "attention_mask": (ids != 0).long(), **OPTIONS[number % 3 if rows > 1 else number % len(OPTIONS)],
        }  # fmt: skip
        found.append(Call(ids, options, model.generate(ids, **options)))
    return found


def tried(model: Any, method: Any, some: Sequence[Call], rng: random.Random, share: float = 0.3) -> str:
    """One call of these, or a share of them cancelled; says what came of it, which is "same" or "cancelled"."""
    call = rng.choice(some)
    if rng.random() >= share:
        return "same" if call.same(model, method) else f"other tokens: {call.options}"
    how = rng.choice(CANCELLED if len(call.ids) == 1 else CANCELLED[1:])
    try:
        call.cancel(model, method, how, rng.randrange(call.plain.shape[1] - call.ids.shape[1]))
    except Enough:
        return "cancelled"
    return f"the {how} was not heard"


@contextmanager
def many_switches() -> Iterator[None]:
    """Threads take turns much oftener than they do by themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(work: Sequence[Callable[[], None]]) -> list[BaseException]:
    """Run each in a thread of its own; what they raised. None may hang."""
    raised: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(one: Callable[[], None]) -> None:
        try:
            start.wait()
            one()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(one,), daemon=True) for one in work]
    with many_switches():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONGEST_WAIT)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return raised


def served(model: Any, methods: Sequence[Any], some: Sequence[Call], requests: int, seed: int = 0) -> Counter[str]:
    """So many requests in each of some threads, one for each method given, which may be the same; what came of them."""
    came: list[Counter[str]] = [Counter() for _ in methods]

    def work(place: int) -> Callable[[], None]:
        def run() -> None:
            rng = random.Random(seed * 100 + place)
            for _ in range(requests):
                came[place][tried(model, methods[place], some, rng)] += 1

        return run

    raised = in_threads([work(place) for place in range(len(methods))])
    if raised:
        raise raised[0]
    return sum(came, Counter())
