"""Profiles: every part of a model priced in seconds of this machine."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tiny, quiet
from traces import POINT

from skipsearch import DraftPlan, SkipMask
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.cost import draft_step
from skipsearch.evaluate.design import Arm, build_groups
from skipsearch.evaluate.profile import profile, profile_or_load
from skipsearch.model.target import Target


def test_profile_is_kept_and_made_anew_for_another_set_up(tiny: Any, tmp_path: Path) -> None:
    """Prevents costs of one device or model from pricing another."""
    path, model = tmp_path / "costs.json", Target.of(tiny("llama"))
    settings: dict[str, Any] = {"contexts": [8, 16], "max_length": 2, "progress": quiet}
    first = profile_or_load(path, model, "here", **settings)
    assert profile_or_load(path, model, "here", **settings) == first
    assert profile_or_load(path, model, "there", **settings) != first
    path.write_text(path.read_text()[:40])
    assert len(profile_or_load(path, model, "there", **settings).points) == 2


def test_profile_of_prompts_shorter_than_a_draft(tiny: Any) -> None:
    """Prevents very short prompts from ending a search before it begins."""
    points = profile(Target.of(tiny("llama")), contexts=[5], max_length=12, progress=quiet)
    assert len(points[0].verify) == 13


def test_profile_prices_every_part(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a part from being priced at nothing, or another's seconds from being charged to it."""
    true = replace(POINT, context=16, verify=(15.0, 16.0, 16.5, 17.25, 18.0), first=0.3, crowding=4.0)
    plans: dict[int, DraftPlan] = {}

    def remember(model: Any, plan: DraftPlan) -> Any:
        view = draft_view(model, plan)
        plans[id(view)] = plan
        return view

    def seconds(sequence: Any, arm: Arm | None) -> list[tuple[float, float]]:
        """As if all took exactly what the model of costs says."""
        if arm is None:
            return [(0.0, true.verify[0])]
        step = draft_step(true, plans[id(sequence.draft_model)], arm.with_confidence)
        return [((arm.drafted + true.first) * step, true.verify[arm.verified])]

    monkeypatch.setattr("skipsearch.evaluate.profile.draft_view", remember)
    monkeypatch.setattr("skipsearch.evaluate.profile.timed_arm", seconds)
    names = ("attention", "mlp", "rest", "exit_check", "verify", "first", "crowding")
    (found,) = profile(Target.of(tiny("llama")), contexts=[16], max_length=4, progress=quiet)
    for name in names:
        np.testing.assert_allclose(getattr(found, name), getattr(true, name), rtol=1e-6, err_msg=name)
    turns: list[int] = []
    monkeypatch.setattr("skipsearch.evaluate.profile.timed_arm", lambda s, a: turns.append(a is None) or seconds(s, a))
    near, far = profile(Target.of(tiny("llama")), contexts=[16, 24], max_length=4, progress=quiet)
    assert sum(turns) == 2 * (1 + 3)  # without noise the fewest turns suffice
    for name in names:  # at the second context few arms are timed
        np.testing.assert_allclose(getattr(far, name), getattr(near, name), rtol=1e-6, err_msg=name)


def test_a_profile_ends_when_its_seconds_are_spent(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a noisy machine from being timed for ever, and a slow one for many times its budget."""
    noise, turns = random.Random(0), list[bool]()

    def seconds(_sequence: Any, arm: Arm | None) -> list[tuple[float, float]]:
        turns.append(arm is None)
        return [(noise.uniform(1, 2), noise.uniform(1, 2))]

    monkeypatch.setattr("skipsearch.evaluate.profile.timed_arm", seconds)
    profile(Target.of(tiny("llama")), contexts=[16], max_length=4, progress=quiet, seconds=0)
    assert sum(turns) == 1
    turns.clear()
    profile(Target.of(tiny("llama")), contexts=[16], max_length=4, progress=quiet, seconds=100)
    assert sum(turns) == 1 + 12


def test_a_profile_of_this_machine_is_made_of_seconds(tiny: Any) -> None:
    """Prevents prices that are not seconds of this machine; which part is dear is not told by a busy one."""
    (point,) = profile(Target.of(tiny("llama")), contexts=[16], max_length=2, progress=quiet)
    assert min(point.verify) > 0 and draft_step(point, SkipMask(num_layers=4), False) > 0
    assert len(set(point.attention)) == len(set(point.mlp)) == 1


def test_unequal_sublayers_are_priced_apart(tiny: Any) -> None:
    """Prevents a dense layer from being priced as a mixture of experts, or a sliding window as full attention."""
    groups = build_groups(Target.of(tiny("deepseek_v3")))
    mlp = [group for group in groups if group[0][0] == "mlp"]
    assert len(mlp) == 2 and sorted(i for group in mlp for _, i in group) == [0, 1, 2, 3]
    attention = [group for group in build_groups(Target.of(tiny("gemma2"))) if group[0][0] == "attention"]
    assert len(attention) == 2
    point = profile(Target.of(tiny("deepseek_v3")), contexts=[16], max_length=1, progress=quiet)[0]
    assert point.mlp[0] != point.mlp[-1]


def test_attention_grows_dear_with_the_context() -> None:
    """Prevents one price for all contexts."""
    model = make_tiny(
        "llama", max_position_embeddings=4096, hidden_size=256, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=256,
    )  # fmt: skip
    short, long = profile(Target.of(model), contexts=[8, 3000], max_length=2, progress=quiet)
    assert long.attention[0] > 1.5 * short.attention[0]


def test_a_stopped_profile_goes_on(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents contexts from being timed again after a stop."""
    path, target, turns = tmp_path / "costs.json", Target.of(tiny("llama")), list[bool]()
    settings: dict[str, Any] = {"contexts": [8, 16], "max_length": 2, "seconds": 60}

    def stop(_stage: str, done: int, _total: int) -> None:
        if done > 50:
            raise KeyboardInterrupt

    def seconds(_sequence: Any, arm: Arm | None) -> list[tuple[float, float]]:
        turns.append(arm is None)
        return [(1.0, 2.0)]

    monkeypatch.setattr("skipsearch.evaluate.profile.timed_arm", seconds)
    with pytest.raises(KeyboardInterrupt):
        profile_or_load(path, target, "here", progress=stop, **settings)
    turns.clear()
    assert [p.context for p in profile_or_load(path, target, "here", progress=quiet, **settings).points] == [8, 16]
    assert sum(turns) == 1 + 3


def test_a_profile_that_lacked_time_is_made_anew_with_more(tiny: Any, tmp_path: Path) -> None:
    """Prevents the costs of a hurried first run from deciding all later ones, and timing again without reason."""
    path, target = tmp_path / "costs.json", Target.of(tiny("llama"))
    settings: dict[str, Any] = {"contexts": [8], "max_length": 2, "progress": quiet}
    hurried = profile_or_load(path, target, "here", seconds=0.001, **settings)
    assert hurried.cut_short == 0.001 and profile_or_load(path, target, "here", seconds=0.002, **settings) == hurried
    whole = profile_or_load(path, target, "here", seconds=60, **settings)
    assert not whole.cut_short and profile_or_load(path, target, "here", seconds=600, **settings) == whole
