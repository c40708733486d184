"""Design: which blocks a profile times, and how one is run."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipsearch.decoding.drafter import Drafter
from skipsearch.decoding.sequences import Sequences
from skipsearch.evaluate.cost import crowding_factor
from skipsearch.mask import KINDS, SkipMask, Sublayer
from skipsearch.model.device import synchronize
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

FEW = 5  # tokens of the longer one of two blocks that separate a draft step from a verify
EAGER = (1, 2, 4, 8, 12)  # tokens whose verify is timed where every number of tokens has kernels of its own
TIMED = 2  # runs of an arm in a turn that are counted
NEVER = 1e-9  # an exit threshold that is checked at every step and never met


@dataclass(frozen=True, slots=True)
class Arm:
    """A block to be timed.

    Attributes:
        mask: number of its mask.
        drafted: tokens that it drafts.
        verified: tokens that are verified; what lies behind the draft is any text.
        with_confidence: whether the draft's confidence is read, as an exit does.
    """

    mask: int
    drafted: int
    verified: int
    with_confidence: bool = False

    def steps(self, masks: list[SkipMask], groups: list[list[Sublayer]], first: float) -> list[float]:
        """How often it contains the rest of a step, an exit check, crowding, and a sublayer of each group."""
        mask = masks[self.mask]
        run = [sum(not mask.skips(*sub) for sub in group) for group in groups]
        counts = (1, int(self.with_confidence), crowding_factor(mask), *run)
        return [(self.drafted + first) * count for count in counts]


@dataclass(frozen=True, slots=True)
class Design:
    """What is timed.

    Attributes:
        arms: drafts of every mask and a verify of every length among them.
        again: fewer, for further contexts: attention and verify alone depend on the context.
        masks: of all densities; the first one is half, the last one is empty.
        groups: sublayers of one cost.
        lengths: tokens whose verify is timed.
        padded: whether a verify costs what the next one of `lengths` does; else what lies between is interpolated.
    """

    arms: list[Arm]
    again: list[Arm]
    masks: list[SkipMask]
    groups: list[list[Sublayer]]
    lengths: list[int]
    padded: bool

    def verify(self, seconds: list[float]) -> list[float]:
        """Of 1, 2, .. tokens, from those of `lengths`."""
        every = range(1, self.lengths[-1] + 1)
        if self.padded:
            return [seconds[next(i for i, length in enumerate(self.lengths) if length >= k)] for k in every]
        return [float(value) for value in np.interp(every, self.lengths, seconds)]


def choose_design(target: Target, max_length: int) -> Design:
    """Arms that separate the costs of drafts and verifies of at most `max_length` tokens."""
    groups, few = build_groups(target), min(FEW, max_length)
    masks = _masks(target.num_layers, groups)
    if target.compiled is None:
        lengths = sorted({min(k, max_length) for k in EAGER})
    else:  # forwards are padded to some widths, of which each is timed once
        lengths = sorted({target.compiled.width_for(k + 1): k for k in range(1, max_length + 1)}.values())
    drafts = [Arm(i, few, lengths[i % len(lengths)]) for i in range(len(masks))]
    short = [Arm(0, 1, length) for length in lengths]
    half = Arm(0, few, lengths[0], with_confidence=True)
    return Design(
        arms=[half, *drafts, short[0], *short[len(drafts) :]], again=[drafts[0], drafts[-1], *short], masks=masks,
        groups=groups, lengths=lengths, padded=target.compiled is not None,
    )  # fmt: skip


def _masks(layers: int, groups: list[list[Sublayer]]) -> list[SkipMask]:
    """One kind dense and the others sparse and the other way round, of every group, between half and empty."""
    rng = random.Random(0)
    masks = [SkipMask(attention=range(0, layers, 2), mlp=range(1, layers, 2), num_layers=layers)]
    for i, _ in enumerate(groups):
        for dense, sparse in ((0.2, 0.8), (0.7, 0.3)):
            shares = [dense if j == i else sparse for j in range(len(groups))]
            chosen = [s for group, share in zip(groups, shares, strict=True) for s in group if rng.random() < share]
            masks.append(SkipMask.from_sublayers(chosen, layers))
    return [*masks, SkipMask(num_layers=layers)]  # without the empty mask, those that skip little would cost too little


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
