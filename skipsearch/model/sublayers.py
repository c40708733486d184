"""Where a model keeps its attention and MLP sublayers, found by structure and proven by an identity check.

Promises that a returned `Sublayers` describes residual branches: with both branches of a layer stubbed
out, the layer returns its input. Does not promise that a model is worth skipping in.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from skipsearch.errors import UnsupportedModel
from skipsearch.mask import KINDS, Kind

CHILD_NAMES: Mapping[Kind, tuple[str, ...]] = {
    "attention": ("self_attn", "attention", "attn", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sublayers:
    """The layout of a decoder's residual branches.

    Attributes:
        path: module path of the layer list inside the model, e.g. "model.layers".
        num_layers: its length.
        child: name of the attention and of the MLP module inside a layer.
        norms: norm modules of a layer that serve that branch alone, and so vanish with it.
        returns: per layer, how many values each branch returns: 0 for a bare tensor, n for an n-tuple.
        layer_returns_tuple: whether a layer returns a tuple around its hidden states.
    """

    path: str
    num_layers: int
    child: Mapping[Kind, str]
    norms: Mapping[Kind, tuple[str, ...]]
    returns: tuple[Mapping[Kind, int], ...]
    layer_returns_tuple: bool


_found: weakref.WeakKeyDictionary[nn.Module, Sublayers] = weakref.WeakKeyDictionary()


def find_sublayers(model: PreTrainedModel) -> Sublayers:
    """Detect and prove the sublayers of a causal LM; the answer is remembered per model object.

    Raises:
        UnsupportedModel: no such layers, a branch that is not residual, or a cache without rollback.
    """
    if model not in _found:
        _found[model] = _detect(model)
    return _found[model]


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the embedding's device, also when its weights are offloaded."""
    embedding = model.get_input_embeddings()
    device: torch.device = next(embedding.parameters()).device
    if device.type == "meta":
        hook = getattr(embedding, "_hf_hook", None) or getattr(model, "_hf_hook", None)
        device = torch.device(getattr(hook, "execution_device", None) or "cpu")
    return device


def _refuse(model: nn.Module, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model).__name__} is not supported: {why}; see `skipsearch models` for those that are"
    )


