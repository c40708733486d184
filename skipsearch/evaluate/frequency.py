"""Frequency: the order in which a smaller head takes up tokens (FR-Spec, arXiv 2502.14856)."""

from __future__ import annotations

from collections import Counter
from pydoc_data import topics  # type: ignore[import-untyped]

from transformers import PreTrainedTokenizerBase

from skipsearch.evaluate.trace import Trace

SMALLEST, SIZES = 2048, 4  # tokens of the smallest head that is offered; how many heads there are, each half the last


def head_sizes(vocabulary: int) -> tuple[int, ...]:
    """Numbers of tokens for smaller heads, falling."""
    halves = (vocabulary >> shift for shift in range(1, SIZES + 1))
    return tuple(size for size in halves if size >= SMALLEST)


def tokens_by_frequency(tokenizer: PreTrainedTokenizerBase, trace: Trace, vocabulary: int) -> tuple[int, ...]:
    """All tokens: first those of the continuations, then of the prompts, of English text, and the rest.

    The text is the documentation that comes with Python. The rest is in the order of token ids, which tokenizers give
    to frequent tokens first.
    """
    written = Counter(token for row in trace.continuations for token in row)
    read = Counter(token for row in trace.prompts for token in row)
    text = Counter(tokenizer("\n".join(topics.topics.values()), add_special_tokens=False)["input_ids"])

    def rank(token: int) -> tuple[int, int, int, int]:
        return -written[token], -read[token], -text[token], token

    return tuple(sorted(range(vocabulary), key=rank))
