"""ExitRule: when the drafts of one sequence end, by its draft policy."""

from __future__ import annotations

from collections.abc import Sequence

from skipsearch.policy import DraftPolicy

# Self-SD's adaptive threshold (arXiv 2309.08168, section 3.3): its target acceptance rate, step and smoothing.
ADAPTIVE_RATE, ADAPTIVE_STEP, ADAPTIVE_OF_RATE, ADAPTIVE_OF_THRESHOLD = 0.9, 0.01, 0.5, 0.9


class ExitRule:
    """The exit of a policy in one sequence.

    Args:
        policy: its threshold, or its curve and prices, decide.
    """

    def __init__(self, policy: DraftPolicy) -> None:
        self.policy, self.threshold, self.rate = policy, policy.exit_threshold, ADAPTIVE_RATE
        self.begin()

    def begin(self) -> None:
        """Start a new draft."""
        self.chance, self.drafted = 1.0, 0

    def stops(self, confidence: float) -> bool:
        """Whether the draft ends with the token that was just drafted with this confidence."""
        self.drafted += 1
        if self.policy.curve:
            self.chance *= accepted_at(self.policy.curve, confidence)
            return self.chance < self.policy.prices[self.drafted - 1]
        return self.threshold is not None and confidence < self.threshold

    def length(self, confidence: Sequence[float], limit: int) -> int:
        """How many tokens a draft with these confidences has, at most `limit`."""
        self.begin()
        longest = min(self.policy.max_length, limit)
        if not self.policy.uses_confidence:
            return longest
        return next((j + 1 for j in range(longest) if self.stops(confidence[j])), longest)

    def learn(self, drafted: int, accepted: int) -> None:
        """Move the adaptive threshold after a block (Self-SD, equations 4 to 6)."""
        if self.policy.adaptive and drafted and self.threshold is not None:
            self.rate = ADAPTIVE_OF_RATE * self.rate + (1 - ADAPTIVE_OF_RATE) * accepted / drafted
            aim = self.threshold + (ADAPTIVE_STEP if self.rate <= ADAPTIVE_RATE else -ADAPTIVE_STEP)
            self.threshold = ADAPTIVE_OF_THRESHOLD * self.threshold + (1 - ADAPTIVE_OF_THRESHOLD) * aim


def accepted_at(curve: Sequence[float], confidence: float) -> float:
    """The curve's acceptance rate at a confidence."""
    return curve[min(int(confidence * len(curve)), len(curve) - 1)]
