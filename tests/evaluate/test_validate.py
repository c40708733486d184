"""Validation: intervals, early ends, and going on after a stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import quiet

from skipsearch import DraftPlan, SkipMask
from skipsearch.decoding.stats import DecodeStats
from skipsearch.evaluate import validate as module
from skipsearch.evaluate.looks import interval
from skipsearch.evaluate.timing import Run
from skipsearch.evaluate.trace import DecodeSettings
from skipsearch.evaluate.validate import MASK, NGRAMS, SERVED, Validation, evidence
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

SKIP = DraftPlan(SkipMask(mlp=[1], num_layers=4))
PLANS: Any = {MASK: (SKIP, DraftPolicy()), NGRAMS: (None, DraftPolicy.ngrams_alone())}
PROMPTS = tuple((5, 6, 7 + i) for i in range(20))
Make = Callable[..., Validation]


@pytest.fixture
def validation(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Make, list[tuple[str, int]]]:
    """Validations whose arms take made-up seconds: plain 1 a prompt, the others what `speeds` says."""
    calls: list[tuple[str, int]] = []

    def make(speeds: dict[str, float], rounds: int = 1, path: Path | None = None, stop: int = 10**9) -> Validation:
        def arm(_target: Any, plan: Any = None, policy: Any = None, rule: Any = None) -> Any:
            name = "plain" if policy is None else MASK if plan is not None else NGRAMS

            def run(prompt: Any, new_tokens: int) -> Run:
                if new_tokens != 16:  # no warm-up
                    calls.append((name, prompt[-1] - 7))
                    if len(calls) > stop:
                        raise KeyboardInterrupt
                wobble = 1 + 0.01 * ((prompt[-1] * 7) % 5)
                stats = DecodeStats(committed=new_tokens)
                stats.blocks[2, 1] += 3
                uneven = 0.9 + 0.2 * (prompt[-1] % 2) if name == NGRAMS else 1.0
                seconds = uneven * wobble / speeds.get(name, 1.0)
                return Run(seconds=seconds, tokens=new_tokens, prefill=0.1, ids=(1, 2), stats=stats)

            return run

        monkeypatch.setattr(module, "our_arm", arm)
        settings = DecodeSettings(new_tokens=40, rounds=rounds)
        return Validation(Target.of(tiny("llama")), PROMPTS, PLANS, settings, path)

    return make, calls


def test_interval_covers_the_ratio_and_narrows() -> None:
    """Prevents an interval of a mean of ratios, or one that ignores pairing."""
    import numpy as np

    rng = np.random.default_rng(0)
    plain = rng.uniform(1, 3, 40)
    low, high = interval(plain, plain / 1.5, 0)
    assert low == pytest.approx(1.5) and high == pytest.approx(1.5)
    noisy = plain / 1.5 * rng.uniform(0.8, 1.25, 40)
    low, high = interval(plain, noisy, 0)
    assert low < plain.sum() / noisy.sum() < high and high - low < 0.3
    few = interval(plain[:8], noisy[:8], 0)
    assert few[1] - few[0] > high - low


def test_a_clear_result_ends_the_timing(validation: Any) -> None:
    """Prevents prompts from being timed whose verdict is known, and an end before all arms are decided."""
    make, calls = validation
    found = make({MASK: 0.7, NGRAMS: 1.6}, rounds=2).run(quiet)
    assert found.prompts == 8 and found.decided and len(calls) == 8 * 3
    assert found.arms[NGRAMS].pays and not found.arms[MASK].pays
    assert found.arms[NGRAMS].speedup == pytest.approx(1.6, rel=0.03)
    calls.clear()
    found = make({MASK: 0.7, NGRAMS: 1.0}, rounds=2).run(quiet)
    assert found.prompts == 20 and len(calls) == 2 * 20 * 3 and found.decided


def test_the_looks_are_those_that_are_simulated(validation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a look whose level was not counted: what is seen at each look, and at which level."""
    make, _ = validation
    seen: list[tuple[int, float]] = []

    def note(plain: Any, ours: Any, miss: float) -> tuple[float, float]:
        seen.append((len(plain), miss))
        return 0.5, 2.0

    monkeypatch.setattr("skipsearch.evaluate.timing.ratio_interval", note)
    make({MASK: 1.0, NGRAMS: 1.0}, rounds=2).run(quiet)
    assert list(dict.fromkeys(seen)) == [(8, 0.005), (14, 0.005), (20, 0.01), (20, 0.03)]


def test_without_time_few_prompts_are_timed_and_told(validation: Any) -> None:
    """Prevents a budget from being exceeded, a verdict from one prompt, and a short timing that looks whole."""
    make, _ = validation
    found = make({MASK: 1.01, NGRAMS: 1.0}).run(quiet, seconds=0.0)
    assert found.prompts == 4 and not found.decided


def test_a_stopped_validation_goes_on(validation: Any, tmp_path: Path) -> None:
    """Prevents minutes of timing from being lost, prompts from being timed twice, and runs of other arms taken over."""
    make, calls = validation
    path = tmp_path / "validation.json"
    with pytest.raises(KeyboardInterrupt):
        make({MASK: 0.7, NGRAMS: 1.6}, path=path, stop=16).run(quiet)
    calls.clear()
    found = make({MASK: 0.7, NGRAMS: 1.6}, path=path).run(quiet)
    assert found.prompts == 8 and {i for _, i in calls} == {5, 6, 7}
    assert found.arms[MASK].stats.blocks == {(2, 1): 24}
    whole = make({MASK: 0.7, NGRAMS: 1.6}).run(quiet)
    assert whole == found
    calls.clear()
    make({MASK: 0.7, NGRAMS: 1.6}, rounds=3, path=path).run(quiet)
    assert len(calls) == 8 * 3


def test_evidence_is_that_of_its_arm(validation: Any, tiny: Any) -> None:
    """Prevents n-grams from being exported with the mask's figures, and prompts counted that were not timed."""
    make, _ = validation
    target, found = Target.of(tiny("llama")), make({MASK: 0.7, NGRAMS: 1.6}).run(quiet)
    of_mask, of_ngrams = (evidence(target, PROMPTS, found, 0.5, arm=arm) for arm in (MASK, NGRAMS))
    assert of_mask.verdict == "do not use" and of_ngrams.verdict == "use"
    assert of_ngrams.speedup == pytest.approx(1.6, rel=0.03) and of_ngrams.speedup_ci[0] > 1
    assert of_mask.prompts == of_ngrams.prompts == 8 and of_ngrams.served_speedup is None
    assert SERVED not in found.arms
