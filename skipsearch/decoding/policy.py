"""DraftPolicy: how many tokens to draft before verifying."""

from __future__ import annotations

from dataclasses import dataclass

from skipsearch.errors import MaskError


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPolicy:
    """Draft at most `max_length` tokens (K); with a threshold, stop once the draft is unsure.

    The token on which the draft was unsure is still verified: it is already paid for, and the decision
    never depends on a token that is left out, so exactness under sampling holds.

    Attributes:
        max_length: K, at least 1.
        exit_threshold: stop after a token whose largest draft probability lies below this, in (0, 1);
            None drafts a fixed K (Self-SD's confidence exit, arXiv 2309.08168, section 3.3).
    """

    max_length: int = 5
    exit_threshold: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1:
            raise MaskError(f"draft.max_length must be a whole number of at least 1, got {self.max_length!r}; try 5")
        threshold = self.exit_threshold
        if threshold is not None and not (isinstance(threshold, int | float) and 0 < threshold < 1):
            raise MaskError(
                f"draft.exit_threshold must lie between 0 and 1, got {threshold!r}; try 0.6, or leave it out"
            )

    def __str__(self) -> str:
        exit_rule = "" if self.exit_threshold is None else f", exit below {self.exit_threshold:g}"
        return f"K = {self.max_length}{exit_rule}"
