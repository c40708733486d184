"""NgramIndex: where the last tokens of a sequence occurred before, and what followed them there.

Prompt lookup (Saxena 2023; "Inference with Reference", arXiv 2304.04487): text repeats itself, and a
repetition is a draft that costs nothing. Lookups take the longest n-gram that is known, and the latest
place where it occurred.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4  # tokens of the n-grams that are indexed; longer matches are found by reading backwards
FARTHEST = 16  # tokens read backwards
# Expected acceptance if 1, 2, 3, 4 to 7, or 8 and more tokens before the n-gram agree.
FIRST_GUESS = (0.3, 0.5, 0.65, 0.75, 0.85)


def match_class(length: int) -> int:
    """Which class of `FIRST_GUESS` a match of so many tokens is in."""
    return min(length, 4) - 1 if length < 8 else 4


class NgramIndex:
    """The n-grams of one growing sequence: a `TokenSource`.

    Args:
        longest: the most tokens that it may propose.
    """

    name = "ngram"
    first_guess: tuple[float, ...] = FIRST_GUESS
    reliable = match_class(3)

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.tokens: list[int] = []
        self._behind: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST + 1)]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; the n-grams that end before the new ones become known."""
        for token in tokens:
            end = len(self.tokens)  # an n-gram is entered when the token behind it is known
            for n in range(1, min(LONGEST, end) + 1):
                self._behind[n][tuple(self.tokens[end - n : end])] = end
            self.tokens.append(token)

    def propose(self, limit: int, drafted: Sequence[int] = ()) -> tuple[list[int], int] | None:
        """See `TokenSource`: the class of reliability is that of the match."""
        match, following = self.lookup(drafted, limit)
        return (following, match_class(match)) if match else None

    def lookup(self, drafted: Sequence[int] = (), limit: int = 10) -> tuple[int, list[int]]:
        """What followed the last tokens where they occurred before.

        Args:
            drafted: tokens drafted after the sequence.
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
