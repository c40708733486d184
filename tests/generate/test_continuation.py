"""Going on from a handed-over cache, which stays usable whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate_calls import MASK, run
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from skipsearch import self_speculative
from skipsearch.model.cache import CACHE


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("known", [1, 6, 9, 10])
def test_continuing_from_past_key_values(family: str, known: int, tiny: Any, batch: torch.Tensor) -> None:
    """Prevents a handed-over cache from being ignored, processed twice, or left unusable for others."""
    model, ids = tiny(family), batch[:1]
    expected = run(model, ids)
    cache = DynamicCache(config=model.config)
    model(ids[:, :known], **{CACHE: cache}, use_cache=True)
    out = run(model, ids, **{CACHE: cache}, custom_generate=self_speculative(MASK))
    assert torch.equal(out, expected) and cache.get_seq_length() == out.shape[1] - 1
    # Plain generate goes on from where we stopped, and we from where it stops.
    longer = run(model, out, **{CACHE: cache}, max_new_tokens=5)
    assert torch.equal(longer, run(model, expected, max_new_tokens=5))
    last = run(model, longer, **{CACHE: cache}, max_new_tokens=5, custom_generate=self_speculative(MASK))
    assert torch.equal(last, run(model, expected, max_new_tokens=10))


def test_only_new_tokens_beside_a_cache(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents the short form of a continuation, new ids with the full attention mask, from losing its place."""
    model, ids = tiny("llama"), batch[:1]
    outs = []
    for method in ({}, {"custom_generate": self_speculative(MASK)}):
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], **{CACHE: cache}, use_cache=True)
        options: dict[str, Any] = {CACHE: cache, "attention_mask": torch.ones_like(ids), **method}
        outs.append(run(model, ids[:, 8:], **options))
    assert torch.equal(*outs)


def test_an_error_in_a_block_leaves_model_and_cache_usable(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents an exception between draft and commit from leaving drafts in a user's cache, or the model patched."""
    model, ids = tiny("llama"), batch[:1]
    expected = run(model, ids)

    class Breaks(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 9:
                raise KeyboardInterrupt
            return scores

    cache = DynamicCache(config=model.config)
    model(ids[:, :6], **{CACHE: cache}, use_cache=True)
    method = self_speculative(MASK)
    with pytest.raises(KeyboardInterrupt):
        run(model, ids, **{CACHE: cache}, logits_processor=LogitsProcessorList([Breaks()]), custom_generate=method)
    assert cache.get_seq_length() == 6
    assert torch.equal(run(model, ids, **{CACHE: cache}, custom_generate=method), expected)
    assert torch.equal(run(model, ids), expected)
