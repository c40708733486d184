"""Packing: linear layers with their weights in oneDNN's blocked order, for products of few rows on a CPU.

Decoding multiplies a few rows by every weight. Where packed weights are measured to be faster, compiled pieces use a
packed copy beside the model's own weights, which stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipsearch.compiled.tracing import copy_sharing_tensors
from skipsearch.model.device import free_memory

ROWS = (1, 6)  # of the products that are timed: a plain step, and a verify
SAMPLE = 5e8  # bytes of weights that are timed
GAIN = 0.95  # packed over plain seconds from which packing is taken
MOST_MEMORY = 0.4  # of the free memory, for the copy


class PackedLinear(nn.Module):
    """A linear layer with packed weights. It has the plain ones too, for code that asks for them."""

    def __init__(self, linear: nn.Linear, packed: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("packed", packed)

    def forward(self, rows: Tensor) -> Tensor:
        return packed_product(rows, self.get_buffer("packed"), self.bias)


def packed_product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product


class Packed:
    """Packed weights of one model, by plain weight."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self._linears = list(linears)
        self._packed = {id(linear.weight): torch.ops.mkldnn._reorder_linear_weight(linear.weight, None)
                        for linear in linears}  # fmt: skip
        self._marks = self._read_marks()

    def of(self, linear: nn.Linear) -> Tensor:
        """The packed weights of a layer."""
        found: Tensor = self._packed[id(linear.weight)]
        return found

    def module(self, module: nn.Module) -> nn.Module:
        """A copy of a module tree that shares its tensors, with packed linear layers where there are packed weights."""
        copied: nn.Module = copy_sharing_tensors(module)
        for parent in list(copied.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear and id(child.weight) in self._packed:
                    parent._modules[name] = PackedLinear(child, self.of(child))
        return copied

    def fits(self) -> bool:
        """Whether the plain weights are still those that were packed; sees any change of a whole row or column."""
        return all(torch.equal(mark, now) for mark, now in zip(self._marks, self._read_marks(), strict=True))

    def _read_marks(self) -> list[Tensor]:
        """One element of each row and of each column of every weight."""
        marks = []
        for linear in self._linears:
            rows, columns = linear.weight.shape
            steps = torch.arange(max(rows, columns))
            marks.append(linear.weight.detach()[steps % rows, steps % columns])
        return marks

    def seconds(self, packed: bool, linears: Sequence[nn.Linear]) -> float:
        """Of products of a few rows with every weight."""
        total = 0.0
        for rows in ROWS:
            inputs = {_kind(li): li.weight.new_ones(1, rows, li.in_features) for li in linears}
            run: Callable[[nn.Linear], Any] = (
                (lambda li: packed_product(inputs[_kind(li)], self.of(li), None))  # noqa: B023
                if packed
                else (lambda li: F.linear(inputs[_kind(li)], li.weight))  # noqa: B023
            )
            begin = time.perf_counter()
            for linear in linears:
                run(linear)
            total += time.perf_counter() - begin
        return total


@torch.no_grad()
def pack(model: nn.Module) -> Packed | None:
    """Packed weights of a model on a CPU; None where they cannot be made, do not fit, or are not faster here."""
    by_weight = {id(m.weight): m for m in model.modules() if type(m) is nn.Linear and m.weight.device.type == "cpu"}
    linears = [linear for linear in by_weight.values() if _can_pack(linear.weight)]
    size = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)
    if not linears or size > MOST_MEMORY * free_memory(torch.device("cpu")):
        return None
    try:
        return _where_faster(linears)
    except RuntimeError:  # the library has no such product for these shapes or on this processor
        return None


def _where_faster(linears: list[nn.Linear]) -> Packed | None:
    packed, sample, taken = Packed(linears), list[nn.Linear](), 0.0
    for linear in linears:
        if taken < SAMPLE:
            sample.append(linear)
            taken += linear.weight.numel() * linear.weight.element_size()
    turns = [(packed.seconds(True, sample), packed.seconds(False, sample)) for _ in range(3)]
    ours, plain = (min(turn[which] for turn in turns) for which in (0, 1))
    return packed if ours < GAIN * plain else None


def _kind(linear: nn.Linear) -> tuple[int, torch.dtype]:
    return linear.in_features, linear.weight.dtype


def _can_pack(weight: Tensor) -> bool:
    if not torch.backends.mkldnn.is_available() or type(weight) is not nn.Parameter:
        return False
    supported: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: lambda: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }  # fmt: skip
    return weight.dtype in supported and bool(supported[weight.dtype]())


def packed_lowerings() -> dict[Any, Callable[..., Any]]:
    """How the compiler calls the product, and the product with another operation behind it, into which it is fused.

    Its own lowerings take packed weights as constants of a graph alone.
    """
    from torch._inductor import ir, mkldnn_ir
    from torch._inductor.lowering import view

    def node(kind: Any, rows: list[Any], packed: Any, bias: Any, constants: list[Any]) -> Any:
        contiguous, realize, size = (
            ir.ExternKernel.require_contiguous,
            ir.ExternKernel.realize_input,
            rows[0].get_size(),
        )
        flat = [contiguous(realize(view(x, [-1, x.get_size()[-1]]))) for x in rows]
        inputs = [*flat, realize(packed), *([] if bias is None else [contiguous(realize(bias))])]
        shape = [flat[0].get_size()[0], packed.get_size()[0]]
        fixed = ir.FixedLayout(device=torch.device("cpu"), dtype=flat[0].get_dtype(), size=shape)
        constants = [None, *constants] if bias is None else constants
        product = kind(layout=fixed, inputs=inputs, constant_args=constants)
        return view(ir.TensorBox.create(mkldnn_ir._create_output_node(product)), [*size[:-1], shape[1]])

    def alone(x: Any, packed: Any, bias: Any, attr: str, scalars: list[Any], algorithm: str, layout: Any = None) -> Any:
        return node(mkldnn_ir.LinearUnary, [x], packed, bias, [attr, scalars or [-1], algorithm])

    def with_other(x: Any, other: Any, packed: Any, bias: Any, attr: str, layout: Any = None) -> Any:
        return node(mkldnn_ir.LinearBinary, [x, other], packed, bias, [attr])

    linear = torch.ops.mkldnn._linear_pointwise
    return {linear.default: alone, linear.binary: with_other}
