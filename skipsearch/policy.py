"""DraftPolicy: how many tokens to draft before they are verified. A frozen value, written in mask.json as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from pydantic import ConfigDict, StrictInt

from skipsearch.errors import MaskError, shown

NGRAM = 10  # the most tokens that prompt lookup proposes, where nothing else is said


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPolicy:
    """Draft at most `max_length` tokens (K); an exit may end the draft earlier.

    The token at which a draft exits is still verified: its cost is already paid. The decision to exit never depends
    on a token that is left out, so sampling stays exact.

    Attributes:
        max_length: K, at least 1.
        exit_threshold: in (0, 1). The draft ends with the first token whose largest draft probability (confidence)
            is below it. None drafts a fixed K (Self-SD's confidence exit, arXiv 2309.08168, section 3.3).
        adaptive: move the threshold after each block: up if too few tokens were accepted, else down.
        curve: measured acceptance by confidence, in equal bins of [0, 1]. With a curve the exit is calibrated: the
            chance that all drafted tokens are accepted is the product of the curve's values.
        prices: one for each drafted token. The draft ends when that chance is below the price: the cost of one more
            token, in tokens that the same seconds would give elsewhere, divided by the acceptance to expect of it.
        ngram: the most tokens to propose from an earlier occurrence of the last tokens (prompt lookup), at no draft
            cost; 0 proposes none.
        never_slower: draft only while it pays, by tokens per second estimated during decoding.
        costs: measured seconds of a draft step, then of verifying 0, 1, 2, ... tokens: the first estimates.

    Raises:
        MaskError: a value is out of range, or two fields contradict each other.
    """

    # Read by pydantic, which checks the types of a policy that comes from a mask file.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_length: StrictInt = 5
    exit_threshold: float | None = None
    adaptive: bool = False
    curve: tuple[float, ...] = ()
    prices: tuple[float, ...] = ()
    ngram: StrictInt = 0
    never_slower: bool = False
    costs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("curve", "prices", "costs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1:
            raise MaskError(
                f"draft.max_length must be a whole number of at least 1, got {shown(self.max_length)}; try 5"
            )
        threshold = self.exit_threshold
        if threshold is not None and not (isinstance(threshold, int | float) and 0 < threshold < 1):
            raise MaskError(
                f"draft.exit_threshold must lie between 0 and 1, got {shown(threshold)}; try 0.6, or leave it out"
            )
        if self.adaptive and threshold is None:
            raise MaskError("draft.adaptive is true, which needs a threshold to start from; set draft.exit_threshold")
        if isinstance(self.ngram, bool) or not isinstance(self.ngram, int) or self.ngram < 0:
            raise MaskError(f"draft.ngram must be a whole number of at least 0, got {shown(self.ngram)}; try 10")
        if bool(self.curve) != bool(self.prices):
            raise MaskError("draft.curve and draft.prices belong together, got one of them; leave both out, or neither")
        if self.curve and (threshold is not None or any(not 0 <= value <= 1 for value in self.curve)):
            raise MaskError(
                f"draft.curve must hold values between 0 and 1 and stand without exit_threshold, got "
                f"{shown(self.curve)} and {threshold!r}; search again"
            )
        if self.curve and len(self.prices) < self.max_length:
            raise MaskError(
                f"draft.prices must hold one value a token, max_length {self.max_length}, got {len(self.prices)}; "
                f"search again"
            )
        if any(not math.isfinite(price) for price in self.prices):
            raise MaskError(f"draft.prices must hold finite numbers, got {shown(self.prices)}; search again")
        costs_fit = all(0 <= value < math.inf for value in self.costs)
        if self.costs and (len(self.costs) < 2 or not costs_fit or not self.costs[1]):
            raise MaskError(
                f"draft.costs must hold seconds of a draft step and of verifying 0, 1, ... tokens, got "
                f"{shown(self.costs)}; leave it out"
            )

    @classmethod
    def ngrams_alone(cls, costs: tuple[float, ...] = ()) -> DraftPolicy:
        """N-grams with fallback to plain steps, for decoding without a mask."""
        return cls(max_length=1, ngram=NGRAM, never_slower=True, costs=costs)

    def mask_alone(self) -> DraftPolicy:
        """The same without other sources of drafts, and without fallback to plain steps."""
        return replace(self, ngram=0, never_slower=False)

    @property
    def uses_confidence(self) -> bool:
        """Whether the exit depends on the draft's confidence."""
        return self.exit_threshold is not None or bool(self.curve)

    def __str__(self) -> str:
        parts = [f"K = {self.max_length}"]
        if self.exit_threshold is not None:
            parts.append(f"exit below {self.exit_threshold:g}" + (", adaptive" if self.adaptive else ""))
        if self.curve:
            parts.append("calibrated exit")
        if self.ngram:
            parts.append(f"n-grams up to {self.ngram}")
        return ", ".join(parts)
