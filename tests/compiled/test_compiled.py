"""The compiled backend: the model's own logits, the same tokens, one set of pieces for every mask."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from skipsearch import SkipMask, load_mask, self_speculative
from skipsearch.compiled.backend import compile_and_prove, with_backend
from skipsearch.compiled.model import GUESS, WIDTHS
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats
from skipsearch.draft.view import draft_view
from skipsearch.errors import BackendWarning, DecodingError
from skipsearch.model.cache import CACHE
from skipsearch.model.target import Target
from skipsearch.online import incumbent
from skipsearch.policy import DraftPolicy

MASK = SkipMask(attention=[0, 2], mlp=[1, 2], num_layers=4)


@pytest.fixture(scope="module")
def llama(tiny: Any) -> Target:
    target = with_backend(Target.of(tiny("llama")), "compiled")
    assert target.compiled is not None
    return target


def decoded(target: Target, ids: Any, new: int, mask: Any, policy: Any, **given: Any) -> tuple[Any, Any]:
    stats = DecodeStats()
    draft = None if mask is None else draft_view(target.model, mask)
    sequences = Sequences(target, ids, capacity=ids.shape[1] + new, draft=draft, **given)
    blocks = decode(sequences, Ending(max_length=ids.shape[1] + new), policy=policy, stats=stats)
    return [token for block in blocks for token in block.tokens], stats


def greedy(model: Any, ids: Any, new: int) -> list[int]:
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()


POLICIES = [
    DraftPolicy(max_length=4),
    DraftPolicy(max_length=6, exit_threshold=0.05),
    DraftPolicy(max_length=6, exit_threshold=0.05, adaptive=True),
    DraftPolicy(max_length=6, curve=(0.2, 0.9), prices=(0.1,) * 6),
    DraftPolicy(max_length=6, ngram=8),
    DraftPolicy(max_length=6, exit_threshold=0.05, ngram=8, never_slower=True),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_same_tokens_as_generate(llama: Any, policy: DraftPolicy) -> None:
    """Prevents a policy, a padded width or a guess from changing the output; prompts cross chunks and slot steps."""
    model = llama.model
    for length in (1, 5, 61, 64, 70):
        ids = torch.arange(length)[None] % 90 + 3
        tokens, stats = decoded(llama, ids, 40, MASK, policy)
        assert tokens == greedy(model, ids, 40), length
        assert sum(stats.blocks_from.values()) == stats.verifies
        assert sum(stats.accepted_from.values()) == stats.accepted
        assert max(k for k, _ in stats.blocks) <= max(policy.max_length, policy.ngram)  # wider ones are not compiled


def test_blocks_are_those_of_eager_decoding(llama: Any, ids: Any) -> None:
    """Prevents the draft of K steps without the host from drafting something else."""
    targets = (llama, replace(llama, compiled=None))
    for policy in POLICIES[:4]:
        ours, eager = (decoded(target, ids, 50, MASK, policy)[1].blocks for target in targets)
        assert ours == eager, str(policy)


def test_another_mask_compiles_nothing_new(llama: Any, ids: Any) -> None:
    """Prevents a compile for each mask: a draft is a choice of pieces that are there."""
    model = llama.model
    for mask in (SkipMask(attention=[0], num_layers=4), SkipMask(mlp=[0], num_layers=4)):
        decoded(llama, ids, 8, mask, POLICIES[0])
    compiled: Any = llama.compiled
    known = len(compiled.pieces._compiled)
    mask = SkipMask(attention=[1, 3], mlp=[0, 2], num_layers=4)
    assert decoded(llama, ids, 30, mask, POLICIES[0])[0] == greedy(model, ids, 30)
    everything = SkipMask(attention=range(4), mlp=range(4), num_layers=4)
    assert decoded(llama, ids, 30, everything, POLICIES[0])[0] == greedy(model, ids, 30)
    assert len(compiled.pieces._compiled) == known


def test_masks_are_found_and_saved_while_the_compiled_backend_serves(
    llama: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Prevents another tuner than the one that served from being asked, and compiled drafts of new masks from lying."""
    model = llama.model
    monkeypatch.setattr(incumbent, "PAYS", 0.0)  # whatever is tried is served
    monkeypatch.setattr(incumbent, "SIGNIFICANT", -9.0)
    method = self_speculative("auto", share=0.9, ngram=0, never_slower=False)
    for start in range(4):
        ids = torch.arange(start, start + 20)[None] % 90 + 3
        out = model.generate(
            ids, custom_generate=method, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        assert out[0, 20:].tolist() == greedy(model, ids, 100)
    tuner = method.tuner_for(model)
    assert tuner.report()["passes"] >= 1 and tuner.report()["decoding_s"] > 0
    tuner.save(tmp_path / "found.json")
    assert load_mask(tmp_path / "found.json").mask.num_layers == 4


def test_two_sequences_at_once_have_buffers_of_their_own(llama: Any) -> None:
    """Prevents interleaved sequences from writing into each other's keys, and buffers from piling up."""
    model = llama.model
    gc.collect()
    compiled: Any = llama.compiled
    free = len(compiled._free)
    prompts = [torch.arange(9)[None] + 3, torch.arange(12)[None] + 40]
    both = [Sequences(llama, ids, capacity=60, draft=draft_view(model, MASK)) for ids in prompts]
    streams = [
        decode(s, Ending(max_length=ids.shape[1] + 20), policy=POLICIES[0])
        for s, ids in zip(both, prompts, strict=True)
    ]
    found: list[list[int]] = [[], []]
    while any(len(tokens) < 20 for tokens in found):
        for tokens, stream in zip(found, streams, strict=True):
            tokens += [token for block in [next(stream, None)] if block for token in block.tokens]
    assert found == [greedy(model, ids, 20) for ids in prompts]
    del both, streams
    gc.collect()
    assert len(compiled._free) >= max(2, free)


def test_a_guess_that_is_wrong_changes_nothing(llama: Any, ids: Any) -> None:
    """Prevents the draft from keeping guessed tokens that it would not have said."""
    model = llama.model
    drafts = []
    for guess in (None, lambda _tokens: [7] * GUESS):
        sequences = Sequences(llama, ids, capacity=60, draft=draft_view(model, MASK))
        sequences.verify([0])
        sequences.draft([8], lambda *_: False, guess)
        drafts.append(sequences.ids[0, sequences.lengths[0] :][:8].tolist())
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_other_builds_of_layers(tiny: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents sliding windows, layers of two builds, and learned positions beyond the context from going wrong."""
    monkeypatch.setitem(WIDTHS, "cpu", (1, 6))  # each takes seconds to compile
    model = tiny(family)
    target = replace(Target.of(model), compiled=compile_and_prove(Target.of(model), None))
    ids = torch.arange(30)[None] + 3
    for new in (20, 60):
        assert decoded(target, ids, new, MASK, POLICIES[0])[0] == greedy(model, ids, new)


def test_options_of_generate_through_the_compiled_backend(llama: Any, ids: Any) -> None:
    """Prevents padding, processors, returned scores or a handed-over cache from being lost on the way."""
    model = llama.model
    method = self_speculative(MASK, backend="compiled")
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    seen = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    options: dict[str, Any] = {
        "attention_mask": seen, "max_new_tokens": 20, "do_sample": False, "repetition_penalty": 1.3, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "use_cache": True,
    }  # fmt: skip
    plain = model.generate(padded, **options)
    ours = model.generate(padded, custom_generate=method, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(ours[name], plain[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    cache = DynamicCache(config=model.config)
    model.generate(ids, **{CACHE: cache}, custom_generate=method, attention_mask=torch.ones_like(ids),
                   max_new_tokens=9, do_sample=False)  # fmt: skip
    longer = torch.cat([ids, torch.tensor([greedy(model, ids, 9)])], 1)
    # Another sequence takes the buffers; what was handed over must not change with them.
    model.generate(ids % 50 + 3, custom_generate=method, attention_mask=torch.ones_like(ids), max_new_tokens=9)
    more = model.generate(longer, **{CACHE: cache}, custom_generate=method, attention_mask=torch.ones_like(longer),
                          max_new_tokens=8, do_sample=False)  # fmt: skip
    assert more[0, longer.shape[1] :].tolist() == greedy(model, longer, 8)


def test_sampling_with_a_seed_does_not_depend_on_the_clock(llama: Any, ids: Any) -> None:
    """Prevents never_slower, which looks at the clock, from making seeded output irreproducible."""
    model = llama.model
    outputs = []
    for _ in range(2):
        method = self_speculative(MASK, max_length=4, ngram=6, never_slower=True, backend="compiled")
        torch.manual_seed(5)
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": True}
        outputs.append(model.generate(ids, custom_generate=method, **options))
    assert torch.equal(*outputs)


def test_past_behind_padding_is_decoded_eagerly(llama: Any, ids: Any) -> None:
    """Prevents padding from being attended to when a cache is handed over with it."""
    model = llama.model
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    seen = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": seen}
    expected = model.generate(padded, **options)
    cache = DynamicCache(config=model.config)
    positions = (seen[:, :-2].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(padded[:, :-2], attention_mask=seen[:, :-2], position_ids=positions, **{CACHE: cache})
    with pytest.warns(BackendWarning, match="behind padding"):
        got = model.generate(
            padded, **{CACHE: cache}, custom_generate=self_speculative(MASK, backend="compiled"), **options
        )  # fmt: skip
    assert torch.equal(got, expected)


def test_batches_and_deterministic_mode_say_that_they_are_eager(llama: Any, ids: Any) -> None:
    """Prevents a batch from being decoded row by row, or in silence on another backend."""
    model = llama.model
    rows = torch.cat([ids, ids + 1])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(rows, attention_mask=torch.ones_like(rows), **options)
    with pytest.warns(BackendWarning, match="sequences one at a time"):
        ours = model.generate(
            rows, attention_mask=torch.ones_like(rows), custom_generate=self_speculative(MASK, backend="compiled"),
            **options,
        )  # fmt: skip
    assert torch.equal(ours, plain)
    with pytest.warns(BackendWarning, match="deterministic"):
        method = self_speculative(MASK, backend="compiled", deterministic=True)
        model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=method, **options)


def test_a_view_is_left_as_it_was(llama: Any, ids: Any) -> None:
    """Prevents tracing from leaving traced tensors in the user's model or its views."""
    model = llama.model
    view = draft_view(model, MASK)
    compiled: Any = llama.compiled
    compiled.warm(compiled.stack_of(view), [1])
    for module in (model, view):
        assert all(type(p) is torch.nn.Parameter for p in module.parameters())
    assert model(ids).logits.isfinite().all()


def test_refused_by_generate_as_before(llama: Any, ids: Any) -> None:
    """Prevents the compiled backend from bypassing what cannot be honoured."""
    model = llama.model
    with pytest.raises(DecodingError, match="num_beams"):
        model.generate(ids, num_beams=2, max_new_tokens=4, custom_generate=self_speculative(MASK, backend="compiled"))


@pytest.mark.parametrize("padded", [{1: 4, 2: 4}, {1: 13, 2: 6, 4: 6, 9: 13}], ids=str)
def test_padded_forwards_give_the_same_tokens(tiny: Any, padded: dict[int, int], monkeypatch: Any) -> None:
    """Prevents padding from being attended to, or drafted: at the ends of chunks and slot steps, and in drafts."""
    model = tiny("llama")
    target = with_backend(Target.of(model), "compiled")
    compiled: Any = target.compiled
    monkeypatch.setattr(compiled, "_padded_to", padded)
    generator = torch.Generator().manual_seed(5)
    for length in (3, 62, 63, 64, 65, 127):
        ids = torch.randint(3, 97, (1, length), generator=generator)
        for mask, policy in ((None, None), (MASK, DraftPolicy(max_length=5)), (MASK, POLICIES[1])):
            assert decoded(target, ids, 12, mask, policy)[0] == greedy(model, ids, 12), (length, policy)


def test_the_fastest_width_serves(tiny: Any, monkeypatch: Any) -> None:
    """Prevents a width from being padded to a slower one, or for a gain that is noise."""
    compiled: Any = with_backend(Target.of(tiny("llama")), "compiled").compiled
    monkeypatch.setattr(compiled, "_padded_to", {})
    now = [0.0]
    took = {1: 3.0, 2: 4.0, 4: 2.0, 6: 1.95, 9: 5.0, 13: 4.9}
    monkeypatch.setattr(compiled, "widths", tuple(took))
    monkeypatch.setattr("skipsearch.compiled.model.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(compiled, "run", lambda _l, _b, _at, width, _s: now.__setitem__(0, now[0] + took[width]))
    compiled.choose_widths([], SimpleNamespace(at=torch.zeros(2, dtype=torch.long)))
    assert [compiled.width_for(n) for n in (1, 2, 3, 5, 7, 10)] == [6, 6, 4, 6, 9, 13]
