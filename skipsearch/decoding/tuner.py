"""Tuner: changes what drafts while decoding goes on. The target verifies every choice, so the output stays its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from skipsearch.decoding.drafter import Draft, Drafter
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block


class Tuner(Protocol):
    """The tuner of one model. It sees single sequences, no batches; several may be decoded at once."""

    def begin(self, sequences: Sequences, temperature: float) -> Drafter:
        """The drafter of a sequence whose prompt has just been processed; temperature 0 is greedy."""

    def after(self, drafter: Drafter, draft: Draft, block: Block, ended: bool) -> None:
        """Called after each committed block; the drafter may be changed here. `ended`: it was the last one."""

    def save(self, path: str | Path, name: str | None = None) -> None:
        """Write the mask that was found as a mask file; by this name of the model."""

    def report(self) -> dict[str, Any]:
        """Plain figures of what was done."""
