"""Lossless with plans: every family, batches, sampling settings and backends, whatever is quantised while drafting."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import SUPPORTED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_plans import plans, random_plan

from skipsearch import DraftPlan, self_speculative
from skipsearch.compiled.backend import with_backend
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats
from skipsearch.draft.copies import obstacle
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.trace import DecodeSettings, record
from skipsearch.mask import KINDS
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def possible(model: Any, plan: DraftPlan) -> DraftPlan:
    """The plan, with what the model cannot quantise running: experts hold no linear layers."""
    subs = [(kind, i) for kind in KINDS for i in range(4)]
    forms = [form if form != "int8" or obstacle(model, sub, "int8") is None else "run"
             for form, sub in zip(plan.forms(), subs, strict=True)]  # fmt: skip
    return DraftPlan.from_forms(forms, plan.head, plan.head_ids)


@pytest.mark.filterwarnings("ignore:.*cannot hold rows of different lengths")
@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_decodes_the_same(family: str, tiny: Any, ids: torch.Tensor, batch: torch.Tensor) -> None:
    """Prevents a quantised branch, or a smaller head, from changing a family's output, alone or in a batch."""
    model, rng = tiny(family), random.Random(family)
    for inputs in (ids, batch):
        options = {**GREEDY, "attention_mask": (inputs != 0).long()}
        expected = model.generate(inputs, **options)
        for _ in range(2):
            method = self_speculative(possible(model, random_plan(rng, 4, 97)), max_length=rng.randint(1, 6))
            assert torch.equal(model.generate(inputs, custom_generate=method, **options), expected)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(4, 97), k=st.integers(1, 7), exit_threshold=st.none() | st.floats(0.05, 0.9), ngram=st.integers(0, 6))
def test_any_plan_and_policy(
    tiny: Any, ids: torch.Tensor, plan: DraftPlan, k: int, exit_threshold: Any, ngram: int
) -> None:
    """Prevents a token that only the draft would choose, in any mix of forms, exits and n-grams."""
    model, options = tiny("llama"), {**GREEDY, "attention_mask": torch.ones_like(ids)}
    method = self_speculative(plan, max_length=k, exit_threshold=exit_threshold, ngram=ngram)
    assert torch.equal(model.generate(ids, custom_generate=method, **options), model.generate(ids, **options))


@pytest.fixture(scope="module")
def compiled(tiny: Any) -> Target:
    target = with_backend(Target.of(tiny("llama")), "compiled")
    assert target.compiled is not None
    return target


PLANS = [
    DraftPlan.everywhere("int8", 4),
    DraftPlan.from_forms(["run", "int8", "skip", "int8", "skip", "int8", "run", "run"], "int8", range(0, 97, 2)),
]


def decoded(
    target: Target, prompt: list[int], new: int, plan: DraftPlan | None, policy: Any
) -> tuple[list[int], DecodeStats]:
    stats, ids = DecodeStats(), torch.tensor([prompt])
    draft = None if plan is None else draft_view(target.model, plan)
    sequences = Sequences(target, ids, capacity=len(prompt) + new, draft=draft)
    ending = Ending(max_length=len(prompt) + new, eos_ids=target.eos_ids)
    blocks = decode(sequences, ending, policy=policy, stats=stats)
    return [token for block in blocks for token in block.tokens], stats


@pytest.mark.parametrize("plan", PLANS, ids=["all int8", "mixed"])
@pytest.mark.parametrize("ngram", [0, 8])
def test_compiled_pieces_decode_the_same(compiled: Target, plan: DraftPlan, ngram: int) -> None:
    """Prevents the draft's head or layers from being taken for the target's in the compiled backend."""
    policy = DraftPolicy(max_length=5, ngram=ngram)
    for length in (1, 9, 66):
        prompt = [i % 90 + 3 for i in range(length)]
        assert decoded(compiled, prompt, 30, plan, policy)[0] == decoded(compiled, prompt, 30, None, None)[0]


@pytest.mark.parametrize("plan", PLANS, ids=["all int8", "mixed"])
def test_replay_counts_what_compiled_decoding_accepts(compiled: Target, plan: DraftPlan) -> None:
    """Prevents a search that scores another draft than is served: many rows take another product than one."""
    rng = random.Random(0)
    prompts = tuple(tuple(rng.randrange(3, 97) for _ in range(rng.randint(4, 20))) for _ in range(6))
    trace = record(compiled, prompts, DecodeSettings(new_tokens=24), lambda *_: None)
    drafts = DraftReplay(Replay(compiled, trace, 5), plan)
    expected = drafts.walk(DraftPolicy(max_length=5))
    found = DecodeStats()
    for prompt in prompts:
        found.add(decoded(compiled, list(prompt), 24, plan, DraftPolicy(max_length=5))[1])
    assert +found.blocks == +expected


def test_an_end_of_a_view_frees_its_pieces(compiled: Target) -> None:
    """Prevents quantised weights that the compiled backend keeps after the last view that used them."""
    import gc

    from skipsearch.draft import copies

    view = draft_view(compiled.model, DraftPlan.everywhere("int8", 4))
    sequence = Sequences(compiled, torch.tensor([[5, 6, 7]]), capacity=20, draft=view)
    sequence.verify([0])
    sequence.draft([2])
    assert len(copies._copies[compiled.model])
    del view, sequence
    gc.collect()
    assert not len(copies._copies[compiled.model])
