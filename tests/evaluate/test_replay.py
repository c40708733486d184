"""Replay: drafts over a trace, with exactly the counts of real decoding."""

from __future__ import annotations

import functools
import itertools
import random
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SUPPORTED, make_tiny, quiet
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from traces import make_trace, really_decode

from skipsearch import SkipMask
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.processors import TokenSelection
from skipsearch.decoding.rule import SelectionRule
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.reference import GROUP_COST, group_by_length
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.trace import DecodeSettings, record
from skipsearch.evaluate.windows import WindowReplay, Windows
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy


@pytest.mark.parametrize("family", SUPPORTED)
def test_replay_counts_equal_real_decoding(family: str, tiny: Any) -> None:
    """Prevents a proxy: blocks by (drafted, accepted) must be those of real decoding, sliding windows included."""
    model, rng = tiny(family), random.Random(2)
    trace = make_trace(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of families whose rows are replayed one after another
        replay = Replay(Target.of(model), trace, 6, states=True)
    assert replay.resumes == replay.together
    masks = [SkipMask.from_bits([rng.random() < p for _ in range(8)]) for p in (0.1, 0.3)]
    for mask in [*masks, SkipMask(attention=range(4), num_layers=4)]:
        policy = DraftPolicy(max_length=rng.randint(1, 6))
        assert DraftReplay(replay, mask).walk(policy) == really_decode(model, trace, mask, policy), str(mask)


def test_replay_with_an_exit_rule_accepts_what_decoding_accepts(tiny: Any) -> None:
    """Prevents the exit rule from changing what is accepted; what lies behind a mismatch may be drafted differently."""
    model = tiny("gpt2")
    trace, mask = make_trace(model), SkipMask(mlp=[2], num_layers=4)
    policy = DraftPolicy(max_length=6, exit_threshold=0.5)
    replayed, real = (
        DraftReplay(Replay(Target.of(model), trace, 6), mask).walk(policy),
        really_decode(model, trace, mask, policy),
    )
    by_accepted = [sorted(n for (_, n), count in blocks.items() for _ in range(count)) for blocks in (replayed, real)]
    assert by_accepted[0] == by_accepted[1]


def test_chunks_of_rows_change_nothing(tiny: Any) -> None:
    """Prevents rows of one pass from seeing each other's keys."""
    model = tiny("mistral")
    trace, mask = make_trace(model), SkipMask(attention=[1], mlp=[3], num_layers=4)
    policy = DraftPolicy(max_length=5)
    one, many = (DraftReplay(Replay(Target.of(model), trace, 6, rows=rows), mask) for rows in (1, 64))
    assert one.walk(policy) == many.walk(policy)


def test_sampled_replay_accepts_what_speculative_sampling_accepts(tiny: Any) -> None:
    """Prevents masks for sampling from being judged by greedy matches: accepted shares agree with real decoding."""
    model, mask, policy = tiny("llama"), SkipMask(attention=[1, 3], mlp=[2], num_layers=4), DraftPolicy(max_length=3)
    prompts = tuple((3 + i, 5, 7, 11 + i) for i in range(24))
    trace = record(Target.of(model), prompts, DecodeSettings(new_tokens=40, rule=SelectionRule(temperature=0.7)), quiet)
    assert trace != record(
        Target.of(model),
        prompts,
        DecodeSettings(new_tokens=40, rule=SelectionRule(temperature=0.7), seed=100),
        quiet,
    )
    replayed = DraftReplay(Replay(Target.of(model), trace, 3), mask).walk(policy)
    stats = DecodeStats()
    for i, prompt in enumerate(prompts):
        device = torch.device("cpu")
        selection = TokenSelection.at_temperature(0.7, 1000 + 2 * i, device)
        sequences = Sequences(
            Target.of(model), torch.tensor([prompt]), capacity=44, draft=draft_view(model, mask), selection=selection
        )
        for _ in decode(sequences, Ending(max_length=44, eos_ids=frozenset([2])), policy=policy, stats=stats):
            pass
    ours = sum(n * c for (_, n), c in replayed.items()) / sum(k * c for (k, _), c in replayed.items())
    assert 0.05 < stats.acceptance_rate < 0.95
    spread = (stats.acceptance_rate * (1 - stats.acceptance_rate) / stats.drafted) ** 0.5
    assert abs(ours - stats.acceptance_rate) < 5 * spread
    full = DraftReplay(Replay(Target.of(model), trace, 3), SkipMask(num_layers=4)).walk(policy)
    cut = sum(c for (k, n), c in full.items() if n < k)  # the model itself is accepted until its text ends
    assert cut <= len(prompts)


@torch.no_grad()
def test_accepted_shares_average_to_the_overlap(tiny: Any) -> None:
    """Prevents a biased estimate: over many random numbers, one drafted token is accepted sum(min(p, q)) often."""
    model, mask = tiny("llama"), SkipMask(mlp=[1, 2], num_layers=4)
    prompts = tuple((3 + i % 90, 5 + i // 90) for i in range(150))
    trace = record(Target.of(model), prompts, DecodeSettings(new_tokens=2, rule=SelectionRule(temperature=0.7)), quiet)
    trace = replace(trace, continuations=tuple(c[:2] for c in trace.continuations))
    replay = Replay(Target.of(model), trace, 1)
    drafts = DraftReplay(replay, mask)
    starts = [(p, len(prompt) + 1) for p, prompt in enumerate(trace.prompts) if len(trace.continuations[p]) == 2]
    drafts.run(starts)
    accepted = sum(drafts.drafts[start].matches for start in starts) / len(starts)
    overlap = []
    for p, t in starts:
        ids = torch.tensor([[*trace.prompts[p], *trace.continuations[p]][:t]])
        target = (model(ids).logits[0, -1] / 0.7).softmax(-1)
        _, _, logits = replay.logits(drafts.view, [(p, t)])
        overlap.append(float(torch.minimum(target, (logits.flatten(0, 1)[0] / 0.7).softmax(-1)).sum()))
    mean = sum(overlap) / len(overlap)
    assert 0.1 < mean < 0.95
    assert abs(accepted - mean) < 4 * (mean * (1 - mean) / len(overlap)) ** 0.5


def test_little_memory_means_few_rows_and_the_same_counts(tiny: Any) -> None:
    """Prevents a pass from being larger than the memory it was given."""
    model = tiny("llama")
    trace, mask, policy = make_trace(model), SkipMask(mlp=[1], num_layers=4), DraftPolicy(max_length=4)
    small, large = Replay(Target.of(model), trace, 4, memory=1), Replay(Target.of(model), trace, 4, memory=1e9)
    assert small.rows == 1 < large.rows
    assert DraftReplay(small, mask).walk(policy) == DraftReplay(large, mask).walk(policy)


@hypothesis_settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_drafts_side_by_side_are_those_run_alone(tiny: Any, data: Any) -> None:
    """Prevents drafts of one prompt, laid out in one row, from seeing each other."""
    model = tiny("llama")
    trace = make_trace(model)
    together, alone = Replay(Target.of(model), trace, 4, side=5), Replay(Target.of(model), trace, 4)
    alone.together, alone.rows = False, 1
    bits = data.draw(st.lists(st.booleans(), min_size=8, max_size=8))
    every = [(p, t) for p, row in enumerate(trace.prompts) for t in range(len(row) + 1, together.lengths[p])]
    starts = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=12, unique=True))
    drafts = [DraftReplay(replay, SkipMask.from_bits(bits)) for replay in (together, alone)]
    for some in drafts:
        some.run(starts)
    assert drafts[0].drafts.keys() == drafts[1].drafts.keys() == set(starts)
    for start in starts:
        assert drafts[0].drafts[start].matches == drafts[1].drafts[start].matches
        assert drafts[0].drafts[start].confidence == pytest.approx(drafts[1].drafts[start].confidence, abs=1e-4)


def test_one_prompt_alone_leaves_the_reference_as_it_is(tiny: Any) -> None:
    """Prevents drafts that run one by one from writing over the keys that later ones read."""
    model = tiny("llama")
    replay = Replay(Target.of(model), make_trace(model, prompts=1), 4)
    replay.together, replay.rows = False, 1
    (group,) = replay.groups
    before = [tuple(part.clone() for part in layer.reference) for layer in group.layers]
    DraftReplay(replay, SkipMask(mlp=[1], num_layers=4)).walk(DraftPolicy(max_length=4))
    for old, layer in zip(before, group.layers, strict=True):
        pairs = zip(old, layer.reference, strict=True)
        assert all(torch.equal(a[:, :, : group.longest], b[:, :, : group.longest]) for a, b in pairs)


def uneven_trace(model: Any, short: int = 5, long: int = 3) -> Any:
    """Prompts of very different lengths, so that they fall into two groups."""
    prompts = tuple(tuple(3 + (7 * i + j) % 90 for j in range(6 + i)) for i in range(short))
    prompts += tuple(tuple(3 + (5 * i + j) % 90 for j in range(900 + 40 * i)) for i in range(long))
    return record(Target.of(model), prompts, DecodeSettings(new_tokens=18), quiet)


@pytest.fixture(scope="module")
def long_context() -> Any:
    return make_tiny("llama", max_position_embeddings=2048)


def test_prompts_of_all_lengths_are_replayed_as_decoded(long_context: Any) -> None:
    """Prevents groups of prompts from reading each other's reference, and drafts of the longest from losing keys."""
    trace, policy = uneven_trace(long_context), DraftPolicy(max_length=5)
    replay = Replay(Target.of(long_context), trace, 6, side=4, states=True)
    assert len(replay.groups) > 1 and replay.resumes
    for mask in (SkipMask(mlp=[2], num_layers=4), SkipMask(attention=[1], mlp=[3], num_layers=4)):
        real = really_decode(long_context, trace, mask, policy)
        assert DraftReplay(replay, mask).walk(policy) == DraftReplay(replay.with_length(5), mask).walk(policy) == real


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=9))
def test_groups_by_length_cost_least(lengths: list[int]) -> None:
    """Prevents a dynamic programme that pads more than it must: with few prompts, the test tries every grouping."""
    groups = group_by_length(lengths)
    assert sorted(p for group in groups for p in group) == list(range(len(lengths)))

    def cost(sizes: Any) -> float:
        return sum(len(some) * max(some) + GROUP_COST for some in sizes)

    order = sorted(lengths)
    every = (
        [order[a:b] for a, b in itertools.pairwise((0, *cuts, len(order)))]
        for n in range(len(order))
        for cuts in itertools.combinations(range(1, len(order)), n)
    )
    assert cost([[lengths[p] for p in group] for group in groups]) == min(map(cost, every))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "mixtral"])
