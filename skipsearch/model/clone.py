"""Clones: modules that share their tensors with the model, so that it is never changed, not even for a moment.

Other threads may be running it.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any, TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


def clone(module: M) -> M:
    """A shallow copy with a table of children of its own; the tensors stay shared."""
    new = copy.copy(module)
    new._modules = module._modules.copy()
    if "_hf_hook" in vars(module):  # accelerate binds forward to the original: bind it to the copy
        vars(new)["_old_forward"] = types.MethodType(type(module).forward, new)
        vars(new)["forward"] = functools.partial(cast(Any, vars(module)["forward"]).func, new)
    else:
        vars(new).pop("forward", None)  # one of its own, as of torch.compile, would run the original
    return new


def clone_tree(module: M, known: dict[nn.Module, nn.Module] | None = None) -> M:
    """A clone with clones of all modules below it, on which hooks and modes can be set."""
    known = {} if known is None else known
    if module not in known:
        known[module] = new = clone(module)
        new._forward_hooks = module._forward_hooks.copy()
        new._modules = {
            name: None if child is None else clone_tree(child, known) for name, child in module._modules.items()
        }
    return cast(M, known[module])
