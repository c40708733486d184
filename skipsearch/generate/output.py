"""What a call of `generate` returns: tokens, scores and logits of its rows, row after row put together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from skipsearch.decoding.loop import Ending
from skipsearch.decoding.stats import Block
from skipsearch.generate.arguments import Arguments
from skipsearch.model.cache import CACHE


@dataclass(slots=True)
class RowOutput:
    """What one sequence of the batch has produced."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def add(self, block: Block, given: Arguments) -> None:
        self.tokens += block.tokens
        if given.keep_logits:
            self.logits += steps(block.logits_KV[: len(block.tokens)])
        if given.keep_scores:
            self.scores += steps(block.scores_KV[: len(block.tokens)])


def made_output(
    input_ids: Tensor, rows: list[RowOutput], given: Arguments, past: Cache | None
) -> Tensor | GenerateDecoderOnlyOutput:
    """What `generate` returns: token ids [B, T], or with `return_dict_in_generate` an output object.

    Args:
        past: the cache to return in it.
    """
    output = _padded(input_ids, rows, given.config)
    if not given.config.return_dict_in_generate:
        return output
    return GenerateDecoderOnlyOutput(
        sequences=output,  # type: ignore[arg-type]
        scores=_stacked([row.scores for row in rows]) if given.keep_scores else None,  # type: ignore[arg-type]
        logits=_stacked([row.logits for row in rows]) if given.keep_logits else None,  # type: ignore[arg-type]
        **{CACHE: past},
    )


def _padded(input_ids: Tensor, rows: list[RowOutput], config: GenerationConfig) -> Tensor:
    """Prompts and new tokens [B, T]; rows that ended early are filled with the padding token."""
    pad = config._pad_token_tensor  # type: ignore[attr-defined]
    longest = max(len(row.tokens) for row in rows)
    fill = 0 if pad is None else int(pad)
    tokens = [row.tokens + [fill] * (longest - len(row.tokens)) for row in rows]
    return torch.cat([input_ids, torch.tensor(tokens, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def steps(logits_KV: Tensor) -> list[Tensor]:
    """Position by position [1, V], as copies in fp32."""
    return [logits_V[None].to(torch.float32, copy=True) for logits_V in logits_KV]


def _stacked(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Step by step [B, V]; zeros where a row has ended."""
    longest = max(map(len, rows))
    nothing = torch.zeros_like(rows[0][0])
    return tuple(torch.cat([row[step] if step < len(row) else nothing for row in rows]) for step in range(longest))


def ending_of(given: Arguments, outputs: list[RowOutput]) -> Ending:
    """When rows end; criteria may read the scores so far, and all of them are asked at every token."""

    def should_stop(block: Block, i: int, ids: Tensor) -> bool:
        scores = None
        if given.keep_scores:
            scores = (*outputs[block.row].scores, *steps(block.scores_KV[: i + 1]))
        said = [criterion(ids, scores) for criterion in given.criteria]  # type: ignore[arg-type]
        return any(bool(done.all()) if isinstance(done, Tensor) else bool(done) for done in said)

    return Ending(
        max_length=given.config.max_length, eos_ids=given.eos_ids, should_stop=should_stop if given.criteria else None
    )  # fmt: skip
