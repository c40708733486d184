"""HiddenStates: one forward seen from its layers or sublayers, and which of them change it least when skipped.

Shapes: U units (layers or sublayers); S numbers of skips; P rows; T positions; H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from skipsearch.draft.view import InPlaceOf, with_layers
from skipsearch.evaluate.reference import Start
from skipsearch.evaluate.replay import Replay
from skipsearch.model.target import Target


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """What units were called with, and the hidden states between them.

    Attributes:
        units: modules, with the arguments of their call after the hidden states.
        hidden: the input [P, T, H] of each unit, then the output of the last.
        seen: positions [P, T] that count.
        any_rows: whether units take more rows than they had; false where they read a reference of their rows.
    """

    units: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
    hidden: list[Tensor]
    seen: Tensor
    any_rows: bool = True

    def run(self, unit: int, hidden_PTH: Tensor) -> Tensor:
        """One unit on other hidden states than it had."""
        module, args, named = self.units[unit]
        out: Tensor | tuple[Tensor, ...] = module(hidden_PTH, *args, **named)
        return out[0] if isinstance(out, tuple) else out

    def run_all(self, unit: int, hidden_SPTH: Tensor) -> Tensor:
        """The same for several hidden states at once."""
        if hidden_SPTH.shape[1] == 1 and self.any_rows:  # arguments for one row serve any number of rows
            return self.run(unit, hidden_SPTH.flatten(0, 1))[:, None]
        return torch.stack([self.run(unit, hidden_PTH) for hidden_PTH in hidden_SPTH])

    def cosine(self, a: Tensor, b: Tensor) -> float:
        """Mean cosine over the positions that count."""
        return float(cosine_similarity(a[self.seen].float(), b[self.seen].float(), dim=-1).mean())

    def cosines(self, hidden_SPTH: Tensor, target_PTH: Tensor) -> list[float]:
        """For each of several hidden states, its mean cosine with the target's."""
        near = cosine_similarity(hidden_SPTH[:, self.seen].float(), target_PTH[self.seen].float(), dim=-1)
        return [float(value) for value in near.mean(-1)]


class _Recorded(InPlaceOf):
    """A layer that remembers its call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.layer = layer

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        self.entering, self.args, self.named = hidden_states, args, named
        out = self.layer(hidden_states, *args, **named)
        self.leaving: Tensor = out[0] if isinstance(out, tuple) else out
        return out


@torch.no_grad()
def layer_states(target: Target, ids: Tensor, seen: Tensor) -> HiddenStates:
    """Run the model once on ids [P, T], without a cache, and record what its layers were called with."""
    layers = [_Recorded(layer) for layer in target.layers]
    with_layers(target.model, target.sublayers.path, layers)(input_ids=ids, use_cache=False)
    return _recorded(layers, seen)


@torch.no_grad()
def draft_states(replay: Replay, starts: list[Start]) -> HiddenStates:
    """The same for drafts of the full model from these starts, which share a group, behind their reference.

    Costs what these tokens cost, however long their prompts are. Valid until the replay runs another pass.
    """
    target = replay.target
    layers = [_Recorded(layer) for layer in target.layers]
    view = with_layers(target.model, target.sublayers.path, layers)
    (_, prompt_P), at_PQ, _ = replay.logits(view, starts)
    lengths_P = torch.tensor(replay.lengths, device=at_PQ.device)[prompt_P]
    return _recorded(layers, at_PQ < lengths_P[:, None], any_rows=False)


def _recorded(layers: list[_Recorded], seen: Tensor, any_rows: bool = True) -> HiddenStates:
    hidden = [*(layer.entering for layer in layers), layers[-1].leaving]
    return HiddenStates([(layer.layer, layer.args, layer.named) for layer in layers], hidden, seen, any_rows)


@torch.no_grad()
def sublayer_states(target: Target, states: HiddenStates, halves: Sequence[PreTrainedModel]) -> HiddenStates:
    """The same with sublayers as units: those of each layer in the order of `halves`, views that keep one kind each.

    Where both kinds of a layer read the same input (parallel residual), the second reads what the first has added.
    """
    lists = [list(half.get_submodule(target.sublayers.path).children()) for half in halves]
    units, hidden = [], [states.hidden[0]]
    for i, (_, args, named) in enumerate(states.units):
        units += [(layers[i], args, named) for layers in lists]
        for number in range(len(lists) - 1):
            hidden.append(HiddenStates(units, hidden, states.seen).run(len(units) - len(lists) + number, hidden[-1]))
        hidden.append(states.hidden[i + 1])
    return HiddenStates(units, hidden, states.seen, states.any_rows)


@torch.no_grad()
def nearest(states: HiddenStates, may_skip: Sequence[bool], least: int, most: int) -> list[frozenset[int]]:
    """For each number of skips from `least` to `most`: the units whose skipping changes the hidden states least.

    Dynamic programming: behind each unit and for each number of skips, the state of largest cosine is kept (CLaSp,
    arXiv 2505.24196, with layers as units). The list ends where no more units may be skipped.
    """
    # One entry for each number of skips, from `fewest` on; those that can no longer reach the least are dropped.
    held_SPTH, chosen, fewest = states.hidden[0][None], [frozenset[int]()], 0
    for u, free in enumerate(may_skip):
        left = sum(may_skip[u + 1 :])
        ran_SPTH = states.run_all(u, held_SPTH)
        both, count = torch.cat([ran_SPTH, held_SPTH]), len(chosen)
        near = states.cosines(both, states.hidden[u + 1])
        first, last = max(fewest, least - left), min(fewest + count - (not free), most)
        picks = []
        for skips in range(min(first, last), last + 1):
            place = skips - fewest
            options = [place] if place < count else []
            options += [count + place - 1] if place and free else []
            picks.append(max(options, key=near.__getitem__))
        held_SPTH, fewest = both[picks], min(first, last)
        chosen = [chosen[p] if p < count else chosen[p - count] | {u} for p in picks]
    return chosen
