"""Attention masks for forwards whose rows stand at different places, in the form that a model wants.

Shapes: R rows, Q queries, K keys. Slots are places in a sequence; padding lies below `pads`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def attention_masks(
    model: PreTrainedModel, windows: list[int | None], query_RQ: Tensor, keys: Callable[[int | None], Tensor],
    pads_R: Tensor | None = None, only_RQK: Tensor | None = None,
) -> Any:  # fmt: skip
    """Which keys each query may see: a tensor [R, 1, Q, K], or one for each layer type of the model.

    Args:
        windows: per layer, the width of its sliding window or chunk, None if it sees everything.
        query_RQ: slot of each query.
        keys: slots [R or 1, K] of the keys that a layer with this window hands to attention.
        pads_R: slots below these hold padding.
        only_RQK: keys that may be seen at all.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = dict(zip(getattr(config, "layer_types", None) or ["all"] * len(windows), windows, strict=True))

    def mask(name: str, window: int | None) -> Tensor:
        query, key = query_RQ[:, :, None], keys(window)[:, None, :]
        seen = key <= query
        if window is not None and name.startswith("chunked"):
            origin = 0 if pads_R is None else pads_R[:, None, None]
            seen = seen & ((key - origin) // window == (query - origin) // window)
        elif window is not None:
            seen = seen & (query - key < window)
        if pads_R is not None:
            # A padding query sees itself, so that no row of the softmax is empty.
            seen = seen & ((key >= pads_R[:, None, None]) | (key == query))
        if only_RQK is not None:
            seen = seen & only_RQK
        return _as_wanted(model, seen[:, None])

    found = {name: mask(name, window) for name, window in kinds.items()}
    return found if len(found) > 1 else next(iter(found.values()))


def _as_wanted(model: PreTrainedModel, allowed: Tensor) -> Tensor:
    if model.config._attn_implementation == "sdpa":
        return allowed
    smallest = torch.finfo(model.dtype).min
    return torch.where(allowed, 0.0, smallest).to(model.dtype)
