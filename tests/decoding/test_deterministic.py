"""Half precision: the deterministic mode is bitwise equal to plain decoding."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import SUPPORTED, make_tiny

from skipsearch import SkipMask, self_speculative
from skipsearch.decoding.batch import ALIGNED
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.sequences import Sequences
from skipsearch.draft.view import draft_view
from skipsearch.model.cache import CACHE
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

MOE = {"mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss", "llama4_text"}


def logits_of(model: Any, ids: torch.Tensor, mask: SkipMask | None, policy: DraftPolicy | None) -> tuple[Any, Any]:
    draft = None if mask is None else draft_view(model, mask)
    sequences = Sequences(Target.of(model), ids, capacity=60, draft=draft, aligned=ALIGNED)
    tokens, rows = [], []
    for block in decode(sequences, Ending(max_length=60), policy=policy):
        tokens += block.tokens
        rows.append(block.logits_KV[: len(block.tokens)])
    return tokens, torch.cat(rows)


CASES = [(f, (torch.bfloat16, torch.float16)[i % 2]) for i, f in enumerate(f for f in SUPPORTED if f not in MOE)]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_deterministic_logits_are_bitwise_those_of_plain_decoding(family: str, dtype: Any, ids: torch.Tensor) -> None:
    """Prevents any shape from depending on what was drafted: every bit of every logit must be the same."""
    model, rng = make_tiny(family).to(dtype), random.Random(family)
    tokens, logits = logits_of(model, ids, None, None)
    for _ in range(2):
        mask = SkipMask.from_bits([rng.random() < 0.3 for _ in range(8)])
        policy = DraftPolicy(max_length=rng.randint(1, 30), exit_threshold=rng.choice([None, 0.2]))
        again, drafted = logits_of(model, ids, mask, policy)
        assert again == tokens and torch.equal(drafted, logits)


def test_deterministic_in_a_batch_and_from_a_cache(ids: torch.Tensor) -> None:
    """Prevents batches and handed-over caches, whose keys came from other shapes, from breaking the promise."""
    model = make_tiny("llama").to(torch.bfloat16)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = torch.cat([ids, ids.flip(1)])
    outs = []
    for mask in (None, SkipMask(attention=[1], mlp=[2], num_layers=4)):
        method = self_speculative(mask, deterministic=True)
        first = model.generate(batch, attention_mask=torch.ones_like(batch), custom_generate=method, **options)
        alone = [model.generate(row[None], attention_mask=torch.ones_like(row[None]), custom_generate=method, **options)
                 for row in batch]  # fmt: skip
        assert torch.equal(first, torch.cat(alone))
        cache = model(ids[:, :7], use_cache=True)[CACHE]
        went_on = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: cache},
                                 custom_generate=method, **options)  # fmt: skip
        assert torch.equal(went_on, first[:1])
        outs.append(first)
    assert torch.equal(*outs)
