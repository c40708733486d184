"""The trail of a decoded sequence: which source each token came from, and what was rejected."""

from __future__ import annotations

from typing import Any

import pytest

from skipsearch import SkipMask
from skipsearch.decoding.rule import SelectionRule
from skipsearch.evaluate.timing import our_arm
from skipsearch.policy import DraftPolicy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_marks_account_for_every_token(demo: Any, temperature: float) -> None:
    """Prevents marks that slip by a token, and rejected tokens that are lost or counted as the text's own."""
    mask, rule = SkipMask(mlp=range(4, 14), num_layers=20), SelectionRule.of(demo.model, temperature)
    arm = our_arm(demo.target, mask, DraftPolicy(max_length=4, ngram=10), rule)
    run = arm(tuple(demo.tokenizer("def main(argv):\n    for a in argv:\n        print(a)\n")["input_ids"]), 64)
    kept = [mark for mark in run.marks if mark.islower()]
    assert len(kept) == len(run.ids) and len(run.marks) - len(kept) == len(run.rejected) > 0
    assert kept.count("m") == run.stats.accepted_from["mask"] > 0
    assert kept.count("n") == run.stats.accepted_from["ngram"] and set(run.marks.lower()) <= set("mnt")
    assert run.marks.startswith("t") and not run.stats.trails
    own = our_arm(demo.target, None, None, rule)((5, 6, 7), 8)
    assert set(own.marks) == {"t"} and not own.rejected


def test_what_is_rejected_is_not_what_the_target_chose(demo: Any) -> None:
    """Prevents rejected tokens of another block from being shown."""
    mask = SkipMask(mlp=range(2, 18), num_layers=20)
    run = our_arm(demo.target, mask, DraftPolicy(max_length=3))((5, 6, 7, 8), 48)
    ids, rejected, first = iter(run.ids), iter(run.rejected), None
    for mark in run.marks:
        if mark.isupper():
            token = next(rejected)
            first = token if first is None else first
        else:
            token = next(ids)
            assert token != first
            first = None
