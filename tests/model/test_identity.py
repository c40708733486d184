"""Which model a mask belongs to: one whose layers compute the same, whatever else its config says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny

from skipsearch import SkipMask, load_mask
from skipsearch.errors import MaskError
from skipsearch.maskfile import MaskFile
from skipsearch.model.identity import check_mask_belongs, model_card
from skipsearch.model.target import Target

ROOT = Path(__file__).parents[2]
SAME: dict[str, Any] = {
    "pad_token_id": 7, "bos_token_id": 9, "eos_token_id": [2, 3], "use_cache": False, "attention_dropout": 0.1,
    "id2label": {0: "yes", 1: "no"}, "initializer_range": 0.5, "a_field_of_next_year": None, "another_one": False,
}  # fmt: skip
OTHER: dict[str, Any] = {
    "rms_norm_eps": 1e-3, "num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "hidden_act": "relu",
}  # fmt: skip


@pytest.fixture(scope="module")
def file() -> MaskFile:
    return MaskFile.of(SkipMask(mlp=[1], num_layers=4), model=model_card(Target.of(make_tiny("llama")), "tiny"))


def changed(tiny: Any, **fields: Any) -> Target:
    model = copy.copy(tiny("llama"))
    model.config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(model.config, name, value)
    return Target.of(model)


@pytest.mark.parametrize("name", SAME)
def test_fields_that_change_no_layer(name: str, tiny: Any, file: MaskFile) -> None:
    """Prevents a mask from being refused because of padding, labels, or a newer library."""
    check_mask_belongs(file, changed(tiny, **{name: SAME[name]}))


@pytest.mark.parametrize("name", OTHER)
def test_fields_that_change_layers(name: str, tiny: Any, file: MaskFile) -> None:
    """Prevents a mask from being used on a model that computes something else."""
    with pytest.raises(MaskError, match="search a mask for this model"):
        check_mask_belongs(file, changed(tiny, **{name: OTHER[name]}))


def test_files_of_the_first_version_belong_as_before(demo: Any) -> None:
    """Prevents masks that users have from being refused by a newer fingerprint."""
    check_mask_belongs(load_mask(ROOT / "results" / "measured" / "demo.mask.json"), demo.target)
