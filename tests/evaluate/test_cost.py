"""Costs: the price of a step, between contexts and by mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import POINT

from skipsearch import SkipMask
from skipsearch.evaluate.cost import Costs, Point, draft_step


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
    assert costs.mean_over([64, 200]).attention[3] == 3 and costs.mean_over([64]) == POINT


def test_crowding_makes_sparse_masks_dear() -> None:
    """Prevents a term that is solved for and then priced for no mask, or for all alike."""
    point = replace(POINT, crowding=8.0)
    every = SkipMask(attention=range(4), mlp=range(4), num_layers=4)
    half = SkipMask(attention=range(4), num_layers=4)
    for mask, extra in ((SkipMask(num_layers=4), 8.0), (half, 2.0), (every, 0.0)):
        assert draft_step(point, mask, False) - draft_step(POINT, mask, False) == pytest.approx(extra)
