"""Stack: what a model or a draft view runs, as tensors and builds, which select its pieces."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from skipsearch.compiled.buffers import Buffers
from skipsearch.compiled.compile import Piece


@dataclass(slots=True, eq=False)
class Layer:
    """A layer to be run: its tensors, its build, which selects the piece, and its place in the cache.

    `module` is a copy, with packed weights where there are some.
    """

    module: nn.Module
    names: list[str]
    tensors: list[Tensor]
    build: str
    index: int


@dataclass(slots=True, eq=False)
class Outside:
    """A copy of the model without its layers, with its tensors and its build."""

    module: nn.Module
    names: list[str]
    tensors: list[Tensor]
    build: str


@dataclass(slots=True, eq=False)
class Stack:
    """What a model or a draft view runs: its layers, and what is around them.

    Attributes:
        quantised: whether any weights are.
        programs: by width, the calls of pieces.
        graphs: by buffers and kind of forward, a replay and its output; they end with the stack.
    """

    layers: list[Layer]
    outside: Outside
    quantised: bool
    programs: dict[int, list[tuple[Piece, int, list[int], list[Tensor]]]] = field(default_factory=dict)
    graphs: weakref.WeakKeyDictionary[Buffers, dict[Any, tuple[Callable[[], None], Any]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
