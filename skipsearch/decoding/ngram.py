"""NgramIndex: where the last tokens of a sequence occurred before, and what followed them there.

Prompt lookup (Saxena 2023; "Inference with Reference", arXiv 2304.04487): text repeats itself, and a
repetition is a draft that costs nothing. Lookups take the longest n-gram that is known, and the latest
place where it occurred.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4  # tokens of the n-grams that are indexed; longer matches are told by reading backwards
FARTHEST = 16  # tokens read backwards


class NgramIndex:
    """The n-grams of one growing sequence."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._behind: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST + 1)]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; the n-grams that end before the new ones become known."""
        for token in tokens:
            end = len(self.tokens)  # an n-gram is entered when the token behind it is known
            for n in range(1, min(LONGEST, end) + 1):
                self._behind[n][tuple(self.tokens[end - n : end])] = end
            self.tokens.append(token)

    def lookup(self, drafted: Sequence[int] = (), limit: int = 10) -> tuple[int, list[int]]:
        """What followed the last tokens where they occurred before.

        Args:
            drafted: tokens that stand behind the sequence for now.
            limit: the most tokens to return.

        Returns:
            how many of the last tokens agree there (0: they never occurred), and the tokens that followed.
        """
        recent = [*self.tokens[-FARTHEST:], *drafted][-FARTHEST:]
        for n in range(min(LONGEST, len(recent)), 0, -1):
            place = self._behind[n].get(tuple(recent[-n:]))
            if place is not None:
                while n < min(len(recent), place) and self.tokens[place - n - 1] == recent[-n - 1]:
                    n += 1
                return n, self._following(place, drafted, limit)
        return 0, []

    def _following(self, place: int, drafted: Sequence[int], limit: int) -> list[int]:
        text = [*self.tokens[place : place + limit]]
        if len(text) < limit:  # what follows runs into the end: it goes on with the draft and then with itself
            text += drafted
            while text and len(text) < limit:
                text.append(text[len(text) - (len(self.tokens) + len(drafted) - place)])
        return text[:limit]
