"""LiveCosts: what drafts and verifies cost, timed on a sequence that is being served, in some twenty steps."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch

from skipsearch.decoding.scheduler import Scheduler
from skipsearch.decoding.sequences import Sequences
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.clock import timed
from skipsearch.evaluate.cost import Point
from skipsearch.mask import SkipMask
from skipsearch.model.target import Target

STEPS = 2  # drafted by an arm
LENGTHS = (2, 8)  # of the verifies that are timed; decoding measures the others
LONGER = 2  # contexts so many times as long are measured anew: attention costs more there


class LiveCosts:
    """Costs of one model, as far as they are known.

    Args:
        target: is not kept; views of it are.

    Attributes:
        views: drafts of nothing but attention, nothing but MLP, and nothing at all; their differences are the costs.
        steps: seconds of a draft step with each view; empty before the first measurement.
        verifies: seconds of verifying so many drafted tokens.
        context: tokens attended to when they were measured.
    """

    def __init__(self, target: Target) -> None:
        self.layers = layers = target.num_layers
        every = range(layers)
        masks = {
            "attention": SkipMask(mlp=every, num_layers=layers), "mlp": SkipMask(attention=every, num_layers=layers),
            "rest": SkipMask(attention=every, mlp=every, num_layers=layers),
        }  # fmt: skip
        self.views = {name: draft_view(target.model, mask) for name, mask in masks.items()}
        self.steps: dict[str, float] = {}
        self.verifies: dict[int, float] = {}
        self.context = 0

    def outgrown(self, length: int) -> bool:
        """Whether they are too low for a context of so many tokens."""
        return length > LONGER * self.context

    def measure(self, sequences: Sequences) -> None:
        """Time steps on a sequence, which is left as it was. Of repeated readings the lowest counts."""
        steps, verifies = self._time(sequences)
        if self.outgrown(sequences.lengths[0]):
            self.steps, self.verifies, self.context = steps, verifies, sequences.lengths[0]
        self.steps = {name: min(seconds, self.steps[name]) for name, seconds in steps.items()}
        self.verifies = {k: min(seconds, self.verifies.get(k, seconds)) for k, seconds in verifies.items()}

    def _time(self, sequences: Sequences) -> tuple[dict[str, float], dict[int, float]]:
        drafting, steps, verifies = sequences.draft_model, dict[str, float](), dict[int, float]()
        try:
            for name, view in self.views.items():
                sequences.draft_with(view)
                steps[name] = timed(sequences, partial(sequences.draft, [STEPS])) / STEPS
        finally:
            sequences.draft_with(drafting)
        for length in LENGTHS:
            probs: Any = None
            if sequences.selection.sampling is not None:
                vocabulary = sequences.target.vocabulary
                probs = torch.full((1, length, vocabulary), 1 / vocabulary, device=sequences.target.device)
            verifies[length] = timed(sequences, partial(sequences.verify, [length], probs))
        return steps, verifies

    def point(self, scheduler: Scheduler, longest: int) -> Point:
        """As a `Point` of the cost model; a verify costs what the scheduler has measured."""
        verify = itertools.accumulate((scheduler.verify_seconds(k) for k in range(longest + 1)), max)
        rest, layers = min(self.steps.values()), self.layers
        return Point(
            context=0, rest=rest, exit_check=0.0, verify=tuple(verify),
            attention=((self.steps["attention"] - rest) / layers,) * layers,
            mlp=((self.steps["mlp"] - rest) / layers,) * layers,
        )  # fmt: skip
