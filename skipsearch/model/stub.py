"""Stub: the module that replaces a skipped residual branch; and how to run a layer with replaced branches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Stub(nn.Module):
    """A skipped branch: it adds nothing to the residual stream. It has no state, so views can share it.

    Args:
        returns: what the branch returns: 0 for a tensor, n for an n-tuple.
        residual: index of the residual among the arguments, if the branch adds the residual itself; else None.
        spread: return zeros of the input's shape. If False, return one zero without dimensions: it broadcasts to any
            shape, keeps the dtype of the other operand, and can be added to a tensor on any device.
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
    """Replaces a running branch in the check. Its output depends on its input, and it needs no other argument."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = (args[0] if args else kwargs["hidden_states"]).sin()
        if self.residual is not None:
            out = out + (kwargs["residual"] if "residual" in kwargs else args[self.residual])
        return (out, *[None] * (self.returns - 1)) if self.returns else out


@contextmanager
def replaced_children(layer: nn.Module, children: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace children of a layer inside a `with` block; they are restored even if the layer raises."""
    saved = {name: layer._modules[name] for name in children}
    try:
        layer._modules.update(children)
        yield
    finally:
        layer._modules.update(saved)


@torch.no_grad()
def run_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """Hidden states [B, T, D] after a layer in evaluation mode; other required arguments are None."""
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    missing = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    training = layer.training
    try:
        out = layer.eval()(x, **missing)
    finally:
        layer.train(training)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result
