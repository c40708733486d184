"""Served: a sequence under way, and what its blocks have told since it was last looked at."""

from __future__ import annotations

from skipsearch.decoding.drafter import Draft, Drafter
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block
from skipsearch.online.domains import Domain
from skipsearch.online.window import LONGEST


class Served(Drafter):
    """The drafter of a sequence under way.

    Attributes:
        seen, due: up to where it was looked at, and from which length on it is looked at again.
        decoding, improvable, tokens, drafted, accepted: of the blocks since the last look.
    """

    def __init__(self, sequences: Sequences, domain: Domain, temperature: float) -> None:
        super().__init__(sequences, domain.contest.policy, domain.pace)
        self.domain, self.temperature, self.seen = domain, temperature, sequences.lengths[0]
        self.due = self.seen + LONGEST
        self.forget()

    def forget(self) -> None:
        self.decoding, self.improvable, self.tokens, self.drafted, self.accepted = 0.0, 0.0, 0, 0, 0

    def note(self, draft: Draft, block: Block) -> None:
        """One block more."""
        self.decoding += self.seconds
        if draft.source != "ngram":
            self.improvable += self.seconds
        self.tokens += len(block.tokens)
        if draft.of_mask:
            self.drafted += min(draft.of_mask, block.drafted)
            self.accepted += min(draft.of_mask, block.accepted)
