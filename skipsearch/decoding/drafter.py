"""Drafter: where each block's draft comes from. The sources are the mask, n-grams of the text, or none (plain).

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
from skipsearch.decoding.ngram import NgramIndex
from skipsearch.decoding.policy import ExitRule
from skipsearch.decoding.scheduler import Scheduler
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block
from skipsearch.policy import DraftPolicy

GUESS_FROM = 0.4  # acceptance from which the draft model checks an n-gram


@dataclass(frozen=True, slots=True)
class Draft:
    """What was drafted for one block.

    Attributes:
        drafted: how many tokens of each row; they lie in `ids` behind its last one.
        probs: with sampling, the probabilities [B, K, V] that they were drawn from.
        source: "plain", "mask" or "ngram".
        of_mask: of a single row, how many of the tokens the mask drafted; an n-gram drafted the others.
        match: how many tokens in front of that n-gram agreed with the text.
    """

    drafted: list[int]
    probs: Tensor | None = None
    source: str = "plain"
    of_mask: int = 0
    match: int = 0


class Drafter:
    """Drafts for one batch of sequences, and learns from what is accepted.

    A single sequence may draft from n-grams, and choose between the sources. The rows of a batch draft with the mask.

    Args:
        scheduler: estimates to start from; sequences that follow each other share one.

    Attributes:
        seconds: of the last block.
    """

    def __init__(self, sequences: Sequences, policy: DraftPolicy, scheduler: Scheduler | None = None) -> None:
        self.sequences, self.scheduler, self.seconds = sequences, scheduler or Scheduler(), 0.0
        self.adopt(policy)
        self.single = len(sequences.rows) == 1
        self.index: NgramIndex | None = None
        if policy.ngram and self.single:
            self.index = NgramIndex()
            self.index.extend(sequences.ids[0, : sequences.lengths[0]].tolist())
        self._begun, self._drafted = 0.0, 0.0

    def change(self, view: PreTrainedModel | None, policy: DraftPolicy) -> None:
        """Draft with another mask, or with none, from now on. Estimates of the previous mask are dropped."""
        self.sequences.draft_with(view)
        self.adopt(policy)
        self.scheduler.forget_mask()

    def adopt(self, policy: DraftPolicy) -> None:
        """Draft with another policy from now on."""
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
        if not self.single or not (self.policy.never_slower or self.index):
            return self._by_mask(rooms) if has_mask else nothing
        rates = {"mask": self.scheduler.mask_rate} if has_mask else {}
        following: list[int] = []
        match, length = 0, 0
        if self.index is not None:
            match, following = self.index.lookup(limit=min(self.policy.ngram, rooms[0]))
            if match:
                length, rates["ngram"] = self.scheduler.ngram_plan(match, len(following))
        if self.policy.never_slower or not rates:
            if not self.scheduler.knows_plain and self.scheduler.clock:
                return nothing  # the first step is plain: its seconds are what a draft has to beat
            if self.scheduler.knows_plain or not rates:
                rates["plain"] = self.scheduler.plain_rate
        source = self.scheduler.choose(rates)
        if source == "mask":
            return self._by_mask(rooms)
        if source == "plain":
            return nothing
        self.sequences.put(0, 0, following[:length])
        return Draft([length], self._certain(following[:length]), "ngram", 0, match)

    def _by_mask(self, rooms: list[int]) -> Draft:
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
            if self.index is None:
                return False
            match, _ = self.index.lookup(tokens, 1)
            return match > 2 and self.scheduler.ngram_acceptance(match) >= self.scheduler.mask_acceptance

        drafted, probs = sequences.draft(
            limits, stop if policy.uses_confidence or self.index is not None else None,
            self._guess if self.index is not None and sequences.selection.sampling is None else None,
        )  # fmt: skip
        match = 0
        of_mask = drafted[0]
        # No block is longer than a mask or an n-gram may draft alone: only such widths are compiled.
        room = min(rooms[0], max(policy.max_length, policy.ngram)) - of_mask
        if self.index is not None and room > 0:
            match, following = self.index.lookup(tokens, min(policy.ngram, room))
            chance = rules[0].chance if policy.curve else self.scheduler.mask_acceptance**of_mask
            more = self.scheduler.tail(chance, of_mask, match, len(following)) if match else 0
            if more:
                sequences.put(0, of_mask, following[:more])
                drafted = [of_mask + more]
                if probs is not None:
                    certain = self._certain(following[:more])
                    assert certain is not None
                    probs = torch.cat([probs, certain], 1)
        return Draft(drafted, probs, "mask", of_mask, match)

    def _guess(self, drafted: list[int]) -> list[int]:
        """An n-gram of `GUESS` tokens that the draft model checks in one forward, or none."""
        assert self.index is not None
        match, following = self.index.lookup(drafted, GUESS)
        return following if match and self.scheduler.ngram_acceptance(match) >= GUESS_FROM else []

    def _certain(self, tokens: list[int]) -> Tensor | None:
        """Draft probabilities [1, K, V] of a source without sampling: 1 for each of these tokens; None if greedy."""
        if self.sequences.selection.sampling is None:
            return None
        ids = torch.tensor([tokens], device=self.sequences.ids.device)
        return torch.nn.functional.one_hot(ids, self.sequences.target.vocabulary).float()

    def learn(self, draft: Draft, blocks: list[Block]) -> None:
        """Update the estimates with the outcome of a draft. To be called right after its verify."""
        self.seconds = seconds = time.perf_counter() - self._begun
        if self.single and self.index is None and self.sequences.draft_model is None:
            if self.scheduler.clock:
                self.scheduler.observe_verify(0, seconds)
            return
        if not self.single:
            for block in blocks:
                self.rules[block.row].learn(block.drafted, block.accepted)
            return
        block = blocks[0]
        # The exit rule learns from what the mask drafted, not from an n-gram behind it or in its place.
        self.rules[block.row].learn(min(draft.of_mask, block.drafted), min(draft.of_mask, block.accepted))
        if self.index is not None:
            self.index.extend(block.tokens)
        # On a GPU a draft without an exit does not wait for the device: the clock cannot separate it from its verify.
        apart = draft.source != "mask" or self.policy.uses_confidence or self.sequences.ids.device.type == "cpu"
        self.scheduler.learn(
            draft.source, of_mask=draft.of_mask, match=draft.match, drafted=block.drafted, accepted=block.accepted,
            seconds=seconds, verify_seconds=time.perf_counter() - self._drafted if apart else None,
        )  # fmt: skip
