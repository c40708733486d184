"""The incumbent for the mask that is served: won on other windows, and lost when it no longer pays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from online_parts import POLICY, free_of

from skipsearch import DraftPlan, SkipMask
from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.objective import throughput
from skipsearch.evaluate.windows import PositionOutcomes
from skipsearch.online.candidates import Candidates, opening
from skipsearch.online.incumbent import KEPT, Incumbent
from skipsearch.online.window import LENGTH
from skipsearch.policy import DraftPolicy

OUTCOMES = [PositionOutcomes([True] * 9, [1.0] * 9, 4)]


def reader(model: Any, speeds: list[float]) -> Any:
    """Reads that bring these speeds, one after the other."""
    _, layers = free_of(model)
    point = Point(context=9, attention=(1.0,) * layers, mlp=(1.0,) * layers, rest=1.0, exit_check=0.0, verify=(1, 2))
    plain, following = throughput(Counter(), SkipMask(num_layers=layers), DraftPolicy(), point), iter(speeds)

    def read(mask: SkipMask) -> Any:
        speed = next(following)
        return replace(plain, plan=DraftPlan(mask), tokens_per_second=speed, speedup=speed), list(OUTCOMES)

    return read


def test_a_challenger_has_to_win_on_other_windows(demo: Any) -> None:
    """Prevents a mask from being chosen for the window that it was picked on, or for being the best of several."""
    _, layers = free_of(demo.model)
    near = [opening(layers)]
    candidates, first = Candidates(layers, near, 0), SkipMask(mlp=[3], num_layers=layers)

    def compare(incumbent: Incumbent, *speeds: float) -> str | None:
        """The incumbent's speed first."""
        left = iter(range(len(speeds) - 2))
        return incumbent.evaluate(reader(demo.model, list(speeds)), candidates, lambda: next(left, None) is not None)

    incumbent = Incumbent(POLICY, first)
    assert compare(incumbent, 1.0, 1.02, 0.8, 1.05, 0.9) is None and incumbent.mask == first
    assert incumbent.challenger is not None and not incumbent.challenger.gains  # where it was picked counts for nothing
    chosen = incumbent.challenger.mask
    assert compare(incumbent, 1.0, 1.04) is None and incumbent.mask == first
    assert compare(incumbent, 1.0, 1.03) == "better mask" and incumbent.mask == chosen and incumbent.challenger is None
    assert incumbent.policy.max_length == LENGTH and incumbent.policy.ngram == POLICY.ngram
    assert compare(incumbent, 1.0, 1.05, 0.9) is None  # wins once, then loses by far
    assert compare(incumbent, 1.0, 0.9) is None and incumbent.mask == chosen and incumbent.challenger is None
    assert compare(incumbent, 1.0, 0.9, 1.3) == "better mask" and incumbent.mask != chosen  # by far: no luck
    rejected = incumbent.rejected
    assert compare(incumbent, 1.0, 0.9, 0.8, 0.7) is None and incumbent.challenger is None
    assert incumbent.rejected == rejected + 3


def test_a_mask_is_served_only_while_it_pays(demo: Any) -> None:
    """Prevents a first mask that is slower than none, and one that text has turned against from being kept."""
    _, layers = free_of(demo.model)
    incumbent = Incumbent(POLICY, queue=[opening(layers), SkipMask(mlp=[3], num_layers=layers)])
    always = lambda: True
    assert incumbent.evaluate(reader(demo.model, [0.9, 1.01]), None, always) is None and incumbent.mask is None
    assert incumbent.evaluate(reader(demo.model, []), None, always) is None  # nothing to try yet
    incumbent.queue = [SkipMask(mlp=[4], num_layers=layers)]
    assert incumbent.evaluate(reader(demo.model, [1.2]), None, always) == "first mask" and incumbent.mask is not None
    slow = Point(context=9, attention=(1.0,) * layers, mlp=(1.0,) * layers, rest=1.0, exit_check=0.0, verify=(1, 2))
    assert incumbent.reconsider(slow) is None  # of one window nothing is concluded
    incumbent.outcomes = OUTCOMES * KEPT
    served = incumbent.mask
    assert incumbent.reconsider(slow) == "no longer pays" and incumbent.mask is None and served in incumbent.tried
