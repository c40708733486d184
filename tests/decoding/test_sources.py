"""Token sources: another one is a class and a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from skipsearch import SkipMask, self_speculative
from skipsearch.decoding.sources import SOURCES

MASK = SkipMask(attention=[0, 2], mlp=[1], num_layers=4)


class Repeat:
    """Proposes the last token again."""

    name, longest, first_guess, reliable = "repeat", 3, (0.5,), 0

    def __init__(self) -> None:
        self.last = 0

    def extend(self, tokens: Sequence[int]) -> None:
        self.last = tokens[-1]

    def propose(self, limit: int, drafted: Sequence[int] = ()) -> tuple[list[int], int]:
        return [drafted[-1] if drafted else self.last] * limit, 0


@pytest.mark.parametrize("settings", [{}, {"ngram": 6}, {"ngram": 6, "never_slower": True}], ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_another_source_is_chosen_counted_and_changes_no_token(
    tiny: Any, ids: torch.Tensor, mask: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a source from being counted as another one, and the output from depending on what drafts."""
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 60, "do_sample": False}
    expected = tiny("llama").generate(ids, **options)
    monkeypatch.setitem(SOURCES, "repeat", lambda _policy: Repeat())
    method = self_speculative(mask, **settings)
    assert torch.equal(tiny("llama").generate(ids, custom_generate=method, **options), expected)
    stats = method.stats
    assert stats.blocks_from["repeat"] + stats.accepted_from["repeat"] > 0
    assert sum(stats.accepted_from.values()) == stats.accepted
    assert sum(stats.blocks_from.values()) == stats.verifies
