"""draft_view on every supported family: the right sublayers are gone, and nothing else changed."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from skipsearch import SkipMask, draft_view
from skipsearch.errors import MaskError, UnsupportedModel
from skipsearch.model.sublayers import find_sublayers

MASKS = [
    SkipMask(attention=[0], num_layers=4),
    SkipMask(mlp=[0], num_layers=4),
    SkipMask(attention=range(4), num_layers=4),
    SkipMask(mlp=range(4), num_layers=4),
    SkipMask(attention=range(4), mlp=range(4), num_layers=4),
    SkipMask(attention=[1, 2], mlp=[2, 3], num_layers=4),
    SkipMask(attention=[0, 2, 3], mlp=[1, 3], num_layers=4),
]


def ablated(model: Any, mask: SkipMask, ids: torch.Tensor) -> torch.Tensor:
    """The reference: the untouched model, with hooks that zero what a skipped branch returns."""
    sublayers = find_sublayers(model)
    layers = model.get_submodule(sublayers.path)

    def zero(_module: Any, _args: Any, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    handles = [getattr(layers[i], sublayers.child[k]).register_forward_hook(zero) for k, i in mask.sublayers()]
    try:
        return model(ids).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_view_equals_ablation(family: str, tiny: Any, ids: torch.Tensor) -> None:
    """Prevents a skipped branch from leaving something behind: a bias, a norm, a residual twice."""
    model = tiny(family)
    for mask in MASKS:
        torch.testing.assert_close(draft_view(model, mask)(ids).logits, ablated(model, mask, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_mask_changes_no_bit(family: str, tiny: Any, ids: torch.Tensor) -> None:
    """Prevents the view itself from changing the function."""
    assert torch.equal(draft_view(tiny(family), SkipMask(num_layers=4))(ids).logits, tiny(family)(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_each_branch_are_found(family: str, tiny: Any) -> None:
    """Prevents drafts from paying for norms whose branch is gone: each branch has one of its own at least."""
    norms = find_sublayers(tiny(family)).norms
    assert norms["attention"] and norms["mlp"]
    assert not set(norms["attention"]) & set(norms["mlp"])


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


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "mlp child"),
        ("bloom", {"n_layer": 4, "n_head": 4}, "left out"),
        ("jamba", {"mamba_d_state": 8, "num_experts": 2, "use_mamba_kernels": False}, "recurrent state"),
        ("t5", {"d_model": 32, "num_layers": 4}, "encoder-decoder"),
    ],
)
def test_unsupported_models_say_why(family: str, changes: dict[str, Any], why: str) -> None:
    """Prevents a model that cannot be skipped safely from being decoded wrongly."""
    config = AutoConfig.for_model(family, vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                                  num_key_value_heads=2, intermediate_size=48, **changes)  # fmt: skip
    if family == "t5":
        from transformers import T5ForConditionalGeneration as Model

        model: Any = Model(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModel, match=why):
        find_sublayers(model.eval())
