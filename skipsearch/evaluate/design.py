"""Design: which blocks a profile times, and how one is run."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipsearch.decoding.drafter import Drafter
from skipsearch.decoding.sequences import Sequences
from skipsearch.evaluate.cost import crowding_factor, runs
from skipsearch.mask import KINDS, SkipMask, Sublayer
from skipsearch.model.device import synchronize
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan, Form, HeadForm, Quantised
from skipsearch.policy import DraftPolicy

FEW = 5  # tokens of the longer one of two blocks that separate a draft step from a verify
EAGER = (1, 2, 4, 8, 12)  # tokens whose verify is timed where every number of tokens has kernels of its own
FEWER = 8  # the smaller one of two heads that are timed has so many times fewer tokens
TIMED = 2  # runs of an arm in a turn that are counted
NEVER = 1e-9  # an exit threshold that is checked at every step and never met


@dataclass(frozen=True, slots=True)
class Arm:
    """A block to be timed.

    Attributes:
        plan: number of its plan.
        drafted: tokens that it drafts.
        verified: tokens that are verified; what lies behind the draft is any text.
        with_confidence: whether the draft's confidence is read, as an exit does.
    """

    plan: int
    drafted: int
    verified: int
    with_confidence: bool = False


@dataclass(frozen=True, slots=True)
class Design:
    """What is timed.

    Attributes:
        arms: drafts of every plan and a verify of every length among them.
        again: fewer, for further contexts: attention and verify alone depend on the context.
        plans: of all densities and forms; the first one skips half, the second one nothing.
        groups: sublayers of one cost.
        forms: quantised forms that are priced.
        heads: heads that are priced, as (form, tokens to choose from); the full one is first.
        lengths: tokens whose verify is timed.
        padded: whether a verify costs what the next one of `lengths` does; else what lies between is interpolated.
    """

    arms: list[Arm]
    again: list[Arm]
    plans: list[DraftPlan]
    groups: list[list[Sublayer]]
    forms: list[Quantised]
    heads: list[tuple[HeadForm, int]]
    lengths: list[int]
    padded: bool

    def verify(self, seconds: list[float]) -> list[float]:
        """Of 1, 2, .. tokens, from those of `lengths`."""
        every = range(1, self.lengths[-1] + 1)
        if self.padded:
            return [seconds[next(i for i, length in enumerate(self.lengths) if length >= k)] for k in every]
        return [float(value) for value in np.interp(every, self.lengths, seconds)]

    def steps(self, arm: Arm, first: float) -> list[float]:
        """How often an arm contains each unknown: heads, exit check, crowding, mixing, and each form of each group."""
        plan = self.plans[arm.plan]
        whole = self.heads[0][1]
        head = (plan.head, whole if plan.head_ids is None else len(plan.head_ids))
        counts = [float(head == other) for other in self.heads]
        counts += [float(arm.with_confidence), crowding_factor(plan), plan.quantises * runs(plan)]
        every: list[Form] = ["run", *self.forms]
        for form in every:
            of_form = set(plan.of_form(form))
            counts += [float(sum(sub in of_form for sub in group)) for group in self.groups]
        return [(arm.drafted + first) * count for count in counts]


def choose_design(target: Target, max_length: int, forms: Sequence[Quantised] = ()) -> Design:
    """Arms that separate the costs of drafts and verifies of at most `max_length` tokens.

    Args:
        forms: quantised forms to price beside running and skipping, of sublayers and of the head.
    """
    groups, few = build_groups(target), min(FEW, max_length)
    plans, heads = _plans(target, groups, forms)
    if target.compiled is None:
        lengths = sorted({min(k, max_length) for k in EAGER})
    else:  # forwards are padded to some widths, of which each is timed once
        lengths = sorted({target.compiled.width_for(k + 1): k for k in range(1, max_length + 1)}.values())
    drafts = [Arm(i, few, lengths[i % len(lengths)]) for i in range(len(plans))]
    short = [Arm(0, 1, length) for length in lengths]
    half = Arm(0, few, lengths[0], with_confidence=True)
    return Design(
        arms=[half, *drafts, short[0], *short[len(drafts) :]], again=[drafts[0], drafts[1], *short], plans=plans,
        groups=groups, forms=list(forms), heads=heads, lengths=lengths, padded=target.compiled is not None,
    )  # fmt: skip


def _plans(
    target: Target, groups: list[list[Sublayer]], forms: Sequence[Quantised]
) -> tuple[list[DraftPlan], list[tuple[HeadForm, int]]]:
    """One kind dense and the others sparse and the other way round, of every group and form; and each head."""
    rng, layers = random.Random(0), target.num_layers

    def some(shares: list[float]) -> SkipMask:
        chosen = [s for group, share in zip(groups, shares, strict=True) for s in group if rng.random() < share]
        return SkipMask.from_sublayers(chosen, layers)

    def uneven() -> Iterator[SkipMask]:
        for i, _ in enumerate(groups):
            for dense, sparse in ((0.2, 0.8), (0.7, 0.3)):
                yield some([dense if j == i else sparse for j in range(len(groups))])

    half = SkipMask(attention=range(0, layers, 2), mlp=range(1, layers, 2), num_layers=layers)
    every, none = SkipMask.from_bits([True] * 2 * layers), SkipMask(num_layers=layers)
    # Without the empty mask, those that skip little would cost too little.
    plans = [DraftPlan(half), DraftPlan(none), *map(DraftPlan, uneven())]
    tokens = target.vocabulary
    heads: list[tuple[HeadForm, int]] = [("full", tokens)]
    few = max(1, tokens // FEWER // 16 * 16)  # int4 takes rows by 16
    for form in forms:
        whole = SkipMask(attention=range(0, layers, 2), mlp=range(0, layers, 2), num_layers=layers)
        heads += [(form, few), (form, tokens)]
        plans += [
            DraftPlan.in_form(form, every, head=form), DraftPlan.in_form(form, whole),
            DraftPlan.in_form(form, every, head=form, head_ids=range(few)),
            *(DraftPlan.in_form(form, every, skip) for skip in uneven()),
        ]  # fmt: skip
    if forms:
        heads.append(("full", few))
        plans.append(DraftPlan(half, head_ids=range(few)))
    return plans, heads


def timed_arm(sequence: Sequences, arm: Arm | None) -> list[tuple[float, float]]:
    """Seconds of draft and verify in a few blocks in a row, after one that is not counted; None: of a plain step."""
    return [_timed_block(sequence, arm) for _ in range(TIMED + 1)][1:]


def _timed_block(sequence: Sequences, arm: Arm | None) -> tuple[float, float]:
    """Draft, put other tokens behind, verify: the work of a block whatever is accepted.

    The device is waited for between the two; on a GPU serving does so only if an exit reads the draft's confidence.
    """
    length, drafting, ahead = sequence.lengths[0], 0.0, 0
    probs: Tensor | None = None
    if arm is not None:
        policy = DraftPolicy(max_length=arm.drafted, exit_threshold=NEVER if arm.with_confidence else None)
        drafter = Drafter(sequence, policy)
        synchronize(sequence.target.device)
        begin = time.perf_counter()
        probs = drafter.draft([arm.drafted]).probs
        synchronize(sequence.target.device)
        drafting, ahead = time.perf_counter() - begin, max(arm.verified, 1)
        if (more := ahead - arm.drafted) > 0:
            sequence.put(0, arm.drafted, [0] * more)
        if probs is not None:
            probs = torch.cat([probs, probs[:, -1:].expand(-1, max(0, more), -1)], 1)[:, :ahead]
    synchronize(sequence.target.device)
    begin = time.perf_counter()
    sequence.verify([ahead], probs)
    synchronize(sequence.target.device)
    verifying = time.perf_counter() - begin
    sequence.truncate(0, length)
    return drafting, verifying


def build_groups(target: Target) -> list[list[Sublayer]]:
    """Sublayers in groups of the same kind and build: those of one group cost the same."""
    groups: dict[Any, list[Sublayer]] = {}
    for kind in KINDS:
        for i, layer in enumerate(target.layers):
            modules = [getattr(layer, name) for name in target.sublayers.child[kind]]
            shapes = tuple(tuple(p.shape) for module in modules for p in module.parameters())
            window = target.attention.windows[i] if kind == "attention" else None
            groups.setdefault((kind, type(modules[0]), shapes, window), []).append((kind, i))
    return list(groups.values())
