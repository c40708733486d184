"""SharedCache: the one owner of the KV cache that draft and target share.

Every layer is a buffer with room to spare, and one cursor says for all of them where the next forward
writes. Rolling back is moving the cursor: nothing is cropped, and a layer whose attention the draft skips
cannot fall out of step. Rows of a batch may stand at different lengths. Promises that slots below
`committed` hold the keys and values of final tokens. Does not do static or quantised caches.

Shapes: B rows, H heads, T slots, Q new tokens, D head size. A slot is a place in the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from skipsearch.errors import DecodingError
from skipsearch.model.target import Target

ROOM = 64  # slots added beyond what is asked for when a buffer is made or grows


@dataclass(slots=True)
class _Cursor:
    """Where the next forward writes. Known to the layers, which must not hold their owner: without a reference
    cycle, buffers are freed as soon as their sequences are, not at some later collection.
    """

    capacity: int
    start: int = 0
    last_start: int = 0
    slots: tuple[Tensor, Tensor] | None = None

    def end(self, queries: int) -> int:
        """One past the highest slot that a forward of so many tokens writes to."""
        return self.last_start + queries


class SharedCache:
    """Keys and values of a batch of sequences, written by draft and target, owned here.

    Args:
        target: its config says which layers have a sliding window.
        capacity: slots to reserve (more may come; the buffers then grow).
        past: a dynamic cache to continue from; it is copied, and `hand_over` writes it back.
        buffers: keys and values of each layer to write into, with room for everything. They belong to the caller and
            never grow.

    Attributes:
        cache: what a forward of target or draft takes as `past_key_values`.
        committed: per row, how many slots hold final tokens.
        floor: committed slots cannot be cut below this and be kept: of `past`, sliding layers know their window alone.
        windows: per layer, the width of its sliding window, None if it sees everything.
    """

    def __init__(
        self, target: Target, capacity: int, past: Cache | None = None, rows: int = 1,
        buffers: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        self.borrowed = buffers is not None
        self.cursor = _Cursor(capacity)
        self.cache = DynamicCache(config=target.model.config)
        self.windows = target.attention.windows
        length = _length_of(past)
        self.cache.layers = [_BufferLayer(self.cursor, window) for window in self.windows]
        for layer, pair in zip(self.cache.layers, buffers or [], strict=False):
            layer.lazy_initialization(*pair)
            layer.buffers = pair
        self.committed = [length] * rows
        self.floor = length if any(self.windows) else 0
        if past is not None and length:
            for mine, theirs in zip(self.cache.layers, past.layers, strict=True):
                mine.adopt(theirs.keys, theirs.values, length)

    def seek(self, starts: list[int], slots_BQ: Tensor | None = None) -> None:
        """Choose where the next forward writes: row b at slots starts[b], starts[b] + 1, ...

        Args:
            slots_BQ: all slots, needed if rows start at different ones.
        """
        slots = None
        if slots_BQ is not None:
            slots = (torch.arange(len(starts), device=slots_BQ.device)[:, None], slots_BQ)
        self.cursor.start, self.cursor.last_start, self.cursor.slots = min(starts), max(starts), slots

    def move(self, sources: list[int], targets: list[int], left: int) -> None:
        """Copy rows over others, and keep the first `left` of them."""
        if sources:
            for layer in self.cache.layers:
                if layer.is_initialized:
                    for buffer in layer.buffers:
                        buffer[targets] = buffer[sources]
            for source, target in zip(sources, targets, strict=True):
                self.committed[target] = self.committed[source]
        del self.committed[left:]

    def keys_and_values(self, slots: int) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values [B, H, slots, D], not copied: what lies behind `committed` may be written to."""
        for layer in self.cache.layers:
            if layer.buffers[0].shape[2] < slots:
                assert not self.borrowed, "borrowed buffers have no such room"
                layer._reserve(slots)
        return [(layer.buffers[0][:, :, :slots], layer.buffers[1][:, :, :slots]) for layer in self.cache.layers]

    def hand_over(self, past: Cache) -> None:
        """Make `past` hold the committed tokens, as plain dynamic layers that anyone may continue from."""
        length = self.committed[0]
        layers: list[DynamicLayer] = []
        for mine, window in zip(self.cache.layers, self.windows, strict=True):
            layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
            if mine.is_initialized:
                first = 0 if window is None else max(0, length - window + 1)
                layer.lazy_initialization(mine.buffers[0], mine.buffers[1])
                shown = (b[: len(self.committed), :, first:length] for b in mine.buffers)
                # Borrowed buffers go back, and the next sequence overwrites them.
                layer.keys, layer.values = (b.clone() if self.borrowed else b for b in shown)
                if window is not None:
                    layer.cumulative_length = length
            layers.append(layer)
        past.layers = layers


class _BufferLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's buffers [B, H, T, D]; where to write is the cursor's to say."""

    buffers: tuple[Tensor, Tensor]

    def __init__(self, cursor: _Cursor, window: int | None) -> None:
        super().__init__()
        self.cursor, self.window = cursor, window
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffers = (_zeros(key_states, 0), _zeros(value_states, 0))
        self.is_initialized = True

    def _reserve(self, end: int) -> None:
        old = self.buffers
        have = old[0].shape[2]
        # Doubling keeps the copies rare; more than the capacity asked for is hardly ever needed.
        room = max(end, min(max(2 * have, end + ROOM), self.cursor.capacity))
        self.buffers = (_zeros(old[0], room), _zeros(old[1], room))
        for buffer, kept in zip(self.buffers, old, strict=True):
            buffer[:, :, :have] = kept

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, queries, _ = key_states.shape
        start, end, first = self.cursor.start, self.cursor.end(queries), self._first()
        if end > self.buffers[0].shape[2]:
            self._reserve(end)
        shown = []
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            if rows < buffer.shape[0]:
                buffer = buffer[:rows]
            if self.cursor.slots is None:
                buffer.narrow(2, start, queries).copy_(states)
            else:
                row, slots = (index.to(buffer.device) for index in self.cursor.slots)
                buffer[row, :, slots] = states.transpose(1, 2)
            shown.append(buffer.narrow(2, first, end - first))
        self.keys, self.values = shown
        return self.keys, self.values

    def _first(self) -> int:
        """The lowest slot that a query of the next forward may see."""
        return 0 if self.window is None else max(0, self.cursor.start - self.window + 1)

    def get_seq_length(self) -> int:
        return self.cursor.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first()
        return self.cursor.end(query_length) - first, first

    def adopt(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Take over the last tokens of a cache that has seen `length` of them."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self._reserve(length)
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, length - states.shape[-2] : length] = states


def _zeros(states: Tensor, room: int) -> Tensor:
    # Zeros, not whatever memory holds: rows of a batch see past their end, and masked-out NaN is NaN still.
    return states.new_zeros((*states.shape[:-2], room, states.shape[-1]))


def _length_of(past: Cache | None) -> int:
    if past is None:
        return 0
    if past.offloading:
        raise DecodingError("past_key_values offloads its layers, must stay on the device; pass a plain DynamicCache")
    for layer in past.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise DecodingError(
                f"past_key_values holds a {type(layer).__name__}, which cannot be rolled back; "
                f"pass a DynamicCache, or none"
            )
    lengths = {int(layer.get_seq_length()) for layer in past.layers}
    if len(lengths) > 1:
        raise DecodingError(
            f"past_key_values holds layers of different lengths {sorted(lengths)}; pass the cache of a full model"
        )
    return lengths.pop() if lengths else 0