def _detect(model: PreTrainedModel) -> Sublayers:
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise _refuse(model, "it is an encoder-decoder, and only decoder-only models draft by skipping")
    if getattr(model, "_is_stateful", False):
        raise _refuse(model, "it keeps a recurrent state, which cannot be rolled back after a rejected draft")
    if getattr(config, "num_kv_shared_layers", 0) or any(getattr(config, "kv_sharing_modes", None) or ()):
        raise _refuse(model, "some layers reuse the keys and values of others, which skipping would remove")
    for i, layer in enumerate(DynamicCache(config=model.config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise _refuse(model, f"layer {i} caches in a {type(layer).__name__}, which has no proven rollback")

    path, layers = _layer_list(model, config.num_hidden_layers)
    child = {kind: _child_name(model, path, layers, kind) for kind in KINDS}
    returns, layer_returns_tuple = _return_arity(model, layers, child)
    norms: dict[Kind, tuple[str, ...]] = {kind: () for kind in KINDS}
    for i, layer in enumerate(layers):
        x = _random_input(model, layer)
        try:
            with _replaced(layer, {child[kind]: Stub(returns[i][kind]) for kind in KINDS}):
                out = _run_layer(layer, x)
        except Exception as error:  # whatever a layer makes of a branch that adds nothing
            reason = str(error).splitlines()[0]
            raise _refuse(model, f"layer {i} does not run with its attention and MLP left out ({reason})") from error
        if not torch.equal(out, x):
            raise _refuse(
                model, f"with attention and MLP of layer {i} left out, the layer does not return its input (it is "
                f"off by {float((out - x).abs().max()):.3g}), so its branches are not purely residual"
            )  # fmt: skip
        own = {kind: _norms_of_branch(layer, x, child, returns[i], kind) for kind in KINDS}
        norms = own if i == 0 else {k: tuple(n for n in norms[k] if n in own[k]) for k in KINDS}
    return Sublayers(
        path=path, num_layers=len(layers), child=child, norms=norms, returns=tuple(returns),
        layer_returns_tuple=layer_returns_tuple,
    )  # fmt: skip


def _layer_list(model: PreTrainedModel, num_layers: int) -> tuple[str, nn.ModuleList]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            names = {name for name, _ in module[0].named_children()}
            if any(names.intersection(CHILD_NAMES[kind]) for kind in KINDS):
                return path, module
    raise _refuse(model, f"no list of {num_layers} decoder layers with attention and MLP children was found")


def _child_name(model: nn.Module, path: str, layers: nn.ModuleList, kind: Kind) -> str:
    for name in CHILD_NAMES[kind]:
        if all(isinstance(getattr(layer, name, None), nn.Module) for layer in layers):
            return name
    raise _refuse(model, f"not every layer of {path} has an {kind} child named one of {', '.join(CHILD_NAMES[kind])}")


@torch.no_grad()
def _return_arity(
    model: PreTrainedModel, layers: nn.ModuleList, child: Mapping[Kind, str]
) -> tuple[list[dict[Kind, int]], bool]:
    """What each branch and layer returns, read off one real forward of two tokens."""
    returns: list[dict[Kind, int]] = [{} for _ in layers]
    layer_tuple: list[bool] = []
    handles = [layers[0].register_forward_hook(lambda _m, _a, out: layer_tuple.append(isinstance(out, tuple)))]

    def note(i: int, kind: Kind) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            returns[i][kind] = len(out) if isinstance(out, tuple) else 0

        return hook

    for i, layer in enumerate(layers):
        handles += [getattr(layer, child[kind]).register_forward_hook(note(i, kind)) for kind in KINDS]
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


class Stub(nn.Module):
    """A skipped branch: adds nothing to the residual stream.

    The zero has no dimensions: it broadcasts over any shape, keeps the other operand's dtype and may
    meet a tensor on any device.
    """

    zero: Tensor

    def __init__(self, returns: int) -> None:
        super().__init__()
        self.zero = torch.zeros(())
        self.result = (self.zero, *[None] * (returns - 1)) if returns else self.zero

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.result


class _Probe(nn.Module):
    """Stands for a running branch in the check: depends on its input, needs no other argument."""

    def __init__(self, returns: int) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = (args[0] if args else kwargs["hidden_states"]).sin()
        return (out, *[None] * (self.returns - 1)) if self.returns else out


@contextmanager
def _replaced(layer: nn.Module, children: Mapping[str, nn.Module]) -> Iterator[None]:
    """Swap children for the length of the check; restored even when the layer raises."""
    saved = {name: layer._modules[name] for name in children}
    try:
        layer._modules.update(children)
        yield
    finally:
        layer._modules.update(saved)


@torch.no_grad()
def _run_layer(layer: nn.Module, x: Tensor) -> Tensor:
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    missing = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    training = layer.training
    try:
        out = layer.eval()(x, **missing)
    finally:
        layer.train(training)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _random_input(model: PreTrainedModel, layer: nn.Module) -> Tensor:
    device = next((p.device for p in layer.parameters() if p.device.type != "meta"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config(decoder=True).hidden_size
    return torch.randn(1, 3, size, generator=generator).to(device=device, dtype=model.dtype)


def _norms_of_branch(
    layer: nn.Module, x: Tensor, child: Mapping[Kind, str], returns: Mapping[Kind, int], kind: Kind
) -> tuple[str, ...]:
    """Norms whose removal changes nothing once `kind` is skipped while the other branch still runs."""
    other: Kind = "mlp" if kind == "attention" else "attention"
    swap: dict[str, nn.Module] = {child[kind]: Stub(returns[kind]), child[other]: _Probe(returns[other])}
    with _replaced(layer, swap):
        expected = _run_layer(layer, x)
        free = []
        for name, module in layer.named_children():
            if "norm" in name.lower() or name.startswith("ln_"):
                with _replaced(layer, {name: nn.Identity()}):
                    if module is not None and torch.equal(_run_layer(layer, x), expected):
                        free.append(name)
    return tuple(free)
