"""Copies: quantised sublayers of a model, each made once and shared by all its draft views.

A copy lives as long as a view that uses it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from skipsearch.draft.forms import bytes_of, quantised, weight_of, why_not
from skipsearch.draft.head import DraftHead
from skipsearch.errors import BackendError, MaskError
from skipsearch.mask import KINDS, Kind, Sublayer
from skipsearch.model.clone import clone
from skipsearch.model.device import free_memory
from skipsearch.model.state import writes_to
from skipsearch.model.sublayers import Sublayers, find_sublayers
from skipsearch.model.turns import one_at_a_time
from skipsearch.plan import QUANTISED, DraftPlan, Quantised

LEAST = 0.5  # share of a sublayer's weights that must be quantised, for its form to be worth the name
ROOM = 0.9  # of the free memory, for copies

_copies: weakref.WeakKeyDictionary[PreTrainedModel, weakref.WeakValueDictionary[Any, nn.Module]] = (
    weakref.WeakKeyDictionary()
)


def branch(model: PreTrainedModel, module: nn.Module, form: Quantised) -> nn.Module:
    """A copy of one module of a sublayer with its linear layers in this form."""
    weight = weight_of(module)
    if weight is not None:
        return _copy(model, module, form) if why_not(weight, form) is None else module
    new = clone(module)
    for name, child in module.named_children():
        if any(weight_of(part) is not None for part in child.modules()):
            new._modules[name] = branch(model, child, form)
    return new


def draft_head(model: PreTrainedModel, plan: DraftPlan) -> DraftHead:
    """The head of a plan that has one of its own."""
    head = _head(model)
    key = ("head", *_state(head.weight), plan.head, plan.head_ids)
    return cast(DraftHead, _kept(model, key, lambda: DraftHead(head, plan.head, plan.head_ids)))


def _copy(model: PreTrainedModel, module: nn.Module, form: Quantised) -> nn.Module:
    return _kept(model, (*_state(cast(Tensor, module.weight)), form), lambda: quantised(module, form))


def _kept(model: PreTrainedModel, key: Any, make: Any) -> nn.Module:
    with one_at_a_time:
        known = _copies.setdefault(model, weakref.WeakValueDictionary())
        found = known.get(key)
        if found is None:
            known[key] = found = make()
    return cast(nn.Module, found)


def _state(weight: Tensor) -> tuple[int, int, int]:
    """What changes when weights are moved, converted or written to: then copies are made anew."""
    return id(weight), weight.data_ptr(), writes_to(weight)


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    if head is None or weight_of(head) is None:
        got = type(head).__name__
        raise MaskError(f"head.form or head.ids is given, but the model's head is a {got}; use a plan without them")
    return cast(nn.Linear, head)


def obstacle(model: PreTrainedModel, sub: Sublayer, form: Quantised) -> str | None:
    """Why a sublayer cannot have this form, in words; None if it can."""
    kind, i = sub
    able, reason = 0.0, "it has no linear layers with plain weights"
    parts = list(_branch_of(model, find_sublayers(model), kind, i))
    for module in (m for part in parts for m in part.modules()):
        weight = weight_of(module)
        if weight is not None:
            why = why_not(weight, form)
            able, reason = able + (0 if why else weight.numel()), why or reason
    whole = sum(p.numel() for part in parts for p in part.parameters() if p.dim() > 1)
    return None if able and able >= LEAST * whole else reason


def _branch_of(model: PreTrainedModel, sublayers: Sublayers, kind: Kind, i: int) -> Iterator[nn.Module]:
    layer = model.get_submodule(f"{sublayers.path}.{i}")
    return (cast(nn.Module, layer._modules[name]) for name in sublayers.child[kind])


def check_forms(model: PreTrainedModel, plan: DraftPlan) -> None:
    """Find out before any copy is made whether the plan's forms are possible.

    Raises:
        MaskError: a sublayer or the head cannot have its form, or ids are outside of the vocabulary.
        BackendError: the copies do not fit into memory.
    """
    for form in QUANTISED:
        for sub in getattr(plan, form).sublayers():
            if why := obstacle(model, sub, form):
                raise MaskError(f"{form} holds {sub[0]} {sub[1]}, which cannot be quantised here: {why}; remove it")
    if plan.head != "full" or plan.head_ids is not None:
        weight = _head(model).weight
        if weight.device.type == "meta":
            raise MaskError("head.form or head.ids is given, but the head's weights are offloaded; use a plan without")
        weight = weight if plan.head_ids is None else weight[: len(plan.head_ids)]
        vocabulary = len(_head(model).weight)
        if plan.head != "full" and (why := why_not(weight, plan.head)):
            raise MaskError(f"head.form is {plan.head!r}, which is not possible here: {why}; use 'full'")
        if plan.head_ids is not None and plan.head_ids[-1] >= vocabulary:
            raise MaskError(
                f"head.ids holds {plan.head_ids[-1]}, must be below {vocabulary}, the model's vocabulary; "
                f"use a plan made for this model"
            )
    needed, free = copies_bytes(model, plan, made=False), free_memory(model.device)
    if needed > ROOM * free:
        raise BackendError(
            f"the plan's quantised copies take {needed / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free on "
            f"{model.device}; use a plan that quantises less"
        )


def copies_bytes(model: PreTrainedModel, plan: DraftPlan, made: bool = True) -> float:
    """Bytes of a plan's quantised copies.

    Args:
        made: whether those that exist already count.
    """
    sublayers, known, total = find_sublayers(model), set(_copies.get(model, ())), 0.0
    for form in QUANTISED:
        for kind, i in getattr(plan, form).sublayers():
            for module in (m for part in _branch_of(model, sublayers, kind, i) for m in part.modules()):
                weight = weight_of(module)
                if weight is None or why_not(weight, form) is not None:
                    continue
                if made or (*_state(cast(Tensor, module.weight)), form) not in known:
                    total += bytes_of(weight, form)
    if plan.head != "full" or plan.head_ids is not None:
        weight = _head(model).weight
        rows = weight if plan.head_ids is None else weight[: len(plan.head_ids)]
        total += rows.numel() * rows.element_size() if plan.head == "full" else bytes_of(rows, plan.head)
    return total


def possible_forms(model: PreTrainedModel) -> dict[Quantised, str | None]:
    """For each quantised form, why not every sublayer and the head can have it; None if they can."""
    found: dict[Quantised, str | None] = {}
    every = [(kind, i) for kind in KINDS for i in range(find_sublayers(model).num_layers)]
    head = model.get_output_embeddings()
    weight = None if head is None else weight_of(head)
    for form in QUANTISED:
        reasons = [why for sub in every if (why := obstacle(model, sub, form))]
        found[form] = reasons[0] if reasons else None
        if found[form] is None:
            found[form] = f"its head is a {type(head).__name__}" if weight is None else why_not(weight, form)
    return found
