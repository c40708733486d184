"""Nothing is lost by cancelled requests, by a model that changes, or by methods and models that are dropped."""

from __future__ import annotations

import gc
import os
import random
import warnings
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cancelled_calls import CANCELLED, Enough, calls, methods, served_model, tried
from conftest import make_tiny
from counts import FULL, tell, times

from skipsearch import DraftPlan, self_speculative
from skipsearch.compiled.backend import KEPT, with_backend
from skipsearch.compiled.buffers import Buffers
from skipsearch.compiled.model import CompiledModel
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.sequences import Sequences
from skipsearch.draft.view import draft_view
from skipsearch.errors import DecodingError
from skipsearch.model.sublayers import find_sublayers
from skipsearch.model.target import Target

pytestmark = [
    pytest.mark.filterwarnings("ignore:decoding plainly"),  # a batch with what the caller wrote
    pytest.mark.filterwarnings("ignore:decoding eagerly. backend 'compiled' takes"),  # a batch
]
BACKENDS = pytest.mark.parametrize("backend", ["eager", "compiled"])
SHORT = {"attention_mask": torch.ones(1, 2, dtype=torch.long)}
GROWTH = 20e6  # bytes of the process: the allocator keeps some


def tensors() -> tuple[int, int]:
    """How many tensors live, and how many bytes they hold, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at every object wakes some that are deprecated
        found = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not o.is_mkldnn]
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found if t.layout == torch.strided)}
    return len(found), sum(storages.values())


def living(*kinds: type) -> list[int]:
    """How many objects of each kind live."""
    gc.collect()
    found = Counter(type(o) for o in gc.get_objects())
    return [found[kind] for kind in kinds]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@BACKENDS
def test_memory_stays_as_it_is(backend: str) -> None:
    """Prevents keys, buffers or views from piling up with requests, cancelled ones among them."""
    model = served_model(backend)
    some, served = calls(model, times(5, 8), seed=3), methods(backend, find_sublayers(model).num_layers)[:3]
    for method in served:
        for call in some:
            assert call.same(model, method)
    before, rss, rng, came = tensors(), resident(), random.Random(0), Counter[str]()
    count = times(60, 1000)
    for number in range(count):
        came[tried(model, served[number % 3], some, rng, share=0.4)] += 1
    assert set(came) == {"same", "cancelled"} and tensors() == before
    grown = resident() - rss
    assert not FULL or grown < GROWTH, grown
    tell(f"{backend}, memory", count, **came, bytes_of_tensors_more=0, bytes_of_the_process_more=grown)


@BACKENDS
def test_errors_that_are_kept(backend: str) -> None:
    """Prevents each kept traceback from holding a sequence's keys, or buffers that the next request then lacks."""
    model = served_model(backend)
    some = [call for call in calls(model, 8, seed=4) if len(call.ids) == 1]
    method = methods(backend, find_sublayers(model).num_layers)[0]
    for call in some:
        assert call.same(model, method)
    (_, before), lent, kept, rng = tensors(), living(Buffers), list[BaseException](), random.Random(1)
    count = times(20, 300)
    for number in range(count):
        call, how = some[number % len(some)], CANCELLED[number % 3]
        with pytest.raises(Enough) as error:
            call.cancel(model, method, how, rng.randrange(3))
        kept.append(error.value)
        with pytest.raises(DecodingError) as refused:
            model.generate(torch.tensor([[5000, 5000]]), custom_generate=method, **call.options | SHORT)
        kept.append(refused.value)
    keys = Target.of(model).num_layers * 2 * model.config.num_key_value_heads * 16 * model.config.head_dim * 4
    assert living(Buffers) == lent
    each = (tensors()[1] - before) / len(kept)
    assert each < keys, "more than the keys and values of 16 tokens"
    assert some[0].same(model, method)
    tell(f"{backend}, errors kept", len(kept), bytes_for_each=int(each), bytes_of_16_tokens=keys)


