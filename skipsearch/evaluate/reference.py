"""Reference: the target's keys and values over a trace, read by many drafts at once.

Promises that a draft attends to the reference up to its start, and to itself. Knows no masks and no tokens.

Shapes: S block starts; P rows, each with G starts of one prompt; K drafted tokens; Q = G * K queries; T positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

Start = tuple[int, int]  # (prompt, committed tokens)
COPIED = 8  # reference positions that are copied in the time that a draft runs one token


class Grid:
    """S block starts arranged for one pass: each row holds G starts of one prompt side by side.

    Starts of one prompt read the same reference. It is copied once for all of them, or not at all where each prompt has
    one row. Where a prompt has fewer than G starts, its first one fills the row.

    Args:
        starts: (prompt, committed tokens), in the order of prompts.
        prompts: how many there are; 0 if the reference must not be written to.
        tokens: of a draft.
        length: of the reference that all rows read.
        side: the largest G.
    """

    def __init__(
        self, starts: Sequence[Start], prompts: int, tokens: int, length: int, side: int, device: torch.device
    ) -> None:
        of_prompt: dict[int, list[int]] = {}
        for number, (prompt, _) in enumerate(starts):
            of_prompt.setdefault(prompt, []).append(number)
        sizes = [len(numbers) for numbers in of_prompt.values()]

        def cost(width: int) -> float:  # measured in tokens run: each row is also copied, and expanded over heads
            return (width * tokens + length / COPIED) * sum(-(-size // width) for size in sizes)

        width = min(range(1, min(side, max(sizes)) + 1), key=cost)
        rows, places = [], []
        for prompt, numbers in of_prompt.items():
            for first in range(0, len(numbers), width):
                part = numbers[first : first + width]
                rows.append(prompt)
                places.append(part + part[:1] * (width - len(part)))
        self.length, self.whole = length, rows == list(range(prompts))
        self.prompt_P, self.start_PG = torch.tensor(rows, device=device), torch.tensor(places, device=device)
        where = {number: place for place, number in enumerate(itertools.chain(*places))}
        self.place_S = torch.tensor([where[number] for number in range(len(starts))], device=device)

    def of_starts(self, found_PQ: Tensor) -> Tensor:
        """Values [P, G * K] as [S, K]."""
        found_SK: Tensor = found_PQ.unflatten(1, (self.start_PG.shape[1], -1)).flatten(0, 1)[self.place_S]
        return found_SK


class ReferenceLayer(DynamicLayer):  # type: ignore[misc]
    """Gives drafts the reference keys and values of their prompt, with their own behind them.

    Their own are written behind the reference, or behind a copy of some of its rows. All layers use the same memory for
    that copy, one after the other.
    """

    def __init__(self, keys: Tensor, values: Tensor, scratch: dict[Any, Tensor]) -> None:
        super().__init__()
        self.reference, self.scratch = (keys, values), scratch
        self.grid: Grid | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        grid, out = self.grid, []
        assert grid is not None
        for which, (reference, own) in enumerate(zip(self.reference, (key_states, value_states), strict=True)):
            shown = reference
            if not grid.whole:
                name = (which, reference.shape[1:], reference.dtype, reference.device)
                if name not in self.scratch or len(self.scratch[name]) < len(own):
                    self.scratch[name] = reference.new_empty((len(own), *reference.shape[1:]))
                rows = grid.prompt_P.to(reference.device)
                shown = torch.index_select(reference, 0, rows, out=self.scratch[name][: len(own)])
            shown[:, :, grid.length : grid.length + own.shape[2]] = own
            out.append(shown[:, :, : grid.length + own.shape[2]])
        return out[0], out[1]

    def get_seq_length(self) -> int:
        return 0 if self.grid is None else self.grid.length
