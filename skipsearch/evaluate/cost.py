"""Costs: seconds of a draft step and of a verify on one device, as curves over context length.

Values, with the name of the set-up they were measured on; `profile` measures them. Knows no tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from skipsearch.mask import SkipMask
from skipsearch.model.device import device_name
from skipsearch.model.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Costs at one context length, in seconds.

    Attributes:
        context: tokens attended to.
        attention, mlp: of each layer's sublayer in a draft step.
        rest: of a draft step without any sublayer.
        exit_check: what a confidence exit adds to a draft step.
        verify: of verifying k drafted tokens, rollback and commit included; index k = 0 is plain decoding.
        first: what beginning a draft costs beside its steps, in steps: its weights have left the cache meanwhile.
        crowding: what a draft step that runs everything costs beyond the sum of its parts. Of a sparser step it is
            this times the square of the share that runs: weights that fit into a cache cost less than their share.
    """

    context: int
    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    rest: float
    exit_check: float
    verify: tuple[float, ...]
    first: float = 0.0
    crowding: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Curves over context length, linear between the measured points and constant beyond them."""

    identity: str
    points: tuple[Point, ...]

    @classmethod
    def of(cls, data: dict[str, Any]) -> Costs:
        """Costs from the dictionary that `asdict` made of them, as JSON gives it back.

        Raises:
            KeyError, TypeError: it is another dictionary.
        """
        lists = ("attention", "mlp", "verify")
        points = tuple(Point(**{**point, **{name: tuple(point[name]) for name in lists}}) for point in data["points"])
        return cls(identity=data["identity"], points=points)

    def at(self, context: float) -> Point:
        """The point at a context length, interpolated."""
        where = [p.context for p in self.points]
        return combine_points(self.points, lambda values: float(np.interp(context, where, values)))

    def mean_over(self, contexts: Sequence[float]) -> Point:
        """The mean of the points at several context lengths: the cost of serving an even mix of them."""
        return combine_points([self.at(context) for context in contexts], statistics.fmean)


def combine_points(points: Sequence[Point], of: Callable[[Sequence[float]], float]) -> Point:
    """One point from several, field by field."""

    def one(name: str) -> float:
        return of([getattr(point, name) for point in points])

    def each(name: str) -> tuple[float, ...]:
        return tuple(map(of, zip(*(getattr(point, name) for point in points), strict=True)))

    return Point(
        context=round(one("context")), attention=each("attention"), mlp=each("mlp"), rest=one("rest"),
        exit_check=one("exit_check"), verify=each("verify"), first=one("first"), crowding=one("crowding"),
    )  # fmt: skip


def draft_step(point: Point, mask: SkipMask, exit_check: bool) -> float:
    """Seconds of one draft step under a mask."""
    attention = sum(s for i, s in enumerate(point.attention) if i not in mask.attention)
    mlp = sum(s for i, s in enumerate(point.mlp) if i not in mask.mlp)
    return point.rest + attention + mlp + point.crowding * crowding_factor(mask) + exit_check * point.exit_check


def crowding_factor(mask: SkipMask) -> float:
    """The square of the share of sublayers that run: what `Point.crowding` is multiplied by."""
    return (1 - len(mask) / (2 * mask.num_layers)) ** 2


def set_up(target: Target) -> str:
    """What measured seconds depend on beside the model: device, dtype, backend, library version."""
    return f"{device_name(target.device)} | {target.dtype} | {target.backend} | torch {torch.__version__}"
