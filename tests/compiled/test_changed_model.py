"""A model that is changed between calls: the compiled backend sees what eager decoding would see."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_compiled import MASK
from torch import Tensor, nn

from skipsearch import DraftPlan, self_speculative
from skipsearch.compiled.backend import with_backend
from skipsearch.compiled.model import WIDTHS
from skipsearch.errors import BackendWarning
from skipsearch.model.state import ModelState
from skipsearch.model.target import Target

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}


class Adapted(nn.Linear):
    """A linear layer with an adapter that can be switched off, as adapter libraries make them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self._disable_adapters, self.scaling = linear.weight, False, {"default": 30.0}

    def forward(self, rows: Tensor) -> Tensor:
        out = super().forward(rows)
        return out if self._disable_adapters else out + self.scaling["default"] * rows.mean(-1, keepdim=True)


@pytest.fixture
def model(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(WIDTHS, "cpu", (1, 13))  # enough here, and compiled in a third of the time
    model = copy.deepcopy(tiny("llama"))
    layer = model.model.layers[2].mlp
    layer.gate_proj = Adapted(layer.gate_proj)
    yield model.eval()


def zeros(_module: Any, _args: Any, out: Tensor) -> Tensor:
    return torch.zeros_like(out)


def negated(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (-args[0],)


def other_forward(model: Any) -> None:
    model.model.layers[1].mlp.forward = lambda rows: -rows


def to_half_of(model: Any) -> None:
    model.model.layers[2].mlp.gate_proj.scaling["default"] = -20.0


HOOKS: dict[str, Callable[[Any], Any]] = {
    "a hook on mlp": lambda m: m.model.layers[1].mlp.register_forward_hook(zeros),
    "a hook on q_proj": lambda m: m.model.layers[1].self_attn.q_proj.register_forward_hook(zeros),
    "a pre-hook": lambda m: m.model.layers[1].mlp.register_forward_pre_hook(negated),
    "a global hook": lambda _m: nn.modules.module.register_module_forward_hook(
        lambda module, _args, out: -out if type(module).__name__ == "LlamaMLP" else None
    ),
}
SWITCHES: dict[str, Callable[[Any], Any]] = {
    "adapters off": lambda m: setattr(m.model.layers[2].mlp.gate_proj, "_disable_adapters", True),
    "another scale": to_half_of,
    "another activation": lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.Tanh()),
}


def same(model: Any, method: Any, ids: Tensor) -> Tensor:
    """The method's tokens, which must be plain decoding's."""
    options = {**GREEDY, "attention_mask": torch.ones_like(ids)}
    out: Tensor = model.generate(ids, custom_generate=method, **options)
    assert torch.equal(out, model.generate(ids, **options))
    return out


@pytest.mark.parametrize("change", [*HOOKS, "a forward of its own"])
def test_code_beside_the_classes_is_run_or_said(model: Any, ids: Tensor, change: str) -> None:
    """Prevents tokens of the model without its hooks; and compiling anew once they are off."""
    method = self_speculative(MASK, backend="compiled")
    before = same(model, method, ids)
    compiled = with_backend(Target.of(model), "compiled").compiled
    handle = HOOKS[change](model) if change in HOOKS else other_forward(model)
    try:
        with pytest.warns(BackendWarning, match="decoding eagerly: .* has a (hook|forward)"):
            assert not torch.equal(same(model, method, ids), before)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            same(model, method, ids)
    finally:
        if handle is None:
            del model.model.layers[1].mlp.forward
        else:
            handle.remove()
    assert torch.equal(same(model, method, ids), before)
    assert with_backend(Target.of(model), "compiled").compiled is compiled is not None


@pytest.mark.parametrize("change", SWITCHES)
@pytest.mark.filterwarnings("error")
def test_switches_are_seen(model: Any, ids: Tensor, change: str) -> None:
    """Prevents tokens of an adapter that was switched off, and decoding eagerly where compiling anew would do."""
    method = self_speculative(MASK, backend="compiled")
    before = same(model, method, ids)
    SWITCHES[change](model)
    assert not torch.equal(same(model, method, ids), before)
    assert with_backend(Target.of(model), "compiled").compiled is not None


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("plan", [MASK, DraftPlan.everywhere("int8", 4)], ids=["mask", "plan"])
def test_modes_of_autograd_may_change_between_calls(model: Any, ids: Tensor, backend: Any, plan: Any) -> None:
    """Prevents buffers that were made in inference mode from being refused by later calls."""
    method = self_speculative(plan, max_length=5, backend=backend)
    with torch.inference_mode():
        first = same(model, method, ids)
    assert torch.equal(same(model, method, ids), first)
    with torch.enable_grad():
        assert torch.equal(same(model, method, ids), first)
    with torch.inference_mode():
        assert torch.equal(same(model, method, ids[:, :-1]), same(model, method, ids[:, :-1]))


def test_a_plan_follows_weights_that_are_trained(model: Any, ids: Tensor) -> None:
    """Prevents a draft of weights as they were before: its tokens would be rejected for ever."""
    method = self_speculative(DraftPlan.everywhere("int8", 4), max_length=4)
    same(model, method, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    same(model, method, ids)
    assert method.stats.acceptance_rate > 0.9


def test_the_hooks_of_the_library_are_idle(model: Any, ids: Tensor) -> None:
    """Prevents a model whose hidden states were once asked for from being decoded eagerly ever after."""
    model(ids, output_hidden_states=True)
    assert ModelState.of(model).foreign is None
    assert with_backend(Target.of(model), "compiled").compiled is not None


MORE: dict[str, Callable[[Any], Any]] = {
    "positions": lambda m: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq * 3),
    "a function": lambda m: setattr(m.model.layers[1].self_attn, "scale_of", torch.tanh),
    "a config": lambda m: setattr(m.config, "some_scale", 3.0),
    "the attention": lambda m: m.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("change", MORE)
def test_the_state_covers_what_a_forward_reads(model: Any, change: str) -> None:
    """Prevents buffers, functions and settings from being changed without notice."""
    before = ModelState.of(model)
    assert ModelState.of(model) == before
    MORE[change](model)
    assert ModelState.of(model).code != before.code


def test_a_view_of_a_model_with_a_forward_of_its_own_skips(model: Any, ids: Tensor) -> None:
    """Prevents `model.forward = torch.compile(model.forward)` from making a draft of the whole model."""
    from skipsearch import draft_view

    forward = model.forward
    model.forward = lambda *args, **given: forward(*args, **given)
    view = draft_view(model, MASK)
    assert not torch.equal(view(ids).logits, model(ids).logits)
    method = self_speculative(MASK, max_length=4)
    same(model, method, ids)
    assert method.stats.acceptance_rate < 1
