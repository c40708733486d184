"""Costs: seconds of a draft step and of a verify on one device, as curves over context length.

Values, with the name of the set-up they were measured on; `profile` measures them. Knows no tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from skipsearch.mask import KINDS, SkipMask
from skipsearch.model.device import device_name
from skipsearch.model.target import Target
from skipsearch.plan import QUANTISED, DraftPlan, Form


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Costs at one context length, in seconds.

    Attributes:
        context: tokens attended to.
        attention, mlp: of each layer's sublayer in a draft step.
        rest: of a draft step without any sublayer, with the full head.
        exit_check: what a confidence exit adds to a draft step.
        verify: of verifying k drafted tokens, rollback and commit included; index k = 0 is plain decoding.
        first: what beginning a draft costs beside its steps, in steps: its weights have left the cache meanwhile.
        crowding: what a draft step that runs everything costs beyond the sum of its parts. Of a sparser step it is
            this times the square of the share that runs: weights that fit into a cache cost less than their share.
        forms: by quantised form and kind, of each layer's sublayer in that form.
        heads: by form of the head, `rest` with so many tokens to choose from, as (tokens, seconds), by rising tokens.
        mixing: what each sublayer that runs costs more where others are quantised: such steps take one token only.
    """

    context: int
    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    rest: float
    exit_check: float
    verify: tuple[float, ...]
    first: float = 0.0
    crowding: float = 0.0
    forms: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    heads: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    mixing: float = 0.0

    def rest_with(self, plan: DraftPlan) -> float:
        """Of a draft step without any sublayer, with the plan's head."""
        if plan.head == "full" and plan.head_ids is None:
            return self.rest
        (few, least), (many, most) = self.heads[plan.head]
        tokens = many if plan.head_ids is None else len(plan.head_ids)
        return max(0.0, least + (most - least) * (tokens - few) / (many - few))

    def of(self, form: Form, kind: str, layer: int) -> float:
        """Of one sublayer in a form."""
        if form == "skip":
            return 0.0
        of_kind: tuple[float, ...] = getattr(self, kind) if form == "run" else self.forms[form][kind]
        return of_kind[layer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Curves over context length, linear between the measured points and constant beyond them.

    Attributes:
        cut_short: seconds that did not suffice to time each part as often as a median needs; 0: they did.
    """

    identity: str
    points: tuple[Point, ...]
    cut_short: float = 0.0

    @classmethod
    def of(cls, data: dict[str, Any]) -> Costs:
        """Costs from the dictionary that `asdict` made of them, as JSON gives it back.

        Raises:
            KeyError, TypeError: it is another dictionary, or holds something else than finite numbers.
        """
        points = tuple(Point(**{name: _tuples(value) for name, value in point.items()}) for point in data["points"])
        return cls(identity=data["identity"], points=points, cut_short=float(_tuples(data.get("cut_short", 0.0))))

    def at(self, context: float) -> Point:
        """The point at a context length, interpolated."""
        where = [p.context for p in self.points]
        return combine_points(self.points, lambda values: float(np.interp(context, where, values)))

    def mean_over(self, contexts: Sequence[float]) -> Point:
        """The mean of the points at several context lengths: the cost of serving an even mix of them."""
        return combine_points([self.at(context) for context in contexts], statistics.fmean)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    if isinstance(value, dict):
        return {name: _tuples(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_tuples, value))
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"a cost is {value!r}")
    return value


def combine_points(points: Sequence[Point], of: Callable[[Sequence[float]], float]) -> Point:
    """One point from several, number by number."""

    def one(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: one([value[name] for value in values]) for name in values[0]}
        if isinstance(values[0], tuple):
            return tuple(map(one, zip(*values, strict=True)))
        return of(values)

    found = {name: one([getattr(point, name) for point in points]) for name in Point.__slots__}
    return Point(**{**found, "context": round(found["context"])})


def draft_step(point: Point, plan: SkipMask | DraftPlan, exit_check: bool) -> float:
    """Seconds of one draft step under a plan."""
    plan = DraftPlan.of(plan)
    seconds = point.rest_with(plan) + point.crowding * crowding_factor(plan) + exit_check * point.exit_check
    for kind in KINDS:
        whole: tuple[float, ...] = getattr(point, kind)
        left_out = set(getattr(plan.skip, kind))
        for form in QUANTISED:
            if of_form := getattr(getattr(plan, form), kind):
                seconds += sum(point.forms[form][kind][i] for i in of_form)
                left_out |= of_form
        seconds += sum(s for i, s in enumerate(whole) if i not in left_out)
    return seconds + (point.mixing * runs(plan) if plan.quantises else 0.0)


def runs(plan: DraftPlan) -> int:
    """How many sublayers run as they are."""
    return 2 * plan.num_layers - len(plan.skip) - len(plan.int8) - len(plan.int4)


def crowding_factor(plan: DraftPlan) -> float:
    """The square of the share of sublayers that run as they are: what `Point.crowding` is multiplied by."""
    return (runs(plan) / (2 * plan.num_layers)) ** 2


def set_up(target: Target) -> str:
    """What measured seconds depend on beside the model: device, dtype, backend, library version."""
    return f"{device_name(target.device)} | {target.dtype} | {target.backend} | torch {torch.__version__}"
