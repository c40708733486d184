"""Many requests at once, some of them cancelled: each gets its own tokens, or what its own streamer raised.

A method holds no buffers: each call makes its own sequences, keys and buffers, and takes compiled code, draft views and
estimates from tables that all calls share. One lock of the process is held while anything is compiled, copied or lent
from these tables, and none while a forward runs.
"""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from cancelled_calls import Call, calls, in_threads, methods, served, served_model, tried
from conftest import make_tiny
from counts import tell, times
from transformers import TextIteratorStreamer

from skipsearch import SkipMask, draft_view, self_speculative
from skipsearch.decoding.ngram import NgramIndex
from skipsearch.decoding.scheduler import Scheduler
from skipsearch.decoding.sources import MASK, PLAIN, Part
from skipsearch.draft import copies
from skipsearch.draft.forms import quantised
from skipsearch.model.sublayers import _found, find_sublayers

pytestmark = [
    pytest.mark.filterwarnings("ignore:decoding plainly"),  # a batch with what the caller wrote
    pytest.mark.filterwarnings("ignore:decoding eagerly. backend 'compiled' takes"),  # a batch
]
THREADS = 4
BACKENDS = pytest.mark.parametrize("backend", ["eager", "compiled"])


@BACKENDS
@pytest.mark.parametrize("shared", [True, False], ids=["one method", "four methods"])
def test_each_thread_gets_its_own_tokens(backend: str, shared: bool) -> None:
    """Prevents calls at once from writing into each other's keys or estimates, and a cancelled one from harming any."""
    model = served_model(backend)
    some = calls(model, times(6, 24))
    made, count = methods(backend, find_sublayers(model).num_layers), times(6, 200)
    for number, each in enumerate([[made[2]] * THREADS, [made[3]] * THREADS][: times(1, 2)] if shared else [made]):
        came = served(model, each, some, count, seed=number)
        assert set(came) <= {"same", "cancelled"}, came
        tell(f"{backend}, {'one method' if shared else 'four methods'} in {THREADS} threads", THREADS * count, **came)
        rng = random.Random(number)
        for method in each:
            assert tried(model, method, some, rng, share=0.0) == "same"  # after all that was cancelled


def test_first_calls_at_once() -> None:
    """Prevents what is found out about a model at its first call from being seen by others as the model itself.

    The proof of its sublayers once put stubs and hooks on it for a moment.
    """
    plain = calls(served_model("eager"), 4)
    for seed in range(times(3, 50)):
        model = make_tiny("llama")
        each = [*methods("eager", 4)[:3], self_speculative(None)]
        came = served(model, each, plain, 2, seed=seed)
        assert set(came) <= {"same", "cancelled"}, came
    tell("first calls at once", times(3, 50))


def test_finding_sublayers_leaves_the_model_alone() -> None:
    """Prevents hooks, modes and stubs on a model that others run."""
    model = make_tiny("llama")
    seen, stop = set[Any](), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for module in model.modules():
                seen.add((len(module._forward_hooks), module.training, type(module).__name__))

    kinds = {type(module).__name__ for module in model.modules()}

    def find() -> None:
        try:
            for _ in range(5):
                _found.pop(model, None)
                find_sublayers(model)
        finally:
            stop.set()

    assert not in_threads([watch, find])
    assert {(hooks, training) for hooks, training, _ in seen} == {(0, False)} and {kind for *_, kind in seen} == kinds


def test_one_scheduler_learns_from_many() -> None:
    """Prevents estimates that another sequence changes meanwhile from raising: a new source, a rate of zero."""
    rounds, steps, source = times(4, 200), 200, NgramIndex(8)

    def work(scheduler: Scheduler, seed: int) -> None:
        rng = random.Random(seed)
        for step in range(steps):
            if step % 10 == 9:
                scheduler.forget_mask()
            scheduler.choose({MASK: scheduler.mask_rate, source.name: 3.0, PLAIN: scheduler.plain_rate})
            parts = rng.choice([(), (Part(MASK, 3),), (Part(f"source {seed} {step}", 4, 0),)])
            scheduler.acceptance(source, 0)
            scheduler.learn(parts, rng.randint(0, 3), rng.random(), rng.random())

    for _ in range(rounds):
        one = Scheduler()
        assert not in_threads([partial(work, one, seed) for seed in range(THREADS)])
    tell("one scheduler in 4 threads", THREADS * rounds * steps)


