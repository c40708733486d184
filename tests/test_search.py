"""Replay, costs and objective: exact counts, seconds that add up, and the best policy."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SUPPORTED, make_tiny
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from skipsearch import SkipMask
from skipsearch.decoding.loop import decode
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.processors import at_temperature
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.cost import Costs, Point, draft_step
from skipsearch.evaluate.hidden_states import layer_states, nearest, sublayer_states
from skipsearch.evaluate.objective import Scorer, foreseen, join, score, standard_error
from skipsearch.evaluate.profile import alike, profile, profile_or_load
from skipsearch.evaluate.prompts import Prompts
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.trace import Trace, record, record_or_load
from skipsearch.mask import KINDS
from skipsearch.model.preset import presets
from skipsearch.search.prepare import Prepared
from skipsearch.search.seeds import (
    all_seeds,
    block_influence,
    by_sensitivity,
    knapsack,
    nearest_states,
    published,
    saves,
    single_skip_loss,
    uniform,
)
from skipsearch.search.space import Space

POINT = Point(
    context=64, attention=(2.0,) * 4, mlp=(1.0,) * 4, rest=3.0, exit_check=0.5,
    verify=tuple(15.0 + k for k in range(13)),
)  # fmt: skip


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


@given(st.lists(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=2, max_size=12), min_size=1, max_size=4),
       st.sampled_from([None, 0.2, 0.7]), st.integers(1, 4))  # fmt: skip
def test_what_is_foreseen_is_a_walk(
    stretches: list[list[tuple[bool, float]]], threshold: float | None, length: int
) -> None:
    """Prevents all policies' walks at once from differing from one walk, block by block."""
    blocks, outlook = Counter[tuple[int, int]](), []
    for stretch in stretches:
        begins, at = len(stretch) - 1, 0
        outlook.append(([right for right, _ in stretch], [sure for _, sure in stretch], begins))
        while at < begins:
            drafted = 0
            while drafted < min(length, len(stretch) - at - 1):
                drafted += 1
                if stretch[at + drafted - 1][1] < (threshold or 0):
                    break
            accepted = next((j for j in range(drafted) if not stretch[at + j][0]), drafted)
            blocks[drafted, accepted] += 1
            at += accepted + 1
    mask, policy = SkipMask(attention=[0], num_layers=4), DraftPolicy(max_length=length, exit_threshold=threshold)
    found, known = foreseen(outlook, mask, POINT, [length], [threshold]), join(blocks, mask, policy, POINT)
    assert found.policy == policy and found.tau == known.tau and found.acceptance_rate == known.acceptance_rate
    assert found.tokens_per_second == pytest.approx(known.tokens_per_second)


def test_join_adds_up_by_hand() -> None:
    """Prevents tokens or seconds from being counted twice: two blocks worked out on paper."""
    mask = SkipMask(attention=[0, 2, 3], mlp=[1, 2], num_layers=4)
    assert draft_step(POINT, mask, exit_check=False) == 3 + 2 + 2 * 1
    uneven = replace(POINT, mlp=(1.0, 7.0, 7.0, 5.0))
    assert draft_step(uneven, mask, exit_check=True) == 3 + 2 + 1 + 5 + 0.5
    result = join(Counter({(4, 4): 1, (4, 1): 1}), mask, DraftPolicy(max_length=4), POINT)
    assert result.tokens_per_second == pytest.approx((5 + 2) / (8 * 7 + 2 * 19))
    assert result.acceptance_rate == 5 / 8 and result.tau == 3.5
    assert result.cost_ratio == pytest.approx(7 / 15)
    assert result.speedup == pytest.approx(result.tokens_per_second * 15)
    begun = join(Counter({(4, 4): 1, (0, 0): 1}), mask, DraftPolicy(max_length=4), replace(POINT, first=0.5))
    assert begun.tokens_per_second == pytest.approx((5 + 1) / (4.5 * 7 + 19 + 15))  # a plain step begins no draft
    assert join(Counter(), SkipMask(num_layers=2), DraftPolicy(max_length=1), POINT).speedup == 1


