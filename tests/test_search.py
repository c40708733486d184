"""Replay, costs and objective: exact counts, seconds that add up, and the best policy."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SUPPORTED
from hypothesis import given
from hypothesis import strategies as st

from skipsearch import SkipMask
from skipsearch.decoding.loop import decode
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats
from skipsearch.model.preset import presets
from skipsearch.search.cost import Costs, Point, draft_step, profile, profile_or_load
from skipsearch.search.objective import join, plain_score, score
from skipsearch.search.replay import Replay
from skipsearch.search.seeds import by_sensitivity, published, single_skip_loss, uniform
from skipsearch.search.space import Space
from skipsearch.search.trace import Trace, record, record_or_load

POINT = Point(context=64, attention=2.0, mlp=1.0, rest=3.0, exit_check=0.5, verify=tuple(15.0 + k for k in range(13)))


def quiet(*_: Any) -> None:
    pass


def make_trace(model: Any, prompts: int = 4, new_tokens: int = 20, seed: int = 2) -> Trace:
    rng = random.Random(seed)
    rows = tuple(tuple(rng.randrange(3, 97) for _ in range(rng.randint(5, 12))) for _ in range(prompts))
    return record(model, rows, new_tokens, quiet)


def really_decode(model: Any, trace: Trace, mask: SkipMask, policy: DraftPolicy) -> Counter[tuple[int, int]]:
    stats = DecodeStats()
    for prompt, continuation in zip(trace.prompts, trace.continuations, strict=True):
        limit = len(prompt) + trace.new_tokens
        sequences = Sequences(model, torch.tensor([prompt]), capacity=limit, mask=mask)
        blocks = decode(sequences, max_length=limit, policy=policy, stats=stats, eos_ids=frozenset([2]))
        assert tuple(token for block in blocks for token in block.tokens) == continuation
    return stats.blocks


@pytest.mark.parametrize("family", SUPPORTED)
def test_replay_counts_equal_real_decoding(family: str, tiny: Any) -> None:
    """Prevents a proxy: blocks by (drafted, accepted) must be those of real decoding, sliding windows included."""
    model, rng = tiny(family), random.Random(2)
    trace = make_trace(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of families whose rows are replayed one after another
        replay = Replay(model, trace, 6)
    masks = [SkipMask.from_bits([rng.random() < p for _ in range(8)]) for p in (0.1, 0.3)]
    for mask in [*masks, SkipMask(num_layers=4), SkipMask(attention=range(4), num_layers=4)]:
        policy = DraftPolicy(max_length=rng.randint(1, 6))
        assert replay.of(mask).walk(policy) == really_decode(model, trace, mask, policy), str(mask)


def test_replay_with_an_exit_rule_accepts_what_decoding_accepts(tiny: Any) -> None:
    """Prevents the exit rule from changing what is accepted; what lies behind a mismatch may be drafted differently."""
    model = tiny("gpt2")
    trace, mask = make_trace(model), SkipMask(mlp=[2], num_layers=4)
    policy = DraftPolicy(max_length=6, exit_threshold=0.5)
    replayed, real = Replay(model, trace, 6).of(mask).walk(policy), really_decode(model, trace, mask, policy)
    by_accepted = [sorted(n for (_, n), count in blocks.items() for _ in range(count)) for blocks in (replayed, real)]
    assert by_accepted[0] == by_accepted[1]


def test_chunks_of_rows_change_nothing(tiny: Any) -> None:
    """Prevents rows of one pass from seeing each other's keys."""
    model = tiny("mistral")
    trace, mask = make_trace(model), SkipMask(attention=[1], mlp=[3], num_layers=4)
    policy = DraftPolicy(max_length=5)
    assert Replay(model, trace, 6, rows=1).of(mask).walk(policy) == Replay(model, trace, 6, rows=64).of(mask).walk(
        policy
    )


def test_score_picks_a_policy_no_worse_than_any_fixed_one(tiny: Any) -> None:
    """Prevents the policy choice by estimate from missing badly."""
    model = tiny("gemma2")
    trace, mask = make_trace(model, prompts=6), SkipMask(mlp=[3], num_layers=4)
    replay = Replay(model, trace, 8)
    best = score(replay, mask, POINT, thorough=True)
    drafts = replay.of(mask)
    fixed = [DraftPolicy(max_length=k) for k in range(1, 9)]
    assert best.tokens_per_second >= 0.95 * max(join(drafts.walk(p), mask, p, POINT).tokens_per_second for p in fixed)


