"""The speculative loop: draft, verify, commit; and plain decoding as the same loop without a draft.

Promises that greedy output equals plain greedy decoding and that sampled output has the target's own
distribution. One sequence at a time. Shapes: T sequence positions, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel

from skipsearch.decoding.accept import accept_greedy, accept_sampling, probabilities
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.mask import SkipMask
from skipsearch.model.cache import SharedCache, positions
from skipsearch.model.view import draft_view


@dataclass(slots=True, kw_only=True)
class DecodeStats:
    """Raw counts of a run; ratios are made from them last.

    Attributes:
        blocks: how many blocks drafted k tokens and had n of them accepted, by (k, n).
        committed: tokens in the output beyond the prompt.
    """

    blocks: Counter[tuple[int, int]] = field(default_factory=Counter)
    committed: int = 0

    @property
    def verifies(self) -> int:
        return sum(self.blocks.values())

    @property
    def drafted(self) -> int:
        return sum(k * count for (k, _), count in self.blocks.items())

    @property
    def accepted(self) -> int:
        return sum(n * count for (_, n), count in self.blocks.items())

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted, a ratio of sums; 0 if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tau(self) -> float:
        """Tokens committed a verify: mean(n) + 1."""
        return self.accepted / self.verifies + 1 if self.verifies else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One draft and one verify.

    Attributes:
        tokens: the committed tokens: accepted drafts, then the target's own.
        drafted: K of this block.
        accepted: num_accepted, 0..K.
        logits_KV: the target's raw logits, a row for each of K + 1 positions.
        scores_KV: the same after the logits processors.
    """

    tokens: list[int]
    drafted: int
    accepted: int
    logits_KV: Tensor
    scores_KV: Tensor


@dataclass(slots=True, kw_only=True)
class Sampling:
    """Generators of a sampled run, one for each use, so that no random number serves twice."""

    draft: torch.Generator
    accept: torch.Generator

    @classmethod
    def from_seed(cls, seed: int, device: torch.device) -> Sampling:
        return cls(
            draft=torch.Generator(device).manual_seed(seed), accept=torch.Generator(device).manual_seed(seed + 1)
        )


