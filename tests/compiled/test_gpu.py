"""A GPU: graphs, forms and batches give what the model gives; skipped where there is none."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from random_plans import random_plan
from torch import nn

from skipsearch import DraftPlan, SkipMask, self_speculative
from skipsearch.compiled.backend import with_backend
from skipsearch.compiled.products import products
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.sequences import Sequences
from skipsearch.draft.forms import quantised
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.form_speed import form_seconds, paying_forms
from skipsearch.evaluate.profile import profile
from skipsearch.model.families import tiny_model
from skipsearch.model.load import load_model
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

pytestmark = pytest.mark.gpu
MASK = SkipMask(attention=[0, 2], mlp=[1, 2], num_layers=4)
POLICIES = [
    DraftPolicy(max_length=4),
    DraftPolicy(max_length=6, exit_threshold=0.05, adaptive=True),
    DraftPolicy(max_length=6, exit_threshold=0.05, ngram=8, never_slower=True),
]
ALL_FORMS = ("run", "int8", "int4", "skip")


@pytest.fixture(scope="module")
def bundled() -> Target:
    """The bundled model on the GPU, in fp32, so that another order of sums flips no choice."""
    target = with_backend(load_model("demo", dtype="float32", device="cuda").target, "compiled")
    assert target.compiled is not None
    return target


def greedy(model: Any, ids: Any, new: int) -> list[int]:
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()


def decoded(target: Target, ids: Any, new: int, plan: Any, policy: DraftPolicy) -> list[int]:
    sequences = Sequences(target, ids, capacity=ids.shape[1] + new, draft=draft_view(target.model, plan))
    blocks = decode(sequences, Ending(max_length=ids.shape[1] + new), policy=policy)
    return [token for block in blocks for token in block.tokens]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_graphs_replay_what_was_captured(family: str) -> None:
    """Prevents a graph from reading a place that has moved since it was captured."""
    model = tiny_model(family).to("cuda")
    target = with_backend(Target.of(model), "compiled")
    assert target.compiled is not None
    for length in (5, 70, 9):
        ids = torch.arange(length, device="cuda")[None] % 90 + 3
        for policy in POLICIES:
            assert decoded(target, ids, 40, MASK, policy) == greedy(model, ids, 40)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forms_multiply_with_the_weights(form: Any, dtype: torch.dtype, bundled: Target) -> None:
    """Prevents a layout of quantised weights that the GPU's product reads differently."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 512, bias=True, device="cuda", dtype=dtype)
    layer: Any = quantised(linear, form)
    step = {"int8": 1 / 127, "int4": 1 / 15}[form]
    for rows in (1, 3, 40):
        row = torch.randn(1, rows, 256, device="cuda", dtype=dtype)
        expected = nn.functional.linear(row.double(), linear.weight.double(), linear.bias.double())
        for got in (layer(row), *products(bundled.compiled.pieces, [layer], row)()[0]):  # type: ignore[union-attr]
            assert got.dtype == dtype
            error = (got.double() - expected).norm() / expected.norm()
            assert error < step, (rows, float(error))


def test_plans_decode_the_same(bundled: Target) -> None:
    """Prevents a form, a smaller head or an exit from changing the output on a GPU, eagerly or in graphs."""
    model, rng = bundled.model, random.Random(0)
    ids = torch.tensor([[rng.randrange(3, 4000) for _ in range(50)]], device="cuda")
    expected = greedy(model, ids, 60)
    for number in range(6):
        plan = random_plan(rng, bundled.num_layers, bundled.vocabulary, ALL_FORMS)
        assert decoded(bundled, ids, 60, plan, POLICIES[number % 3]) == expected
        method = self_speculative(plan, max_length=5, backend="eager")
        seen = {"attention_mask": torch.ones_like(ids)}
        out = model.generate(
            ids, custom_generate=method, max_new_tokens=60, do_sample=False, eos_token_id=None, **seen
        )  # fmt: skip
        assert out[0, 50:].tolist() == expected


def test_batches_and_sampling(bundled: Target) -> None:
    """Prevents tensors of the host from being mixed with those of the device."""
    model = bundled.model
    plan = DraftPlan.everywhere("int8", bundled.num_layers)
    rows = [[0] * (12 - n) + list(range(5, 5 + n)) for n in (4, 12, 9)]
    ids = torch.tensor(rows, device="cuda")
    options: dict[str, Any] = {"attention_mask": (ids != 0).long(), "max_new_tokens": 24, "pad_token_id": 0}
    expected = model.generate(ids, do_sample=False, **options)
    assert torch.equal(
        model.generate(ids, do_sample=False, custom_generate=self_speculative(plan), **options), expected
    )
    out = model.generate(ids, do_sample=True, top_k=5, custom_generate=self_speculative(plan), **options)
    assert out.shape[0] == 3 and out.max() < bundled.vocabulary


def test_graphs_end_with_their_view(bundled: Target) -> None:
    """Prevents the graphs of every plan that was ever tried from staying in the GPU's memory."""
    ids = torch.arange(20, device="cuda")[None] + 3
    compiled: Any = bundled.compiled

    def stacks() -> int:
        gc.collect()
        return len(compiled.pieces._stacks)

    decoded(bundled, ids, 20, SkipMask(mlp=[1], num_layers=bundled.num_layers), POLICIES[0])
    before, seen = stacks(), list[float]()
    for layer in range(2, 8):
        decoded(bundled, ids, 20, SkipMask(mlp=[layer], num_layers=bundled.num_layers), POLICIES[0])
        assert stacks() == before
        seen.append(torch.cuda.memory_allocated())
    assert max(seen) - min(seen) < 1 << 20


def test_seconds_are_those_of_the_device(bundled: Target) -> None:
    """Prevents the launches of single products from hiding what a form saves."""
    found = form_seconds(bundled)
    assert all(isinstance(seconds, float) and seconds > 0 for seconds in found.values()), found
    forms = paying_forms(found)
    (point,) = profile(bundled, contexts=[64], max_length=6, progress=lambda *_: None, forms=forms)
    assert all(second > 0 for second in point.verify)
