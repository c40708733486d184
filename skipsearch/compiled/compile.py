"""Compiling a function of tensors, and keeping what was compiled on the disk."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from skipsearch.compiled.packing import packed_lowerings

Piece = Callable[..., Sequence[Tensor]]
sdpa = torch.nn.functional.scaled_dot_product_attention
attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def compiler() -> str | None:
    """The C++ compiler that pieces need, on a GPU too; None if there is none."""
    return next((found for found in map(shutil.which, ("g++", "c++", "clang++")) if found), None)


def keep_compiled() -> Path:
    """Where compiled pieces are kept between runs; TORCHINDUCTOR_CACHE_DIR, if set, decides.

    Code is run from there, so the folder must belong to this user, and only they may write to it. Where that cannot
    be, a temporary folder serves this process alone.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    name, home = "TORCHINDUCTOR_CACHE_DIR", Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if os.environ.get(name, default_cache_dir()) == default_cache_dir():  # torch sets its own, which a reboot empties
        # Machines that share a home directory must not share code for vectors of different lengths.
        folder = home / "skipsearch" / "compiled" / torch.backends.cpu.get_cpu_capability().lower()
        os.environ[name] = str(folder) if _ours(folder, home) else tempfile.mkdtemp(prefix="skipsearch-")
    return Path(os.environ[name])


def _ours(folder: Path, home: Path) -> bool:
    """Make a folder below `home` that nobody else can write to; False if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in (folder, *folder.parents[: len(folder.relative_to(home).parts) - 1]):
            if hasattr(os, "getuid"):
                if not part.lstat().st_uid == part.stat().st_uid == os.getuid():
                    return False
                part.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def as_rows(query: Tensor, mask: Tensor, key_heads: int, times: int = 1) -> tuple[Tensor, Tensor]:
    """The query heads of each key head as rows of one product, and the mask of these rows; both `times` over."""
    batch, heads, tokens, size = query.shape
    rows = heads // key_heads * tokens
    mask = mask.repeat(1, 1, heads // key_heads, 1) if mask.shape[1] == 1 else mask.reshape(batch, key_heads, rows, -1)
    query = query.reshape(batch, key_heads, rows, size)
    return query.repeat(1, 1, times, 1), mask.repeat(1, 1, times, 1)


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False,
    *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    """The CPU's attention with the query heads of each key head as rows of one product.

    With one row a head, its kernel for half precision is several times slower than with some; a single row is doubled.
    """
    (batch, heads, tokens, _), groups = query.shape, query.shape[1] // key.shape[1]
    rows = groups * tokens
    double = 2 if rows == 1 and query.dtype != torch.float32 else 1
    if attn_mask is None or causal or groups * double == 1:
        return NotImplemented
    query, attn_mask = as_rows(query, attn_mask, key.shape[1], double)
    out, weight = attention(query, key, value, dropout, causal, attn_mask=attn_mask, scale=scale)
    out = out[:, :, :rows].reshape(batch, heads, tokens, -1)
    return out, weight[:, :, :rows].reshape(batch, heads, tokens)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """A GPU's attention with an added mask: one kernel, which torch would not choose for lengths that are symbols.

    Rows of the mask lie at multiples of 16 elements, as the kernel requires: see `EXAMPLE_SLOTS` and `STEP`.
    """
    if not isinstance(query, FakeTensor):  # of another thread, which decodes meanwhile
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is None or is_causal or query.shape[-1] % 8 or value.shape[-1] % 8:
        with sdpa_kernel(SDPBackend.MATH):
            return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf)
    rows, mask = as_rows(query, attn_mask, key.shape[1])
    mask = mask.to(query.dtype).expand(*rows.shape[:3], key.shape[2])
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        rows, key, value, mask, False, dropout_p, False, scale=scale
    )[0]  # fmt: skip
    return out.reshape(*query.shape[:3], value.shape[-1])


def single_row(rows: Tensor, weight: Tensor) -> Any:
    """A product of one row as a sum, which on a GPU reaches more of the bandwidth than a matrix product does."""
    return (rows[0, :, None] * weight).sum(0)[None] if len(rows) == 1 else NotImplemented


def single_row_and_bias(bias: Tensor, rows: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """The same with a bias."""
    product = single_row(rows, weight) if beta == alpha == 1 else NotImplemented
    return product if product is NotImplemented else bias + product


DECOMPOSITIONS: dict[str, dict[Any, Callable[..., Any]]] = {
    "cpu": {attention: grouped_attention},
    "cuda": {torch.ops.aten.mm.default: single_row, torch.ops.aten.addmm.default: single_row_and_bias},
}


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
    # On a GPU graphs remove it.
    on_cpu = examples[0].device.type == "cpu"
    settings = config.patch({"cpp_wrapper": on_cpu})
    fakes_of = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes: list[Any] = []
    for example, dims in zip(examples, dynamic, strict=True):
        sizes = [DimDynamic.DYNAMIC if d in dims else DimDynamic.STATIC for d in range(example.dim())]
        fakes.append(fakes_of.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
    # By itself transformers copies all keys once for each query head of a group.
    grouped = patch.dict(os.environ, {"TRANSFORMERS_SDPA_FORCE_GQA": "1"})
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
            with nullcontext() if on_cpu else patch.object(torch.nn.functional, sdpa.__name__, masked_attention):
                graph = make_fx(run, decomposition_table=DECOMPOSITIONS["cpu" if on_cpu else "cuda"])(*fakes)
            return cast(Piece, standalone_compile(graph, fakes, dynamic_shapes="from_graph"))
        finally:
            log.setLevel(level)
