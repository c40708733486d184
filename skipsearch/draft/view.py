"""draft_view: the model with some sublayers left out, sharing every parameter with it.

Promises that the given model is never patched, toggled or copied, and that any number of views can exist at once.
A view has the model's class, so it runs wherever the model does, also as the `assistant_model` of `generate`.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from skipsearch.errors import MaskError
from skipsearch.mask import KINDS, SkipMask
from skipsearch.model.sublayers import Sublayers, find_sublayers

M = TypeVar("M", bound=nn.Module)


class _Layers(nn.ModuleList):
    """A layer list whose slice costs nothing: models slice it on every forward."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self._modules.values())[index]
        return super().__getitem__(index)


class InPlaceOf(nn.Module):
    """A module that stands in a layer's place; the layer itself gets no hook, since others may be running it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):  # some models choose the layer's attention mask by this attribute
            self.attention_type = layer.attention_type


class RemovedLayer(InPlaceOf):
    """A layer that is skipped whole, norms included. It keeps its place, so that per-layer settings stay aligned."""

    def __init__(self, layer: nn.Module, as_tuple: bool) -> None:
        super().__init__(layer)
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if self.as_tuple else hidden_states


def draft_view(model: PreTrainedModel, mask: SkipMask) -> PreTrainedModel:
    """A module of the model's class, sharing all its parameters, that skips the mask's sublayers.

    Args:
        model: a decoder-only model with proven sublayers (`find_sublayers`).
        mask: one bit a sublayer, for exactly this number of layers.

    Raises:
        MaskError: the mask is for another number of layers.
        UnsupportedModel: the model's sublayers cannot be skipped with proof.
    """
    sublayers = find_sublayers(model)
    if mask.num_layers != sublayers.num_layers:
        raise MaskError(
            f"the mask is for num_layers {mask.num_layers}, but the model has {sublayers.num_layers}; "
            f"use a mask that was searched on this model"
        )
    layers = [
        _draft_layer(layer, i, mask, sublayers)
        for i, layer in enumerate(cast(nn.ModuleList, model.get_submodule(sublayers.path)))
    ]
    root, parents = _on_path(model, sublayers.path, layers)
    # A cache made from the view's own config (as `generate` does for an assistant) holds no keys where
    # attention is skipped, so lengths and positions are read from a layer that runs.
    config = copy.deepcopy(model.config)
    config.get_text_config(decoder=True).kv_sharing_modes = [
        "reuse" if mask.skips("attention", i) else None for i in range(mask.num_layers)
    ]
    if len(mask.attention) == mask.num_layers:
        config.use_cache = False  # nothing is left that could be cached
    for module in parents:
        if getattr(module, "config", None) is model.config:
            module.config = config
    return root


def with_layers(model: PreTrainedModel, path: str, layers: Sequence[nn.Module]) -> PreTrainedModel:
    """A module of the model's class, sharing everything with it but the list of layers at this path."""
    return _on_path(model, path, layers)[0]


def _on_path(model: PreTrainedModel, path: str, layers: Sequence[nn.Module]) -> tuple[PreTrainedModel, list[nn.Module]]:
    """Copies of the modules on the way to the layer list, with other layers at its end: the first one, and all."""
    root: PreTrainedModel = _clone(model)
    parents: list[nn.Module] = [root]
    *way, last = path.split(".")
    for name in way:
        nested = parents[-1]._modules[name]
        assert nested is not None
        parents[-1]._modules[name] = _clone(nested)
        parents.append(cast(nn.Module, parents[-1]._modules[name]))
    parents[-1]._modules[last] = _Layers(layers)
    return root, parents


def _draft_layer(layer: nn.Module, i: int, mask: SkipMask, sublayers: Sublayers) -> nn.Module:
    """The draft form of one layer: itself, a layer with stubs, or nothing."""
    skipped = [kind for kind in KINDS if mask.skips(kind, i)]
    if not skipped:
        return layer
    if len(skipped) == len(KINDS):
        return RemovedLayer(layer, sublayers.layer_returns_tuple)
    new = _clone(layer)
    for kind in skipped:
        for name in sublayers.child[kind]:
            new._modules[name] = sublayers.stubs[i][kind]
        for norm in sublayers.norms[kind]:
            new._modules[norm] = nn.Identity()
    return new


def _clone(module: M) -> M:
    """A shallow copy with child and parameter tables of its own; the tensors stay shared."""
    new = copy.copy(module)
    new._modules = module._modules.copy()
    if "_hf_hook" in vars(module):  # accelerate binds forward to the original: bind it to the copy
        vars(new)["_old_forward"] = types.MethodType(type(module).forward, new)
        vars(new)["forward"] = functools.partial(cast(Any, vars(module)["forward"]).func, new)
    return new