def test_an_iterator_that_is_closed_early() -> None:
    """Prevents buffers from staying lent when decoding is left in the middle."""
    model = served_model("compiled")
    target, call = with_backend(Target.of(model), "compiled"), calls(model, 1, seed=5)[0]
    view = draft_view(model, methods("compiled", find_sublayers(model).num_layers)[0].plan)
    lent, rng = None, random.Random(0)
    for _ in range(times(10, 300)):
        sequences = Sequences(target, call.ids, capacity=call.plain.shape[1], draft=view)
        blocks = decode(sequences, Ending(max_length=call.plain.shape[1]), policy=methods("compiled", 4)[0].policy)
        for _ in range(rng.randint(1, 4)):
            next(blocks, None)
        blocks.close()
        sequences.close()
        sequences.close()  # the next one has these buffers by now
        lent = lent or living(Buffers)
    assert living(Buffers) == lent
    assert call.same(model, self_speculative(None, backend="compiled"))
    tell("iterators closed early", times(10, 300), buffers=lent[0])


def test_longer_and_longer_sequences() -> None:
    """Prevents the buffers of every length that was ever served from being kept."""
    target = with_backend(Target.of(served_model("compiled")), "compiled")
    compiled: Any = target.compiled
    for step in range(40):
        compiled.acquire(64 * step, Owner())
    sizes = [b.ids.shape[1] for b in compiled._free]
    assert sum(sizes) <= 2 * max(sizes) and max(sizes) >= 64 * 39
    compiled._free.clear()


class Owner:
    """Takes buffers and dies."""


@pytest.mark.filterwarnings("ignore:decoding eagerly.*has a hook")
def test_hooks_on_and_off_between_requests() -> None:
    """Prevents compiled code, or copies of weights, of a state of the model that is gone."""
    model = served_model("compiled")
    method, some = methods("compiled", find_sublayers(model).num_layers)[1], calls(model, 2, seed=6)
    mlp = model.model.layers[1].mlp
    rng, before, came = random.Random(2), None, Counter[str]()
    for number in range(times(7, 200)):
        handle = mlp.register_forward_hook(lambda _m, _a, out, n=number: None)
        came[tried(model, method, some, rng)] += 1
        handle.remove()
        came[tried(model, method, some, rng)] += 1
        if number == KEPT:
            before = tensors(), living(CompiledModel)
    assert set(came) <= {"same", "cancelled"} and (tensors(), living(CompiledModel)) == before
    tell("hooks on and off", times(7, 200), **came)


@BACKENDS
def test_what_is_dropped_is_freed(backend: str) -> None:
    """Prevents a method from keeping a model, or a model the quantised copies, views and code of a method."""
    model = make_tiny("llama") if backend == "eager" else served_model.__wrapped__("compiled")
    layers, path = find_sublayers(model).num_layers, find_sublayers(model).path
    some, others = calls(model, 2, seed=7), living(CompiledModel, Buffers)

    def used(model: Any) -> tuple[Any, list[weakref.ref[Any]]]:
        """A method, and what must end with it: a draft view and a quantised copy."""
        method = self_speculative(DraftPlan.everywhere("int8", layers), backend=backend)
        for call in some:
            assert call.same(model, method)
        for how in CANCELLED:
            with pytest.raises(Enough):
                some[0].cancel(model, method, how, 3)
        view = method._drafts[model][1]
        return method, [weakref.ref(view), weakref.ref(view.get_submodule(path)[1].mlp.down_proj)]

    method, parts = used(model)
    assert all(ref() is not None for ref in parts)
    del method
    gc.collect()
    assert [ref() for ref in parts] == [None, None]
    method, parts = used(model)
    parts += [weakref.ref(model), weakref.ref(model.get_submodule(path)[1].mlp.down_proj)]
    del model
    gc.collect()
    assert [ref() for ref in parts] == [None] * 4 and method.stats is not None
    assert all(now <= then for now, then in zip(living(CompiledModel, Buffers), others, strict=True))
