"""Drafter: where each block's draft comes from. The mask drafts, or a token source (n-grams), or none (plain).

The target verifies every draft in the same way, so the output does not depend on its source.
Shapes: B rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skipsearch.compiled.model import GUESS
from skipsearch.decoding.exit_rule import ExitRule
from skipsearch.decoding.scheduler import Scheduler
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.sources import MASK, PLAIN, Part, TokenSource, token_sources
from skipsearch.decoding.stats import Block
from skipsearch.policy import DraftPolicy

GUESS_FROM = 0.4  # acceptance from which the draft model checks the tokens of a source


@dataclass(frozen=True, slots=True)
class Draft:
    """What was drafted for one block.

    Attributes:
        drafted: how many tokens of each row; they lie in `ids` behind its last one.
        probs: with sampling, the probabilities [B, K, V] that they were drawn from.
        parts: which source drafted how many of them, in order; of a batch, as many as its longest row's.
    """

    drafted: list[int]
    probs: Tensor | None = None
    parts: tuple[Part, ...] = ()

    @property
    def source(self) -> str:
        """The source that began it."""
        return self.parts[0].source if self.parts else PLAIN

    @property
    def of_mask(self) -> int:
        """How many tokens the mask drafted."""
        return sum(part.tokens for part in self.parts if part.source == MASK)

    @property
    def free(self) -> bool:
        """Whether it took no draft step."""
        return self.source not in (MASK, PLAIN)


class Drafter:
    """Drafts for one batch of sequences, and learns from what is accepted.

    A single sequence may draft from token sources, and choose between them, the mask and plain steps. The rows of a
    batch draft with the mask.

    Args:
        scheduler: estimates to start from; sequences that follow each other share one.

    Attributes:
        sources: token sources that the policy switches on; of a batch, none.
        seconds: of the last block.
    """

    def __init__(self, sequences: Sequences, policy: DraftPolicy, scheduler: Scheduler | None = None) -> None:
        self.sequences, self.scheduler, self.seconds = sequences, scheduler or Scheduler(), 0.0
        self.adopt(policy)
        self.single = len(sequences.rows) == 1
        self.sources = token_sources(policy) if self.single else []
        for source in self.sources:
            source.extend(sequences.ids[0, : sequences.lengths[0]].tolist())
        self._begun, self._drafted = 0.0, 0.0

    def change(self, view: PreTrainedModel | None, policy: DraftPolicy) -> None:
        """Draft with another mask, or with none, from now on. Estimates of the previous mask are dropped."""
        self.sequences.draft_with(view)
        self.adopt(policy)
        self.scheduler.forget_mask()

    def adopt(self, policy: DraftPolicy) -> None:
        """Draft with another length and exit from now on; the token sources stay."""
        self.policy = policy
        self.rules = {row: ExitRule(policy) for row in self.sequences.rows}

    def draft(self, rooms: list[int]) -> Draft:
        """Draft at most rooms[b] tokens for each row."""
        self._begun = time.perf_counter()
        draft = self._draft(rooms)
        self._drafted = time.perf_counter()
        return draft

    def _draft(self, rooms: list[int]) -> Draft:
        nothing = Draft([0] * len(rooms))
        has_mask = self.sequences.draft_model is not None
        if max(rooms) < 1:
            return nothing
        if not self.single or not (self.policy.never_slower or self.sources):
            return self._by_mask(rooms) if has_mask else nothing
        rates = {MASK: self.scheduler.mask_rate} if has_mask else {}
        plans: dict[str, tuple[list[int], Part]] = {}
        for source in self.sources:
            if (proposal := source.propose(min(source.longest, rooms[0]))) is not None:
                tokens, reliability = proposal
                acceptance = self.scheduler.acceptance(source, reliability)
                length, rates[source.name] = self.scheduler.plan(acceptance, len(tokens))
                plans[source.name] = tokens[:length], Part(source.name, length, reliability)
        if self.policy.never_slower or not rates:
            if not self.scheduler.knows_plain and self.scheduler.clock:
                return nothing  # the first step is plain: its seconds are what a draft has to beat
            if self.scheduler.knows_plain or not rates:
                rates[PLAIN] = self.scheduler.plain_rate
        chosen = self.scheduler.choose(rates)
        if chosen == MASK:
            return self._by_mask(rooms)
        if chosen == PLAIN:
            return nothing
        tokens, part = plans[chosen]
        self.sequences.put(0, 0, tokens)
        return Draft([len(tokens)], self._certain(tokens), (part,))

    def _by_mask(self, rooms: list[int]) -> Draft:
        """A draft of the mask; a token source may continue it."""
        sequences, policy = self.sequences, self.policy
        limits = [min(room, policy.max_length) for room in rooms]
        rules = [self.rules[row] for row in sequences.rows]
        for rule in rules:
            rule.begin()
        tokens: list[int] = []

        def stop(place: int, token: int, confidence: float) -> bool:
            tokens.append(token)
            if policy.uses_confidence and rules[place].stops(confidence):
                return True
            return any(self._continues(source, tokens) for source in self.sources)

        drafted, probs = sequences.draft(
            limits, stop if policy.uses_confidence or self.sources else None,
            self._guess if self.sources and sequences.selection.sampling is None else None,
        )  # fmt: skip
        draft = Draft(drafted, probs, (Part(MASK, max(drafted)),))
        chance = rules[0].chance if policy.curve else self.scheduler.mask_acceptance**draft.of_mask
        for source in self.sources:
            continued = self._continue(draft, source, tokens, rooms[0], chance)
            if continued is not draft:
                return continued
        return draft

    def _continues(self, source: TokenSource, drafted: list[int]) -> bool:
        """Whether the mask's draft should end here, because a source can continue it."""
        if (proposal := source.propose(1, drafted)) is None or proposal[1] < source.reliable:
            return False
        return self.scheduler.acceptance(source, proposal[1]) >= self.scheduler.mask_acceptance

    def _continue(self, draft: Draft, source: TokenSource, drafted: list[int], room: int, chance: float) -> Draft:
        """The mask's draft with as many tokens of a source behind it as pay, given the chance that it is accepted."""
        # No block is longer than the mask or the source may draft alone; the drafts of such widths are compiled.
        room = min(room, max(self.policy.max_length, source.longest)) - draft.of_mask
        proposal = source.propose(min(source.longest, room), drafted) if room > 0 else None
        if proposal is None:
            return draft
        tokens, reliability = proposal
        more = self.scheduler.tail(chance, draft.of_mask, self.scheduler.acceptance(source, reliability), len(tokens))
        if not more:
            return draft
        self.sequences.put(0, draft.of_mask, tokens[:more])
        probs, certain = draft.probs, self._certain(tokens[:more])
        if probs is not None and certain is not None:
            probs = torch.cat([probs, certain], 1)
        return Draft([draft.of_mask + more], probs, (*draft.parts, Part(source.name, more, reliability)))

    def _guess(self, drafted: list[int]) -> list[int]:
        """`GUESS` tokens of a source that the draft model checks in one forward, or none."""
        for source in self.sources:
            tokens, reliability = source.propose(GUESS, drafted) or ([], 0)
            if len(tokens) == GUESS and self.scheduler.acceptance(source, reliability) >= GUESS_FROM:
                return tokens
        return []

    def _certain(self, tokens: list[int]) -> Tensor | None:
        """Draft probabilities [1, K, V] of a source without sampling: 1 for each of these tokens; None if greedy."""
        if self.sequences.selection.sampling is None:
            return None
        ids = torch.tensor([tokens], device=self.sequences.ids.device)
        return torch.nn.functional.one_hot(ids, self.sequences.target.vocabulary).float()

    def learn(self, draft: Draft, blocks: list[Block]) -> None:
        """Update the estimates with the outcome of a draft. To be called right after its verify."""
        self.seconds = seconds = time.perf_counter() - self._begun
        if self.single and not self.sources and self.sequences.draft_model is None:
            if self.scheduler.clock:
                self.scheduler.observe_verify(0, seconds)
            return
        if not self.single:
            for block in blocks:
                self.rules[block.row].learn(block.drafted, block.accepted)
            return
        block = blocks[0]
        # The exit rule learns from what the mask drafted, not from a source behind it or in its place.
        self.rules[block.row].learn(min(draft.of_mask, block.drafted), min(draft.of_mask, block.accepted))
        for source in self.sources:
            source.extend(block.tokens)
        # On a GPU a draft without an exit does not wait for the device: the clock cannot separate it from its verify.
        apart = draft.source != MASK or self.policy.uses_confidence or self.sequences.ids.device.type == "cpu"
        self.scheduler.learn(
            draft.parts, block.accepted, seconds, time.perf_counter() - self._drafted if apart else None
        )
