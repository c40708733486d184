"""Sublayers of models that have none, and the context limit of a config."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, T5ForConditionalGeneration

from skipsearch.errors import UnsupportedModel
from skipsearch.model.sublayers import find_sublayers
from skipsearch.model.target import context_limit


@pytest.mark.parametrize("known", [{}, {"max_position_embeddings": None}])
def test_a_config_may_have_no_context_limit(known: dict[str, Any]) -> None:
    """Prevents a missing limit, or None, from being compared with a number of tokens."""
    assert context_limit(SimpleNamespace(**known)) > 100_000


def test_encoder_decoders_are_refused() -> None:
    """Prevents a model that cannot be skipped safely from being decoded wrongly."""
    config = AutoConfig.for_model("t5", vocab_size=97, d_model=32, num_layers=4, num_heads=4)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        find_sublayers(T5ForConditionalGeneration(config).eval())
