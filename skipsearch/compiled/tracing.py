"""What a model is traced with: layers that record or replace, a cache of static buffers, copies that share tensors.

Tracing works on copies of the module tree with the same tensors, so it never touches the user's model.
Shapes: Q tokens of a forward, T slots that attention reads, H heads, D head size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from skipsearch.errors import BackendError
from skipsearch.model.cache import CACHE
from skipsearch.model.target import Target

EXAMPLE_SLOTS = 208  # slots to trace with; a GPU's attention pads masks whose length is no multiple of 16


Shape = tuple[int, int, torch.dtype]  # of one layer's keys or values: heads, head size, dtype


class Recorder(nn.Module):
    """Takes the place of a layer: records its arguments, and returns the hidden state unchanged."""

    def __init__(self, layer: nn.Module, as_tuple: bool, calls: list[Any]) -> None:
        super().__init__()
        self.as_tuple, self.calls = as_tuple, calls
        object.__setattr__(self, "layer", layer)  # not a child module: only its settings are read

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.calls.append((args, kwargs))
        return (hidden,) if self.as_tuple else hidden


class Last(Recorder):
    """Takes the place of the last layer, and returns the hidden state that was put into `calls`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.calls[0],) if self.as_tuple else self.calls[0]


class Slots(DynamicLayer):  # type: ignore[misc]
    """One layer's buffers: new keys and values go to given slots, attention reads all slots."""

    def __init__(self, buffers: tuple[Tensor, Tensor] | None = None, slots_Q: Tensor | None = None) -> None:
        super().__init__()
        self.buffers, self.slots_Q, self.is_initialized = buffers, slots_Q, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.buffers is not None and self.slots_Q is not None
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.slots_Q] = states  # this form is compiled to writes in place; index_copy_ is not
        return self.buffers

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return EXAMPLE_SLOTS, 0


class OneLayer(DynamicCache):  # type: ignore[misc]
    """A cache whose every layer number means the same layer: layers that share a piece have different numbers."""

    def __init__(self, layers: list[Slots]) -> None:
        Cache.__init__(self, layers=layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.layers[0].update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def copy_sharing_tensors(module: nn.Module) -> Any:
    """A copy of the module tree with the same tensors. Tracing may swap them there without touching the model."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    memo |= {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    for m in module.modules():
        if isinstance(m, Recorder):
            memo |= {id(m.calls): m.calls, id(vars(m)["layer"]): vars(m)["layer"]}
    return copy.deepcopy(module, memo)


def tensors_of(module: nn.Module) -> tuple[list[str], list[Tensor]]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return list(named), [tensor.detach() for tensor in named.values()]


def build_of(module: nn.Module, names: list[str], tensors: list[Tensor]) -> str:
    """How a layer is built, its number left out. Layers of equal builds compute the same function of their tensors."""
    parts: list[Any] = [
        (n, tuple(t.shape), None if t.is_mkldnn else t.stride(), t.dtype, t.device)
        for n, t in zip(names, tensors, strict=True)
    ]
    ignored = ("layer_idx", "training", "config")
    for name, part in module.named_modules():
        plain = {
            k: v for k, v in vars(part).items()
            if not k.startswith("_") and k not in ignored and not isinstance(v, Tensor | nn.Module)
        }  # fmt: skip
        parts.append((name, type(part).__module__, type(part).__qualname__, sorted(plain.items(), key=repr)))
    return repr(parts)


@torch.no_grad()
def cache_shapes(target: Target) -> list[tuple[Shape, ...]]:
    """Heads, head size and dtype of each layer's keys and values, read off a forward of one token."""
    cache = DynamicCache(config=target.model.config)
    target.model(input_ids=target.ids([0]), **{CACHE: cache})
    return [
        tuple((states.shape[1], states.shape[3], states.dtype) for states in (layer.keys, layer.values))
        for layer in cache.layers
    ]


def make_buffer(shape: Shape, slots: int, device: torch.device) -> Tensor:
    """Zeros [1, H, T, D], contiguous slot after slot, so that attention reads one block of memory."""
    heads, size, dtype = shape
    return torch.zeros((1, slots, heads, size), dtype=dtype, device=device).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Call:
    """How the model calls one layer. It is the same for every token.

    Attributes:
        leaves: flat arguments; "hidden", "cache", a number of the head's outputs, or a constant in a tuple.
        spec: how to make the arguments of them again.
    """

    leaves: tuple[Any, ...]
    spec: Any


def read_calls(calls: list[Any]) -> tuple[Tensor, list[Tensor], list[Call]]:
    """The hidden state that enters the first layer, the other tensors that layers take, and how each takes them."""
    extras: list[Tensor] = []
    first: Tensor | None = None
    found = []
    for args, kwargs in calls:
        hidden = args[0] if args else kwargs["hidden_states"]
        first = hidden if first is None else first
        if hidden is not first:
            raise BackendError("the model changes the hidden state between layers; use backend 'eager'")
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Cache))
        kinds: list[Any] = []
        for leaf in leaves:
            if leaf is hidden:
                kinds.append("hidden")
            elif isinstance(leaf, Cache):
                kinds.append("cache")
            elif isinstance(leaf, Tensor):
                place = next((i for i, extra in enumerate(extras) if extra is leaf), len(extras))
                extras += [leaf] if place == len(extras) else []
                kinds.append(place + 2)  # behind hidden and slots in the head's outputs
            else:
                kinds.append((leaf,))
        found.append(Call(tuple(kinds), spec))
    assert first is not None
    return first, extras, found
