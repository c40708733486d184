"""Sequences, sublayers and the policy that the tests of serving share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from skipsearch.decoding.sequences import Sequences
from skipsearch.mask import KINDS
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

POLICY = DraftPolicy(ngram=6, never_slower=True)


def sequence_of(model: Any, ids: torch.Tensor, new: int, compiled: Any = None) -> Sequences:
    target = replace(Target.of(model), compiled=compiled)
    sequences = Sequences(target, ids, capacity=ids.shape[1] + new + 40)
    for _ in range(new):
        sequences.verify([0])
    return sequences


def free_of(model: Any) -> tuple[list[Any], int]:
    layers = model.config.num_hidden_layers
    return [(kind, i) for i in range(layers) for kind in KINDS], layers
