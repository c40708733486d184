"""Sampling is exact: what comes out has the target's own distribution."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import make_tiny
from scipy.stats import chisquare

from skipsearch import SkipMask, self_speculative
from skipsearch.decoding.accept import accept_greedy, accept_sampling, draw, probabilities
from skipsearch.errors import DecodingError

N = 20_000
TARGET = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4]])
DRAFT = torch.tensor([[0.5, 0.4, 0.0, 0.1]])


def agreement(seen: list[int], wanted: list[float]) -> float:
    """Chi-square p of counts against expected ones (rescaled: fp32 probabilities do not sum to 1 exactly)."""
    return float(chisquare(seen, [w * sum(seen) / sum(wanted) for w in wanted]).pvalue)


def p_value(rule: Any, target: torch.Tensor = TARGET, draft: torch.Tensor = DRAFT) -> float:
    """Chi-square p of the first committed token against the target's first row."""
    generator, drafting = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    seen: Counter[int] = Counter()
    for _ in range(N):
        token = draw(draft[0], drafting)
        n, bonus = rule(target, draft, [token], generator)
        seen[token if n else bonus] += 1
    possible = [i for i in range(target.shape[1]) if target[0, i] > 0]
    if not set(seen) <= set(possible):
        return 0.0  # a token of probability zero came out
    return agreement([seen[i] for i in possible], [float(target[0, i]) for i in possible])


def plain_sample_for_residual(target: Any, draft: Any, ids: list[int], generator: Any) -> tuple[int, int]:
    """A bug seen in a reference code: after a rejection, a plain target sample."""
    n, bonus = accept_sampling(target, draft, ids, generator)
    return (n, bonus) if n else (0, draw(target[0], generator))


def always_residual(target: Any, draft: Any, ids: list[int], generator: Any) -> tuple[int, int]:
    """A bug: accepting by a fair coin."""
    if torch.rand((), generator=generator) < 0.5:
        return 1, draw(target[1], generator)
    return 0, draw((target[0] - draft[0]).clamp(min=0), generator)


def test_accept_rule_gives_the_target_distribution() -> None:
    """Prevents lossy sampling."""
    assert p_value(accept_sampling) > 1e-3


@pytest.mark.parametrize("mutant", [plain_sample_for_residual, always_residual])
def test_the_test_can_fail(mutant: Any) -> None:
    """Prevents a test that known bugs would pass."""
    assert p_value(mutant) < 1e-6


def test_equal_distributions_accept_always() -> None:
    """Prevents rejections, and an empty residual, where draft and target agree."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([TARGET[1], TARGET[1]])
    for token in range(4):
        assert accept_sampling(rows, rows[:1], [token], generator)[0] == 1


def test_one_hot_target_rejects_what_it_forbids() -> None:
    """Prevents a proposal of zero target probability from being accepted."""
    one_hot = torch.tensor([[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        assert accept_sampling(one_hot, DRAFT, [1], generator) == (0, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_logits_are_a_typed_error(bad: float) -> None:
    """Prevents NaN from turning into token 0."""
    with pytest.raises(DecodingError, match="NaN"):
        probabilities(torch.tensor([0.0, bad, 1.0]))
    with pytest.raises(DecodingError):
        probabilities(torch.full((3,), float("-inf")))


def test_greedy_accept_counts_the_common_prefix() -> None:
    """Prevents an off-by-one in num_accepted."""
    assert accept_greedy([1, 2, 3], [1, 2, 3, 4]) == 3
    assert accept_greedy([1, 2, 3], [1, 9, 3, 4]) == 1
    assert accept_greedy([1], [2, 3]) == 0
    assert accept_greedy([], [2]) == 0


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_joint_distribution_of_two_tokens_through_generate(threshold: float | None) -> None:
    """Prevents bias from the loop around the rule: bonus tokens, exit, processors, generators."""
    model = make_tiny("llama", vocab_size=6, hidden_size=16, num_hidden_layers=2)
    ids = torch.tensor([[3, 4, 5]])
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 4, "top_p": 0.95, "max_new_tokens": 3,
                               "eos_token_id": None, "attention_mask": torch.ones_like(ids)}  # fmt: skip
    warp = model._get_logits_processor(_warpers(model, options), 3, ids, None, [], model_kwargs={})

    def next_probs(prefix: torch.Tensor) -> torch.Tensor:
        return warp(prefix, model(prefix).logits[:, -1].float()).softmax(-1)[0]

    # The second and third tokens: the first comes from the prefill, the others from a speculative block.
    expected: Counter[tuple[int, int]] = Counter()
    with torch.no_grad():
        for a, pa in enumerate(next_probs(ids).tolist()):
            for b, pb in enumerate(next_probs(torch.cat([ids, torch.tensor([[a]])], 1)).tolist() if pa else []):
                prefix = torch.cat([ids, torch.tensor([[a, b]])], 1)
                for c, pc in enumerate(next_probs(prefix).tolist() if pb else []):
                    expected[b, c] += pa * pb * pc  # type: ignore[assignment]
    method = self_speculative(SkipMask(mlp=[1], num_layers=2), max_length=2, exit_threshold=threshold)
    torch.manual_seed(11)
    n = 1200
    seen: Counter[tuple[int, int]] = Counter()
    accepted = 0
    for _ in range(n):
        out = model.generate(ids, custom_generate=method, **options)[0, -2:].tolist()
        accepted += method.stats.accepted
        seen[out[0], out[1]] += 1
    assert 0 < accepted < n
    assert all(expected[pair] > 0 for pair in seen)
    common = [pair for pair, p in expected.items() if p * n >= 5]
    rest = n - sum(seen[p] for p in common)
    observed = [*(seen[p] for p in common), rest]
    wanted = [*(n * expected[p] for p in common), n * (1 - sum(expected[p] for p in common))]
    if wanted[-1] < 1:
        observed, wanted = observed[:-1], wanted[:-1]
    assert agreement(observed, wanted) > 1e-3


def _warpers(model: Any, options: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    keys = ("do_sample", "temperature", "top_k", "top_p")
    return GenerationConfig(**{k: options[k] for k in keys})


def test_a_seed_repeats_the_output(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents randomness that no seed controls."""
    model, outs = tiny("llama"), []
    for _ in range(2):
        torch.manual_seed(5)
        method = self_speculative(SkipMask(mlp=[1], num_layers=4))
        mask = torch.ones_like(ids)
        outs.append(model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=20, custom_generate=method))
    assert torch.equal(*outs)
