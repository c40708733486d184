"""The speculative loop over a batch: block after block until every row has ended.

Plain decoding is the same loop without a draft. A row that ends leaves the batch. Shapes: T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from skipsearch.decoding.drafter import Draft, Drafter
from skipsearch.decoding.scheduler import Scheduler
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block, DecodeStats
from skipsearch.decoding.tuner import Tuner
from skipsearch.policy import DraftPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """When a row ends.

    Attributes:
        max_length: tokens of a row in all, padding included.
        eos_ids: end-of-sequence tokens.
        should_stop: called after every token with its block, its place in it, and the ids [1, T] up to it.
    """

    max_length: int
    eos_ids: frozenset[int] = frozenset()
    should_stop: Callable[[Block, int, Tensor], bool] | None = None

    def first_end(self, block: Block, ids_1T: Tensor, length: int) -> int | None:
        """The place in a block of the token that ends its row; None if the row goes on.

        Args:
            ids_1T: the row's tokens.
            length: tokens of the row before the block.
        """
        for i, token in enumerate(block.tokens):
            asked = self.should_stop is not None and self.should_stop(block, i, ids_1T[:, : length + i + 1])
            if asked or token in self.eos_ids:
                return i
        return None


def cut_block(block: Block, tokens: int) -> Block:
    """The block's first tokens alone."""
    return replace(block, tokens=block.tokens[:tokens], accepted=min(block.accepted, tokens), rejected=())


def decode(
    sequences: Sequences, ending: Ending, *, policy: DraftPolicy | None = None, stats: DecodeStats | None = None,
    scheduler: Scheduler | None = None, tuner: Tuner | None = None, temperature: float = 0.0,
) -> Iterator[Block]:  # fmt: skip
    """Yield block after block until each row has ended.

    The prompt is processed before a row's first block, which then holds one token. A block is cut
    where decoding ends; drafts never reach past `ending.max_length`.

    Args:
        policy: how to draft; None, or sequences without a draft view, decode plainly.
        stats: each block is added to it before it is yielded; the prefill is no block.
        scheduler: estimates of earlier sequences to go on from, and to add to.
        tuner: for a single sequence: chooses in place of `policy` and `scheduler`, anew after each block.
        temperature: of sampling, passed to the tuner; 0 is greedy.
    """
    stats = stats if stats is not None else DecodeStats()
    drafter, prefilled = None, False
    if max(sequences.lengths) >= ending.max_length:
        return
    while sequences.rows:
        draft = Draft([0] * len(sequences.rows))
        before, ended = list(sequences.lengths), []
        if drafter is not None:
            draft = drafter.draft(sequences.room(ending.max_length))
        blocks = sequences.verify(draft.drafted, draft.probs)
        if drafter is not None:
            drafter.learn(draft, blocks)
        for b, block in enumerate(blocks):
            last = ending.first_end(block, sequences.ids[b : b + 1], before[b])
            if last is not None or sequences.lengths[b] >= ending.max_length:
                ended.append(b)
            if last is not None and last + 1 < len(block.tokens):
                sequences.truncate(b, before[b] + last + 1)
                block = cut_block(block, last + 1)
            stats.count(block, draft.parts, prefill=not prefilled)
            yield block
            if tuner is not None and drafter is not None:
                tuner.after(drafter, draft, block, bool(ended))
        if not prefilled and tuner is not None:
            drafter = tuner.begin(sequences, temperature)
        elif not prefilled and policy is not None:
            drafter = Drafter(sequences, policy, scheduler)
        prefilled = True
        if len(ended) == len(sequences.rows):
            return  # these rows stay in the batch, so that their cache can be handed over
        if ended:
            sequences.drop(ended)
