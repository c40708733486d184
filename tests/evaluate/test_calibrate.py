"""Calibration of the cost model against decoding."""

from __future__ import annotations

from functools import partial
from typing import Any

from conftest import quiet


def test_calibration_holds_predictions_against_decoding(shallow: Any, monkeypatch: Any) -> None:
    """Prevents a verdict on the cost model that rests on too few masks, one context, or no plain decoding."""
    from skipsearch.evaluate import calibrate as module
    from skipsearch.search.options import SearchOptions
    from skipsearch.search.prepare import chosen_prompts

    monkeypatch.setattr(module, "PROMPTS", 2)
    monkeypatch.setattr(module, "TOKENS", 10)
    monkeypatch.setattr(module, "profile", partial(module.profile, seconds=1))  # how it is timed: see test_profile.py
    monkeypatch.setattr(module, "paying_forms", lambda _seconds: ["int8"])  # the clock decides nothing here
    prompts = chosen_prompts(shallow.target, shallow.tokenizer, SearchOptions()).calibration
    data = module.calibrate(shallow.target, prompts, quiet, plans=6, rounds=1)
    short, long = data["contexts"]
    assert short["context"] == 64 < long["context"] and data["backend"] == "eager"
    skipped = [row["attention"] + row["mlp"] for row in long["rows"]]
    assert len(skipped) == 6 and skipped[0] <= 2 and skipped[-1] >= 6
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in short["rows"])
    assert 0.3 < short["plain"][0] / short["plain"][1] < 3