class SpeculativeSequence:
    """One sequence being decoded: its tokens, its shared cache, and the two steps of a block.

    Args:
        model: the target.
        input_ids: [1, T] prompt.
        capacity: the most tokens the sequence may ever hold.
        mask: sublayers that drafting skips; None decodes plainly.
        processors: applied position by position to draft and target alike.
        sampling: generators; None decodes greedily.
        past: a dynamic cache to continue from.
    """

    def __init__(
        self, model: PreTrainedModel, input_ids: Tensor, *, capacity: int, mask: SkipMask | None = None,
        draft: PreTrainedModel | None = None, processors: LogitsProcessorList | None = None,
        sampling: Sampling | None = None, past: Cache | None = None,
    ) -> None:  # fmt: skip
        self.target = model
        self.draft_model = draft if draft is not None or mask is None else draft_view(model, mask)
        self.length = input_ids.shape[1]
        self.ids = torch.zeros((1, capacity), dtype=torch.long, device=input_ids.device)
        self.ids[:, : self.length] = input_ids
        self.positions = positions(capacity, input_ids.device)
        self.cache = SharedCache(model, capacity, past)
        self.draft_cache = self.cache.draft(mask) if mask is not None else None
        self.processors = processors or LogitsProcessorList()
        self.sampling = sampling
        self.few_logits = model._supports_logits_to_keep()

    def _forward(self, model: PreTrainedModel, cache: Cache | None, start: int, end: int, keep: int) -> Tensor:
        """Logits [keep, V] of the last `keep` of the tokens start..end, written to the cache."""
        extra: dict[str, Any] = {"logits_to_keep": keep} if self.few_logits and keep < end - start else {}
        out = model(
            input_ids=self.ids[:, start:end], position_ids=self.positions[:, start:end],
            past_key_values=cache, use_cache=cache is not None, **extra,
        )  # fmt: skip
        logits: Tensor = out.logits[0, -keep:]
        return logits

    def _process(self, logits_V: Tensor, end: int) -> Tensor:
        """Scores [V] for the token after position `end`, given the prefix up to it."""
        return self.processors(self.ids[:, :end], logits_V[None].float())[0]  # type: ignore[arg-type,no-any-return]

    @torch.no_grad()
    def draft(self, policy: DraftPolicy, limit: int) -> tuple[list[int], list[Tensor]]:
        """Draft up to min(K, limit) tokens behind the last one; with sampling, also what each was drawn from."""
        assert self.draft_model is not None
        # Without any attention there is no draft cache, and each token needs no more than itself.
        probs: list[Tensor] = []
        threshold = policy.exit_threshold
        first = end = self.length
        for _ in range(min(policy.max_length, limit)):
            scores_V = self._forward(self.draft_model, self.draft_cache, end - 1, end, 1)[0]
            if self.processors:
                scores_V = self._process(scores_V, end)
            sure: Tensor | None = None
            if self.sampling is None:
                token = scores_V.argmax()
                if threshold is not None:
                    sure = (scores_V[token] - scores_V.float().logsumexp(-1)).exp()
            else:
                probs.append(probabilities(scores_V))
                token = torch.multinomial(probs[-1], 1, generator=self.sampling.draft)[0]
                if threshold is not None:
                    sure = probs[-1].max()
            self.ids[0, end] = token
            end += 1
            if threshold is not None and sure is not None and sure.item() < threshold:
                break
        return self.ids[0, first:end].tolist(), probs

    @torch.no_grad()
    def verify(self, drafted: Sequence[int], draft_probs: Sequence[Tensor] = ()) -> Block:
        """Run the target over what is not yet committed, accept, and append the block's tokens.

        With nothing drafted this is one step of plain decoding, and the first time it is the prefill.
        """
        k = len(drafted)
        self.cache.rollback()
        start, end = self.cache.committed, self.length + k
        logits_KV = self._forward(self.target, self.cache.cache, start, end, k + 1)
        scores_KV = logits_KV
        if self.processors:
            scores_KV = torch.stack([self._process(logits_KV[j], self.length + j) for j in range(k + 1)])
        if self.sampling is None:
            target_ids = scores_KV.argmax(-1).tolist()
            n = accept_greedy(list(drafted), target_ids)
            bonus = target_ids[n]
        else:
            target_probs_KV = torch.stack([probabilities(row) for row in scores_KV])
            draft_probs_KV = torch.stack(list(draft_probs)) if k else target_probs_KV[:0]
            n, bonus = accept_sampling(target_probs_KV, draft_probs_KV, list(drafted), self.sampling.accept)
        self.ids[0, self.length + n] = bonus
        self.cache.commit(self.length + n)
        self.length += n + 1
        return Block(tokens=[*drafted[:n], bonus], drafted=k, accepted=n, logits_KV=logits_KV, scores_KV=scores_KV)

    def truncate(self, length: int) -> None:
        """Forget all tokens behind the first `length`; the last one left will be processed again."""
        self.length = length
        self.cache.commit(min(self.cache.committed, length - 1))


def decode(
    sequence: SpeculativeSequence, *, max_length: int, policy: DraftPolicy | None,
    eos_ids: frozenset[int] = frozenset(), should_stop: Callable[[Tensor, Tensor], bool] | None = None,
    stats: DecodeStats | None = None,
) -> Iterator[Block]:  # fmt: skip
    """Yield block after block until an end-of-sequence token, `should_stop`, or `max_length` tokens in all.

    The prompt is processed before the first block, which then holds one token. A block is cut
    where decoding ends; drafts never reach past `max_length`.

    Args:
        policy: how to draft; None, or a sequence without a mask, decodes plainly.
        should_stop: asked after every token with the ids [1, T] so far and the token's scores [1, V].
        stats: counts are added to it; the prefill is no block.
    """
    stats = stats if stats is not None else DecodeStats()
    prefilled = False
    while sequence.length < max_length:
        drafted: list[int] = []
        probs: list[Tensor] = []
        if prefilled and policy is not None and sequence.draft_model is not None:
            drafted, probs = sequence.draft(policy, limit=max_length - sequence.length - 1)
        block = sequence.verify(drafted, probs)
        before = sequence.length - len(block.tokens)
        stop = next(
            (
                i
                for i, token in enumerate(block.tokens)
                if token in eos_ids
                or (should_stop and should_stop(sequence.ids[:, : before + i + 1], block.scores_KV[i : i + 1]))
            ),
            None,
        )
        if stop is not None and stop + 1 < len(block.tokens):
            sequence.truncate(before + stop + 1)
            block = Block(
                tokens=block.tokens[: stop + 1], drafted=block.drafted, accepted=min(block.accepted, stop + 1),
                logits_KV=block.logits_KV, scores_KV=block.scores_KV,
            )  # fmt: skip
        if prefilled:
            stats.blocks[block.drafted, block.accepted] += 1
        stats.committed += len(block.tokens)
        prefilled = True
        yield block
        if stop is not None:
            return
