"""Many requests at once, some of them cancelled: each gets its own tokens, or what its own streamer raised.

A method holds no buffers: each call makes its own sequences, keys and buffers, and takes compiled code, draft views and
estimates from tables that all calls share. One lock of the process is held while anything is compiled or handed out
from these tables, and none while a forward runs.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cancelled_calls import Call, calls, in_threads, served, tried
from conftest import make_tiny
from counts import times, tell

from skipsearch import DraftPlan, SkipMask, self_speculative

pytestmark = [
    pytest.mark.filterwarnings("ignore:decoding plainly"),  # a batch with what the caller wrote
    pytest.mark.filterwarnings("ignore:decoding eagerly. backend 'compiled' takes"),  # a batch
]
THREADS = 4
LAYERS = {"eager": 4, "compiled": 20}


def served_model(backend: str, request: Any) -> Any:
    return make_tiny("llama") if backend == "eager" else request.getfixturevalue("demo").model


def methods(backend: Any, layers: int) -> list[Any]:
    """As different as they can be: a mask, a plan with quantised copies, n-grams with a mask, and a search."""
    half = SkipMask(attention=range(0, layers, 2), mlp=range(1, layers, 3), num_layers=layers)
    return [
        self_speculative(half, max_length=5, exit_threshold=0.05, backend=backend),
        self_speculative(DraftPlan.everywhere("int8", layers), max_length=4, backend=backend),
        self_speculative(half, max_length=5, ngram=6, never_slower=True, backend=backend),
        self_speculative("auto", share=0.5, backend=backend),
    ]


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("shared", [True, False], ids=["one method", "four methods"])
def test_each_thread_gets_its_own_tokens(backend: str, shared: bool, request: Any) -> None:
    """Prevents calls at once from writing into each other's keys or estimates, and a cancelled one from harming any."""
    model = served_model(backend, request)
    some = calls(model, times(6, 24))
    made = methods(backend, LAYERS[backend])
    count = times(6 if backend == "eager" else 4, 200)
    rounds = [[made[which]] * THREADS for which in (0, 2, 3)] if shared else [made]
    rounds = rounds if times(0, 1) or not shared else [made[2:3] * THREADS]
    for number, each in enumerate(rounds):
        came = served(model, each, some, count, seed=number)
        assert set(came) <= {"same", "cancelled"}, came
        tell(f"{backend}, {'one method' if shared else 'four methods'} in {THREADS} threads", THREADS * count, **came)
        rng = random.Random(number)
        for method in each:
            assert tried(model, method, some, rng, share=0.0) == "same"  # after all that was cancelled
