"""Compiling a function of tensors, and keeping what was compiled on the disk."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

from skipsearch.compiled.packing import packed_lowerings

Piece = Callable[..., Sequence[Tensor]]
attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def compiler() -> str | None:
    """The C++ compiler that pieces need, on a GPU too; None if there is none."""
    return next((found for found in map(shutil.which, ("g++", "c++", "clang++")) if found), None)


def keep_compiled() -> Path:
    """Where compiled pieces are kept between runs; TORCHINDUCTOR_CACHE_DIR, if set, decides."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    name, home = "TORCHINDUCTOR_CACHE_DIR", Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if os.environ.get(name, default_cache_dir()) == default_cache_dir():  # torch sets its own, which a reboot empties
        # Machines that share a home directory must not share code for vectors of different lengths.
        os.environ[name] = str(home / "skipsearch" / "compiled" / torch.backends.cpu.get_cpu_capability().lower())
    return Path(os.environ[name])


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False,
    *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """The CPU's attention with the query heads of each key head as rows of one product.

    With one row a head, its kernel for half precision is several times slower than with some; a single row is doubled.
    """
    (batch, heads, tokens, size), groups = query.shape, query.shape[1] // key.shape[1]
    rows = groups * tokens
    double = 2 if rows == 1 and query.dtype != torch.float32 else 1
    if attn_mask is None or causal or groups * double == 1:
        return NotImplemented
    if attn_mask.shape[1] == 1:
        attn_mask = attn_mask.repeat(1, 1, groups, 1)
    else:
        attn_mask = attn_mask.reshape(batch, key.shape[1], rows, -1)
    query = query.reshape(batch, key.shape[1], rows, size).repeat(1, 1, double, 1)
    out, weight = attention(
        query, key, value, dropout, causal, attn_mask=attn_mask.repeat(1, 1, double, 1), scale=scale
    )  # fmt: skip
    out = out[:, :, :rows].reshape(batch, heads, tokens, size)
    return out, weight[:, :, :rows].reshape(batch, heads, tokens)


@torch.no_grad()
def compile_piece(
    run: Callable[..., list[Tensor]], examples: list[Tensor], dynamic: list[tuple[int, ...]]
) -> Piece:  # fmt: skip
    """Trace and compile, or read back what was compiled before.

    Args:
        run: a function of tensors alone; what it writes into its inputs is kept.
        examples: inputs to trace with.
        dynamic: for each input, the dimensions whose length may change. Equal lengths there count as one symbol.
    """
    keep_compiled()
    # Slow to import, and eager decoding needs none of it.
    from torch._inductor import config, lowering, standalone_compile
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    # On a CPU the wrapper around the kernels is compiled as well: in Python it costs as much as the kernels do.
    # On a GPU graphs remove it; there, products of few rows become reductions, which reach more of the bandwidth.
    on_cpu = examples[0].device.type == "cpu"
    settings = config.patch({"cpp_wrapper": True} if on_cpu else {"coordinate_descent_tuning": True})
    fakes_of = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: list[Any] = []
    for example, dims in zip(examples, dynamic, strict=True):
        sizes = [DimDynamic.DYNAMIC if d in dims else DimDynamic.STATIC for d in range(example.dim())]
        fakes.append(fakes_of.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
    # On a CPU the kernel of transformers' choice for grouped heads copies all keys for a few tokens.
    grouped = patch.dict(os.environ, {"TRANSFORMERS_SDPA_FORCE_GQA": "1"} if on_cpu else {})
    packed = patch.dict(
        lowering.lowerings, packed_lowerings() if on_cpu and torch.backends.mkldnn.is_available() else {}
    )
    log = logging.getLogger("torch")
    level = log.level
    with settings, grouped, packed, warnings.catch_warnings():
        # The compiler warns of its own deprecated parts, and logs what it then raises.
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            graph = make_fx(run, decomposition_table={attention: grouped_attention})(*fakes)
            return cast(Piece, standalone_compile(graph, fakes, dynamic_shapes="from_graph"))
        finally:
            log.setLevel(level)
