"""draft_view: the model with some sublayers left out or quantised, sharing every parameter that it runs.

Promises that the given model is never patched, toggled or copied, and that any number of views can exist at once.
A view has the model's class, so it runs wherever the model does, also as the `assistant_model` of `generate`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from skipsearch.draft.copies import branch, check_forms, draft_head
from skipsearch.errors import MaskError
from skipsearch.mask import KINDS, SkipMask
from skipsearch.model.clone import clone
from skipsearch.model.sublayers import Sublayers, find_sublayers
from skipsearch.plan import DraftPlan


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


def draft_view(model: PreTrainedModel, plan: SkipMask | DraftPlan) -> PreTrainedModel:
    """A module of the model's class, sharing its parameters, that follows a plan.

    Args:
        model: a decoder-only model with proven sublayers (`find_sublayers`).
        plan: a plan, or a mask: the plan that only skips. Quantised copies are shared with other views.

    Raises:
        MaskError: the plan is for another number of layers, or has a form or tokens that the model has not.
        BackendError: the quantised copies do not fit into memory.
        UnsupportedModel: the model's sublayers cannot be skipped with proof.
    """
    sublayers, plan = find_sublayers(model), DraftPlan.of(plan)
    if plan.num_layers != sublayers.num_layers:
        raise MaskError(
            f"the mask is for num_layers {plan.num_layers}, but the model has {sublayers.num_layers}; "
            f"use a mask that was searched on this model"
        )
    if not plan.only_skips:
        check_forms(model, plan)
    layers = [
        _draft_layer(model, layer, i, plan, sublayers)
        for i, layer in enumerate(cast(nn.ModuleList, model.get_submodule(sublayers.path)))
    ]
    root, parents = _on_path(model, sublayers.path, layers)
    # A cache made from the view's own config (as `generate` does for an assistant) holds no keys where
    # attention is skipped, so lengths and positions are read from a layer that runs.
    config = copy.deepcopy(model.config)
    config.get_text_config(decoder=True).kv_sharing_modes = [
        "reuse" if plan.skip.skips("attention", i) else None for i in range(plan.num_layers)
    ]
    if len(plan.skip.attention) == plan.num_layers:
        config.use_cache = False  # nothing is left that could be cached
    for module in parents:
        if getattr(module, "config", None) is model.config:
            module.config = config
    if plan.head != "full" or plan.head_ids is not None:
        _put(root, _path_of(model, cast(nn.Module, model.get_output_embeddings())), draft_head(model, plan))
    return root


def with_layers(model: PreTrainedModel, path: str, layers: Sequence[nn.Module]) -> PreTrainedModel:
    """A module of the model's class, sharing everything with it but the list of layers at this path."""
    return _on_path(model, path, layers)[0]


def _on_path(model: PreTrainedModel, path: str, layers: Sequence[nn.Module]) -> tuple[PreTrainedModel, list[nn.Module]]:
    """Copies of the modules on the way to the layer list, with other layers at its end: the first one, and all."""
    root: PreTrainedModel = clone(model)
    parents: list[nn.Module] = [root]
    *way, last = path.split(".")
    for name in way:
        nested = parents[-1]._modules[name]
        assert nested is not None
        parents[-1]._modules[name] = clone(nested)
        parents.append(cast(nn.Module, parents[-1]._modules[name]))
    parents[-1]._modules[last] = _Layers(layers)
    return root, parents


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(str(path) for path, found in model.named_modules() if found is module)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replace a module below a root that is a copy; modules on the way become copies too."""
    *way, last = path.split(".")
    for name in way:
        root._modules[name] = clone(cast(nn.Module, root._modules[name]))
        root = cast(nn.Module, root._modules[name])
    root._modules[last] = module


def _draft_layer(
    model: PreTrainedModel, layer: nn.Module, i: int, plan: DraftPlan, sublayers: Sublayers
) -> nn.Module:  # fmt: skip
    """The draft form of one layer: itself, a layer with stubs or quantised copies, or nothing."""
    forms = {kind: plan.form(kind, i) for kind in KINDS}
    if all(form == "run" for form in forms.values()):
        return layer
    if all(form == "skip" for form in forms.values()):
        return RemovedLayer(layer, sublayers.layer_returns_tuple)
    new = clone(layer)
    for kind, form in forms.items():
        for name in sublayers.child[kind]:
            if form == "skip":
                new._modules[name] = sublayers.stubs[i][kind]
            elif form != "run":
                new._modules[name] = branch(model, cast(nn.Module, layer._modules[name]), form)
        for norm in sublayers.norms[kind] if form == "skip" else ():
            new._modules[norm] = nn.Identity()
    return new
