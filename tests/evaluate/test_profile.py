"""Profiles: every part of a model priced in seconds of this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tiny, quiet
from traces import POINT

from skipsearch import SkipMask
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.cost import draft_step
from skipsearch.evaluate.profile import build_groups, profile, profile_or_load
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
    points = profile(Target.of(tiny("llama")), contexts=[5], max_length=12, progress=quiet, repeats=1)
    assert len(points[0].verify) == 13


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
        confident = what != "draft" and run.args[1].uses_confidence
        verify = 0.0 if what == "draft" else true.verify[length]
        return (length + true.first) * draft_step(true, mask, confident) + verify

    monkeypatch.setattr("skipsearch.evaluate.profile.draft_view", remember)
    monkeypatch.setattr("skipsearch.evaluate.profile.timed", seconds)
    (found,) = profile(Target.of(tiny("llama")), contexts=[16], max_length=4, progress=quiet, repeats=1)
    for name in ("attention", "mlp", "rest", "exit_check", "verify", "first", "crowding"):
        np.testing.assert_allclose(getattr(found, name), getattr(true, name), rtol=1e-6, err_msg=name)


def test_a_profile_of_this_machine_is_made_of_seconds(tiny: Any) -> None:
    """Prevents prices that are not seconds of this machine; which part is dear is not told by a busy one."""
    (point,) = profile(Target.of(tiny("llama")), contexts=[16], max_length=2, progress=quiet, repeats=3)
    assert min(point.verify) > 0 and draft_step(point, SkipMask(num_layers=4), False) > 0
    assert len(set(point.attention)) == len(set(point.mlp)) == 1


def test_unequal_sublayers_are_priced_apart(tiny: Any) -> None:
    """Prevents a dense layer from being priced as a mixture of experts, or a sliding window as full attention."""
    groups = build_groups(Target.of(tiny("deepseek_v3")))
    mlp = [group for group in groups if group[0][0] == "mlp"]
    assert len(mlp) == 2 and sorted(i for group in mlp for _, i in group) == [0, 1, 2, 3]
    attention = [group for group in build_groups(Target.of(tiny("gemma2"))) if group[0][0] == "attention"]
    assert len(attention) == 2
    point = profile(Target.of(tiny("deepseek_v3")), contexts=[16], max_length=1, progress=quiet, repeats=3)[0]
    assert point.mlp[0] != point.mlp[-1]


def test_attention_grows_dear_with_the_context() -> None:
    """Prevents one price for all contexts."""
    model = make_tiny(
        "llama", max_position_embeddings=4096, hidden_size=256, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=256,
    )  # fmt: skip
    short, long = profile(Target.of(model), contexts=[8, 3000], max_length=2, progress=quiet, repeats=5)
    assert long.attention[0] > 1.5 * short.attention[0]
