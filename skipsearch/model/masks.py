"""AttentionLayout: which keys a query may see, as attention masks in the form that a model takes.

For forwards whose rows have different lengths. Shapes: R rows, Q queries, K keys. Slots are positions in a padded
sequence; slots below `pads` hold padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Which keys the attention of each layer may see.

    Attributes:
        windows: for each layer, the width of its sliding window or chunk; None without one.
        layer_types: for each layer, its type in the model's config ("full_attention", "sliding_attention", ...).
        boolean: whether attention takes a boolean mask (SDPA), or a mask that is added to the scores.
        dtype: of the mask that is added.
    """

    windows: tuple[int | None, ...]
    layer_types: tuple[str, ...]
    boolean: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> AttentionLayout:
        """Read off a model's config."""
        windows = [
            layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            for layer in DynamicCache(config=model.config).layers
        ]
        names = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["all"] * len(windows)
        return cls(tuple(windows), tuple(names), model.config._attn_implementation == "sdpa", model.dtype)

    def masks(
        self, query_RQ: Tensor, keys: Callable[[int | None], Tensor], pads_R: Tensor | None = None,
        only_RQK: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Which keys each query may see: a tensor [R, 1, Q, K], or one for each layer type of the model.

        Args:
            query_RQ: slot of each query.
            keys: gives the slots [R or 1, K] of the keys in a layer with this window.
            pads_R: slots below these hold padding.
            only_RQK: True for keys that may be seen at all.
        """

        def mask(name: str, window: int | None) -> Tensor:
            query, key = query_RQ[:, :, None], keys(window)[:, None, :]
            seen = key <= query
            if window is not None and name.startswith("chunked"):
                origin = 0 if pads_R is None else pads_R[:, None, None]
                seen = seen & ((key - origin) // window == (query - origin) // window)
            elif window is not None:
                seen = seen & (query - key < window)
            if pads_R is not None:
                # A query in the padding sees itself, because a softmax over no keys is NaN.
                seen = seen & ((key >= pads_R[:, None, None]) | (key == query))
            if only_RQK is not None:
                seen = seen & only_RQK
            if self.boolean:
                return seen[:, None]
            return torch.where(seen[:, None], 0.0, torch.finfo(self.dtype).min).to(self.dtype)

        kinds = dict(zip(self.layer_types, self.windows, strict=True))
        found = {name: mask(name, window) for name, window in kinds.items()}
        return found if len(found) > 1 else next(iter(found.values()))
