"""Quantised linear layers: near the weights that they stand for, by every product that computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from skipsearch.draft.forms import FEW, GROUP, Int4Linear, Int8Linear, bytes_of, quantised, weight_of, why_not
from skipsearch.draft.head import DraftHead


def linear(out: int = 48, columns: int = 128, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, out, bias=bias, dtype=dtype)


def weights_of(form: nn.Module, columns: int) -> torch.Tensor:
    """The weights that a form computes with, read off products with unit vectors."""
    bias = form.bias if form.bias is not None else 0.0
    return (form(torch.eye(columns)) - bias).t()  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_int8_rounds_to_the_nearest(bias: bool) -> None:
    """Prevents columns that are exchanged in a word, a sign that is lost, or a scale of another row."""
    plain = linear(bias=bias)
    form = Int8Linear(plain.weight, plain.bias)
    error = (weights_of(form, 128) - plain.weight).abs()
    assert (error <= form.scale[:, None] * 0.501).all() and error.max() > 0
    x = torch.randn(2, 3, 128)  # the product that is compiled is another one
    form.fused = True
    torch.testing.assert_close(form(x), x @ weights_of(Int8Linear(plain.weight, None), 128).t()
                               + (plain.bias if bias else 0), atol=1e-5, rtol=1e-5)  # fmt: skip


@torch.no_grad()
def test_int4_rounds_to_the_nearest() -> None:
    """Prevents a zero point or a scale of another group of columns."""
    plain = linear(columns=2 * GROUP)
    form = Int4Linear(plain.weight, plain.bias)
    groups = plain.weight.view(48, -1, GROUP)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (weights_of(form, 2 * GROUP) - plain.weight).abs().view(48, -1, GROUP)
    assert (error <= 0.6 * step[..., None] + 2e-3).all()  # scales and products are rounded to bfloat16 too


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@torch.no_grad()
def test_few_rows_and_many_give_the_same(kind: Any) -> None:
    """Prevents a replay of many rows from scoring another draft than decoding runs row by row."""
    plain = linear()
    form, x = kind(plain.weight, plain.bias), torch.randn(FEW + 4, 128)
    alone = torch.cat([form(row[None]) for row in x])
    assert (alone - form(x)).abs().max() < 0.02 * form(x).abs().max()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_bytes_are_those_of_the_tensors(form: Any) -> None:
    """Prevents a promise about memory that the copies break."""
    plain = linear(bias=False)
    made = quantised(plain, form)
    assert sum(b.numel() * b.element_size() for b in made.buffers()) == bytes_of(plain.weight, form)


def test_what_can_be_quantised() -> None:
    """Prevents layers that compute something else, or hold packed weights already, from being read as plain ones."""

    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    packed = linear()
    packed.weight = nn.Parameter(torch.zeros(48, 128, dtype=torch.int8), requires_grad=False)
    assert weight_of(Doubling(4, 4)) is None and weight_of(packed) is None and weight_of(nn.LayerNorm(4)) is None
    assert "multiple of 4" in str(why_not(torch.zeros(4, 6), "int8"))
    assert "groups" in str(why_not(torch.zeros(16, 96), "int4"))
    assert "offloaded" in str(why_not(torch.zeros(16, 64, device="meta"), "int8"))


@torch.no_grad()
def test_transposed_layers() -> None:
    """Prevents weights that are stored with their inputs first from being quantised along the wrong side."""
    torch.manual_seed(0)
    conv = Conv1D(12, 32)  # outputs, inputs
    made = quantised(conv, "int8")
    x = torch.randn(FEW + 1, 32)
    assert (made(x) - conv(x)).abs().max() < 0.02 * conv(x).abs().max()


@pytest.mark.parametrize("form", ["int8", "int4"])
@torch.no_grad()
def test_the_best_are_scored_exactly(form: Any) -> None:
    """Prevents near ties that rounding would flip: the head decides what is drafted."""
    head = linear(out=64, bias=False)
    x = torch.randn(1, 5, 128)
    exact, drafted = head(x), DraftHead(head, form, None)(x)
    best = drafted.topk(4).indices
    torch.testing.assert_close(drafted.gather(-1, best), exact.gather(-1, best), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["full", "int8", "int4"])
@torch.no_grad()
def test_tokens_that_may_not_be_chosen(form: Any) -> None:
    """Prevents a smaller head from drafting other tokens, or from giving its logits to the wrong ones."""
    head, ids = linear(out=64), (*range(0, 40, 2), *range(40, 52))
    x = torch.randn(1, 3, 128)
    logits = DraftHead(head, form, ids)(x)
    assert logits.shape == (1, 3, 64) and set((logits[0, 0] > -100).nonzero()[:, 0].tolist()) == set(ids)
    assert (logits[..., list(ids)] - head(x)[..., list(ids)]).abs().max() < (1e-5 if form == "full" else 0.4)
