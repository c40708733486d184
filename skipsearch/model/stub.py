"""Stub: what stands in a layer for a branch that is skipped; and how a layer is run with branches replaced."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Stub(nn.Module):
    """A skipped branch: adds nothing to the residual stream. Has no state, so any number of views may share it.

    Args:
        returns: how many values the branch returns: 0 for a bare tensor, n for an n-tuple.
        residual: the branch adds the residual itself, and takes it at this place.
        spread: zeros of the input's shape; else one zero without dimensions, which broadcasts over any shape,
            keeps the other operand's dtype and may meet a tensor on any device.
    """

    zero: Tensor

    def __init__(self, returns: int, residual: int | None, spread: bool) -> None:
        super().__init__()
        self.returns, self.residual, self.spread = returns, residual, spread
        self.zero = torch.zeros(())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.zero
        if self.residual is not None:
            out = kwargs["residual"] if "residual" in kwargs else args[self.residual]
        elif self.spread:
            out = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (out, *[None] * (self.returns - 1)) if self.returns else out


class Probe(Stub):
    """Stands for a running branch in the check: depends on its input, needs no other argument."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = (args[0] if args else kwargs["hidden_states"]).sin()
        if self.residual is not None:
            out = out + (kwargs["residual"] if "residual" in kwargs else args[self.residual])
        return (out, *[None] * (self.returns - 1)) if self.returns else out


@contextmanager
def replaced_children(layer: nn.Module, children: Mapping[str, nn.Module]) -> Iterator[None]:
    """Swap children for the length of the check; restored even when the layer raises."""
    saved = {name: layer._modules[name] for name in children}
    try:
        layer._modules.update(children)
        yield
    finally:
        layer._modules.update(saved)


@torch.no_grad()
def run_layer(layer: nn.Module, x: Tensor) -> Tensor:
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    missing = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    training = layer.training
    try:
        out = layer.eval()(x, **missing)
    finally:
        layer.train(training)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result
