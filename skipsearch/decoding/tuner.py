"""Tuner: who may change, while decoding goes on, what drafts. Whatever it chooses, the target verifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from skipsearch.decoding.drafter import Draft, Drafter
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block


class Tuner(Protocol):
    """One model's. Told of single sequences alone; several may be under way at once."""

    def begin(self, sequences: Sequences, temperature: float) -> Drafter:
        """Who drafts for a sequence whose prompt has just been processed; sampled at a temperature, greedy at 0."""

    def after(self, drafter: Drafter, draft: Draft, block: Block, ended: bool) -> None:
        """A block was committed, the sequence's last one if it ended. Drafts may change from here on."""

    def save(self, path: str | Path, name: str | None = None) -> None:
        """Write the mask that was found as a mask file; by this name of the model."""

    def report(self) -> dict[str, Any]:
        """Plain figures of what was done."""
