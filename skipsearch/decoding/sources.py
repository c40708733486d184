"""Token sources: what drafts beside the mask, at no draft cost.

To add a source, write a class with the interface of `TokenSource` (`NgramIndex` is one), add a row to `SOURCES`, and a
field to `DraftPolicy` that switches it on; `DraftPolicy.mask_alone` must switch it off. The scheduler, the drafter and
the statistics know sources by name alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from skipsearch.decoding.ngram import NgramIndex
from skipsearch.policy import DraftPolicy

MASK, PLAIN = "mask", "plain"  # the draft view; no draft
TARGET = "target"  # the source of tokens that nothing drafted


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a draft that one source drafted.

    Attributes:
        source: `MASK`, or the name of a token source.
        tokens: how many.
        reliability: of a token source: the class of its proposal.
    """

    source: str
    tokens: int
    reliability: int = 0


class TokenSource(Protocol):
    """Proposes continuations of one growing sequence.

    Attributes:
        name: in statistics and estimates.
        longest: the most tokens that it may propose.
        first_guess: for each class of reliability, the acceptance to expect before any was verified. The scheduler
            learns the acceptance of each class apart.
        reliable: the class from which the mask's draft may end so that this source continues it.
    """

    name: str
    longest: int
    first_guess: tuple[float, ...]
    reliable: int

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens to the sequence."""

    def propose(self, limit: int, drafted: Sequence[int] = ()) -> tuple[list[int], int] | None:
        """At most `limit` tokens behind the sequence and what is drafted so far, and their class of reliability."""


SOURCES: dict[str, Callable[[DraftPolicy], TokenSource | None]] = {
    "ngram": lambda policy: NgramIndex(policy.ngram) if policy.ngram else None,
}


def token_sources(policy: DraftPolicy) -> list[TokenSource]:
    """The sources that a policy switches on."""
    made = [make(policy) for make in SOURCES.values()]
    return [source for source in made if source is not None]
