"""DraftPlan: one form for each sublayer, and nothing that a mask or a model could not mean."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from conftest import assert_one_sentence
from hypothesis import given
from hypothesis import strategies as st
from random_plans import plans

from skipsearch import DraftPlan, SkipMask
from skipsearch.errors import MaskError
from skipsearch.plan import CELLS, FORMS

NONE = SkipMask(num_layers=3)


@given(plans(3, 50, FORMS))
def test_forms_are_the_plan(plan: DraftPlan) -> None:
    """Prevents a form that is lost or changed between a plan, its parameters and its masks."""
    again = DraftPlan.from_forms(plan.forms(), plan.head, plan.head_ids)
    assert again == plan and hash(again) == hash(plan)
    assert sorted(sub for form in FORMS for sub in plan.of_form(form)) == sorted(
        (kind, i) for kind in ("attention", "mlp") for i in range(3)
    )
    for form in FORMS:
        assert all(plan.form(*sub) == form for sub in plan.of_form(form))


@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_a_mask_is_the_plan_that_only_skips(bits: list[bool]) -> None:
    """Prevents a mask and its plan from being two trials, or a file that is newer than it needs to be."""
    mask = SkipMask.from_bits(bits)
    plan = DraftPlan.of(mask)
    assert plan.skip == mask and plan.only_skips and not plan.quantises and DraftPlan.of(plan) is plan
    assert plan.drafts == bool(mask) and plan.columns() == {
        "mask": "".join(map(str, mask.bits())),
        "skipped": len(mask),
    }


@given(plans(3, 50, FORMS))
def test_the_first_changed_layer(plan: DraftPlan) -> None:
    """Prevents a replay that resumes behind a layer that the plan changes."""
    assert all(plan.form(kind, i) == "run" for kind in ("attention", "mlp") for i in range(plan.first))


@given(plans(3, 50, FORMS))
def test_drawn_as_one_cell_a_sublayer(plan: DraftPlan) -> None:
    """Prevents two forms from looking alike, or a row that is too short."""
    rows = str(plan).splitlines()
    cells = rows[0][10:13] + rows[1][10:13]
    assert [form for cell in cells for form in FORMS if CELLS[form] == cell] == list(plan.forms())
    assert len(set(CELLS.values())) == len(FORMS) and plan.head in rows[2]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DraftPlan(SkipMask(attention=[1], num_layers=3), SkipMask(attention=[1], num_layers=3)),
         ["skip and int8", "attention 1"]),
        (lambda: DraftPlan(NONE, SkipMask(mlp=[2], num_layers=3), SkipMask(mlp=[2], num_layers=3)), ["int4", "mlp 2"]),
        (lambda: DraftPlan(NONE, SkipMask(num_layers=4)), ["3 and 4 layers"]),
        (lambda: DraftPlan(NONE, head="int3"), ["'int3'", "int8"]),  # type: ignore[arg-type]
        (lambda: DraftPlan(NONE, head_ids=[]), ["empty"]),
        (lambda: DraftPlan(NONE, head_ids=[-1]), ["-1"]),
        (lambda: DraftPlan(NONE, head_ids=[True]), ["True"]),
        (lambda: DraftPlan.from_forms(["run", "gone"]), ["'gone'", "skip"]),
    ],
)  # fmt: skip
def test_nonsense_is_refused(make: Any, words: list[str]) -> None:
    """Prevents a plan that two readers would understand differently."""
    with pytest.raises(MaskError) as error:
        make()
    assert_one_sentence(error, *words)


def test_a_plan_does_not_change() -> None:
    """Prevents a plan that changes under a view or a memo key."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        DraftPlan(NONE).head = "int8"  # type: ignore[misc]
