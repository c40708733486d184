"""The audit of half precision tells rounding from faults."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from conftest import make_tiny, quiet

from skipsearch import SkipMask
from skipsearch.decoding.sequences import Sequences
from skipsearch.evaluate.audit import audit
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy


def prompts(count: int = 12) -> tuple[tuple[int, ...], ...]:
    rng = random.Random(0)
    return tuple(tuple(rng.randrange(3, 97) for _ in range(9)) for _ in range(count))


def test_the_audit_explains_near_ties() -> None:
    """Prevents honest rounding from being called a fault: bf16 differs here, and each difference is a near-tie."""
    model = make_tiny("gpt2", eos_token_id=None).to(torch.bfloat16)
    mask = SkipMask(mlp=[2], num_layers=4)
    found = audit(Target.of(model), prompts(), mask, DraftPolicy(max_length=6), new_tokens=90, progress=quiet)
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
    found = audit(Target.of(model), prompts(6), mask, DraftPolicy(max_length=6), new_tokens=60, progress=quiet)
    assert not found.passed


def test_full_precision_needs_no_audit() -> None:
    """Prevents differences in fp32, where there is nothing to explain; the model given is not changed."""
    model = make_tiny("llama")
    before = copy.deepcopy(model.state_dict())
    mask = SkipMask(attention=[0], num_layers=4)
    found = audit(Target.of(model), prompts(4), mask, DraftPolicy(), new_tokens=40, progress=quiet)
    assert found.passed and not found.divergences
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
