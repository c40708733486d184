"""The speculative loop over a batch: block after block until every row has ended.

Plain decoding is the same loop without a draft. A row that ends leaves the batch. Shapes: T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from skipsearch.decoding.drafter import Draft, Drafter
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.scheduler import Pace
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block, DecodeStats
from skipsearch.decoding.tuner import Tuner


def decode(
    sequences: Sequences, *, max_length: int, policy: DraftPolicy | None,
    eos_ids: frozenset[int] = frozenset(), should_stop: Callable[[Block, int, Tensor], bool] | None = None,
    stats: DecodeStats | None = None, pace: Pace | None = None, tuner: Tuner | None = None,
    temperature: float = 0.0,
) -> Iterator[Block]:  # fmt: skip
    """Yield block after block until each row meets an end-of-sequence token, `should_stop`, or `max_length`.

    The prompt is processed before a row's first block, which then holds one token. A block is cut
    where decoding ends; drafts never reach past `max_length`.

    Args:
        max_length: tokens of a row in all, padding included.
        policy: how to draft; None, or sequences without a mask, decode plainly.
        should_stop: asked after every token with its block, its place in it, and the ids [1, T] up to it.
        stats: counts are added to it; the prefill is no block.
        pace: estimates of earlier sequences to go on from, and to add to.
        tuner: of a single sequence: chooses in place of `policy` and `pace`, and may change its mind after each block.
        temperature: what the tuner is told that the sequence is sampled at.
    """
    stats = stats if stats is not None else DecodeStats()
    drafter, prefilled = None, False
    if max(sequences.lengths) >= max_length:
        return
    while sequences.rows:
        draft = Draft([0] * len(sequences.rows))
        before, ended = list(sequences.lengths), []
        if drafter is not None:
            draft = drafter.draft(sequences.room(max_length))
        blocks = sequences.verify(draft.drafted, draft.probs)
        if drafter is not None:
            drafter.learn(draft, blocks)
        for b, block in enumerate(blocks):
            for i, token in enumerate(block.tokens):
                if token in eos_ids or (
                    should_stop and should_stop(block, i, sequences.ids[b : b + 1, : before[b] + i + 1])
                ):
                    ended.append(b)
                    break
            else:
                if sequences.lengths[b] >= max_length:
                    ended.append(b)
            if i + 1 < len(block.tokens):
                sequences.truncate(b, before[b] + i + 1)
                block = replace(block, tokens=block.tokens[: i + 1], accepted=min(block.accepted, i + 1))
            if prefilled:
                of_mask = draft.of_mask if drafter is None or drafter.single else block.drafted
                stats.count(block.drafted, block.accepted, draft.source, of_mask)
            stats.committed += len(block.tokens)
            yield block
            if tuner is not None and drafter is not None:
                tuner.after(drafter, draft, block, bool(ended))
        if not prefilled and tuner is not None:
            drafter = tuner.begin(sequences, temperature)
        elif not prefilled and policy is not None:
            drafter = Drafter(sequences, policy, pace)
        prefilled = True
        if len(ended) == len(sequences.rows):
            return  # left as they are, so that the cache can be handed over
        if ended:
            sequences.drop(ended)