@given(context=st.floats(1, 500))
def test_costs_between_points_lie_between_them(context: float) -> None:
    """Prevents extrapolation into negative seconds."""
    far = Point(
        context=200, attention=(4.0,) * 4, mlp=(1.0,) * 4, rest=3.0, exit_check=0.5,
        verify=tuple(20.0 + k for k in range(13)),
    )  # fmt: skip
    costs = Costs(identity="", points=(POINT, far))
    point = costs.at(context)
    assert 2 <= point.attention[0] <= 4 and 15 <= point.verify[0] <= 20
    assert costs.mix([64, 200]).attention[3] == 3 and costs.mix([64]) == POINT


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


def test_profile_prices_every_part(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a part from being priced at nothing, or another's seconds from being charged to it."""
    true = replace(POINT, context=16, verify=(15.0, 16.0, 16.5, 18.0, 18.5), first=0.3, crowding=4.0)
    masks: dict[int, SkipMask] = {}

    def remember(model: Any, mask: SkipMask) -> Any:
        view = draft_view(model, mask)
        masks[id(view)] = mask
        return view

    def seconds(sequence: Any, run: Any, _before: Any = None) -> float:
        """As if all took exactly what the model of costs says."""
        mask, what = masks[id(sequence.draft_model)], run.func.__name__
        if what == "verify":
            return true.verify[0]
        length = run.args[0][0] if what == "draft" else run.args[1].max_length
        asks = what != "draft" and run.args[1].asks
        verify = 0.0 if what == "draft" else true.verify[length]
        return (length + true.first) * draft_step(true, mask, asks) + verify

    monkeypatch.setattr("skipsearch.evaluate.profile.draft_view", remember)
    monkeypatch.setattr("skipsearch.evaluate.profile.timed", seconds)
    (found,) = profile(tiny("llama"), "x", contexts=[16], max_length=4, progress=quiet, repeats=1).points
    for name in ("attention", "mlp", "rest", "exit_check", "verify", "first", "crowding"):
        np.testing.assert_allclose(getattr(found, name), getattr(true, name), rtol=1e-6, err_msg=name)


def test_a_profile_of_this_machine_is_made_of_seconds(tiny: Any) -> None:
    """Prevents prices that are not seconds of this machine; which part is dear is not told by a busy one."""
    (point,) = profile(tiny("llama"), "x", contexts=[16], max_length=2, progress=quiet, repeats=3).points
    assert min(point.verify) > 0 and draft_step(point, SkipMask(num_layers=4), False) > 0
    assert len(set(point.attention)) == len(set(point.mlp)) == 1


def test_unequal_sublayers_are_priced_apart(tiny: Any) -> None:
    """Prevents a dense layer from being priced as a mixture of experts, or a sliding window as full attention."""
    groups = alike(tiny("deepseek_v3"))
    mlp = [group for group in groups if group[0][0] == "mlp"]
    assert len(mlp) == 2 and sorted(i for group in mlp for _, i in group) == [0, 1, 2, 3]
    attention = [group for group in alike(tiny("gemma2")) if group[0][0] == "attention"]
    assert len(attention) == 2
    point = profile(tiny("deepseek_v3"), "x", contexts=[16], max_length=1, progress=quiet, repeats=3).points[0]
    assert point.mlp[0] != point.mlp[-1]


def test_attention_grows_dear_with_the_context() -> None:
    """Prevents one price for all contexts."""
    model = make_tiny(
        "llama", max_position_embeddings=4096, hidden_size=256, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=256,
    )  # fmt: skip
    costs = profile(model, "x", contexts=[8, 3000], max_length=2, progress=quiet, repeats=5)
    short, long = costs.points
    assert long.attention[0] > 1.5 * short.attention[0]


def test_the_context_that_is_asked_for_decides_the_mask() -> None:
    """Prevents --context from being read and ignored: the best of all masks is another one at length."""
    model = make_tiny("llama", seed=1)
    for layer in model.model.layers[2:]:  # so that skipping attention is never free
        layer.self_attn.o_proj.weight.data *= 3
    trace = make_trace(model, prompts=8)
    replay, points = Replay(model, trace, 4), []
    for context, attention in ((8, 0.3), (3000, 20.0)):
        plain = 4 * attention + 4.2
        verify = tuple(plain * (1 + 0.02 * k) for k in range(13))
        points.append(Point(context=context, attention=(attention,) * 4, mlp=(1.0,) * 4, rest=0.2, exit_check=0.0,
                            verify=verify))  # fmt: skip
    found = []
    for contexts in ((8,), (3000,), (8, 3000)):
        point = Prepared(
            prompts=Prompts(calibration=(), held_out=()), trace=trace, identity={}, compiled=None,
            costs=Costs(identity="", points=tuple(points)), space=Space(num_layers=4, fixed=SkipMask(num_layers=4)),
            contexts=contexts,
        ).point  # fmt: skip
        some = [(kind, i) for kind in KINDS for i in (1, 3)]
        masks = (SkipMask.from_sublayers(c, 4) for n in range(1, 5) for c in itertools.combinations(some, n))
        found.append(max((score(replay, mask, point) for mask in masks), key=lambda s: s.tokens_per_second))
    near, far, mixed = found
    assert not near.mask.attention and near.mask.mlp and far.mask.attention
    assert far.tokens_per_second < mixed.tokens_per_second < near.tokens_per_second


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


@given(data=st.data())
def test_the_knapsack_is_the_best_there_is(data: Any) -> None:
    """Prevents a dynamic programme that is off by one: on few sublayers every subset can be tried."""
    fixed = SkipMask(attention=[0], mlp=[0], num_layers=4)
    space = Space(num_layers=4, fixed=fixed)
    loss = {sub: data.draw(st.integers(0, 9)) / 10 for sub in space.free}
    point = replace(POINT, attention=(1.0, 2.0, 3.0, 4.0), mlp=(2.0, 2.5, 1.0, 3.0))
    harm = {sub: -math.log(max(1e-3, 1 - loss[sub])) + 1e-4 for sub in space.free}
    unit = sum(harm.values()) / 256
    weight = {sub: max(1, round(harm[sub] / unit)) for sub in space.free}
    for label, mask in knapsack(space, loss, point):
        room = round(float(label.split(":")[1]) * 256)
        gain = sum(saves(point, sub) for sub in mask.sublayers())
        subsets = (c for n in range(7) for c in itertools.combinations(space.free, n))
        best = max(sum(saves(point, s) for s in c) for c in subsets if sum(weight[s] for s in c) <= room)
        assert sum(weight[sub] for sub in mask.sublayers()) <= room and gain == pytest.approx(best)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_seeds_from_hidden_states_find_the_idle_layer(family: str) -> None:
    """Prevents layers called on their own from computing something else than in the model."""
    from conftest import make_tiny

    model = make_tiny(family, seed=1)
    layers = next(m for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    for name, weight in layers[2].named_parameters():
        if "norm" not in name and "ln_" not in name:
            weight.data.zero_()  # both branches add nothing
    space = Space(num_layers=4, fixed=SkipMask(num_layers=4))
    states = layer_states(model, *make_trace(model).padded(model.device))
    for i in range(4):
        assert torch.equal(states.run(i, states.hidden[i]), states.hidden[i + 1])
    idle = SkipMask(attention=[2], mlp=[2], num_layers=4)
    assert idle in [mask for _, mask in block_influence(space, states)]
    assert idle in [mask for _, mask in nearest_states(space, states)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_sublayers_as_units_make_up_the_model(family: str) -> None:
    """Prevents halves of layers that compute something else than the layer does, and an idle one from being kept."""
    from conftest import make_tiny

    model = make_tiny(family, seed=1)
    layers = next(m for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    for name, weight in layers[2].named_parameters():
        if ("mlp" in name or "ffn" in name) and "norm" not in name:
            weight.data.zero_()
    every = range(4)
    halves = [draft_view(model, SkipMask(**{other: every}, num_layers=4)) for other in reversed(KINDS)]
    ids = torch.randint(0, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    states = layer_states(model, ids, torch.ones_like(ids, dtype=torch.bool))
    halved = sublayer_states(states, halves)
    assert len(halved.units) == 8 and len(halved.hidden) == 9
    assert [torch.equal(a, b) for a, b in zip(halved.hidden[::2], states.hidden, strict=True)] == [True] * 5
    through = torch.stack([halved.hidden[4]] * 3)
    ran = halved.run_all(5, halved.run_all(4, through))
    if family != "gpt_neox":  # there the MLP does not read what attention adds
        torch.testing.assert_close(ran[1], halved.hidden[6])
    chosen = nearest(halved, [True] * 8, 0, 5)
    assert [len(units) for units in chosen] == [0, 1, 2, 3, 4, 5] and chosen[1] == {5}
    assert nearest(halved, [True] * 8, 3, 5) == chosen[3:]
    assert all(3 not in units for units in nearest(halved, [unit != 3 for unit in range(8)], 2, 8))


def test_every_seed_is_a_mask_of_the_space(tiny: Any) -> None:
    """Prevents a seed from skipping what is fixed, and an earlier mask from being forgotten."""
    model, fixed = tiny("llama"), SkipMask(attention=[0], mlp=[1], num_layers=4)
    space, earlier = Space(num_layers=4, fixed=fixed), SkipMask(attention=[2, 3], num_layers=4)
    seeds = all_seeds(model, make_trace(model), space, POINT, quiet, None, earlier)
    assert dict(seeds)["earlier"] == earlier
    assert all(not mask & fixed for _, mask in seeds)
    assert {name.split(":")[0] for name, _ in seeds} == {
        "empty", "earlier", "sensitivity", "knapsack", "states", "influence", "uniform"
    }  # fmt: skip


def test_sampled_replay_accepts_what_speculative_sampling_accepts(tiny: Any) -> None:
    """Prevents masks for sampling from being judged by greedy matches: accepted shares agree with real decoding."""
    model, mask, policy = tiny("llama"), SkipMask(attention=[1, 3], mlp=[2], num_layers=4), DraftPolicy(max_length=3)
    prompts = tuple((3 + i, 5, 7, 11 + i) for i in range(24))
    trace = record(model, prompts, 40, quiet, temperature=0.7)
    assert trace != record(model, prompts, 40, quiet, temperature=0.7, seed=100)
    replayed = Replay(model, trace, 3).of(mask).walk(policy)
    stats = DecodeStats()
    for i, prompt in enumerate(prompts):
        device = torch.device("cpu")
        sequences = Sequences(
            model, torch.tensor([prompt]), capacity=44, mask=mask, **at_temperature(0.7, 1000 + 2 * i, device)
        )  # fmt: skip
        for _ in decode(sequences, max_length=44, policy=policy, stats=stats, eos_ids=frozenset([2])):
            pass
    ours = sum(n * c for (_, n), c in replayed.items()) / sum(k * c for (k, _), c in replayed.items())
    assert 0.05 < stats.acceptance_rate < 0.95
    spread = (stats.acceptance_rate * (1 - stats.acceptance_rate) / stats.drafted) ** 0.5
    assert abs(ours - stats.acceptance_rate) < 5 * spread
    full = Replay(model, trace, 3).of(SkipMask(num_layers=4)).walk(policy)
    cut = sum(c for (k, n), c in full.items() if n < k)  # the model itself is accepted until its text ends
    assert cut <= len(prompts)


@torch.no_grad()
def test_accepted_shares_average_to_the_overlap(tiny: Any) -> None:
    """Prevents a biased estimate: over many random numbers, one drafted token is accepted sum(min(p, q)) often."""
    model, mask = tiny("llama"), SkipMask(mlp=[1, 2], num_layers=4)
    trace = record(model, tuple((3 + i % 90, 5 + i // 90) for i in range(150)), 2, quiet, temperature=0.7)
    trace = replace(trace, continuations=tuple(c[:2] for c in trace.continuations))
    replay = Replay(model, trace, 1)
    drafts = replay.of(mask)
    starts = [(p, len(prompt) + 1) for p, prompt in enumerate(trace.prompts) if len(trace.continuations[p]) == 2]
    drafts.run(starts)
    accepted = sum(drafts.drafts[start].matches for start in starts) / len(starts)
    overlap = []
    for p, t in starts:
        ids = torch.tensor([[*trace.prompts[p], *trace.continuations[p]][:t]])
        target = (model(ids).logits[0, -1] / 0.7).softmax(-1)
        _, _, logits = drafts.logits([(p, t)])
        overlap.append(float(torch.minimum(target, (logits.flatten(0, 1)[0] / 0.7).softmax(-1)).sum()))
    mean = sum(overlap) / len(overlap)
    assert 0.1 < mean < 0.95
    assert abs(accepted - mean) < 4 * (mean * (1 - mean) / len(overlap)) ** 0.5


def test_little_memory_means_few_rows_and_the_same_counts(tiny: Any) -> None:
    """Prevents a pass from being larger than the memory it was given."""
    model = tiny("llama")
    trace, mask, policy = make_trace(model), SkipMask(mlp=[1], num_layers=4), DraftPolicy(max_length=4)
    small, large = Replay(model, trace, 4, memory=1), Replay(model, trace, 4, memory=1e9)
    assert small.rows == 1 < large.rows
    assert small.of(mask).walk(policy) == large.of(mask).walk(policy)


@hypothesis_settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_drafts_side_by_side_are_those_run_alone(tiny: Any, data: Any) -> None:
    """Prevents drafts of one prompt, laid out in one row, from seeing each other."""
    model = tiny("llama")
    trace = make_trace(model)
    together, alone = Replay(model, trace, 4, lanes=5), Replay(model, trace, 4)
    alone.together, alone.rows = False, 1
    bits = data.draw(st.lists(st.booleans(), min_size=8, max_size=8))
    every = [(p, t) for p, row in enumerate(trace.prompts) for t in range(len(row) + 1, together.lengths[p])]
    starts = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=12, unique=True))
    drafts = [replay.of(SkipMask.from_bits(bits)) for replay in (together, alone)]
    for some in drafts:
        some.run(starts)
    assert drafts[0].drafts.keys() == drafts[1].drafts.keys() == set(starts)
    for start in starts:
        assert drafts[0].drafts[start].matches == drafts[1].drafts[start].matches
        assert drafts[0].drafts[start].confidence == pytest.approx(drafts[1].drafts[start].confidence, abs=1e-4)


def test_crowding_makes_sparse_masks_dear() -> None:
    """Prevents a term that is solved for and then priced for no mask, or for all alike."""
    point = replace(POINT, crowding=8.0)
    every = SkipMask(attention=range(4), mlp=range(4), num_layers=4)
    half = SkipMask(attention=range(4), num_layers=4)
    for mask, extra in ((SkipMask(num_layers=4), 8.0), (half, 2.0), (every, 0.0)):
        assert draft_step(point, mask, False) - draft_step(POINT, mask, False) == pytest.approx(extra)


def test_giving_up_early_needs_evidence_and_keeps_the_best(tiny: Any, monkeypatch: Any) -> None:
    """Prevents screening by a partial score that does not rank as the whole one does, and a screened-out winner."""
    from skipsearch.evaluate import objective

    model, rng = tiny("gpt2"), random.Random(0)
    replay = Replay(model, make_trace(model, prompts=8, new_tokens=60), 6, lanes=5)
    masks = [SkipMask.from_bits([rng.random() < p for _ in range(8)]) for p in [k / 100 for k in range(5, 80)]]
    assert 12 <= len(replay.sample()) <= 16 and len({lane.prompt for lane in replay.sample()}) >= 7
    scorer, plain = Scorer(replay, POINT, first=5), [score(replay, mask, POINT) for mask in masks]
    found = [scorer(mask) for mask in masks]
    for a, b in zip(found, plain, strict=True):
        assert a.fidelity != "whole" or a.tokens_per_second == pytest.approx(b.tokens_per_second, rel=0.03)
    first = objective.CHECK_FIRST
    assert all(f.fidelity == "whole" for f in [*found[:first], *found[:: objective.CHECKED]])
    for stage in range(3):
        said, whole = zip(*((row[stage], row[-1]) for row in scorer.checked), strict=True)
        assert scorer.agreement(stage) == pytest.approx(spearmanr(said, whole).statistic)
    best = max(found, key=lambda f: f.tokens_per_second)
    assert best.fidelity == "whole"
    assert best.tokens_per_second > 0.9 * max(p.tokens_per_second for p in plain)
    assert sum(scorer.counts.values()) == len(masks) and scorer.counts["part"] > 10
    monkeypatch.setattr(objective, "AGREEMENT", 1.1)
    never = Scorer(replay, POINT, first=5)
    assert all(never(mask).fidelity == "whole" for mask in masks)


def test_a_front_holds_masks_to_one_measure(tiny: Any) -> None:
    """Prevents acceptance rates of drafts of different lengths from being compared on a front."""
    model = tiny("llama")
    replay = Replay(model, make_trace(model, prompts=4, new_tokens=30), 4, lanes=3)
    scorer, longest = Scorer(replay, POINT, front=True), DraftPolicy(max_length=4)
    for mask in (SkipMask(mlp=[1], num_layers=4), SkipMask(attention=[1, 2], mlp=[1, 2, 3], num_layers=4)):
        found, blocks = scorer(mask), replay.of(mask).walk(longest)
        drafted, accepted = (sum(pair[i] * count for pair, count in blocks.items()) for i in (0, 1))
        assert found.fidelity == "whole" and found.acceptance_rate == pytest.approx(accepted / drafted)


def test_one_prompt_alone_leaves_the_reference_as_it_is(tiny: Any) -> None:
    """Prevents drafts that run one by one from writing over the keys that later ones read."""
    model = tiny("llama")
    replay = Replay(model, make_trace(model, prompts=1), 4)
    replay.together, replay.rows = False, 1
    before = [(keys.clone(), values.clone()) for keys, values in replay.reference]
    replay.of(SkipMask(mlp=[1], num_layers=4)).walk(DraftPolicy(max_length=4))
    for old, new in zip(before, replay.reference, strict=True):
        assert all(
            torch.equal(a[:, :, : replay.longest], b[:, :, : replay.longest]) for a, b in zip(old, new, strict=True)
        )


def test_lanes_cover_the_trace_once(tiny: Any) -> None:
    """Prevents tokens between lanes from being scored twice or never; one lane is real decoding."""
    model = tiny("llama")
    trace = make_trace(model, prompts=3, new_tokens=23)
    replay = Replay(model, trace, 4, lanes=5)
    for p, (prompt, continuation) in enumerate(zip(trace.prompts, trace.continuations, strict=True)):
        mine = [(lane.start, lane.stop) for lane in replay.lanes if lane.prompt == p]
        assert mine[0][0] == len(prompt) + 1 and mine[-1][1] == len(prompt) + len(continuation)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(mine))
    blocks = replay.of(SkipMask(num_layers=4)).walk(DraftPolicy(max_length=4))
    assert all(n == k for k, n in blocks)


def test_the_standard_error_is_that_of_prompts(tiny: Any) -> None:
    """Prevents a figure that ignores how much prompts differ: alike prompts have none."""
    model, policy, mask = tiny("gpt2"), DraftPolicy(max_length=3), SkipMask(mlp=[2], num_layers=4)
    same = record(model, ((5, 6, 7),) * 4, 20, quiet)
    assert standard_error(Replay(model, same, 3).of(mask), policy, POINT) == pytest.approx(0, abs=1e-12)
    assert standard_error(Replay(model, make_trace(model), 3).of(mask), policy, POINT) > 0


def test_calibration_holds_predictions_against_decoding(monkeypatch: Any) -> None:
    """Prevents a verdict on the cost model that rests on too few masks, one context, or no plain decoding."""
    from skipsearch import load_model
    from skipsearch.evaluate import calibrate as module
    from skipsearch.search.options import SearchOptions
    from skipsearch.search.prepare import chosen_prompts

    monkeypatch.setattr(module, "PROMPTS", 2)
    monkeypatch.setattr(module, "TOKENS", 10)
    loaded = load_model("demo")
    prompts = chosen_prompts(loaded, SearchOptions()).calibration
    data = module.calibrate(loaded, prompts, quiet, backend="eager", masks=6, rounds=1)
    short, long = data["contexts"]
    assert short["context"] == 64 < long["context"] and data["backend"] == "eager"
    skipped = [row["attention"] + row["mlp"] for row in long["rows"]]
    assert len(skipped) == 6 and skipped[0] < 6 and skipped[-1] > 20
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in short["rows"])
    assert 0.3 < short["plain"][0] / short["plain"][1] < 3
