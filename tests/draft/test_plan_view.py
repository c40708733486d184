"""Views of plans: quantised copies beside the model, made once, and said before they do not fit."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from conftest import assert_one_sentence, make_tiny
from random_plans import random_plan
from torch import nn

from skipsearch import DraftPlan, SkipMask, draft_view
from skipsearch.draft import copies
from skipsearch.draft.copies import copies_bytes, possible_forms
from skipsearch.draft.forms import Int8Linear
from skipsearch.errors import BackendError, MaskError

ALL = DraftPlan.everywhere("int8", 4)


def quantised_in(view: nn.Module) -> set[int]:
    return {id(module) for module in view.modules() if isinstance(module, Int8Linear)}


@torch.no_grad()
def test_the_model_is_untouched(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents a form from writing to the target's weights, whose output the draft must not change."""
    model, rng = tiny("llama"), random.Random(0)
    before = {name: (id(p), p.clone()) for name, p in model.state_dict(keep_vars=True).items()}
    modules, logits = {name: id(module) for name, module in model.named_modules()}, model(ids).logits
    for _ in range(4):
        draft_view(model, random_plan(rng, 4, model.config.vocab_size))(ids)
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items())
    assert modules == {name: id(module) for name, module in model.named_modules()}
    assert torch.equal(model(ids).logits, logits)


def test_copies_are_made_once_and_kept_as_long_as_used(tiny: Any) -> None:
    """Prevents a copy a view, and copies of a search that stay in the memory of a server."""
    model = tiny("qwen3")
    first, second = draft_view(model, ALL), draft_view(model, DraftPlan.everywhere("int8", 4, "full"))
    assert quantised_in(second) < quantised_in(first)
    held = quantised_in(first)
    part = draft_view(model, DraftPlan.in_form("int8", SkipMask(attention=[2], num_layers=4)))
    del first, second
    gc.collect()
    assert len(copies._copies[model]) == len(quantised_in(part)) > 0 and quantised_in(part) < held


def test_changed_weights_are_quantised_anew(ids: torch.Tensor) -> None:
    """Prevents drafts with the weights of before, after an adapter was merged."""
    model = make_tiny("llama")
    before = draft_view(model, ALL)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert len(quantised_in(draft_view(model, ALL)) - quantised_in(before)) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_quantised_drafts_are_near_the_model(family: str, tiny: Any, ids: torch.Tensor) -> None:
    """Prevents a sublayer that is left out or computed twice when it is quantised."""
    model = tiny(family)
    expected, found = model(ids).logits, draft_view(model, ALL)(ids).logits
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_bytes_said_are_bytes_taken(family: str, tiny: Any) -> None:
    """Prevents a plan that fits by its own account, and not in fact."""
    model = tiny(family)
    buffers = [b for m in draft_view(model, ALL).modules() if isinstance(m, Int8Linear) for b in m.buffers()]
    assert copies_bytes(model, ALL) == sum(b.numel() * b.element_size() for b in buffers)


def test_a_plan_that_does_not_fit_is_refused_before(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents running out of memory half-way through the copies."""
    model = make_tiny("llama")
    monkeypatch.setattr(copies, "free_memory", lambda device: 10_000.0)
    monkeypatch.setattr(copies, "quantised", lambda *_: pytest.fail("a copy was made"))
    with pytest.raises(BackendError) as error:
        draft_view(model, ALL)
    assert_one_sentence(error, "GB", "quantises less")


def test_plans_that_the_model_cannot_follow(tiny: Any) -> None:
    """Prevents an error deep inside, or a draft that silently runs what the plan quantises."""
    model = make_tiny("llama")
    none = SkipMask(num_layers=4)
    cases: list[tuple[DraftPlan, list[str]]] = [
        (DraftPlan(none, head_ids=[1, model.config.vocab_size]), ["head.ids", str(model.config.vocab_size)]),
        (DraftPlan.everywhere("int4", 4), ["int4", "attention 0", "groups"]),
        (DraftPlan.everywhere("int8", 5), ["num_layers 5", "4"]),
    ]
    for plan, words in cases:
        with pytest.raises(MaskError) as error:
            draft_view(model, plan)
        assert_one_sentence(error, *words)


def test_weights_that_are_quantised_already() -> None:
    """Prevents quantising what another library has packed; masks go on working there."""

    class Packed(nn.Linear):
        """Stands in for the layers of a quantisation library: a subclass with a forward and weights of its own."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight.to(x.dtype) / 100).t()

    model = make_tiny("llama")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    packed = Packed(child.in_features, child.out_features, bias=False)
                    whole = (child.weight.detach() * 100).round().to(torch.int8)
                    packed.weight = nn.Parameter(whole, requires_grad=False)
                    setattr(parent, name, packed)
    assert "plain weights" in str(possible_forms(model)["int8"])
    with pytest.raises(MaskError) as error:
        draft_view(model, DraftPlan.everywhere("int8", 4, "full"))
    assert_one_sentence(error, "attention 0", "plain weights")
    draft_view(model, SkipMask(attention=[1], num_layers=4))
