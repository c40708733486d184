"""Sampling is exact: what comes out has the target's own distribution, token by token and jointly.

The reference is enumerated: every three-token continuation over eight tokens, with transformers' own processors.
Known bugs of other codes are kept here as mutants; the same test must kill each of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import make_tiny
from counts import times
from scipy.stats import chisquare

from skipsearch import SkipMask, self_speculative
from skipsearch.decoding import sequences
from skipsearch.decoding.accept import accept_greedy, accept_sampling, draw, probabilities
from skipsearch.errors import DecodingError
from skipsearch.model.target import Target

AT_ONCE, VOCABULARY, NEW = 50_000, 8, 3
N = times(1, 4) * AT_ONCE  # the mutants below die of the fewer
PROMPT = torch.tensor([[3, 4, 5, 3]])
MASK = SkipMask(attention=[0], mlp=[1], num_layers=2)
FILTERS: dict[str, dict[str, Any]] = {
    "unfiltered": {"top_k": 0},
    "top-k": {"top_k": 3},
    "top-p": {"top_k": 0, "top_p": 0.7},
    "repetition penalty": {"top_k": 0, "repetition_penalty": 1.5},
}
# Every temperature and every filter meets fixed and confidence-exit drafts, in turn.
GRID = [(t, f, (None, 0.5)[(i + j) % 2]) for i, t in enumerate((0.2, 0.6, 1.0, 1.5)) for j, f in enumerate(FILTERS)]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny(
        "llama", vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )


def options(temperature: float, name: str) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature, "max_new_tokens": NEW, "eos_token_id": None,
            "pad_token_id": 0, "attention_mask": torch.ones_like(PROMPT), **FILTERS[name]}  # fmt: skip


@torch.no_grad()
def enumerated(model: Any, settings: dict[str, Any]) -> torch.Tensor:
    """The probability of each continuation [V, V, V] under plain sampling."""
    rows = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=NEW)))
    kept: dict[str, Any] = {}

    def keep(_model: Any, input_ids: Any, logits_processor: Any, **_: Any) -> Any:
        kept["processors"] = logits_processor
        return input_ids

    def method(model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
               **kwargs: Any) -> Any:  # fmt: skip
        return keep(model, input_ids, logits_processor)

    model.generate(PROMPT, custom_generate=method, **settings)
    full = torch.cat([PROMPT.expand(len(rows), -1), rows], 1)
    total = torch.ones(len(rows), dtype=torch.float64)
    for i in range(NEW):
        prefix = full[:, : PROMPT.shape[1] + i]
        scores = kept["processors"](prefix, model(prefix).logits[:, -1].float())
        total *= scores.softmax(-1).double().gather(1, rows[:, i : i + 1])[:, 0]
    return total


def drawn(model: Any, settings: dict[str, Any], method: Any, n: int) -> torch.Tensor:
    """How often each continuation came out of n runs through `generate`."""
    torch.manual_seed(11)
    counts = torch.zeros(VOCABULARY**NEW, dtype=torch.float64)
    for _ in range(0, n, AT_ONCE):
        out = model.generate(PROMPT, num_return_sequences=AT_ONCE, custom_generate=method, **settings)[:, -NEW:]
        place = sum(out[:, i] * VOCABULARY ** (NEW - 1 - i) for i in range(NEW))
        counts += torch.bincount(place, minlength=VOCABULARY**NEW)
    return counts


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square over all cells; rare ones are put together. 0 if something impossible came out."""
    if counts[expected == 0].sum():
        return 0.0
    wanted = expected * counts.sum() / expected.sum()
    common = wanted >= 5
    seen, wanted = (torch.cat([c[common], c[~common].sum()[None]]) for c in (counts, wanted))
    return float(chisquare(seen[wanted > 0], wanted[wanted > 0]).pvalue)


@pytest.mark.parametrize(("temperature", "name", "threshold"), GRID)
def test_joint_distribution(temperature: float, name: str, threshold: float | None, model: Any) -> None:
    """Prevents lossy sampling anywhere: the rule, the bonus, processors, the exit, generators, rows of a batch."""
    settings = options(temperature, name)
    method = self_speculative(MASK, max_length=2, exit_threshold=threshold)
    found = p_value(drawn(model, settings, method, N), enumerated(model, settings))
    assert found > 0.01 / len(GRID), found  # Bonferroni
    assert 0 < method.stats.accepted < method.stats.drafted


