"""Packed weights: the same products, taken where they are faster, and never those of other weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from skipsearch.compiled import packing
from skipsearch.compiled.backend import with_backend
from skipsearch.compiled.model import WIDTHS
from skipsearch.compiled.packing import Packed, PackedLinear, pack
from skipsearch.compiled.tracing import tensors_of
from skipsearch.model.target import Target

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if packed products took half of the time."""
    monkeypatch.setattr(Packed, "seconds", lambda self, packed, linears: 1.0 if packed else 2.0)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_packed_layer_computes_the_same(bias: bool) -> None:
    """Prevents a packed layer that forgets its bias, or leaves the model's own layer changed."""
    model = nn.Sequential(nn.Linear(40, 24, bias=bias), nn.ReLU(), nn.Linear(24, 8, bias=bias))
    model.requires_grad_(False)
    rows, before = torch.randn(3, 40), list(model)
    packed = Packed([model[0], model[2]]).module(model)
    torch.testing.assert_close(packed(rows), model(rows))
    assert [type(m) for m in packed] == [PackedLinear, nn.ReLU, PackedLinear] and list(model) == before
    assert {id(p) for p in packed.parameters()} == {id(p) for p in model.parameters()}


@needs_onednn
def test_subclasses_and_shared_weights_are_left_alone(faster: None) -> None:
    """Prevents a quantised layer from being packed as if its weight were plain, and a tied weight packed twice."""

    class Other(nn.Linear):
        pass

    model = nn.ModuleList([Other(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)]).requires_grad_(False)
    model[2].weight = model[1].weight
    packed = pack(model)
    assert packed is not None and len(packed._packed) == 1
    assert [type(m) for m in packed.module(model)] == [Other, PackedLinear, PackedLinear]


@needs_onednn
def test_packing_is_taken_only_where_it_pays(monkeypatch: pytest.MonkeyPatch, faster: None) -> None:
    """Prevents a second copy of the weights that is slower, or for which there is no memory."""
    model = nn.Linear(64, 64).requires_grad_(False)
    assert pack(model) is not None
    monkeypatch.setattr(packing, "free_memory", lambda device: 30_000.0)
    assert pack(model) is None
    monkeypatch.setattr(packing, "free_memory", lambda device: 1e9)
    monkeypatch.setattr(Packed, "seconds", lambda self, packed, linears: 1.0)
    assert pack(model) is None


@needs_onednn
def test_changed_weights_are_noticed(faster: None) -> None:
    """Prevents decoding with a copy of weights that were edited in place, by training or by merging an adapter."""
    for edit in (lambda w: w.mul_(1.01), lambda w: w[3].zero_(), lambda w: w[:, 5].add_(1)):
        model = nn.Linear(48, 32).requires_grad_(False)
        packed = pack(model)
        assert packed is not None and packed.fits()
        edit(model.weight.data)
        assert not packed.fits()


@needs_onednn
@torch.no_grad()
def test_a_merged_adapter_is_decoded_with(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the compiled model from serving the weights of before: it compiles and packs anew."""
    monkeypatch.setattr(Packed, "seconds", lambda self, packed, linears: 1.0 if packed else 2.0)
    monkeypatch.setitem(WIDTHS, "cpu", (1, 4))  # each takes seconds to compile
    model = copy.deepcopy(demo.model)
    first = with_backend(Target.of(model), "compiled", lambda *_: None)
    assert first.compiled is not None and first.compiled.packs
    assert with_backend(Target.of(model), "compiled", lambda *_: None).compiled is first.compiled
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
    second = with_backend(Target.of(model), "compiled", lambda *_: None)  # proves its logits against the model's
    assert second.compiled is not None and second.compiled is not first.compiled
    layer = second.compiled.stack_of(model).layers[0]
    assert any(tensor.is_mkldnn for tensor in tensors_of(layer.module)[1])
