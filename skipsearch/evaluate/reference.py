"""Reference: the target's keys and values over a trace, read by many drafts at once.

Promises that a draft attends to the reference up to its start, and to itself. Knows no masks and no tokens.

Shapes: S block starts; P rows, each with G starts of one prompt; K drafted tokens; Q = G * K queries; T positions;
H hidden size; C tokens of a continuation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from skipsearch.draft.view import InPlaceOf

Start = tuple[int, int]  # (prompt, committed tokens)
COPIED = 8  # reference positions that are copied in the time that a draft runs one token
GROUP_COST = 400  # tokens of padding that are as slow as one more pass


class Grid:
    """S block starts arranged for one pass: each row holds G starts of one prompt side by side.

    Starts of one prompt read the same reference. It is copied once for all of them, or not at all where each prompt has
    one row. Where a prompt has fewer than G starts, its first one fills the row.

    Args:
        starts: (row of the reference, committed tokens), in the order of rows.
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


class Keeping(InPlaceOf):
    """A layer that keeps some of the hidden states that enter it."""

    def __init__(self, layer: nn.Module, at_PC: Tensor) -> None:
        super().__init__(layer)
        self.layer, self.at_PC = layer, at_PC

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        rows = torch.arange(len(hidden_states), device=hidden_states.device)[:, None]
        self.kept = hidden_states[rows, self.at_PC.to(hidden_states.device)]
        return self.layer(hidden_states, *args, **named)


class Resumed(InPlaceOf):
    """A layer that is given stored hidden states, whatever reaches it."""

    def __init__(self, layer: nn.Module, hidden_PQH: Tensor) -> None:
        super().__init__(layer)
        self.layer, self.hidden_PQH = layer, hidden_PQH

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        return self.layer(self.hidden_PQH, *args, **named)


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts of similar length, padded to the longest: what one pass can run.

    Attributes:
        prompts: their numbers in the trace, in the order of rows.
        longest: tokens of prompt and continuation, at most.
        layers: keys and values of each layer.
        states: hidden states [P, C, H] in front of each layer, of the continuations' tokens; empty: not kept.
    """

    prompts: tuple[int, ...]
    longest: int
    layers: list[ReferenceLayer]
    states: list[Tensor]

    def row(self, prompt: int) -> int:
        return self.prompts.index(prompt)

    @property
    def bytes_of_row(self) -> int:
        """Of a copy of one row's keys and values in one layer, as it is made and expanded over heads."""
        sizes = [[part[0].numel() * part.element_size() for part in layer.reference] for layer in self.layers]
        return 2 * max(map(sum, sizes))


def group_by_length(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Numbers of prompts in groups, shortest first, so that padding and passes together cost least."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first so many: cost, and where their last group begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best.append(min((best[i][0] + (end - i) * longest + GROUP_COST, i) for i in range(end)))
    groups, end = [], len(order)
    while end:
        begin = best[end][1]
        groups.append(tuple(sorted(order[begin:end])))
        end = begin
    return groups[::-1]