def greedy_draft_with_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposes the argmax, and accepts as if it had been drawn (Self-SD's code)."""
    monkeypatch.setattr(sequences, "draw", lambda probs, generator: probs.argmax(-1))


def bonus_at_temperature_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the last token from unprocessed probabilities (SWIFT's code)."""

    def mutant(target: Any, draft: Any, ids: Any, drafted: Any, generator: Any) -> Any:
        n, bonus = accept_sampling(target, draft, ids, drafted, generator)
        last = target[torch.arange(len(n)), n] ** 0.6
        return n, torch.where(n == drafted, draw(last, generator), bonus)

    monkeypatch.setattr(sequences, "accept_sampling", mutant)


def target_sample_for_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rejection, draws from the target itself."""

    def mutant(target: Any, draft: Any, ids: Any, drafted: Any, generator: Any) -> Any:
        n, _ = accept_sampling(target, draft, ids, drafted, generator)
        return n, draw(target[torch.arange(len(n)), n], generator)

    monkeypatch.setattr(sequences, "accept_sampling", mutant)


def accept_randomness_decides_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives up a drafted token by the random number that will judge it."""
    draft = sequences.Sequences.draft

    def mutant(self: Any, limits: Any, *_: Any) -> Any:
        drafted, probs = draft(self, [min(1, limit) for limit in limits])
        if probs is None:
            return drafted, probs
        peek = torch.Generator().manual_seed(0)
        peek.set_state(self.selection.sampling.accept.get_state())
        u = torch.rand((len(drafted), 1), generator=peek)[:, 0]
        sure = probs[:, 0].gather(1, self._behind(1))[:, 0]
        return [k if good else 0 for k, good in zip(drafted, (u < sure).tolist(), strict=True)], probs

    monkeypatch.setattr(sequences.Sequences, "draft", mutant)


def off_by_one_bonus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the last token one place too early."""

    def mutant(target: Any, draft: Any, ids: Any, drafted: Any, generator: Any) -> Any:
        n, bonus = accept_sampling(target, draft, ids, drafted, generator)
        early = target[torch.arange(len(n)), (n - 1).clamp(min=0)]
        return n, torch.where(n == drafted, draw(early, generator), bonus)

    monkeypatch.setattr(sequences, "accept_sampling", mutant)


def residual_with_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds an epsilon to the residual against division by zero, and so to tokens that are impossible."""

    def mutant(target: Any, draft: Any, ids: Any, drafted: Any, generator: Any) -> Any:
        n, bonus = accept_sampling(target, draft, ids, drafted, generator)
        if not ids.shape[1]:
            return n, bonus
        every = torch.arange(len(n))
        residual = (target[every, n] - draft[every, n.clamp(max=ids.shape[1] - 1)]).clamp(min=0) + 1e-3
        return n, torch.where(n < drafted, draw(residual, generator), bonus)

    monkeypatch.setattr(sequences, "accept_sampling", mutant)


MUTANTS = [greedy_draft_with_softmax, bonus_at_temperature_one, target_sample_for_residual,
           accept_randomness_decides_the_exit, off_by_one_bonus, residual_with_epsilon]  # fmt: skip


@pytest.fixture(scope="module")
def sound(model: Any) -> float:
    """What the sound code gets where the mutants must fail."""
    settings = options(0.6, "top-k")
    return p_value(drawn(model, settings, self_speculative(MASK, max_length=2), AT_ONCE), enumerated(model, settings))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_known_bugs_are_killed(mutant: Any, model: Any, sound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a distribution test that bugs of published codes would pass."""
    settings = options(0.6, "top-k")
    method, expected = self_speculative(MASK, max_length=2), enumerated(model, settings)
    mutant(monkeypatch)
    assert p_value(drawn(model, settings, method, AT_ONCE), expected) < 1e-9 < sound


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_equal_distributions_accept_always() -> None:
    """Prevents rejections, and an empty residual, where draft and target agree."""
    probs = torch.rand(64, 3, 8, generator=generator()).softmax(-1)
    ids = probs[:, :2].argmax(-1)
    n, _ = accept_sampling(probs, probs[:, :2], ids, torch.full((64,), 2), generator())
    assert n.tolist() == [2] * 64


def test_impossible_proposals_are_rejected() -> None:
    """Prevents a proposal of zero target probability from being accepted, and the residual from holding it."""
    target = torch.zeros(64, 2, 4)
    target[:, 0, 2] = target[:, 1, 0] = 1.0  # one-hot
    draft = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(64, 1, 4)
    n, bonus = accept_sampling(target, draft, torch.ones(64, 1, dtype=torch.long), torch.ones(64), generator())
    assert n.tolist() == [0] * 64 and bonus.tolist() == [2] * 64


def test_rows_with_fewer_drafts_are_cut_there() -> None:
    """Prevents a row from accepting what fills its place in a longer batch."""
    probs = torch.full((3, 3, 4), 0.25)
    ids = torch.zeros(3, 2, dtype=torch.long)
    n, _ = accept_sampling(probs, probs[:, :2], ids, torch.tensor([0, 1, 2]), generator())
    assert n.tolist() == [0, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_logits_are_a_typed_error(bad: float) -> None:
    """Prevents NaN from turning into token 0."""
    with pytest.raises(DecodingError, match="NaN"):
        probabilities(torch.tensor([[0.0, 1.0], [bad, 1.0]]))
    with pytest.raises(DecodingError):
        probabilities(torch.full((3,), float("-inf")))


def test_overflow_in_half_precision_is_a_typed_error(ids: torch.Tensor) -> None:
    """Prevents fp16 logits beyond 65,504 from being sampled as if they meant something."""
    model = make_tiny("llama").half()
    model.lm_head.weight.data.fill_(60_000.0)
    with pytest.raises(DecodingError, match="float32 or bfloat16"):
        model.generate(ids, do_sample=True, max_new_tokens=4, custom_generate=self_speculative(None))


def test_greedy_accept_counts_the_common_prefix() -> None:
    """Prevents an off-by-one in num_accepted."""
    drafted = torch.tensor([[1, 2, 3], [1, 9, 3], [7, 2, 3], [1, 2, 3]])
    target = torch.tensor([[1, 2, 3, 4]]).expand(4, -1)
    n, bonus = accept_greedy(drafted, torch.tensor([3, 3, 3, 2]), target)
    assert n.tolist() == [3, 1, 0, 2] and bonus.tolist() == [4, 2, 1, 3]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_seed_repeats_the_output(rows: int, tiny: Any, ids: torch.Tensor) -> None:
    """Prevents randomness that no seed controls."""
    model, outs = tiny("llama"), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        method = self_speculative(SkipMask(mlp=[1], num_layers=4))
        outs.append(model.generate(ids, do_sample=True, max_new_tokens=20, num_return_sequences=rows,
                                           custom_generate=method))  # fmt: skip
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_a_draft_that_overflows_is_rejected(ids: Any) -> None:
    """Prevents a draft that alone says NaN from ending decoding: it may say anything, and is not believed."""
    from skipsearch.model.families import tiny_model

    class Overflow(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.full((*hidden.shape[:-1], 97), torch.nan)

    model = tiny_model("llama")
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    method = self_speculative(SkipMask(attention=[1], num_layers=4), max_length=3)
    draft = method._draft_for(Target.of(model))
    assert draft is not None
    draft.lm_head = Overflow()
    torch.manual_seed(0)
    out = model.generate(ids, custom_generate=method, do_sample=True, **options)
    assert out.shape[1] == ids.shape[1] + 12 and method.stats.drafted > 0
    expected = model.generate(ids, do_sample=False, **options)
    assert torch.equal(model.generate(ids, custom_generate=method, do_sample=False, **options), expected)


def test_training_with_checkpoints_is_refused(ids: Any) -> None:
    """Prevents an error about sizes from a model that keeps no cache."""
    from skipsearch.model.families import tiny_model

    model = tiny_model("llama")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with pytest.raises(DecodingError, match=r"call model\.eval\(\) before"):
        model.generate(ids, max_new_tokens=4, custom_generate=self_speculative(None))
