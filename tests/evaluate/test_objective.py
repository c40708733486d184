"""The objective: what replay counts, joined with costs, and the best policy."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from conftest import quiet
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from traces import POINT, make_trace

from skipsearch import DraftPlan, SkipMask
from skipsearch.evaluate.cost import Point, draft_step
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.objective import (
    best_policy,
    calibrated,
    estimate,
    follow,
    score,
    score_policy,
    standard_error,
    throughput,
)
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.scorer import Scorer
from skipsearch.evaluate.trace import DecodeSettings, record
from skipsearch.evaluate.windows import PositionOutcomes, WindowReplay, Windows
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy


def test_score_picks_a_policy_no_worse_than_any_fixed_one(tiny: Any) -> None:
    """Prevents the policy choice by estimate from missing badly."""
    model = tiny("gemma2")
    trace, mask = make_trace(model, prompts=6), SkipMask(mlp=[3], num_layers=4)
    replay = Replay(Target.of(model), trace, 8)
    best = best_policy(WindowReplay(Windows(replay), mask).outcomes(), mask, POINT)
    drafts = DraftReplay(replay, mask)
    fixed = [DraftPolicy(max_length=k) for k in range(1, 9)]
    exact = score_policy(drafts, best.policy, POINT).tokens_per_second
    assert exact >= 0.95 * max(throughput(drafts.walk(p), mask, p, POINT).tokens_per_second for p in fixed)


@given(st.lists(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=2, max_size=12), min_size=1, max_size=4),
       st.sampled_from([None, 0.2, 0.7]), st.integers(1, 4))  # fmt: skip
def test_an_estimate_is_a_walk(stretches: list[list[tuple[bool, float]]], threshold: float | None, length: int) -> None:
    """Prevents all policies' walks at once from differing from one walk, block by block."""
    blocks, outcomes = Counter[tuple[int, int]](), []
    for stretch in stretches:
        begins, at = len(stretch) - 1, 0
        correct, confidence = ([pair[side] for pair in stretch] for side in (0, 1))
        outcomes.append(PositionOutcomes(correct, confidence, begins))
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
    assert follow(outcomes, policy) == blocks
    found, known = estimate(outcomes, mask, POINT, [length], [threshold]), throughput(blocks, mask, policy, POINT)
    assert found.policy == policy and found.tau == known.tau and found.acceptance_rate == known.acceptance_rate
    assert found.tokens_per_second == pytest.approx(known.tokens_per_second)


def test_throughput_adds_up_by_hand() -> None:
    """Prevents tokens or seconds from being counted twice: two blocks worked out on paper."""
    mask = SkipMask(attention=[0, 2, 3], mlp=[1, 2], num_layers=4)
    assert draft_step(POINT, mask, exit_check=False) == 3 + 2 + 2 * 1
    uneven = replace(POINT, mlp=(1.0, 7.0, 7.0, 5.0))
    assert draft_step(uneven, mask, exit_check=True) == 3 + 2 + 1 + 5 + 0.5
    result = throughput(Counter({(4, 4): 1, (4, 1): 1}), mask, DraftPolicy(max_length=4), POINT)
    assert result.tokens_per_second == pytest.approx((5 + 2) / (8 * 7 + 2 * 19))
    assert result.acceptance_rate == 5 / 8 and result.tau == 3.5
    assert result.cost_ratio == pytest.approx(7 / 15)
    assert result.speedup == pytest.approx(result.tokens_per_second * 15)
    begun = throughput(Counter({(4, 4): 1, (0, 0): 1}), mask, DraftPolicy(max_length=4), replace(POINT, first=0.5))
    assert begun.tokens_per_second == pytest.approx((5 + 1) / (4.5 * 7 + 19 + 15))  # a plain step begins no draft
    assert throughput(Counter(), SkipMask(num_layers=2), DraftPolicy(max_length=1), POINT).speedup == 1


