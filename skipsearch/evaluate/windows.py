"""Windows: every position of a trace drafted once, in consecutive drafts of K tokens, instead of block by block.

A draft's token depends on where its block began only through the draft's own keys, so windows tell for each position
whether a draft would be right there and how confident it would be; policies are then walked by arithmetic. A pass over
windows wastes nothing behind a mismatch, and any stretch of them can be run by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.reference import Start
from skipsearch.evaluate.replay import Replay
from skipsearch.mask import SkipMask
from skipsearch.plan import DraftPlan


@dataclass(frozen=True, slots=True)
class PositionOutcomes:
    """What drafts over one stretch of text would do, position by position.

    Attributes:
        correct: whether a drafted token would be accepted there.
        confidence: the draft's largest probability there.
        starts: how many of the positions blocks may begin at; the rest is what the last block may reach.
    """

    correct: Sequence[bool]
    confidence: Sequence[float]
    starts: int


Part = tuple[range, ...]  # for each prompt, some windows in a row


class Windows:
    """The windows of a replay.

    Attributes:
        counts: how many windows each prompt's continuation has.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        # The prefill gives the first token of a continuation; drafts begin behind it.
        self.firsts = [len(prompt) + 1 for prompt in replay.trace.prompts]
        spans = [length - first for length, first in zip(replay.lengths, self.firsts, strict=True)]
        self.counts = [-(-max(0, span) // replay.max_length) for span in spans]

    def part(self, share: float) -> Part:
        """About this share of each prompt's windows, in one stretch, early in some prompts and late in others.

        A larger share holds a smaller one.
        """
        found = []
        for p, count in enumerate(self.counts):
            size = min(count, max(1, round(share * count)))
            middle = count * ((p * 7) % 16 + 0.5) / 16
            first = max(0, min(round(middle - size / 2), count - size))
            found.append(range(first, first + size))
        return tuple(found)

    def few(self, prompts: int, tokens: int) -> Part:
        """Windows of so many prompts, spread over all that have some, and of so many tokens in each."""
        some, k = [p for p, count in enumerate(self.counts) if count], self.replay.max_length
        chosen = some[:: max(1, len(some) // prompts)][:prompts]
        return tuple(range(min(count, -(-tokens // k)) if p in chosen else 0) for p, count in enumerate(self.counts))

    def starts(self, part: Part) -> list[Start]:
        """The block starts of these windows, in the order of prompts."""
        k = self.replay.max_length
        return [(p, self.firsts[p] + k * window) for p, windows in enumerate(part) for window in windows]


class WindowReplay:
    """Outcomes of one plan at the positions of windows; each window is run once, when it is first needed."""

    def __init__(self, windows: Windows, plan: SkipMask | DraftPlan) -> None:
        self.windows, self.plan = windows, DraftPlan.of(plan)
        self.drafts = DraftReplay(windows.replay, self.plan)
        self.known: dict[Start, tuple[list[bool], list[float]]] = {}

    @torch.no_grad()
    def outcomes(self, part: Part | None = None) -> list[PositionOutcomes]:
        """Of each prompt's stretch, without those that have none; by default of the whole trace."""
        windows, replay = self.windows, self.windows.replay
        part = windows.part(1) if part is None else part
        for some in replay.passes({start for start in windows.starts(part) if start not in self.known}):
            correct_SK, confidence_SK = self.drafts.evaluate(some)
            self.known |= zip(some, zip(correct_SK.tolist(), confidence_SK.tolist(), strict=True), strict=True)
        found = []
        for p, stretch in enumerate(part):
            begins = [(p, windows.firsts[p] + replay.max_length * window) for window in stretch]
            size = min(len(begins) * replay.max_length, replay.lengths[p] - begins[0][1]) if begins else 0
            if size > 0:
                correct = [right for begin in begins for right in self.known[begin][0]][:size]
                confidence = [value for begin in begins for value in self.known[begin][1]][:size]
                whole = begins[0][1] + size == replay.lengths[p]
                starts = size if whole else max(1, size - replay.max_length)
                found.append(PositionOutcomes(correct, confidence, starts))
        return found
