"""Find the attention and MLP sublayers of a model by its structure, and prove that they are residual branches.

The proof: if stubs replace both branches of a layer, the layer returns exactly its input. Whether skipping makes the
model faster is another question.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from skipsearch.errors import UnsupportedModel
from skipsearch.mask import KINDS, Kind
from skipsearch.model.clone import clone_tree
from skipsearch.model.device import input_device
from skipsearch.model.stub import Probe, Stub, replaced_children, run_layer

# Names of the branches in a decoder layer. A branch may be a sequence of several modules.
CHILD_NAMES: Mapping[Kind, tuple[tuple[str, ...], ...]] = {
    "attention": (("self_attn",), ("attention",), ("attn",), ("self_attention",)),
    "mlp": (("mlp",), ("feed_forward",), ("ffn",), ("fc1", "fc2")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sublayers:
    """Where the residual branches of a decoder are.

    Attributes:
        path: module path of the layer list inside the model, e.g. "model.layers".
        num_layers: length of the layer list.
        child: names of the modules that are the attention and the MLP of a layer.
        norms: norm modules of a layer that only this branch uses; they are skipped with it.
        stubs: for each layer, the replacement of each branch's modules when it is skipped.
        layer_returns_tuple: whether a layer returns its hidden states in a tuple.
    """

    path: str
    num_layers: int
    child: Mapping[Kind, tuple[str, ...]]
    norms: Mapping[Kind, tuple[str, ...]]
    stubs: tuple[Mapping[Kind, Stub], ...]
    layer_returns_tuple: bool


_found: weakref.WeakKeyDictionary[nn.Module, Sublayers] = weakref.WeakKeyDictionary()


def find_sublayers(model: PreTrainedModel) -> Sublayers:
    """Find and prove the sublayers of a causal LM. The result is kept for each model object.

    Raises:
        UnsupportedModel: the model has no such layers, a branch is not residual, or its cache has no rollback.
    """
    if model not in _found:
        _found[model] = _detect(model)
    return _found[model]


def _refuse(model: nn.Module, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model).__name__} is not supported: {why}; see `skipsearch models --families` for those that are"
    )


def _detect(model: PreTrainedModel) -> Sublayers:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise _refuse(model, "it is an encoder-decoder, and only decoder-only models draft by skipping")
    if getattr(model, "_is_stateful", False):
        raise _refuse(model, "it keeps a recurrent state, which cannot be rolled back after a rejected draft")
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise _refuse(model, "each layer also adds an input of its own to the residual stream, beside its two branches")
    if getattr(config, "num_kv_shared_layers", 0) or any(getattr(config, "kv_sharing_modes", None) or ()):
        raise _refuse(model, "some layers reuse the keys and values of others, which skipping would remove")
    for i, layer in enumerate(DynamicCache(config=model.config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise _refuse(model, f"layer {i} caches in a {type(layer).__name__}, which has no proven rollback")

    model = clone_tree(model)  # other threads may be running the given one
    path, layers = _layer_list(model, config.num_hidden_layers)
    child = {kind: _child_names(model, path, layers, kind) for kind in KINDS}
    returns, layer_returns_tuple = _return_arity(model, layers, child)
    stubs: list[dict[Kind, Stub]] = []
    norms: dict[Kind, tuple[str, ...]] = {kind: () for kind in KINDS}
    for i, layer in enumerate(layers):
        made, own = _prove(model, i, layer, child, returns[i])
        stubs.append(made)
        norms = own if i == 0 else {k: tuple(n for n in norms[k] if n in own[k]) for k in KINDS}
    return Sublayers(
        path=path, num_layers=len(layers), child=child, norms=norms, stubs=tuple(stubs),
        layer_returns_tuple=layer_returns_tuple,
    )  # fmt: skip


def _prove(
    model: PreTrainedModel, i: int, layer: nn.Module, child: Mapping[Kind, tuple[str, ...]], returns: Mapping[Kind, int]
) -> tuple[dict[Kind, Stub], dict[Kind, tuple[str, ...]]]:
    """The identity check of one layer. Returns its stubs, and the norms that are skipped with each branch."""
    x = _random_input(model, layer)
    failure: Exception | None = None
    for spread in (False, True):  # True for layers that reshape a branch's output, or add to it in place
        stubs = {kind: Stub(returns[kind], _residual_place(layer, child[kind]), spread) for kind in KINDS}
        try:
            with replaced_children(layer, {name: stubs[kind] for kind in KINDS for name in child[kind]}):
                out = run_layer(layer, x)
            own = {kind: _norms_of_branch(layer, x, child, stubs, kind) for kind in KINDS}
            if out.dtype != x.dtype:  # a norm behind the branch has made a vector of the zero without dimensions
                raise TypeError(f"the residual stream becomes {out.dtype}")
        except Exception as error:  # a layer may raise anything if a branch returns zeros
            failure = error
            continue
        if not torch.equal(out, x):
            raise _refuse(
                model, f"with attention and MLP of layer {i} left out, the layer does not return its input (it is "
                f"off by {float((out - x).abs().max()):.3g}), so its branches are not purely residual"
            )  # fmt: skip
        return stubs, own
    reason = str(failure).splitlines()[0]
    raise _refuse(model, f"layer {i} does not run with its attention or MLP left out ({reason})") from failure


def _residual_place(layer: nn.Module, names: tuple[str, ...]) -> int | None:
    """The index of the residual among a branch's arguments, if the branch adds it; None if the layer adds it."""
    branch = layer.get_submodule(names[-1])
    parameters = list(inspect.signature(type(branch).forward).parameters)[1:]
    return parameters.index("residual") if "residual" in parameters else None


