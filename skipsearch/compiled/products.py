"""Products: linear layers alone as pieces, to measure what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipsearch.compiled.pieces import Pieces
from skipsearch.compiled.tracing import build_of, tensors_of


def products(pieces: Pieces, modules: Sequence[nn.Module], row: Tensor) -> Callable[[], Any]:
    """A function that multiplies a row [1, I] with each of these layers of one build, as forwards do."""
    found: list[Callable[[], Any]] = []
    for module in modules:
        copied = pieces.copied(nn.Sequential(module))
        names, tensors = tensors_of(copied)

        def run(
            row: Tensor, *tensors: Tensor, copied: nn.Module = copied, names: Sequence[str] = names
        ) -> list[Tensor]:
            return [torch.func.functional_call(copied, dict(zip(names, tensors, strict=True)), (row,))]

        key = ("product", build_of(copied, names, tensors), row.shape, row.dtype)
        piece = pieces.piece(key, run, partial(_with, row, tensors), [()] * (1 + len(tensors)))
        found.append(partial(piece, row, *tensors))
    return lambda: [product() for product in found]


def _with(row: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return [row, *tensors]