def test_a_pass_may_begin_where_the_draft_first_differs(family: str, tiny: Any) -> None:
    """Prevents stored hidden states from being those of another position, row or layer."""
    model, rng = tiny(family), random.Random(1)
    trace = make_trace(model, prompts=5, new_tokens=23)
    kept, whole = (Replay(Target.of(model), trace, 4, side=6, states=states) for states in (True, False))
    assert kept.resumes and not whole.resumes
    for first in range(4):
        mask = SkipMask.from_bits([i % 4 >= first and (i == first or rng.random() < 0.3) for i in range(8)])
        parts = [WindowReplay(Windows(replay), mask).outcomes() for replay in (kept, whole)]
        for a, b in zip(*parts, strict=True):
            assert a.correct == b.correct and a.confidence == pytest.approx(b.confidence, abs=1e-4)


@given(share=st.floats(0, 1), more=st.floats(0, 1))
def test_windows_cover_each_position_once(tiny: Any, share: float, more: float) -> None:
    """Prevents positions from being scored twice or never, and a larger part that lacks what a smaller one has."""
    model = tiny("llama")
    replay = shared_replay(model)
    windows = Windows(replay)
    small, large = (windows.part(s) for s in sorted((share, more)))
    for some, all_ in zip(small, large, strict=True):
        assert set(some) <= set(all_)
    places = [(p, t + j) for p, t in windows.starts(windows.part(1)) for j in range(4)]
    wanted = {
        (p, t)
        for p, prompt in enumerate(replay.trace.prompts)
        for t in range(len(prompt) + 1, len(prompt) + len(replay.trace.continuations[p]))
    }
    assert len(places) == len(set(places)) and wanted <= set(places)
    mask = SkipMask(mlp=[1, 2], num_layers=4)
    alone = DraftReplay(replay, mask)
    alone.run(windows.starts(small))
    drafts = WindowReplay(windows, mask)
    drafts.outcomes(small)
    for start, (correct, confidence) in drafts.known.items():
        assert next((j for j in range(4) if not correct[j]), 4) == alone.drafts[start].matches
        assert tuple(confidence) == pytest.approx(alone.drafts[start].confidence, abs=1e-4)


@functools.cache
def shared_replay(model: Any) -> Replay:
    return Replay(Target.of(model), make_trace(model, prompts=3, new_tokens=23), 4, side=6, states=True)