def test_join_adds_up_by_hand() -> None:
    """Prevents tokens or seconds from being counted twice: two blocks worked out on paper."""
    mask = SkipMask(attention=[0], num_layers=2)
    assert draft_step(POINT, mask, exit_check=False) == 3 + 2 + 2 * 1
    result = join(Counter({(4, 4): 1, (4, 1): 1}), mask, DraftPolicy(max_length=4), POINT)
    assert result.tokens_per_second == pytest.approx((5 + 2) / (8 * 7 + 2 * 19))
    assert result.acceptance_rate == 5 / 8 and result.tau == 3.5
    assert result.cost_ratio == pytest.approx(7 / 15)
    assert result.speedup == pytest.approx(result.tokens_per_second * 15)
    assert plain_score(2, POINT).speedup == 1


@given(context=st.floats(1, 500))
def test_costs_between_points_lie_between_them(context: float) -> None:
    """Prevents extrapolation into negative seconds."""
    far = Point(
        context=200, attention=4.0, mlp=1.0, rest=3.0, exit_check=0.5, verify=tuple(20.0 + k for k in range(13))
    )
    point = Costs(identity="", points=(POINT, far)).at(context)
    assert 2 <= point.attention <= 4 and 15 <= point.verify[0] <= 20


def test_profile_is_kept_and_made_anew_for_another_set_up(tiny: Any, tmp_path: Path) -> None:
    """Prevents costs of one device or model from pricing another."""
    path, model = tmp_path / "costs.json", tiny("llama")
    settings: dict[str, Any] = {"contexts": [8, 16], "max_length": 2, "progress": quiet}
    first = profile_or_load(path, model, "here", **settings)
    assert profile_or_load(path, model, "here", **settings) == first
    assert profile_or_load(path, model, "there", **settings) != first
    path.write_text(path.read_text()[:40])
    assert len(profile_or_load(path, model, "there", **settings).points) == 2


def test_profile_of_prompts_shorter_than_a_draft(tiny: Any) -> None:
    """Prevents very short prompts from ending a search before it begins."""
    costs = profile(tiny("llama"), "x", contexts=[5], max_length=12, progress=quiet, repeats=1)
    assert len(costs.points[0].verify) == 13


def test_profile_prices_every_part(tiny: Any) -> None:
    """Prevents a part from being priced at nothing."""
    costs = profile(tiny("llama"), "x", contexts=[16], max_length=2, progress=quiet, repeats=5)
    point = costs.points[0]
    assert point.attention > 0 and point.mlp > 0 and min(point.verify) > 0


def test_trace_is_greedy_generate_and_kept(tiny: Any, tmp_path: Path) -> None:
    """Prevents a trace of another model or prompt set from being taken for this one's."""
    model, path = tiny("llama"), tmp_path / "trace.json"
    prompts = ((5, 6, 7), (8, 9, 10, 11))
    trace = record_or_load(path, model, prompts, 12, "a", quiet)
    for prompt, continuation in zip(trace.prompts, trace.continuations, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert list(continuation) == expected.tolist()
    calls: list[str] = []
    note = lambda stage, *_: calls.append(stage)
    assert record_or_load(path, model, prompts, 12, "a", note) == trace and not calls
    record_or_load(path, model, prompts, 12, "b", note)
    record_or_load(path, model, prompts[:1], 12, "b", note)
    assert calls == ["record"] * 3
    assert trace.head(1, 4).continuations == (trace.continuations[0][:4],)


def test_sensitivity_finds_the_harmless_sublayer(tiny: Any) -> None:
    """Prevents an order that is upside down: a branch with zero weights changes nothing, so it goes first."""
    from conftest import make_tiny

    model = make_tiny("llama", seed=1)
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    space = Space(num_layers=4, fixed=SkipMask(num_layers=4))
    loss = single_skip_loss(model, make_trace(model), space, quiet)
    assert loss["mlp", 2] == 0 and max(loss.values()) > 0
    seeds = by_sensitivity(space, loss, POINT)
    assert all(mask.skips("mlp", 2) for _, mask in seeds)
    assert [len(mask) for _, mask in seeds] == [1, 2, 3, 4, 5, 6, 7]


def test_seeds_respect_fixed_sublayers() -> None:
    """Prevents seeds that the space cannot express."""
    preset = presets()["llama-2-13b"]
    space = Space.of(40, preset)
    for _, mask in [*published(preset, space), *uniform(space)]:
        assert not mask & preset.fixed
        assert space.mask(space.params(mask)) == mask
    assert {name for name, _ in published(preset, space)} >= {"published:self-sd"}
