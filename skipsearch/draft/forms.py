"""Forms: linear layers with their weights in int8 or int4, for products of few rows.

int8 has one scale a row of the weights, int4 one scale and one zero point for each `GROUP` columns, rounded to the
nearest. Activations are not quantised. Weights are read, never written: a form is a copy beside them.
Shapes: O output features, I input features, M rows of a product.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from skipsearch.plan import Quantised

GROUP = 64  # columns that share a scale in int4
FEW = 8  # rows up to which a product is bound by reading weights


class Int8Linear(nn.Module):
    """A linear layer in int8.

    Four columns a quarter of the row apart share a word of 32 bits, since compilers unpack words by shifts on every
    processor, and convert bytes on few. A compiled product of few rows unpacks, converts and sums up in float32 in one
    loop. Eagerly the library's operator takes bfloat16 rows; products of many rows use unpacked weights.
    """

    words: Tensor  # [O, I / 4], int32
    scale: Tensor  # [O], float32

    def __init__(self, weight_OI: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.fused = False  # set on the copies that are compiled
        self.bias = bias
        scale_O = (weight_OI.float().abs().amax(1) / 127).clamp(min=1e-12)
        whole = (weight_OI.float() / scale_O[:, None]).round_().to(torch.int8)
        words = whole.view(self.out_features, 4, -1).transpose(1, 2).contiguous().view(torch.int32)[..., 0]
        self.register_buffer("words", words.contiguous())
        self.register_buffer("scale", scale_O)

    def forward(self, rows: Tensor) -> Tensor:
        flat_MI = rows.reshape(-1, self.in_features)
        out_MO = self._fused(flat_MI) if self.fused else self._eager(flat_MI)
        out = out_MO.to(rows.dtype).view(*rows.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def _fused(self, rows_MI: Tensor) -> Tensor:
        quarters = rows_MI.view(len(rows_MI), 4, -1)
        if rows_MI.dtype != torch.float32:
            # Stacked, and so written to memory: otherwise they would be converted again for each of the O sums.
            quarters = torch.stack(rows_MI.float().chunk(4, 1), 1)
        sums: Any = sum(quarters[:, k, None] * ((self.words << (24 - 8 * k)) >> 24).float() for k in range(4))
        return cast(Tensor, sums.sum(-1) * self.scale)

    def _eager(self, rows_MI: Tensor) -> Tensor:
        # The bytes of a word are columns that lie apart, so the rows' columns are put into the same order.
        order_MI = rows_MI.view(len(rows_MI), 4, -1).transpose(1, 2).reshape(rows_MI.shape)
        bytes_OI = self.words.view(torch.int8)
        if len(rows_MI) <= FEW and rows_MI.device.type == "cpu" and has_operator("_weight_int8pack_mm", "cpu"):
            # With float32 rows the operator is slower than any other product; a GPU's is slower than unpacking.
            packed: Tensor = torch._weight_int8pack_mm(order_MI.bfloat16(), bytes_OI, self.scale.bfloat16())
            return packed
        dtype = torch.float32 if rows_MI.dtype == torch.float16 else rows_MI.dtype  # sums of bytes leave its range
        return F.linear(order_MI.to(dtype), bytes_OI.to(dtype)) * self.scale.to(dtype)


class Int4Linear(nn.Module):
    """A linear layer in int4, by the library's operator for this device, which takes bfloat16 rows."""

    packed: Tensor
    scales: Tensor  # [I / GROUP, O, 2]: scale, and the value of 8

    def __init__(self, weight_OI: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.on_cpu, self.bias = weight_OI.device.type == "cpu", bias
        groups = weight_OI.float().reshape(self.out_features, -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-12)
        whole_OI = ((groups - low) / scale).round_().clamp_(0, 15).to(torch.int32).reshape(weight_OI.shape)
        if self.on_cpu:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole_OI, 1)
        else:
            pairs = (whole_OI[:, ::2] << 4 | whole_OI[:, 1::2]).to(torch.uint8).contiguous()
            tiles = next(tiles for tiles in (8, 4, 2) if self.in_features % (16 * tiles) == 0)
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
        self.register_buffer("packed", packed)
        scales = torch.stack([scale[..., 0].t(), (low + 8 * scale)[..., 0].t()], -1)
        self.register_buffer("scales", scales.bfloat16().contiguous())

    def forward(self, rows: Tensor) -> Tensor:
        flat_MI = rows.reshape(-1, self.in_features).bfloat16().contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu if self.on_cpu else torch.ops.aten._weight_int4pack_mm
        out: Tensor = product(flat_MI, self.packed, GROUP, self.scales).to(rows.dtype)
        out = out.view(*rows.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


@functools.cache
def has_operator(name: str, device: str) -> bool:
    """Whether this torch has a kernel of its own for an operator on this kind of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device, device.upper())
    return hasattr(torch.ops.aten, name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear layer in a quantised form."""
    return isinstance(module, Int8Linear | Int4Linear)


def weight_of(module: nn.Module) -> Tensor | None:
    """The weights [O, I] of a linear layer that can be quantised; None for any other module."""
    if type(module) is Conv1D:
        return cast(Tensor, module.weight).detach().t()
    if not isinstance(module, nn.Linear) or (
        type(module).forward is not nn.Linear.forward and (type(module).__name__ != "FalconLinear")
    ):
        return None  # a layer that is quantised already, or computes something else
    weight = module.weight
    return weight.detach() if type(weight) is nn.Parameter and weight.is_floating_point() else None


def why_not(weight_OI: Tensor, form: Quantised) -> str | None:
    """The reason why these weights cannot have this form here; None if they can."""
    out_features, in_features = weight_OI.shape
    device = weight_OI.device.type
    if device == "meta":
        return "its weights are offloaded"
    if form == "int8":
        return None if in_features % 4 == 0 else f"{in_features} input features are no multiple of 4"
    if in_features % GROUP or out_features % 16:
        return f"{out_features} x {in_features} weights do not divide into groups of 16 x {GROUP}"
    if device == "cuda" and torch.cuda.get_device_capability(weight_OI.device) < (8, 0):
        return "int4 products need a GPU of compute capability 8.0"
    name = "_weight_int4pack_mm_for_cpu" if device == "cpu" else "_weight_int4pack_mm"
    return None if has_operator(name, device) else f"this torch has no int4 product for {device}"


def bytes_of(weight_OI: Tensor, form: Quantised) -> float:
    """What a copy takes."""
    out_features, in_features = weight_OI.shape
    per_row = in_features + 4 if form == "int8" else in_features / 2 + 4 * in_features / GROUP
    return float(out_features * per_row)


def quantised(module: nn.Module, form: Quantised) -> nn.Module:
    """A linear layer in this form, which is possible."""
    weight, kind = weight_of(module), {"int8": Int8Linear, "int4": Int4Linear}[form]
    assert weight is not None
    return kind(weight, cast(Any, module).bias)
