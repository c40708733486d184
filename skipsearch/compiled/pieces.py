"""Pieces: the model cut at its layers, each kind of piece compiled once.

There is a head (embeddings, positions, attention masks), one piece for each different build of layer, and a tail
(final norm, logits, the likeliest token and its probability) for each build of it. Weights are inputs of a piece, so
layers of the same build share one. A draft is a shorter list of calls of the same pieces, so a new mask compiles
nothing new. Attention reads static buffers whose length is a symbol, so nothing is compiled again as the context grows.

Does not patch the model: pieces are traced from copies of its modules that share the tensors.
Shapes: Q tokens of a forward, C tokens of a buffer, T slots that attention reads, H heads, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import DynamicCache, PreTrainedModel

from skipsearch.compiled.compile import Piece, compile_piece
from skipsearch.compiled.packing import pack
from skipsearch.compiled.stack import Layer, Outside, Stack
from skipsearch.compiled.tracing import (
    EXAMPLE_SLOTS,
    Call,
    Last,
    OneLayer,
    Recorder,
    Slots,
    build_of,
    cache_shapes,
    copy_sharing_tensors,
    make_buffer,
    read_calls,
    tensors_of,
)  # fmt: skip
from skipsearch.draft.forms import Int8Linear, is_quantised
from skipsearch.draft.head import DraftHead
from skipsearch.draft.view import RemovedLayer, with_layers
from skipsearch.errors import BackendError
from skipsearch.model.cache import CACHE
from skipsearch.model.target import Target
from skipsearch.model.turns import one_at_a_time

# Lengths to trace with. They and `EXAMPLE_SLOTS` differ: equal ones would be taken for one symbol.
EXAMPLE_IDS, EXAMPLE_POSITIONS = 331, 359


class Pieces:
    """All pieces of one model.

    Args:
        target: is not kept; layers of its draft views fit too.

    Raises:
        BackendError: why the model cannot be cut.
    """

    def __init__(self, target: Target) -> None:
        _check(target.model)
        self.path, self.as_tuple = target.sublayers.path, target.sublayers.layer_returns_tuple
        self.device, self.dtype = target.device, target.dtype
        self.attention, self.takes_positions = target.attention, target.takes_positions
        layers = target.layers
        self.num_layers = len(layers)
        self.calls: list[Any] = []
        recorders = [Recorder(layer, self.as_tuple, self.calls) for layer in layers]
        self.packed = pack(target.model)
        self.outside = self._outside_of(with_layers(target.model, self.path, recorders))
        self.shapes = cache_shapes(target)
        self._layers: weakref.WeakKeyDictionary[nn.Module, Layer] = weakref.WeakKeyDictionary()
        self._stacks: weakref.WeakKeyDictionary[nn.Module, Stack] = weakref.WeakKeyDictionary()
        self._compiled: dict[Any, Piece] = {}
        self.layer_calls: list[Call] = []

    def stack_of(self, model: nn.Module) -> Stack:
        """What the model, or a draft view of it, runs; kept as long as the view lives."""
        if model in self._stacks:
            return self._stacks[model]
        found = []
        modules = list(cast(nn.ModuleList, model.get_submodule(self.path)))
        for index, module in enumerate(modules):
            if isinstance(module, RemovedLayer):
                continue
            if module not in self._layers:
                copied = self.copied(module)
                names, tensors = tensors_of(copied)
                self._layers[module] = Layer(copied, names, tensors, build_of(copied, names, tensors), index)
            found.append(self._layers[module])
        outside = self.outside
        if isinstance(cast(PreTrainedModel, model).get_output_embeddings(), DraftHead):
            recorders = [Recorder(layer, self.as_tuple, self.calls) for layer in modules]
            outside = self._outside_of(with_layers(cast(PreTrainedModel, model), self.path, recorders))
        parts = [*(layer.module for layer in found), outside.module]
        quantised = any(is_quantised(m) for part in parts for m in part.modules())
        self._stacks[model] = stack = Stack(found, outside, quantised)
        return stack

    def _outside_of(self, model: nn.Module) -> Outside:
        copied = self.copied(model)
        names, tensors = tensors_of(copied)
        head = cast(PreTrainedModel, copied).get_output_embeddings()
        return Outside(copied, names, tensors, build_of(head, *tensors_of(head)) if isinstance(head, DraftHead) else "")

    def copied(self, module: nn.Module) -> nn.Module:
        """A copy for tracing, with packed weights where there are some, and quantised products as compiled ones."""
        copied = copy_sharing_tensors(module) if self.packed is None else self.packed.module(module)
        for part in copied.modules():
            if isinstance(part, Int8Linear):
                part.fused = True
        return cast(nn.Module, copied)

    def head(self, width: int) -> Piece:
        """(*tensors outside of layers, ids [1, C], positions [N], slots [T], at [2]) -> hidden, slots [Q], extras.

        `at` holds the slot of the first token and its place in ids.
        """
        tensors, count = self.outside.tensors, len(self.outside.names)
        model = copy_sharing_tensors(self.outside.module)  # others may be copying that one

        def run(*inputs: Tensor) -> list[Tensor]:
            ids_C, positions_N, slots_T, at = inputs[count:]
            slots_Q = at[0] + torch.arange(width, device=ids_C.device)
            ids = ids_C[:, slots_Q + (at[1] - at[0])]
            self.calls.clear()
            self._outer(self.outside, model, inputs, ids, slots_Q, slots_T, positions_N[slots_Q])
            hidden, extras, self.layer_calls = read_calls(self.calls)
            self.calls.clear()
            return [hidden, slots_Q, *extras]

        def examples() -> list[Tensor]:
            options: dict[str, Any] = {"dtype": torch.long, "device": self.device}
            return [
                *tensors, torch.zeros(1, EXAMPLE_IDS, **options), torch.zeros(EXAMPLE_POSITIONS, **options),
                torch.zeros(EXAMPLE_SLOTS, **options), torch.zeros(2, **options),
            ]  # fmt: skip

        dynamic: list[tuple[int, ...]] = [*[()] * count, (1,), (0,), (0,), ()]
        return self.piece(("head", width), run, examples, dynamic)

    def layer(self, layer: Layer, width: int, example: Sequence[Tensor]) -> Piece:
        """(hidden, slots [Q], keys, values [1, H, T, D], *the head's extras it takes, *its tensors) -> hidden."""
        call = self.layer_calls[layer.index]
        extras = [example[leaf] for leaf in call.leaves if type(leaf) is int]
        module = copy_sharing_tensors(layer.module)
        constants = repr([leaf if type(leaf) is not int else ("extra",) for leaf in call.leaves])

        def run(hidden: Tensor, slots_Q: Tensor, keys: Tensor, values: Tensor, *rest: Tensor) -> list[Tensor]:
            given, tensors = iter(rest[: len(extras)]), rest[len(extras) :]
            cache = OneLayer([Slots((keys, values), slots_Q)])

            def leaf(kind: Any) -> Any:
                if type(kind) is int:
                    return next(given)
                return {"hidden": hidden, "cache": cache}[kind] if isinstance(kind, str) else kind[0]

            args, kwargs = pytree.tree_unflatten([leaf(kind) for kind in call.leaves], call.spec)
            out = torch.func.functional_call(module, dict(zip(layer.names, tensors, strict=True)), args, kwargs)
            return [out[0] if self.as_tuple else out]

        def examples() -> list[Tensor]:
            buffers = [make_buffer(shape, EXAMPLE_SLOTS, self.device) for shape in self.shapes[layer.index]]
            return [example[0], example[1], *buffers, *extras, *layer.tensors]

        shapes = [tuple(extra.shape) for extra in extras]
        dynamic = [(), (), (2,), (2,)] + [
            tuple(d for d, size in enumerate(shape) if size == EXAMPLE_SLOTS) for shape in shapes
        ]
        key = ("layer", width, layer.build, constants, repr(shapes), self.shapes[layer.index])
        return self.piece(key, run, examples, [*dynamic, *[()] * len(layer.tensors)])

    def tail(self, width: int, hidden: Tensor, outside: Outside) -> Piece:
        """(*tensors outside of layers, hidden [1, Q, E]) -> logits [1, Q, V], and [2, Q]: tokens, probabilities.

        The likeliest tokens are doubles beside their probabilities, so that one copy brings both to the host.
        """
        model = copy_sharing_tensors(outside.module)
        layers = cast(nn.ModuleList, model.get_submodule(self.path))
        given: list[Tensor] = []
        layers[-1] = Last(vars(layers[-1])["layer"], self.as_tuple, given)

        def run(*inputs: Tensor) -> list[Tensor]:
            given[:] = [inputs[-1]]
            slots = torch.arange(width, device=inputs[-1].device)
            logits = self._outer(outside, model, inputs, torch.zeros_like(slots)[None], slots, slots, slots).logits
            highest, token = logits.max(-1)
            confidence = (highest.float() - logits.float().logsumexp(-1)).exp()
            return [logits, torch.cat([token, confidence]).double()]

        example = hidden.new_zeros((1, width, hidden.shape[-1]))
        dynamic: list[tuple[int, ...]] = [()] * (len(outside.names) + 1)
        return self.piece(("tail", width, outside.build), run, lambda: [*outside.tensors, example], dynamic)

    def _outer(
        self, outside: Outside, model: Any, tensors: Sequence[Tensor], ids: Tensor, slots_Q: Tensor, slots_T: Tensor,
        positions_Q: Tensor,
    ) -> Any:  # fmt: skip
        """The model's own forward around its layers."""
        cache = DynamicCache(config=model.config)
        cache.layers = [Slots() for _ in range(self.num_layers)]
        given: dict[str, Any] = {"input_ids": ids, CACHE: cache, "use_cache": True}
        masks = self.attention.masks(slots_Q[None], lambda _window: slots_T[None])
        given["attention_mask"] = pytree.tree_map(lambda seen: _added(seen, self.dtype), masks)
        if self.takes_positions:
            given["position_ids"] = positions_Q[None]
        return torch.func.functional_call(model, dict(zip(outside.names, tensors, strict=False)), (), given)

    def piece(
        self, key: Any, run: Callable[..., list[Tensor]], examples: Callable[[], list[Tensor]],
        dynamic: list[tuple[int, ...]],
    ) -> Piece:  # fmt: skip
        """A piece that is compiled once for each key; see `compile_piece`."""
        with one_at_a_time:  # tracing notes the layers' calls here: one at a time
            if key not in self._compiled:
                self._compiled[key] = compile_piece(run, examples(), dynamic)
        return self._compiled[key]


def _check(model: PreTrainedModel) -> None:
    if any(parameter.device.type == "meta" for parameter in model.parameters()) or any(
        "_hf_hook" in vars(module) for module in model.modules()
    ):
        raise BackendError("the model's weights are spread or offloaded, must lie on one device; use backend 'eager'")
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise BackendError(
            f"the model's attention is {model.config._attn_implementation!r}, must be 'sdpa' or 'eager'; "
            f"load it with attn_implementation='sdpa'"
        )


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to attention scores: made once here, not once in every layer."""
    if seen.dtype != torch.bool:
        return seen
    return torch.where(seen, 0.0, -torch.inf).to(dtype)
