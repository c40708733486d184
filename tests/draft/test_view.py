"""draft_view: the right sublayers are gone, and nothing else changed. For each family: test_families.py."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from ablation import MASKS, ablated
from conftest import make_tiny
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM

from skipsearch import SkipMask, draft_view, self_speculative
from skipsearch.errors import MaskError
from skipsearch.model.sublayers import find_sublayers


def test_parallel_branches_keep_their_shared_norm(ids: torch.Tensor) -> None:
    """Prevents skipping attention from taking the norm away that a parallel MLP reads."""
    model = make_tiny("cohere")
    assert find_sublayers(model).norms == {"attention": (), "mlp": ()}
    mask = SkipMask(attention=[1], num_layers=4)
    torch.testing.assert_close(draft_view(model, mask)(ids).logits, ablated(model, mask, ids), atol=1e-5, rtol=1e-5)


def test_weights_are_shared_and_the_model_untouched(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents a second copy of the weights, and a user's model that comes back patched."""
    model = tiny("llama")
    before = {name: id(module) for name, module in model.named_modules()}
    logits = model(ids).logits
    view = draft_view(model, MASKS[-1])
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in view.parameters()} <= own
    view(ids)
    assert before == {name: id(module) for name, module in model.named_modules()}
    assert torch.equal(model(ids).logits, logits)
    assert model.config is not view.config and not hasattr(model.config, "kv_sharing_modes")


def test_two_views_at_once(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents masks from leaking into one another, as module-global skip sets do."""
    model = tiny("qwen3")
    first, second = draft_view(model, MASKS[0]), draft_view(model, MASKS[-1])
    expected = first(ids).logits, second(ids).logits
    assert torch.equal(first(ids).logits, expected[0]) and torch.equal(second(ids).logits, expected[1])
    assert not torch.equal(*expected)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="before, it crops caches of no layer")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_view_works_as_assistant_model(family: str, tiny: Any, ids: torch.Tensor) -> None:
    """Prevents wrong positions when attention 0 is skipped and a stock cache is made from the view's config."""
    model = tiny(family)
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    rng = random.Random(0)
    for mask in [MASKS[0], *(SkipMask.from_bits([rng.random() < 0.4 for _ in range(8)]) for _ in range(3))]:
        view = draft_view(model, mask)
        assert torch.equal(model.generate(ids, assistant_model=view, **settings), expected)


def test_accelerate_hooks_stay_with_their_module(ids: torch.Tensor) -> None:
    """Prevents a dispatched layer's forward, bound to the original, from running sublayers that are skipped."""
    accelerate = pytest.importorskip("accelerate")
    plain = make_tiny("llama")
    expected = ablated(plain, MASKS[-1], ids)
    hooked = accelerate.cpu_offload(make_tiny("llama"), execution_device="cpu")
    torch.testing.assert_close(draft_view(hooked, MASKS[-1])(ids).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hooked(ids).logits, plain(ids).logits)


def test_wrong_layer_count_is_refused(tiny: Any) -> None:
    """Prevents a 40-layer mask from being half applied."""
    with pytest.raises(MaskError, match=r"num_layers 5.*has 4"):
        draft_view(tiny("llama"), SkipMask(num_layers=5))


def saved(tmp_path: Any, ids: torch.Tensor) -> Any:
    model = make_tiny("llama")
    model.save_pretrained(tmp_path)
    return model


OUTER = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
PLACES: dict[str, Any] = {
    "auto": "auto",
    "layers on disk": {**OUTER, **{f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}},
    "all layers on disk": {**OUTER, **{f"model.layers.{i}": "disk" for i in range(4)}},
}


@pytest.mark.parametrize("place", PLACES)
def test_models_spread_by_a_device_map(place: str, tmp_path: Any, ids: torch.Tensor) -> None:
    """Prevents offloaded weights (meta tensors until their layer runs) from breaking the check, view or loop."""
    plain = saved(tmp_path / "model", ids)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=PLACES[place], offload_folder=tmp_path / "offload"
    )
    mask = MASKS[-1]
    torch.testing.assert_close(draft_view(model, mask)(ids).logits, ablated(plain, mask, ids), atol=1e-5, rtol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = plain.generate(ids, **options)
    assert torch.equal(model.generate(ids, custom_generate=self_speculative(mask), **options), expected)
    assert torch.equal(model.generate(ids, **options), expected)


class Int8Linear(nn.Module):
    """What quantising libraries put in place of a linear layer: integer buffers and scales, no weight parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("quantised", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.quantised.to(x.dtype) * self.scale)


def test_quantised_linear_layers(ids: torch.Tensor) -> None:
    """Prevents the check and the view from needing weights as parameters. A stand-in: no such library is installed."""
    model = make_tiny("llama")
    for layer in model.model.layers:
        for branch in (layer.self_attn, layer.mlp):
            for name, module in list(branch.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(branch, name, Int8Linear(module))
    for mask in MASKS:
        torch.testing.assert_close(draft_view(model, mask)(ids).logits, ablated(model, mask, ids), atol=1e-5, rtol=1e-5)
        options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        method = self_speculative(mask)
        assert torch.equal(model.generate(ids, custom_generate=method, **options), model.generate(ids, **options))
