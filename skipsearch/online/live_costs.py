"""Prices: what drafts and verifies cost, timed on a live sequence in some twenty steps instead of a profile."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from skipsearch.decoding.scheduler import Pace
from skipsearch.decoding.sequences import Sequences
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.profile import timed
from skipsearch.mask import SkipMask

STEPS = 2  # drafted by an arm
LENGTHS = (2, 8)  # of the verifies that are timed; decoding itself tells of the others


def corner_views(model: PreTrainedModel, layers: int) -> dict[str, PreTrainedModel]:
    """Drafts of nothing but attention, nothing but MLP, and nothing at all: their differences are the prices."""
    every = range(layers)
    masks = {
        "attention": SkipMask(mlp=every, num_layers=layers), "mlp": SkipMask(attention=every, num_layers=layers),
        "rest": SkipMask(attention=every, mlp=every, num_layers=layers),
    }  # fmt: skip
    return {name: draft_view(model, mask) for name, mask in masks.items()}


def measure(sequences: Sequences, views: dict[str, PreTrainedModel]) -> tuple[dict[str, float], dict[int, float]]:
    """Seconds of a draft step of each view, and of verifying so many tokens. The sequence is left as it was."""
    drafting, steps, verifies = sequences.draft_model, dict[str, float](), dict[int, float]()
    try:
        for name, view in views.items():
            sequences.draft_with(view)
            steps[name] = timed(sequences, partial(sequences.draft, [STEPS])) / STEPS
    finally:
        sequences.draft_with(drafting)
    for length in LENGTHS:
        probs: Any = None
        if sequences.sampling is not None:
            probs = torch.full((1, length, sequences.vocabulary), 1 / sequences.vocabulary)
            probs = probs.to(sequences.ids.device)
        verifies[length] = timed(sequences, partial(sequences.verify, [length], probs))
    return steps, verifies


def point(steps: dict[str, float], pace: Pace, layers: int, longest: int) -> Point:
    """The measured prices as the cost model's; a verify costs what decoding has seen since."""
    verify = itertools.accumulate((pace.verify_seconds(k) for k in range(longest + 1)), max)
    rest = min(steps.values())
    return Point(
        context=0, rest=rest, exit_check=0.0, verify=tuple(verify),
        attention=((steps["attention"] - rest) / layers,) * layers, mlp=((steps["mlp"] - rest) / layers,) * layers,
    )  # fmt: skip
