"""The call of `generate` that every test here varies."""

from __future__ import annotations

from typing import Any

import torch

from skipsearch import SkipMask

MASK = SkipMask(attention=[0, 2], mlp=[1], num_layers=4)


def run(model: Any, ids: torch.Tensor, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "attention_mask": (ids != 0).long(),
    }  # fmt: skip
    return model.generate(ids, **{**options, **changes})
