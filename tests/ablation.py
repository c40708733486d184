"""What a draft view is held against: the untouched model with hooks, for masks of every kind."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from skipsearch import SkipMask
from skipsearch.model.sublayers import find_sublayers

MASKS = [
    SkipMask(attention=[0], num_layers=4),
    SkipMask(mlp=[0], num_layers=4),
    SkipMask(attention=range(4), num_layers=4),
    SkipMask(mlp=range(4), num_layers=4),
    SkipMask(attention=range(4), mlp=range(4), num_layers=4),
    SkipMask(attention=[1, 2], mlp=[2, 3], num_layers=4),
    SkipMask(attention=[0, 2, 3], mlp=[1, 3], num_layers=4),
]


def ablated(model: Any, mask: SkipMask, ids: torch.Tensor) -> torch.Tensor:
    """The reference: the untouched model, with hooks that zero what a skipped branch returns."""
    sublayers = find_sublayers(model)
    layers = model.get_submodule(sublayers.path)

    def zero(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        nothing = bound.get("residual", torch.zeros_like(first))  # some branches add the residual themselves
        return (nothing, *out[1:]) if isinstance(out, tuple) else nothing

    handles = [
        getattr(layers[i], sublayers.child[k][-1]).register_forward_hook(zero, with_kwargs=True)
        for k, i in mask.sublayers()
    ]
    try:
        return model(ids).logits
    finally:
        for handle in handles:
            handle.remove()
