"""Seeds: first masks by sensitivity, knapsack, hidden states and publications."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny, quiet
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from traces import POINT, make_trace

from skipsearch import SkipMask
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.hidden_states import draft_states
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.trace import DecodeSettings, record
from skipsearch.evaluate.windows import Windows
from skipsearch.files import write_checked
from skipsearch.model.preset import presets
from skipsearch.model.space import Space
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan
from skipsearch.search.seeds import (
    all_seeds,
    block_influence,
    by_sensitivity,
    knapsack,
    nearest_states,
    published,
    seconds_saved,
    uniform,
)
from skipsearch.search.sensitivity import sensitivity_or_load, single_losses


def windows_of(model: Any) -> Windows:
    return Windows(Replay(Target.of(model), make_trace(model), 4, side=5, states=True))


def test_sensitivity_finds_the_harmless_sublayer(tiny: Any) -> None:
    """Prevents an order that is upside down: a branch with zero weights changes nothing, so it goes first."""
    model = make_tiny("llama", seed=1)
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    space = Space(num_layers=4, fixed=SkipMask(num_layers=4))
    windows = windows_of(model)
    loss = single_losses(windows, windows.part(1), space, quiet)["skip"]
    assert loss["mlp", 2] == 0 and max(loss.values()) > 0
    seeds = by_sensitivity(space, loss, POINT)
    assert all(plan.only_skips and plan.skip.skips("mlp", 2) for _, plan in seeds)
    assert [len(plan.skip) for _, plan in seeds] == [1, 2, 3, 4, 5, 6, 7]


@torch.no_grad()
def test_sensitivity_is_that_of_teacher_forced_passes(demo: Any) -> None:
    """Prevents a loss of something else: on short prompts it is near that of whole passes of the skipping model.

    They differ by the keys of prompts, which a draft reads from the full model, and so harm it less.
    """
    target, fixed = demo.target, SkipMask(attention=range(0, 20, 3), mlp=range(1, 20, 2), num_layers=20)
    space = Space(num_layers=20, fixed=fixed)
    prompts = tuple(tuple(demo.tokenizer(f"def {name}(")["input_ids"]) for name in ("main", "read", "_split", "add"))
    trace = record(target, prompts, DecodeSettings(new_tokens=40), quiet)
    windows = Windows(Replay(target, trace, 6, side=7, states=True))
    ours = single_losses(windows, windows.part(1), space, quiet)["skip"]
    ids, generated = trace.padded(target.device)
    theirs = {}
    for sub in space.free:
        view = draft_view(target.model, SkipMask.from_sublayers([sub], 20))
        wrong = view(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1) != ids[:, 1:]
        theirs[sub] = float(wrong[generated[:, 1:]].float().mean())
    far = [theirs[sub] - ours[sub] for sub in space.free]
    assert max(map(abs, far)) < 0.1 and -0.02 < sum(far) / len(far) < 0.05, far
    assert spearmanr([ours[sub] for sub in space.free], [theirs[sub] for sub in space.free]).statistic > 0.7


def test_seeds_respect_fixed_sublayers() -> None:
    """Prevents seeds that the space cannot express."""
    preset = presets()["llama-2-13b"]
    space = preset.space
    for _, plan in [*published(preset, space), *uniform(space)]:
        assert not plan.skip & space.fixed
        assert space.plan(space.params(plan)) == plan
    assert {name for name, _ in published(preset, space)} >= {"published:self-sd"}


@given(data=st.data())
def test_the_knapsack_is_optimal(data: Any) -> None:
    """Prevents a dynamic programme that is off by one. With few sublayers, the test tries every subset."""
    fixed = SkipMask(attention=[0], mlp=[0], num_layers=4)
    space = Space(num_layers=4, fixed=fixed)
    loss = {sub: data.draw(st.integers(0, 9)) / 10 for sub in space.free}
    point = replace(POINT, attention=(1.0, 2.0, 3.0, 4.0), mlp=(2.0, 2.5, 1.0, 3.0))
    harm = {sub: -math.log(max(1e-3, 1 - loss[sub])) + 1e-4 for sub in space.free}
    unit = sum(harm.values()) / 256
    weight = {sub: max(1, round(harm[sub] / unit)) for sub in space.free}
    for label, plan in knapsack(space, {"skip": loss}, point):
        mask = plan.skip
        room = round(float(label.split(":")[1]) * 256)
        gain = sum(seconds_saved(point, sub) for sub in mask.sublayers())
        subsets = (c for n in range(7) for c in itertools.combinations(space.free, n))
        best = max(sum(seconds_saved(point, s) for s in c) for c in subsets if sum(weight[s] for s in c) <= room)
        assert sum(weight[sub] for sub in mask.sublayers()) <= room and gain == pytest.approx(best)
        assert plan.only_skips


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
    windows = windows_of(model)
    states = draft_states(windows.replay, windows.starts(windows.part(1)))
    for i in range(4):
        assert torch.equal(states.run(i, states.hidden[i]), states.hidden[i + 1])
    idle = DraftPlan(SkipMask(attention=[2], mlp=[2], num_layers=4))
    assert idle in [plan for _, plan in block_influence(space, states)]
    assert idle in [plan for _, plan in nearest_states(space, states)]


def test_every_seed_is_a_mask_of_the_space(tiny: Any) -> None:
    """Prevents a seed from skipping what is fixed, and an earlier mask from being forgotten."""
    model, fixed = tiny("llama"), SkipMask(attention=[0], mlp=[1], num_layers=4)
    space, earlier = Space(num_layers=4, fixed=fixed), DraftPlan(SkipMask(attention=[2, 3], num_layers=4))
    windows = windows_of(model)
    states = draft_states(windows.replay, windows.starts(windows.few(2, 12)))
    loss = single_losses(windows, windows.few(2, 12), space, quiet)
    seeds = all_seeds(space, loss, states, POINT, None, earlier)
    assert dict(seeds)["earlier"] == earlier
    assert all(plan.only_skips and not plan.skip & fixed for _, plan in seeds)
    assert {name.split(":")[0] for name, _ in seeds} == {
        "empty", "earlier", "sensitivity", "knapsack", "states", "influence", "uniform"
    }  # fmt: skip


def test_sensitivity_is_kept_sublayer_by_sublayer(tiny: Any, tmp_path: Path) -> None:
    """Prevents sublayers from being run again after a stop, and losses of another trace from being taken."""
    model, path = tiny("llama"), tmp_path / "sensitivity.json"
    windows, space = windows_of(model), Space(num_layers=4, fixed=SkipMask(attention=[0], num_layers=4))
    part = windows.few(3, 8)

    def stop(_stage: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity_or_load(path, "a", windows, lambda: part, space, stop)
    data = json.loads(path.read_text())
    kept = data["loss"]
    assert sum(map(len, kept.values())) == 3
    kept["attention"]["1"] = 0.123  # so that it can be told from one that is computed
    write_checked(path, {name: value for name, value in data.items() if name != "sha256"})
    never: Any = None  # the windows are those of the file
    loss, kept_part = sensitivity_or_load(path, "a", windows, never, space, quiet)
    assert kept_part == part and set(loss) == {"skip"}
    assert set(loss["skip"]) == set(space.free) and loss["skip"]["attention", 1] == 0.123
    assert sensitivity_or_load(path, "b", windows, lambda: part, space, quiet)[0]["skip"]["attention", 1] != 0.123