def _layer_list(model: PreTrainedModel, num_layers: int) -> tuple[str, nn.ModuleList]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            names = {name for name, _ in module[0].named_children()}
            if any(names.issuperset(parts) for kind in KINDS for parts in CHILD_NAMES[kind]):
                return path, module
    raise _refuse(model, f"no list of {num_layers} decoder layers with attention and MLP children was found")


def _child_names(model: nn.Module, path: str, layers: nn.ModuleList, kind: Kind) -> tuple[str, ...]:
    for names in CHILD_NAMES[kind]:
        if all(isinstance(getattr(layer, name, None), nn.Module) for layer in layers for name in names):
            return names
    known = ", ".join("+".join(names) for names in CHILD_NAMES[kind])
    raise _refuse(model, f"not every layer of {path} has an {kind} child named one of {known}")


@torch.no_grad()
def _return_arity(
    model: PreTrainedModel, layers: nn.ModuleList, child: Mapping[Kind, tuple[str, ...]]
) -> tuple[list[dict[Kind, int]], bool]:
    """Lengths of the tuples that branches return (0: no tuple), and whether layers return tuples, from one forward."""
    returns: list[dict[Kind, int]] = [{} for _ in layers]
    layer_tuple: list[bool] = []
    handles = [layers[0].register_forward_hook(lambda _m, _a, out: layer_tuple.append(isinstance(out, tuple)))]

    def note(i: int, kind: Kind) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            returns[i][kind] = len(out) if isinstance(out, tuple) else 0

        return hook

    for i, layer in enumerate(layers):
        handles += [getattr(layer, child[kind][-1]).register_forward_hook(note(i, kind)) for kind in KINDS]
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for i, seen in enumerate(returns):
        for kind in KINDS:
            if kind not in seen:
                raise _refuse(model, f"the forward pass never calls the {kind} of layer {i} as a module")
    return returns, layer_tuple[0]


def _random_input(model: PreTrainedModel, layer: nn.Module) -> Tensor:
    device = next((p.device for p in layer.parameters() if p.device.type != "meta"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config(decoder=True).hidden_size
    return torch.randn(1, 3, size, generator=generator).to(device=device, dtype=model.dtype)


def _norms_of_branch(
    layer: nn.Module, x: Tensor, child: Mapping[Kind, tuple[str, ...]], stubs: Mapping[Kind, Stub], kind: Kind
) -> tuple[str, ...]:
    """Norms whose removal does not change the layer's output if `kind` is skipped and the other branch runs."""
    other: Kind = "mlp" if kind == "attention" else "attention"
    swap: dict[str, nn.Module] = {name: stubs[kind] for name in child[kind]}
    probed = stubs[other]
    swap |= {name: Probe(probed.returns, probed.residual, probed.spread) for name in child[other]}
    with replaced_children(layer, swap):
        expected = run_layer(layer, x)
        free = []
        for name, module in layer.named_children():
            if "norm" in name.lower() or name.startswith("ln_"):
                with replaced_children(layer, {name: nn.Identity()}):
                    if module is not None and torch.equal(run_layer(layer, x), expected):
                        free.append(name)
    return tuple(free)
