"""ServedSequence: a sequence that is being decoded, with counts since the last search step on it."""

from __future__ import annotations

from skipsearch.decoding.drafter import Draft, Drafter
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block
from skipsearch.online.domains import Domain
from skipsearch.online.window import LONGEST


class ServedSequence(Drafter):
    """The drafter of a sequence.

    Attributes:
        searched, due: the length up to which masks were scored on it, and the length at which the search runs again.
        decoding, improvable, tokens, drafted, accepted: of the blocks since the search last ran; see `Budget`.
    """

    def __init__(self, sequences: Sequences, domain: Domain, temperature: float) -> None:
        super().__init__(sequences, domain.incumbent.policy, domain.scheduler)
        self.domain, self.temperature, self.searched = domain, temperature, sequences.lengths[0]
        self.due = self.searched + LONGEST
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.decoding, self.improvable, self.tokens, self.drafted, self.accepted = 0.0, 0.0, 0, 0, 0

    def note(self, draft: Draft, block: Block) -> None:
        """One more block."""
        self.decoding += self.seconds
        if not draft.free:
            self.improvable += self.seconds
        self.tokens += len(block.tokens)
        if draft.of_mask:
            self.drafted += min(draft.of_mask, block.drafted)
            self.accepted += min(draft.of_mask, block.accepted)
