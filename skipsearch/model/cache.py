"""SharedCache: the KV cache that draft and target share.

Each layer is a buffer that is longer than needed. Slots below `committed` hold the keys and values of final tokens
(all but the last token, which the next forward processes). What lies behind, such as rejected drafts, is scratch. To
forget it, `commit` sets the number of committed slots; nothing is cropped or erased. So a layer whose attention the
draft skips stays in step with the others. Rows of a batch may have different lengths. Static and quantised caches are
not supported.

Why no query attends to scratch: each forward starts at a row's committed slots, or right behind slots that were written
in the same block, and it writes its own slots before attention reads. A query sees no slot above its own. In a batch,
in compiled forwards and in trees of tokens the attention mask hides those (`AttentionLayout.masks`); for a single eager
row the keys end with the forward's last slot. Buffers begin as zeros, since a NaN in a masked slot would still spread.

Shapes: B rows, H heads, T slots, Q new tokens, D head size. A slot is a position in the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from skipsearch.errors import DecodingError
from skipsearch.model.target import Target

# What forwards and `generate` call their cache: it has a new name since transformers 5.24.
CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
ROOM = 64  # slots beyond the needed ones when a buffer grows


@dataclass(slots=True)
class _Cursor:
    """Where the next forward writes. The layers hold this and not the SharedCache: without a reference cycle, buffers
    are freed together with their sequences, and not at a later garbage collection.

    Attributes:
        capacity: slots that buffers need at most, as far as known.
        start, last_start: the lowest and the highest slot at which a row starts to write.
        slots: row indices [B, 1] and slots [B, Q]; None if all rows write to the same slots.
    """

    capacity: int
    start: int = 0
    last_start: int = 0
    slots: tuple[Tensor, Tensor] | None = None


class SharedCache:
    """Keys and values of a batch of sequences, written by draft and target.

    Args:
        target: the model, with the sliding windows of its layers.
        capacity: expected number of slots. Buffers grow if more are needed.
        past: a dynamic cache to continue from. It is copied; `hand_over` writes the result back.
        rows: B.
        buffers: keys and values [B, H, T, D] of each layer to write into. They belong to the caller, are large enough
            and never grow.

    Attributes:
        cache: what forwards of target and draft are given.
        committed: for each row, how many slots hold final tokens.
        floor: the least number of slots to keep. A sliding layer of `past` holds only its window, so a rollback
            below the length of `past` is impossible.
        windows: for each layer, the width of its sliding window, None without one.

    Raises:
        DecodingError: `past` cannot be rolled back, or its layers have different lengths.
    """

    def __init__(
        self, target: Target, capacity: int, past: Cache | None = None, rows: int = 1,
        buffers: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        self.borrowed = buffers is not None
        self.cursor = _Cursor(capacity)
        self.cache = DynamicCache(config=target.model.config)
        self.windows = target.attention.windows
        length = length_of(past)
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
        """Set where the next forward writes: row b at slots starts[b], starts[b] + 1, ...

        Args:
            starts: the first slot of each row.
            slots_BQ: all slots; needed if rows start at different ones.
        """
        slots = None
        if slots_BQ is not None:
            slots = (torch.arange(len(starts), device=slots_BQ.device)[:, None], slots_BQ)
        self.cursor.start, self.cursor.last_start, self.cursor.slots = min(starts), max(starts), slots

    def move(self, sources: list[int], targets: list[int], left: int) -> None:
        """Copy rows `sources` to rows `targets`, then keep the first `left` rows."""
        if sources:
            for layer in self.cache.layers:
                if layer.is_initialized:
                    for buffer in layer.buffers:
                        buffer[targets] = buffer[sources]
            for source, target in zip(sources, targets, strict=True):
                self.committed[target] = self.committed[source]
        del self.committed[left:]

    def commit(self, row: int, slots: int) -> None:
        """From now on the first `slots` slots of a row hold final tokens; the others are forgotten."""
        self.committed[row] = slots

    def keys_and_values(self, slots: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, H, slots, D] of each layer, as views. Slots behind `committed` may be written to."""
        for layer in self.cache.layers:
            if layer.buffers[0].shape[2] < slots:
                assert not self.borrowed, "borrowed buffers cannot grow"
                layer._reserve(slots)
        return [(layer.buffers[0][:, :, :slots], layer.buffers[1][:, :, :slots]) for layer in self.cache.layers]

    def hand_over(self, past: Cache) -> None:
        """Put the committed tokens into `past`, as plain dynamic layers that any decoding can continue from."""
        length = self.committed[0]
        layers: list[DynamicLayer] = []
        for mine, window in zip(self.cache.layers, self.windows, strict=True):
            layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
            if mine.is_initialized:
                first = 0 if window is None else max(0, length - window + 1)
                layer.lazy_initialization(mine.buffers[0], mine.buffers[1])
                shown = (b[: len(self.committed), :, first:length] for b in mine.buffers)
                # The owner of borrowed buffers reuses them for the next sequence.
                layer.keys, layer.values = (b.clone() if self.borrowed else b for b in shown)
                if window is not None:
                    layer.cumulative_length = length
            layers.append(layer)
        past.layers = layers


class _BufferLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, H, T, D] of one layer, written where the cursor says."""

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
        # Doubling keeps copies rare. More slots than `capacity` are hardly ever needed.
        room = max(end, min(max(2 * have, end + ROOM), self.cursor.capacity))
        self.buffers = (_zeros(old[0], room), _zeros(old[1], room))
        for buffer, kept in zip(self.buffers, old, strict=True):
            buffer[:, :, :have] = kept

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, queries, _ = key_states.shape
        start, end, first = self.cursor.start, self.cursor.last_start + queries, self._first()
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
        """The lowest slot that a query of the next forward attends to."""
        return 0 if self.window is None else max(0, self.cursor.start - self.window + 1)

    def get_seq_length(self) -> int:
        return self.cursor.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first()
        return self.cursor.last_start + query_length - first, first

    def adopt(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Copy the last tokens of a cache layer that has seen `length` tokens."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self._reserve(length)
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, length - states.shape[-2] : length] = states


def _zeros(states: Tensor, room: int) -> Tensor:
    # Zeros and not uninitialised memory: attention reads slots behind the end of a row, and a masked NaN stays NaN.
    return states.new_zeros((*states.shape[:-2], room, states.shape[-1]))


def length_of(past: Cache | None) -> int:
    """Tokens that a cache to continue from holds.

    Raises:
        DecodingError: it cannot be rolled back, or its layers have different lengths.
    """
    if past is None:
        return 0
    if past.offloading:
        raise DecodingError(f"{CACHE} offloads its layers, must stay on the device; pass a plain DynamicCache")
    for layer in past.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise DecodingError(
                f"{CACHE} holds a {type(layer).__name__}, which cannot be rolled back; pass a DynamicCache, or none"
            )
    lengths = {int(layer.get_seq_length()) for layer in past.layers}
    if len(lengths) > 1:
        raise DecodingError(
            f"{CACHE} holds layers of different lengths {sorted(lengths)}; pass the cache of a full model"
        )
    return lengths.pop() if lengths else 0
