"""Frequency: the order in which a smaller head takes up tokens (FR-Spec, arXiv 2502.14856).

Shapes: V vocabulary, P prompts, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pydoc_data import topics  # type: ignore[import-untyped]
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from skipsearch.evaluate.trace import Trace

SMALLEST, SIZES = 2048, 4  # tokens of the smallest head that is offered; how many heads there are, each half the last
Array = NDArray[Any]


def head_sizes(vocabulary: int) -> tuple[int, ...]:
    """Numbers of tokens for smaller heads, falling."""
    halves = ((vocabulary >> shift) // 16 * 16 for shift in range(1, SIZES + 1))  # int4 takes rows by 16
    return tuple(size for size in halves if size >= SMALLEST)


@dataclass(frozen=True, slots=True)
class Frequency:
    """The order of tokens by a trace, and what it would be for a text that is not in the trace.

    Attributes:
        tokens: all of them, the most frequent first.
        ranks_PT: of each token of the trace, its place in the order that the other prompts give. Scored by its own
            order, a trace would contain no token that a small head lacks.
    """

    tokens: tuple[int, ...]
    ranks_PT: Tensor


def frequency(tokenizer: PreTrainedTokenizerBase, trace: Trace, vocabulary: int, width: int) -> Frequency:
    """Tokens of continuations first, then of prompts, of English text, and the rest.

    The text is the documentation that comes with Python. The rest is in the order of token ids, which tokenizers give
    to frequent tokens first.

    Args:
        width: T, of the ranks; behind a prompt's last token they are 0.
    """

    def counted(ids: Iterable[int]) -> Array:
        return np.bincount(np.fromiter(ids, dtype=np.int64), minlength=vocabulary)[:vocabulary]

    # Not for the model, so longer than its context.
    texts = tokenizer(list(topics.topics.values()), add_special_tokens=False, verbose=False)["input_ids"]
    text = counted(token for ids in texts for token in ids)
    written, read = [counted(row) for row in trace.continuations], [counted(row) for row in trace.prompts]
    every = np.arange(vocabulary)

    def order(of_written: Array, of_read: Array) -> Array:
        return np.lexsort((every, -text, -of_read, -of_written))

    all_written, all_read = sum(written), sum(read)
    ranks_PT = torch.zeros((len(written), width), dtype=torch.long)
    for p, (prompt, continuation) in enumerate(zip(trace.prompts, trace.continuations, strict=True)):
        place = np.empty(vocabulary, dtype=np.int64)
        place[order(all_written - written[p], all_read - read[p])] = every
        ids = np.array([*prompt, *continuation])
        ranks_PT[p, : len(ids)] = torch.from_numpy(place[ids])
    return Frequency(tuple(order(np.asarray(all_written), np.asarray(all_read)).tolist()), ranks_PT)
