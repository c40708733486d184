"""Arguments of `generate` that cannot be honoured are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate_calls import MASK, run
from transformers import DynamicCache, StaticCache

from skipsearch import draft_view, self_speculative
from skipsearch.errors import DecodingError
from skipsearch.model.cache import CACHE

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam_search"),
    "no cache": ({"use_cache": False}, "use_cache is False"),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions is True"),
    "hidden states": ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states is True"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "offloaded cache": ({"cache_implementation": "offloaded"}, "cache_implementation"),
    "holes": ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1]])}, "zeros inside the prompt"),
    "positions": ({"position_ids": torch.arange(5, 16)[None]}, "position_ids are not those"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, tiny: Any, batch: torch.Tensor) -> None:
    """Prevents options from being ignored in silence."""
    options, said = REFUSED[name]
    with pytest.raises(DecodingError, match=said):
        run(tiny("llama"), batch[:1], custom_generate=self_speculative(MASK), **options)


def test_arguments_that_generate_drops_are_refused(tiny: Any, batch: torch.Tensor) -> None:
    """Prevents an assistant, which generate does not hand on to a callable, from being ignored."""
    model = tiny("llama")
    with pytest.raises(DecodingError, match="assistant_model"):
        run(model, batch[:1], assistant_model=draft_view(model, MASK), custom_generate=self_speculative(MASK))
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(DecodingError, match="StaticLayer"):
        run(model, batch[:1], **{CACHE: cache}, custom_generate=self_speculative(MASK))
    filled = DynamicCache(config=model.config)
    model(batch[:, :4], **{CACHE: filled}, use_cache=True)
    with pytest.raises(DecodingError, match="one by one"):
        run(model, batch, **{CACHE: filled}, custom_generate=self_speculative(MASK))


def test_inputs_on_another_device_are_refused(tiny: Any, batch: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback from the middle of the model; one device here, so the model's is only said to be another."""
    monkeypatch.setattr("skipsearch.model.target.input_device", lambda _model: torch.device("cuda:0"))
    with pytest.raises(DecodingError, match=r"input_ids lie on cpu, the model takes them on cuda:0; move them"):
        run(tiny("llama"), batch[:1], custom_generate=self_speculative(MASK))