def test_giving_up_early_needs_evidence_and_keeps_the_best(tiny: Any, monkeypatch: Any) -> None:
    """Prevents screening by a partial score that does not rank as the whole one does, and a screened-out winner."""
    from skipsearch.evaluate import scorer as module

    model, rng = tiny("gpt2"), random.Random(0)
    windows = Windows(Replay(Target.of(model), make_trace(model, prompts=8, new_tokens=60), 6, side=10, states=True))
    shares = rng.sample([k / 100 for k in range(5, 80)], 75)
    masks = [SkipMask.from_bits([rng.random() < share for _ in range(8)]) for share in shares]
    scorer, plain = Scorer(windows, POINT), [score(WindowReplay(windows, mask), POINT) for mask in masks]
    found = [scorer(DraftPlan(mask)) for mask in masks]
    for a, b in zip(found, plain, strict=True):
        assert a.fidelity != "whole" or a.tokens_per_second == pytest.approx(b.tokens_per_second, rel=0.03)
    first = module.CHECK_FIRST
    assert all(f.fidelity == "whole" for f in [*found[:first], *found[:: module.CHECKED]])
    for stage in range(2):
        said, whole = zip(*((row[stage], row[-1]) for row in scorer.checked), strict=True)
        assert scorer.agreement(stage) == pytest.approx(spearmanr(said, whole).statistic)
    best = max(found, key=lambda f: f.tokens_per_second)
    assert best.fidelity == "whole"
    assert best.tokens_per_second > 0.9 * max(p.tokens_per_second for p in plain)
    assert sum(scorer.counts.values()) == len(masks) and scorer.counts["first"] + scorer.counts["part"] > 10
    monkeypatch.setattr(module, "AGREEMENT", 1.1)
    never = Scorer(windows, POINT)
    assert all(never(DraftPlan(mask)).fidelity == "whole" for mask in masks)


def test_a_front_holds_masks_to_one_measure(tiny: Any) -> None:
    """Prevents acceptance rates of drafts of different lengths from being compared on a front."""
    model = tiny("llama")
    windows = Windows(Replay(Target.of(model), make_trace(model, prompts=4, new_tokens=30), 4, side=8))
    scorer, longest = Scorer(windows, POINT, front=True), DraftPolicy(max_length=4)
    for mask in (SkipMask(mlp=[1], num_layers=4), SkipMask(attention=[1, 2], mlp=[1, 2, 3], num_layers=4)):
        found, blocks = scorer(DraftPlan(mask)), follow(WindowReplay(windows, mask).outcomes(), longest)
        drafted, accepted = (sum(pair[i] * count for pair, count in blocks.items()) for i in (0, 1))
        assert found.fidelity == "whole" and found.acceptance_rate == pytest.approx(accepted / drafted)


def test_the_standard_error_is_that_of_prompts(tiny: Any) -> None:
    """Prevents a figure that ignores how much prompts differ: alike prompts have none."""
    model, policy, mask = tiny("gpt2"), DraftPolicy(max_length=3), SkipMask(mlp=[2], num_layers=4)
    same = record(Target.of(model), ((5, 6, 7),) * 4, DecodeSettings(new_tokens=20), quiet)
    assert standard_error(DraftReplay(Replay(Target.of(model), same, 3), mask), policy, POINT) == pytest.approx(
        0, abs=1e-12
    )
    assert standard_error(DraftReplay(Replay(Target.of(model), make_trace(model), 3), mask), policy, POINT) > 0


def test_calibrated_exit_is_chosen_by_replay(demo: Any) -> None:
    """Prevents thorough scoring from losing to a threshold, and prices that know nothing of the costs."""
    prompts = tuple(
        tuple(demo.tokenizer(text)["input_ids"][:24]) for text in ("def main(argv):\n", "import os\n\nclass A")
    )
    trace = record(Target.of(demo.model), prompts, DecodeSettings(new_tokens=24), lambda *_: None)
    replay = Replay(Target.of(demo.model), trace, 6)
    mask = SkipMask(attention=range(2, 20, 2), mlp=range(1, 20, 2), num_layers=20)
    point = Point(context=40, attention=(0.02,) * 20, mlp=(0.02,) * 20, rest=0.05, exit_check=0.001,
                  verify=tuple(1 + 0.05 * k for k in range(7)))  # fmt: skip
    outcomes = WindowReplay(Windows(replay), mask).outcomes()
    cheap, dear = (calibrated(outcomes, mask, rate, point) for rate in (0.5, 5.0))
    assert list(cheap.curve) == sorted(cheap.curve)
    assert all(a < b for a, b in zip(cheap.prices, dear.prices, strict=True))
    best = best_policy(outcomes, mask, point)
    assert best.tokens_per_second >= throughput(follow(outcomes, cheap), mask, cheap, point).tokens_per_second
    drafts = DraftReplay(replay, mask)
    mean = [sum(k * n for (k, _), n in drafts.walk(p).items()) / sum(drafts.walk(p).values()) for p in (cheap, dear)]
    assert mean[0] > mean[1]
