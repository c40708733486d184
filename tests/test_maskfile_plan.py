"""mask.json of plans: version 2 where a plan does more than skip, version 1 where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_one_sentence
from hypothesis import HealthCheck, given, settings
from random_plans import plans

from skipsearch import DraftPlan, MaskFile, SkipMask, load_mask
from skipsearch.errors import MaskError
from skipsearch.maskfile import ModelCard, parse_mask
from skipsearch.plan import FORMS

CARD = ModelCard(num_layers=3)


def written(path: Path, plan: DraftPlan | SkipMask) -> dict[str, Any]:
    MaskFile.of(plan, model=CARD).save(path)
    data: dict[str, Any] = json.loads(path.read_text())
    data.pop("checksum")  # those who edit a file delete it
    return data


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(3, 300, FORMS))
def test_a_plan_comes_back(tmp_path: Path, plan: DraftPlan) -> None:
    """Prevents a form, a head or a token that a file loses."""
    data = written(tmp_path / "plan.json", plan)
    file = load_mask(tmp_path / "plan.json")
    assert file.plan == plan and file.mask == plan.skip
    assert data["version"] == (1 if plan.only_skips else 2) and ("head" in data) != plan.only_skips


def test_a_plan_that_only_skips_is_what_older_readers_know(tmp_path: Path) -> None:
    """Prevents a version 1 file with fields that version 1 has not."""
    mask = SkipMask(attention=[1], mlp=[0, 2], num_layers=3)
    assert written(tmp_path / "a.json", mask) | {"provenance": 0} == written(tmp_path / "b.json", DraftPlan(mask)) | {
        "provenance": 0
    }
    assert set(written(tmp_path / "c.json", mask)) == {
        "format", "version", "model", "skip", "draft", "evidence", "provenance", "per_layer_config",
    }  # fmt: skip


def test_n_grams_alone_draft_with_no_plan() -> None:
    """Prevents a file for n-grams from drafting with the full model, and a plan that quantises from not drafting."""
    from skipsearch.policy import DraftPolicy

    ngrams = DraftPolicy.ngrams_alone()
    assert MaskFile.of(SkipMask(num_layers=3), model=CARD, draft=ngrams).drafting_plan is None
    plan = DraftPlan.everywhere("int8", 3)
    assert MaskFile.of(plan, model=CARD, draft=ngrams).drafting_plan == plan


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 1}, ["head", "version"]),
        ({"version": 3}, ["version", "3"]),
        ({"version": True}, ["version", "True"]),
        ({"quantise": {"int3": {"attention": [], "mlp": []}}}, ["quantise.int3"]),
        ({"quantise": {"int8": {"attention": [7], "mlp": []}}}, ["7", "0..2"]),
        ({"quantise": {"int8": {"attention": [0], "mlp": []}, "int4": {"attention": [0], "mlp": []}}}, ["attention 0"]),
        ({"head": {"form": "int2"}}, ["head.form", "int2"]),
        ({"head": {"form": "int8", "ids": ""}}, ["head.ids", "empty"]),
        ({"head": {"form": "int8", "ids": "4-2x"}}, ["head.ids", "4-2x"]),
        ({"head": {"form": "int8", "ids": "9-5"}}, ["head.ids", "9-5"]),
        ({"head": {"form": "int8", "ids": "9" * 5000}}, ["head.ids", "999"]),
        ({"head": {"form": "int8", "ids": "0-99999999999"}}, ["head.ids", "0-99999999999"]),
        ({"head": {"form": "int8", "tokens": 4}}, ["head.tokens"]),
    ],
)
def test_broken_plans_are_refused(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """Prevents a form that this version does not know from being read as running, and a huge range from being made."""
    data = written(tmp_path / "plan.json", DraftPlan.everywhere("int8", 3)) | changes
    with pytest.raises(MaskError) as error:
        parse_mask(data, "plan.json")
    assert_one_sentence(error, "plan.json", *words)
