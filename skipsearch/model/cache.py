"""SharedCache: the one owner of the KV cache that draft and target share.

Promises that after `commit` every layer holds exactly the committed tokens, whatever a draft or a
verification wrote before. Layers are transformers' own types, so every model writes to them as to any cache.
Does not do static or quantised caches: those cannot be rolled back and are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from skipsearch.errors import DecodingError
from skipsearch.mask import SkipMask


class BufferLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in a buffer with room to spare: appending copies the new tokens alone.

    `keys` and `values` are views of shape [B, H, T, D] of the buffers, as in any dynamic layer.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._view: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._allocate(self.capacity, 0, key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        # Someone else may have replaced `keys` (beam reordering): then the buffer is not theirs.
        assert self._buffers is not None
        if end > self._buffers[0].shape[-2] or self.keys is not self._view:
            self._allocate(self.capacity if end <= self.capacity else 2 * end, start, key_states, value_states)
        keys, values = self._buffers
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self._show(end)
        return self.keys, self.values

    def _allocate(self, room: int, kept: int, key_states: Tensor, value_states: Tensor) -> None:
        """New buffers of `room` tokens, shaped like the states, that begin with the `kept` tokens held so far."""
        keys, values = (s.new_empty((*s.shape[:-2], room, s.shape[-1])) for s in (key_states, value_states))
        if kept:
            keys[..., :kept, :], values[..., :kept, :] = self.keys, self.values
        self._buffers = (keys, values)
        self._show(kept)

    def _show(self, length: int) -> None:
        assert self._buffers is not None
        self.keys = self._view = self._buffers[0][..., :length, :]
        self.values = self._buffers[1][..., :length, :]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if self.is_initialized and tokens_to_remove:
            if self.keys is self._view:
                self._show(self.get_seq_length() + tokens_to_remove)
            else:
                super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self._buffers = self._view = None


class SharedCache:
    """Keys and values of one sequence, written by draft and target, owned here.

    Args:
        model: the target; its config says which layers slide.
        capacity: tokens to reserve room for (more may come; the buffers then grow).
        past: a dynamic cache to continue from, taken over in place; by default an empty one.

    Attributes:
        cache: what the target's forward takes as `past_key_values`.
        committed: tokens that are final in every layer.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, past: Cache | None = None) -> None:
        cache = DynamicCache(config=model.config) if past is None else past
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and not layer.is_initialized:
                cache.layers[i] = BufferLayer(capacity)
            elif not isinstance(layer, (DynamicLayer, DynamicSlidingWindowLayer)):
                raise DecodingError(
                    f"past_key_values holds a {type(layer).__name__}, which cannot be rolled back; "
                    f"pass a DynamicCache, or none"
                )
        cache.activate_past_recording()
        self.cache = cache
        lengths = {layer.get_seq_length() for layer in cache.layers}
        if len(lengths) != 1:
            raise DecodingError(
                f"past_key_values holds layers of different lengths {sorted(lengths)}; pass the cache of a full model"
            )
        self.committed: int = lengths.pop()

    def draft(self, mask: SkipMask) -> Cache | None:
        """The draft's view of the same layers, without those whose attention is skipped; None if none is left."""
        if len(mask.attention) == mask.num_layers:
            return None
        dummy = DummyLayer()
        return Cache(
            layers=[dummy if mask.skips("attention", i) else layer for i, layer in enumerate(self.cache.layers)]
        )

    def commit(self, length: int) -> None:
        """Make the first `length` tokens final and drop everything behind them, layer by layer.

        Layers differ in length whenever a draft skipped some of them, so each is cut to size on its own.
        """
        for layer in self.cache.layers:
            excess = layer.get_seq_length() - length
            assert excess >= 0, "a layer holds fewer tokens than are committed"
            # A sliding layer sheds what left its window only when cropped, if by nothing.
            layer.crop(-excess)
        self.committed = length

    def rollback(self) -> None:
        """Forget everything written since the last commit."""
        for layer in self.cache.layers:
            if excess := layer.get_seq_length() - self.committed:
                layer.crop(-excess)


def positions(length: int, device: torch.device) -> Tensor:
    """Position ids [1, length] to slice from: positions are always passed, never read off a cache."""
    return torch.arange(length, device=device)[None]
