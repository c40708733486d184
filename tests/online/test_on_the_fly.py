"""Search while serving: it keeps to its share of the time, changes no output, and can be saved."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from skipsearch import SkipMask, load_mask, self_speculative
from skipsearch.errors import DecodingError
from skipsearch.online import incumbent as incumbents
from skipsearch.online import tuner as tuning
from skipsearch.online.budget import Budget
from skipsearch.online.tuner import OnTheFly


@pytest.mark.parametrize("sampled", [False, True])
def test_output_stays_the_targets_while_masks_change(demo: Any, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents scratch keys of scoring, or a change of masks inside a sequence, from reaching the output."""
    monkeypatch.setattr(incumbents, "PAYS", 0.0)  # whatever is tried is served
    monkeypatch.setattr(incumbents, "SIGNIFICANT", -9.0)
    method = self_speculative("auto", share=0.9, backend="eager", never_slower=False)
    for text in ("def read_config(path):\n", "import os\n\nclass Walker:\n", "for name in names:\n"):
        inputs = demo.tokenizer(text, return_tensors="pt")
        settings = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if sampled:
            settings |= {"do_sample": True, "temperature": 0.7}
        out = demo.model.generate(**inputs, custom_generate=method, **settings)
        if not sampled:
            assert torch.equal(out, demo.model.generate(**inputs, **settings))
    report = method.tuner_for(demo.model).report()
    assert report["passes"] >= 6 and len(report["events"]) >= 2 and 0 < report["share"] < 1.5


def test_search_keeps_to_its_share(demo: Any) -> None:
    """Prevents a search that costs more than it may."""
    method = self_speculative("auto", share=0.5, backend="eager", ngram=0)
    tuner = method.tuner_for(demo.model)
    for text in ("def read_config(path):\n", "import os\n", "class Node:\n"):
        inputs = demo.tokenizer(text, return_tensors="pt")
        demo.model.generate(
            **inputs, custom_generate=method, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
        )  # fmt: skip
    budget = tuner.budget
    assert budget.counts["pass"] >= 1
    longest = max(budget.seconds.values())  # what is begun is finished
    assert budget.searching <= 0.5 * budget.decoding + 3 * longest
    nothing = self_speculative("auto", share=0.0, backend="eager")
    inputs = demo.tokenizer("import os\n", return_tensors="pt")
    demo.model.generate(**inputs, custom_generate=nothing, max_new_tokens=120, do_sample=False)
    assert nothing.tuner_for(demo.model).budget.counts["pass"] == 0


def test_a_budget_lets_a_step_begin_only_if_it_ends_within_the_share() -> None:
    """Prevents steps of unknown length from being free, and a part of the share from being taken for all of it."""
    budget = Budget(0.1)
    budget.decoding, budget.improvable = 20.0, 10.0
    with budget.search():
        assert budget.allows("pass", 0.1) and not budget.allows("pass", 0.2)  # six plain steps, it is thought
        budget.seconds["pass"] = 0.4
        assert budget.allows("pass", 9.9, times=2) and not budget.allows("pass", 9.9, times=3)
        assert budget.allows("pass", 9.9, part=0.5) and not budget.allows("pass", 9.9, part=0.3)
        budget.improvable = 1000.0  # what was not spent is not saved up
        assert budget.allows("pass", 0.01, times=2) and not budget.allows("states", 0.5, times=99)
        budget.searching += 0.6
        assert not budget.allows("pass", 0.01)
    with budget.step("pass"):
        pass
    assert budget.counts["pass"] == 1 and budget.seconds["pass"] < 0.4 and budget.spent > 0


def test_what_was_found_can_be_saved(demo: Any, tmp_path: Any) -> None:
    """Prevents a search that is lost with its process."""
    method = self_speculative("auto", backend="eager")
    tuner = method.tuner_for(demo.model)
    with pytest.raises(DecodingError, match="no mask was found"):
        tuner.save(tmp_path / "mask.json")
    assert isinstance(tuner, OnTheFly)
    domain = tuner.domains.of(torch.tensor([5, 6, 7]))
    found = domain.incumbent
    found.mask = SkipMask(attention=[3], mlp=[2], num_layers=20)
    found.policy = replace(found.policy, max_length=6, exit_threshold=0.4, adaptive=True)
    tuner.save(tmp_path / "mask.json")
    file = load_mask(tmp_path / "mask.json")
    assert file.mask == found.mask and file.draft.max_length == 6 and file.evidence is None
    again = self_speculative("auto", start=tmp_path / "mask.json", backend="eager").tuner_for(demo.model)
    assert isinstance(again, OnTheFly) and again.domains.first.mask == found.mask


def test_wrong_settings_are_named() -> None:
    """Prevents a start that is ignored, and a share that can never be kept."""
    with pytest.raises(DecodingError, match="start"):
        self_speculative(None, start="mask.json")
    with pytest.raises(DecodingError, match=r"share is 0\.1"):
        self_speculative(None, share=0.1)
    for setting in ("beam_width", "threshold"):
        with pytest.raises(DecodingError, match=f"{setting} is 1, which goes with"):
            self_speculative(None, **{setting: 1})
    with pytest.raises(DecodingError, match="backend is 'fast'"):
        self_speculative(None, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(DecodingError, match="share is 1"):
        self_speculative("auto", share=1)
    with pytest.raises(DecodingError, match="nothing is searched"):
        self_speculative(None).tuner_for(object())  # type: ignore[arg-type]
    assert math.isclose(tuning.SHARE, 0.05)
