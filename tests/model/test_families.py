"""The contract, on a tiny model of every family in the registry: supported with proof, or refused with a reason."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from ablation import MASKS, ablated
from conftest import PROVEN, REFUSED, SUPPORTED, make_tiny
from torch import nn
from transformers import DynamicCache

from skipsearch import SkipMask, draft_view, self_speculative
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.rows import rows_may_differ
from skipsearch.decoding.sequences import Sequences
from skipsearch.errors import UnsupportedModel
from skipsearch.model.cache import CACHE
from skipsearch.model.sublayers import find_sublayers
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

MASK = SkipMask(attention=[0, 2], mlp=[1], num_layers=4)


def greedy(model: Any, ids: torch.Tensor, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    return model.generate(ids, **{**options, **changes})


def test_the_registry_is_wide_enough() -> None:
    """Prevents families from being dropped, and refusals from creeping in where support was proven."""
    assert len(SUPPORTED) >= 35
    assert set(REFUSED) == {
        "opt+post_norm", "gemma3n_text", "gemma4_text", "lfm2", "jamba", "bamba", "falcon_h1", "qwen3_next",
        "qwen3_5_text", "nemotron_h", "mamba",
    }  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_refusals_are_one_sentence_with_a_reason(family: str) -> None:
    """Prevents a model that cannot be skipped safely from being decoded wrongly, or refused without a reason."""
    with pytest.raises(
        UnsupportedModel, match=r"is not supported: .{20,}; see `skipsearch models --families`"
    ) as error:
        find_sublayers(make_tiny(family))
    assert str(error.value) == PROVEN[family].note and "\n" not in str(error.value)


@pytest.mark.parametrize("family", SUPPORTED)
def test_view_equals_ablation(family: str, tiny: Any, ids: torch.Tensor) -> None:
    """Prevents a skipped branch from leaving something behind: a bias, a norm, a residual twice."""
    model = tiny(family)
    for mask in MASKS:
        torch.testing.assert_close(draft_view(model, mask)(ids).logits, ablated(model, mask, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", SUPPORTED)
def test_empty_mask_changes_no_bit(family: str, tiny: Any, ids: torch.Tensor) -> None:
    """Prevents the view itself from changing the function."""
    assert torch.equal(draft_view(tiny(family), SkipMask(num_layers=4))(ids).logits, tiny(family)(ids).logits)


@pytest.mark.parametrize("family", SUPPORTED)
def test_skipping_a_whole_layer_removes_it(family: str, tiny: Any, ids: torch.Tensor) -> None:
    """Prevents a norm, a scale or a bias of a layer from running when both branches are skipped."""
    model = tiny(family)
    layers = model.get_submodule(find_sublayers(model).path)
    for gone in (0, 3):
        handle = layers[gone].register_forward_hook(
            lambda _m, args, kwargs, out: _instead(out, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        try:
            expected = model(ids).logits
        finally:
            handle.remove()
        mask = SkipMask(attention=[gone], mlp=[gone], num_layers=4)
        torch.testing.assert_close(draft_view(model, mask)(ids).logits, expected, atol=1e-5, rtol=1e-5)


def _instead(out: Any, hidden: torch.Tensor) -> Any:
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


@pytest.mark.parametrize("family", SUPPORTED)
def test_norms_vanish_with_their_branch(family: str, tiny: Any) -> None:
    """Prevents drafts from paying for norms whose branch is gone, and a norm that both branches read from vanishing."""
    model = tiny(family)
    found = find_sublayers(model)
    layer = model.get_submodule(found.path)[0]
    names = [
        n for n, m in layer.named_children() if "norm" in type(m).__name__.lower() and not isinstance(m, nn.Identity)
    ]
    assert not set(found.norms["attention"]) & set(found.norms["mlp"])
    if len(names) > 1 and family != "falcon":
        assert found.norms["attention"] and found.norms["mlp"]
    else:
        assert not found.norms["attention"] and not found.norms["mlp"]


@pytest.mark.parametrize("family", SUPPORTED)
def test_greedy_output_equals_generate(family: str, tiny: Any, ids: torch.Tensor) -> None:
    """Prevents any wrong position, mask or leftover key: tokens must match for masks of every kind."""
    model = tiny(family)
    expected = greedy(model, ids)
    rng = random.Random(1)
    masks = [*MASKS, *(SkipMask.from_bits([rng.random() < p for _ in range(8)]) for p in (0.2, 0.5))]
    for mask in masks:
        method = self_speculative(mask, max_length=rng.randint(1, 7), exit_threshold=rng.choice([None, 0.3]))
        assert torch.equal(greedy(model, ids, custom_generate=method), expected), (str(mask), method.policy)
        assert method.stats.committed == 24


@pytest.mark.parametrize("family", SUPPORTED)
def test_cache_after_every_commit_equals_a_fresh_prefill(family: str, tiny: Any, ids: torch.Tensor) -> None:
    """Prevents committed keys from being cropped, or draft keys from staying (both seen in stock caches)."""
    model = tiny(family)
    sequences = Sequences(Target.of(model), ids, capacity=64, draft=draft_view(model, MASK))
    for block in decode(sequences, Ending(max_length=50), policy=DraftPolicy(max_length=5)):
        assert block.tokens
        size = sequences.lengths[0] - 1
        assert sequences.cache.committed == [size]
        fresh = DynamicCache(config=model.config)
        model(sequences.ids[:, :size], **{CACHE: fresh}, use_cache=True)
        for mine, theirs in zip(sequences.cache.cache.layers, fresh.layers, strict=True):
            seen = theirs.keys.shape[-2]
            for buffer, states in zip(mine.buffers, (theirs.keys, theirs.values), strict=True):
                torch.testing.assert_close(buffer[..., size - seen : size, :], states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SUPPORTED)
def test_each_row_of_a_batch_equals_its_own_run(family: str, tiny: Any) -> None:
    """Prevents rows of different padding, acceptance and end from disturbing one another."""
    model, rng = tiny(family), random.Random(family)
    pads = [0, 3, 7, 1]
    ids = torch.randint(3, 97, (4, 11), generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad] = seen[row, :pad] = 0
    ends = {"eos_token_id": [5, 9, 17, 33]}
    alone = [greedy(model, ids[row : row + 1, pad:], **ends)[0, 11 - pad :].tolist() for row, pad in enumerate(pads)]
    longest = max(map(len, alone))
    expected = torch.tensor([row + [0] * (longest - len(row)) for row in alone])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of families whose rows are decoded one after another
        for _ in range(2):
            mask = SkipMask.from_bits([rng.random() < 0.4 for _ in range(8)])
            method = self_speculative(mask, max_length=rng.randint(1, 6), exit_threshold=rng.choice([None, 0.3]))
            out = greedy(model, ids, attention_mask=seen, custom_generate=method, **ends)
            assert torch.equal(out[:, 11:], expected), str(mask)


def test_rows_that_cannot_differ_are_decoded_alone(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents a batch from being decoded wrongly where position biases come from the mask; and from being refused."""
    model = make_tiny("bloom")
    with pytest.warns(UserWarning, match="decoded one after another"):
        assert not rows_may_differ(Target.of(model))
    assert rows_may_differ(Target.of(tiny("llama"))) and rows_may_differ(Target.of(tiny("gemma3_text")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", SUPPORTED)
def test_half_precision_runs(family: str, dtype: torch.dtype, ids: torch.Tensor) -> None:
    """Prevents stubs, masks and caches from changing a half-precision model's dtype; the audit checks equality."""
    model = make_tiny(family).to(dtype)
    assert draft_view(model, MASK)(ids).logits.dtype == dtype
    out = greedy(model, ids, custom_generate=self_speculative(MASK), max_new_tokens=8)
    assert out.shape == (1, ids.shape[1] + 8)


@pytest.mark.parametrize("family", ["opt+post_norm", "gemma4_text"])
def test_a_model_that_cannot_be_skipped_in_decodes_plainly(family: str, ids: torch.Tensor) -> None:
    """Prevents plain and n-gram decoding from needing the proof that only a mask needs."""
    model = make_tiny(family)
    expected = greedy(model, ids)
    for method in (self_speculative(None), self_speculative(None, ngram=6)):
        assert torch.equal(greedy(model, ids, custom_generate=method), expected)
    with pytest.raises(UnsupportedModel):
        greedy(model, ids, custom_generate=self_speculative(MASK))
