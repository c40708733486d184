"""The contest for the mask that is served: won on other windows, and lost when it no longer pays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from online_parts import POLICY, free_of

from skipsearch import SkipMask
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.objective import join
from skipsearch.online.candidates import Candidates, opening
from skipsearch.online.incumbent import KEPT, Contest
from skipsearch.online.window import LENGTH

OUTLOOK = [([True] * 9, [1.0] * 9, 4)]


def reader(model: Any, speeds: list[float]) -> Any:
    """Reads that bring these speeds, one after the other."""
    _, layers = free_of(model)
    point = Point(context=9, attention=(1.0,) * layers, mlp=(1.0,) * layers, rest=1.0, exit_check=0.0, verify=(1, 2))
    plain, following = join(Counter(), SkipMask(num_layers=layers), DraftPolicy(), point), iter(speeds)

    def read(mask: SkipMask) -> Any:
        speed = next(following)
        return replace(plain, mask=mask, tokens_per_second=speed, speedup=speed), list(OUTLOOK)

    return read


def test_a_challenger_has_to_win_on_other_windows(demo: Any) -> None:
    """Prevents a mask from being chosen for the window that it was picked on, or for being the best of several."""
    free, layers = free_of(demo.model)
    near = [opening(free, layers)]
    candidates, first = Candidates(free, layers, near, 0), SkipMask(mlp=[3], num_layers=layers)

    def look(contest: Contest, *speeds: float) -> str | None:
        """The incumbent's speed first."""
        left = iter(range(len(speeds) - 2))
        return contest.look(reader(demo.model, list(speeds)), candidates, lambda: next(left, None) is not None)

    contest = Contest(POLICY, first)
    assert look(contest, 1.0, 1.02, 0.8, 1.05, 0.9) is None and contest.mask == first
    assert contest.challenger is not None and not contest.challenger.gains  # where it was picked counts for nothing
    chosen = contest.challenger.mask
    assert look(contest, 1.0, 1.04) is None and contest.mask == first
    assert look(contest, 1.0, 1.03) == "better mask" and contest.mask == chosen and contest.challenger is None
    assert contest.policy.max_length == LENGTH and contest.policy.ngram == POLICY.ngram
    assert look(contest, 1.0, 1.05, 0.9) is None  # wins once, then loses by far
    assert look(contest, 1.0, 0.9) is None and contest.mask == chosen and contest.challenger is None
    assert look(contest, 1.0, 0.9, 1.3) == "better mask" and contest.mask != chosen  # by far: no luck
    rejected = contest.rejected
    assert look(contest, 1.0, 0.9, 0.8, 0.7) is None and contest.challenger is None
    assert contest.rejected == rejected + 3


def test_a_mask_is_served_only_while_it_pays(demo: Any) -> None:
    """Prevents a first mask that is slower than none, and one that text has turned against from being kept."""
    free, layers = free_of(demo.model)
    contest = Contest(POLICY, queue=[opening(free, layers), SkipMask(mlp=[3], num_layers=layers)])
    always = lambda: True
    assert contest.look(reader(demo.model, [0.9, 1.01]), None, always) is None and contest.mask is None
    assert contest.look(reader(demo.model, []), None, always) is None  # nothing to try yet
    contest.queue = [SkipMask(mlp=[4], num_layers=layers)]
    assert contest.look(reader(demo.model, [1.2]), None, always) == "first mask" and contest.mask is not None
    slow = Point(context=9, attention=(1.0,) * layers, mlp=(1.0,) * layers, rest=1.0, exit_check=0.0, verify=(1, 2))
    assert contest.reconsider(slow) is None  # of one window nothing is concluded
    contest.outlooks = OUTLOOK * KEPT
    served = contest.mask
    assert contest.reconsider(slow) == "no longer pays" and contest.mask is None and served in contest.tried
