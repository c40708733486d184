"""Drafting: what a decoding method drafts with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from skipsearch.compiled.backend import Progress
from skipsearch.decoding.tuner import Tuner
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan
from skipsearch.policy import DraftPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """What drafts.

    Attributes:
        plan: a mask or plan; None decodes plainly.
        policy: how to draft with it.
        file: the mask file that both come from, if they do.
    """

    plan: SkipMask | DraftPlan | None = None
    policy: DraftPolicy = field(default_factory=DraftPolicy)
    file: MaskFile | None = None


# Makes a model's tuner: the target, what to draft with at first, and a callback for the progress of compiling.
MakeTuner = Callable[[Target, Drafting, Progress | None], Tuner]