@BACKENDS
def test_modes_and_numbers_of_threads_change(backend: str) -> None:
    """Prevents buffers of one mode of autograd from being refused in another thread's, and tokens from changing."""
    model = served_model(backend)
    some, method = calls(model, 4, seed=1), methods(backend, find_sublayers(model).num_layers)[1]
    before = torch.get_num_threads()

    def work(mode: Any, threads: int) -> None:
        rng = random.Random(threads)
        for _ in range(times(4, 50)):
            with mode():
                assert tried(model, method, some, rng) in ("same", "cancelled")
            torch.set_num_threads(threads)

    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    try:
        raised = in_threads([partial(work, mode, n) for n, mode in enumerate(modes, 1)])
    finally:
        torch.set_num_threads(before)
    assert not raised, raised
    tell(f"{backend}, modes of autograd and numbers of threads", 3 * times(4, 50))


def test_a_pool_with_readers_that_leave(tokenizer: Any) -> None:
    """Prevents a reader that stops reading from blocking a thread of the pool, or the requests after it."""
    model = served_model("eager")
    method, some = methods("eager", 4)[0], [c for c in calls(model, 6, seed=2) if len(c.ids) == 1]

    def decode(call: Call, streamer: Any) -> bool:
        out = model.generate(call.ids, custom_generate=method, streamer=streamer, **call.options)
        return torch.equal(out, call.plain)

    async def serve(pool: ThreadPoolExecutor) -> list[bool]:
        loop, waiting = asyncio.get_running_loop(), []
        for number in range(times(8, 200)):
            streamer = TextIteratorStreamer(tokenizer, timeout=300)
            waiting.append(loop.run_in_executor(pool, decode, some[number % len(some)], streamer))
            if number % 2:
                await loop.run_in_executor(None, next, streamer)  # and never again
        return await asyncio.gather(*waiting)

    with ThreadPoolExecutor(THREADS) as pool:
        same = asyncio.run(serve(pool))
    assert all(same)
    tell("a pool with readers that leave", len(same), same=sum(same))


def test_copies_of_a_method() -> None:
    """Prevents a server that copies or sends its objects from failing at a lock; what was learnt stays behind."""
    model = served_model("eager")
    some = calls(model, 2)
    for method in [*methods("eager", 4), self_speculative(SkipMask(num_layers=4), decoding="mtad")]:
        for copied in (copy.copy(method), copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
            settings = [
                {k: v for k, v in vars(m).items() if k in ("plan", "policy", "deterministic", "joint", "backend")}
                for m in (method, copied)
            ]
            assert settings[0] == settings[1] and copied is not method
            assert method.joint is not None or some[0].same(model, copied)


def _decode_in_child(call: Call, method: Any, model: Any, said: Any) -> None:
    torch.set_num_threads(1)
    said.put(call.same(model, method))


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded")
@BACKENDS
def test_a_forked_process_decodes(backend: str) -> None:
    """Prevents a child from waiting for a lock that a thread of its parent held.

    With one thread a product: the library for threads behind torch does not survive a fork after more than one.
    """
    from skipsearch.model.turns import one_at_a_time

    model = served_model(backend)
    call, method = calls(model, 1)[0], methods(backend, find_sublayers(model).num_layers)[0]
    assert torch.get_num_threads() == 1 and call.same(model, method)
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with one_at_a_time:
            held.set()
            let_go.wait(300)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    fork = multiprocessing.get_context("fork")
    said: Any = fork.SimpleQueue()
    child = fork.Process(target=_decode_in_child, args=(call, method, model, said))
    try:
        child.start()
        child.join(300)
        assert child.exitcode == 0 and said.get()
    finally:
        let_go.set()
        thread.join()
        child.kill()


def test_copies_of_weights_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents two first calls at once from quantising the same layers twice, for which there may be no memory."""

    def slowly(*given: Any) -> Any:
        time.sleep(0.002)
        return quantised(*given)

    monkeypatch.setattr(copies, "quantised", slowly)
    model = make_tiny("llama")
    plan, views = methods("eager", 4)[1].plan, list[Any]()
    assert not in_threads([lambda: views.append(draft_view(model, plan))] * THREADS)
    mlps = {id(view.model.layers[1].mlp.up_proj) for view in views}
    assert len(mlps) == 1 and len(views) == THREADS
