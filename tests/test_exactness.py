"""Half precision: the deterministic mode is bitwise equal, and the audit tells rounding from faults."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from conftest import SUPPORTED, make_tiny

from skipsearch import SkipMask, self_speculative
from skipsearch.decoding.batch import ALIGNED
from skipsearch.decoding.loop import decode
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.sequences import Sequences
from skipsearch.evaluate.audit import audit

MOE = {"mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss", "llama4_text"}


def logits_of(model: Any, ids: torch.Tensor, mask: SkipMask | None, policy: DraftPolicy | None) -> tuple[Any, Any]:
    sequences = Sequences(model, ids, capacity=60, mask=mask, aligned=ALIGNED)
    tokens, rows = [], []
    for block in decode(sequences, max_length=60, policy=policy):
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
        cache = model(ids[:, :7], use_cache=True).past_key_values
        went_on = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
                                 custom_generate=method, **options)  # fmt: skip
        assert torch.equal(went_on, first[:1])
        outs.append(first)
    assert torch.equal(*outs)


def prompts(count: int = 12) -> tuple[tuple[int, ...], ...]:
    rng = random.Random(0)
    return tuple(tuple(rng.randrange(3, 97) for _ in range(9)) for _ in range(count))


def quiet(*_: Any) -> None:
    pass


def test_the_audit_explains_near_ties() -> None:
    """Prevents honest rounding from being called a fault: bf16 differs here, and each difference is a near-tie."""
    model = make_tiny("gpt2", eos_token_id=None).to(torch.bfloat16)
    mask = SkipMask(mlp=[2], num_layers=4)
    found = audit(model, prompts(), mask, DraftPolicy(max_length=6), new_tokens=90, progress=quiet)
    assert found.divergences and found.passed, found
    assert found.tokens == 12 * 90
    assert model.dtype == torch.bfloat16


def test_the_audit_finds_a_broken_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an audit that excuses everything: a loop that loses values of the prompt must not pass."""
    model = make_tiny("gpt2", eos_token_id=None).to(torch.bfloat16)
    verify = Sequences.verify

    def forgetful(self: Any, drafted: Any, probs: Any = None) -> Any:
        if self.draft_model is not None and self.lengths[0] > 20:
            for layer in self.cache.cache.layers:
                layer.buffers[1][:, :, 4:12] = 0
        return verify(self, drafted, probs)

    monkeypatch.setattr(Sequences, "verify", forgetful)
    mask = SkipMask(mlp=[2], num_layers=4)
    found = audit(model, prompts(6), mask, DraftPolicy(max_length=6), new_tokens=60, progress=quiet)
    assert not found.passed


def test_full_precision_needs_no_audit() -> None:
    """Prevents differences in fp32, where there is nothing to explain; the model given is not changed."""
    model = make_tiny("llama")
    before = copy.deepcopy(model.state_dict())
    found = audit(
        model, prompts(4), SkipMask(attention=[0], num_layers=4), DraftPolicy(), new_tokens=40, progress=quiet
    )
    assert found.passed and not found.divergences
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
