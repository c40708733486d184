"""Rival searches of the comparison, on a tiny model: each follows its paper."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from traces import POINT, make_trace

from skipsearch import SkipMask
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.replay import Replay
from skipsearch.model.space import Space
from skipsearch.model.target import Target

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from rivals import hidden, swift


@pytest.fixture
def bench(tiny: Any) -> Any:
    model = tiny("llama")
    fixed = SkipMask(attention=[1], num_layers=4)
    return SimpleNamespace(
        target=Target.of(model), space=Space(num_layers=4, fixed=fixed),
        prepared=SimpleNamespace(trace=make_trace(model, new_tokens=40), point=POINT),
    )  # fmt: skip


@torch.no_grad()
def test_matchness_is_what_replay_sees_of_single_tokens(bench: Any) -> None:
    """Prevents SWIFT's matchness from being measured with a draft that computes its own keys of the prompt."""
    trace, mask = bench.prepared.trace, SkipMask(attention=[2], num_layers=4)
    prompt, continuation = trace.prompts[0], trace.continuations[0]
    window = swift.Window.of(bench.target, prompt, continuation)
    assert window.matchness(bench.target, SkipMask(num_layers=4)) == 1.0
    # Before the first token of the window there are only keys of the full model, as in a draft of one token.
    replay = Replay(bench.target, trace, 1)
    _, _, logits = replay.logits(draft_view(bench.target.model, mask), [(0, len(prompt) + 0)])
    alone = int(logits.flatten(0, 1)[0].argmax())
    first = swift.Window(window.before, window.ids[:, :2])
    assert first.matchness(bench.target, mask) == float(alone == continuation[0])
    assert torch.equal(
        window.before.layers[0].keys, swift.Window.of(bench.target, prompt, continuation).before.layers[0].keys
    )


def test_swift_skips_its_share_and_nothing_fixed(bench: Any) -> None:
    """Prevents SWIFT from skipping more than published, or sublayers that may not be skipped."""
    steps = list(swift.search(bench, 0, 60))
    best = steps[-1][1]
    assert len(best) == int(0.45 * 3) and not best & bench.space.fixed
    assert not {0, 3} & (best.attention | best.mlp) and len(steps) <= 60
    assert [match for *_, match in steps] == sorted(match for *_, match in steps)


def test_dynamic_programmes_stay_in_the_space(bench: Any) -> None:
    """Prevents masks outside the search space, and a budget other than half of the layers."""
    ((_, mask, _),) = hidden.clasp(bench, 0, 1)
    assert mask == (SkipMask(attention=mask.mlp, mlp=mask.mlp, num_layers=4) - bench.space.fixed) and len(mask.mlp) == 2
    steps = list(hidden.knapspec(bench, 0, 63))
    assert 2 <= len(steps) <= 63 and all(not mask & bench.space.fixed for _, mask, _ in steps)
