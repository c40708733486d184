"""Buffers: the tensors of one sequence at fixed addresses; Scores: what a forward leaves.

Shapes: C tokens of a buffer, H heads, D head size, Q tokens of a forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skipsearch.compiled.tracing import Shape, make_buffer


@dataclass(slots=True, eq=False, weakref_slot=True)
class Buffers:
    """The tensors of one sequence, at fixed addresses.

    Attributes:
        ids [1, C], positions [C], slots [C]: tokens; the position of each slot; 0, 1, 2, ...
        at [2]: slot of a forward's first token, and its place in ids.
        layers: keys and values [1, H, C, D].
        give_back: to be called by the present owner alone; calls after the first do nothing.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    at: Tensor
    layers: list[tuple[Tensor, Tensor]]
    slices: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    give_back: Callable[[], Any] | None = None
    pool: Any = None  # memory of the graphs that run in them; each overwrites the output of the others

    @classmethod
    def of(cls, size: int, shapes: Sequence[Sequence[Shape]], device: torch.device) -> Buffers:
        """Zeros for so many tokens, which later calls may write to in any mode of autograd."""
        whole: dict[str, Any] = {"dtype": torch.long, "device": device}
        with torch.inference_mode(False):
            layers = [(make_buffer(keys, size, device), make_buffer(values, size, device)) for keys, values in shapes]
            ids, positions, at = (torch.zeros(shape, **whole) for shape in ((1, size), size, 2))
            return cls(ids, positions, torch.arange(size, device=device), at, layers)

    def first(self, slots: int) -> list[tuple[Tensor, Tensor]]:
        """The first slots of each layer's buffers."""
        if slots not in self.slices:
            self.slices[slots] = [(k[:, :, :slots], v[:, :, :slots]) for k, v in self.layers]
        return self.slices[slots]


@dataclass(frozen=True, slots=True)
class Scores:
    """What a forward predicts behind each of its tokens.

    Attributes:
        logits: [1, Q, V].
        top: [2, Q], as doubles: the likeliest token, and its probability.
    """

    logits: Tensor
    top: Tensor
