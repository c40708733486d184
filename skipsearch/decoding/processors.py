"""Logits processors: on some rows of the batch that they were made for, and in the order that they expect.

The library's read the prefix alone, so they may be applied to drafts that are rejected later. A few hold a value for
each row, by its place in the batch. Once rows have ended, or stand at another length, such a processor would read the
value of another row; so it gets those of its rows. Others may count their calls or remember tokens: they are called in
order.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper

from skipsearch.decoding.accept import Sampling

_TENSORS = {
    "RepetitionPenaltyLogitsProcessor": "prompt_ignore_length",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_input_ids",
}
LIBRARY = "transformers.generation.logits_process"
# These of the library keep state from token to token, or call a function that may.
_KEEPING = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor", "PrefixConstrainedLogitsProcessor",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSelection:
    """How the next token is chosen from logits; the same for draft and target.

    Attributes:
        processors: applied to the logits behind each position.
        sampling: random generators; None takes the likeliest token.
        ends: tokens behind which nothing is asked of the processors.
    """

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    sampling: Sampling | None = None
    ends: frozenset[int] = frozenset()

    @classmethod
    def at_temperature(cls, temperature: float, seed: int, device: torch.device) -> TokenSelection:
        """Sampling at this temperature; 0 is greedy."""
        if not temperature:
            return cls()
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        return cls(processors=warpers, sampling=Sampling.from_seed(seed, device))

    @property
    def in_order(self) -> list[str]:
        """Class names of the processors that must be called as `generate` does: once for each token, in order."""
        return in_order(self.processors)

    @property
    def of_drafts(self) -> LogitsProcessorList:
        """The processors that may see drafts."""
        return LogitsProcessorList([processor for processor in self.processors if reads_prefix_alone(processor)])

    @property
    def plain_argmax(self) -> bool:
        """Whether the likeliest token of the bare logits is chosen."""
        return self.sampling is None and not self.processors


def reads_prefix_alone(processor: object) -> bool:
    """Whether a processor is known to depend on nothing but what it is called with."""
    kind = type(processor)
    return kind.__module__ == LIBRARY and kind.__name__ not in _KEEPING


def in_order(processors: LogitsProcessorList) -> list[str]:
    """Class names of those that must be called once for each token, in order."""
    return [type(processor).__name__ for processor in processors if not reads_prefix_alone(processor)]


def process(processors: LogitsProcessorList, rows: list[int], ids_RT: Tensor, logits_RV: Tensor) -> Tensor:
    """Scores [R, V] in fp32 for the token behind each prefix.

    Args:
        rows: which rows of the whole batch these are.
    """
    chosen = LogitsProcessorList([_for_rows(p, rows) for p in processors])
    return chosen(ids_RT, logits_RV.float())  # type: ignore[arg-type,no-any-return]


def _for_rows(processor: LogitsProcessor, rows: list[int]) -> LogitsProcessor:
    name = type(processor).__name__
    if (attribute := _TENSORS.get(name)) and isinstance(held := getattr(processor, attribute, None), Tensor):
        processor = copy.copy(processor)
        setattr(processor, attribute, held[torch.tensor(rows, device=held.device)])
    return processor
