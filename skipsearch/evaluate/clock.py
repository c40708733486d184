"""Clock: seconds of parts of a block, on a sequence that is left as it was."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from transformers import PreTrainedModel

from skipsearch.decoding.rule import GREEDY, SelectionRule
from skipsearch.decoding.sequences import Sequences
from skipsearch.draft.view import draft_view
from skipsearch.model.device import synchronize
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan

STEPS = 6  # draft steps in one timing of a draft step


def sequence_at(
    target: Target, draft: PreTrainedModel | None, context: int, max_length: int, rule: SelectionRule = GREEDY
) -> Sequences:
    """A sequence of random tokens, its prompt processed, to time blocks on."""
    ids = target.random_ids(context)
    sequence = Sequences(
        target, ids, capacity=context + max_length + 4, draft=draft,
        selection=rule.selection(target.model, ids, max_length),
    )  # fmt: skip
    sequence.verify([0])
    return sequence


def timed(sequence: Sequences, run: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Seconds that `run` takes on a sequence, which is put back to its length afterwards.

    Args:
        before: what is done just before it, as in decoding; by default the same.
    """
    clock(sequence, before or run)
    return clock(sequence, run)


def clock(sequence: Sequences, run: Callable[[], object]) -> float:
    """Seconds that `run` takes, once."""
    length = sequence.lengths[0]
    synchronize(sequence.target.device)
    start = time.perf_counter()
    run()
    synchronize(sequence.target.device)
    seconds = time.perf_counter() - start
    sequence.truncate(0, length)
    return seconds


def step_costs(target: Target, plan: DraftPlan, context: int, repeats: int = 15) -> tuple[float, float]:
    """Seconds of a draft step and of a plain step at a context length: medians, measured alternately."""
    drafting = sequence_at(target, draft_view(target.model, plan), context, STEPS)
    plain = sequence_at(target, None, context, STEPS)
    draft, step = [], []
    for turn in range(repeats + 3):
        drafted = timed(drafting, lambda: drafting.draft([STEPS])) / STEPS
        stepped = timed(plain, lambda: plain.verify([0]))
        if turn >= 3:
            draft.append(drafted)
            step.append(stepped)
    return statistics.median(draft), statistics.median(step)
