"""Traces of tiny models, prices for them, and real decoding to hold replay against."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import torch
from conftest import quiet

from skipsearch import SkipMask
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import DecodeStats
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.trace import DecodeSettings, Trace, record
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

POINT = Point(
    context=64, attention=(2.0,) * 4, mlp=(1.0,) * 4, rest=3.0, exit_check=0.5,
    verify=tuple(15.0 + k for k in range(13)),
)  # fmt: skip


def make_trace(model: Any, prompts: int = 4, new_tokens: int = 20, seed: int = 2) -> Trace:
    rng = random.Random(seed)
    rows = tuple(tuple(rng.randrange(3, 97) for _ in range(rng.randint(5, 12))) for _ in range(prompts))
    return record(Target.of(model), rows, DecodeSettings(new_tokens=new_tokens), quiet)


def really_decode(model: Any, trace: Trace, mask: SkipMask, policy: DraftPolicy) -> Counter[tuple[int, int]]:
    stats = DecodeStats()
    for prompt, continuation in zip(trace.prompts, trace.continuations, strict=True):
        limit = len(prompt) + trace.new_tokens
        sequences = Sequences(Target.of(model), torch.tensor([prompt]), capacity=limit, draft=draft_view(model, mask))
        blocks = decode(sequences, Ending(max_length=limit, eos_ids=frozenset([2])), policy=policy, stats=stats)
        assert tuple(token for block in blocks for token in block.tokens) == continuation
    return stats.blocks
