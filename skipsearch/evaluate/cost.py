"""Costs: seconds of a draft step and of a verify on one device, as curves over context length.

Values, and the name of what they were measured on; `profile` measures them. Knows no tokens.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from skipsearch.mask import SkipMask
from skipsearch.model.sublayers import input_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Costs at one context length, in seconds.

    Attributes:
        context: tokens attended to.
        attention, mlp: of each layer's sublayer in a draft step.
        rest: of a draft step without any sublayer.
        exit_check: what a confidence exit adds to a draft step.
        verify: of verifying k drafted tokens, rollback and commit included; index k = 0 is plain decoding.
        first: what beginning a draft costs beside its steps, in steps: what it reads has left the cache.
        crowding: of a draft step that runs everything, in excess of its parts; with the square of the share that runs:
            what fits into a cache costs less than its share.
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
    """Curves over context length, linear between the measured points and held beyond them."""

    identity: str
    points: tuple[Point, ...]

    @classmethod
    def of(cls, data: dict[str, Any]) -> Costs:
        """What `asdict` made of them, as JSON returns it.

        Raises:
            KeyError, TypeError: it is something else.
        """
        lists = ("attention", "mlp", "verify")
        points = tuple(Point(**{**point, **{name: tuple(point[name]) for name in lists}}) for point in data["points"])
        return cls(identity=data["identity"], points=points)

    def at(self, context: float) -> Point:
        """The point at a context length, interpolated."""
        where = [p.context for p in self.points]
        return merged(self.points, lambda values: float(np.interp(context, where, values)))

    def mix(self, contexts: Sequence[float]) -> Point:
        """The mean of the points at several context lengths: what serving an even mix of them costs."""
        return merged([self.at(context) for context in contexts], statistics.fmean)


def merged(points: Sequence[Point], of: Callable[[Sequence[float]], float]) -> Point:
    """One point of several, figure by figure."""

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
    return point.rest + attention + mlp + point.crowding * crowd(mask) + exit_check * point.exit_check


def crowd(mask: SkipMask) -> float:
    """The square of the share of sublayers that run."""
    return (1 - len(mask) / (2 * mask.num_layers)) ** 2


def device_name(device: torch.device) -> str:
    """The processor that a figure belongs to."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def set_up(model: PreTrainedModel, backend: str = "eager") -> str:
    """What measured seconds depend on beside the model: device, dtype, backend, library version."""
    return f"{device_name(input_device(model))} | {model.dtype} | {backend} | torch {torch.__version__}"
