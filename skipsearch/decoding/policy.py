"""DraftPolicy: how many tokens to draft before verifying, and ExitRule, its decisions in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skipsearch.errors import MaskError

# Self-SD's adaptive threshold (arXiv 2309.08168, section 3.3): its target acceptance rate, step and smoothing.
ADAPTIVE_RATE, ADAPTIVE_STEP, ADAPTIVE_OF_RATE, ADAPTIVE_OF_THRESHOLD = 0.9, 0.01, 0.5, 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPolicy:
    """Draft at most `max_length` tokens (K); with an exit, stop before that.

    The token after which a draft stops is still verified: it is already paid for, and the decision never
    depends on a token that is left out, so exactness under sampling holds.

    Attributes:
        max_length: K, at least 1.
        exit_threshold: stop after a token whose largest draft probability (confidence) lies below this, in
            (0, 1); None drafts a fixed K (Self-SD's confidence exit, arXiv 2309.08168, section 3.3).
        adaptive: move the threshold after each block, up where too little is accepted and down elsewhere.
        curve: measured acceptance by confidence, in equal bins of [0, 1]. With it the exit is calibrated: the
            chance that all drafted tokens are accepted is the product of the curve's values.
        prices: one for each drafted token: stop once that chance lies below it. It is what one more token
            costs, in tokens that the same seconds bring elsewhere, over the acceptance one more can expect.
        ngram: the longest continuation to propose where the last tokens occurred before, at no draft cost;
            0 proposes none (prompt lookup).
        never_slower: draft only while it pays, by an estimate of tokens per second made while decoding.
        costs: measured seconds of a draft step, then of verifying 0, 1, 2, ... tokens: where those estimates begin.
    """

    max_length: int = 5
    exit_threshold: float | None = None
    adaptive: bool = False
    curve: tuple[float, ...] = ()
    prices: tuple[float, ...] = ()
    ngram: int = 0
    never_slower: bool = False
    costs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("curve", "prices", "costs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1:
            raise MaskError(f"draft.max_length must be a whole number of at least 1, got {self.max_length!r}; try 5")
        threshold = self.exit_threshold
        if threshold is not None and not (isinstance(threshold, int | float) and 0 < threshold < 1):
            raise MaskError(
                f"draft.exit_threshold must lie between 0 and 1, got {threshold!r}; try 0.6, or leave it out"
            )
        if self.adaptive and threshold is None:
            raise MaskError("draft.adaptive is true, which needs a threshold to start from; set draft.exit_threshold")
        if isinstance(self.ngram, bool) or not isinstance(self.ngram, int) or self.ngram < 0:
            raise MaskError(f"draft.ngram must be a whole number of at least 0, got {self.ngram!r}; try 10")
        if bool(self.curve) != bool(self.prices):
            raise MaskError("draft.curve and draft.prices belong together, got one of them; leave both out, or neither")
        if self.curve and (threshold is not None or any(not 0 <= value <= 1 for value in self.curve)):
            raise MaskError(
                f"draft.curve must hold values between 0 and 1 and stand without exit_threshold, got {self.curve!r} "
                f"and {threshold!r}; search again"
            )
        if self.curve and len(self.prices) < self.max_length:
            raise MaskError(
                f"draft.prices must hold one value a token, max_length {self.max_length}, got {len(self.prices)}; "
                f"search again"
            )

        if self.costs and (len(self.costs) < 2 or any(not value >= 0 for value in self.costs) or not self.costs[1]):
            raise MaskError(
                f"draft.costs must hold seconds of a draft step and of verifying 0, 1, ... tokens, got {self.costs!r}; "
                f"leave it out"
            )

    @property
    def uses_confidence(self) -> bool:
        """Whether it looks at the draft's confidence."""
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


class ExitRule:
    """A policy's exit in one sequence: when its drafts stop."""

    def __init__(self, policy: DraftPolicy) -> None:
        self.policy, self.threshold, self.rate = policy, policy.exit_threshold, ADAPTIVE_RATE
        self.chance, self.drafted = 1.0, 0

    def begin(self) -> None:
        """A new draft."""
        self.chance, self.drafted = 1.0, 0

    def stops(self, confidence: float) -> bool:
        """Whether the draft ends with the token that was just drafted with this confidence."""
        self.drafted += 1
        if self.policy.curve:
            self.chance *= accepted_at(self.policy.curve, confidence)
            return self.chance < self.policy.prices[self.drafted - 1]
        return self.threshold is not None and confidence < self.threshold

    def length(self, confidence: Sequence[float], limit: int) -> int:
        """How many tokens a draft with these confidences holds, at most `limit`."""
        self.begin()
        longest = min(self.policy.max_length, limit)
        if not self.policy.uses_confidence:
            return longest
        return next((j + 1 for j in range(longest) if self.stops(confidence[j])), longest)

    def learn(self, drafted: int, accepted: int) -> None:
        """What became of the draft; the adaptive threshold moves (Self-SD, equations 4 to 6)."""
        if self.policy.adaptive and drafted and self.threshold is not None:
            self.rate = ADAPTIVE_OF_RATE * self.rate + (1 - ADAPTIVE_OF_RATE) * accepted / drafted
            aim = self.threshold + (ADAPTIVE_STEP if self.rate <= ADAPTIVE_RATE else -ADAPTIVE_STEP)
            self.threshold = ADAPTIVE_OF_THRESHOLD * self.threshold + (1 - ADAPTIVE_OF_THRESHOLD) * aim


def accepted_at(curve: Sequence[float], confidence: float) -> float:
    """The curve's value at a confidence."""
    return curve[min(int(confidence * len(curve)), len(curve) - 1)]
