"""Looks: timings that end early keep the coverage of their interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipsearch.evaluate.looks import FIRST_LOOKS, LAST_LOOK, decides, look_after, ratio_interval

PROMPTS = 20  # timed in two rounds


def timed(rng: np.random.Generator, speedup: float, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds [2 rounds, P] of prompts of uneven length, plain and drafted; prompts differ in how much they gain."""
    plain = rng.uniform(0.3, 1.0, PROMPTS)
    gains = np.exp(rng.normal(-(spread**2) / 2, spread, PROMPTS))  # of mean 1
    noise = rng.normal(1, 0.05, (2, 2, PROMPTS))
    return plain * noise[0], plain / speedup * gains * noise[1]


def validated(plain: np.ndarray, ours: np.ndarray) -> tuple[int, tuple[float, float]]:
    """How many prompts a validation times, in its first round or in both, and its interval."""
    for done in range(1, PROMPTS + 1):
        miss = look_after(done, PROMPTS)
        if miss is not None and decides(found := ratio_interval(plain[0, :done], ours[0, :done], miss)):
            return done, found
    return 2 * PROMPTS, ratio_interval(np.median(plain, 0), np.median(ours, 0), LAST_LOOK)


@pytest.mark.parametrize("speedup", [0.8, 1.0, 1.05, 1.3, 2.0])
@pytest.mark.parametrize("spread", [0.1, 0.35])
def test_an_interval_that_ends_the_timing_keeps_its_coverage(speedup: float, spread: float) -> None:
    """Prevents verdicts from looks at which the data happened to be lucky."""
    rng, runs = np.random.default_rng(1), 1500
    found = [validated(*timed(rng, speedup, spread)) for _ in range(runs)]
    covered = sum(low <= speedup <= high for _, (low, high) in found) / runs
    assert covered > 0.95 - 2.5 * math.sqrt(0.05 * 0.95 / runs), covered
    wrong = sum((low > 1) if speedup <= 1 else (high <= 1) for _, (low, high) in found) / runs
    assert wrong < 0.05
    if speedup in (0.8, 2.0) and spread == 0.1:  # far from 1 few prompts suffice
        assert np.mean([done for done, _ in found]) < 0.5 * PROMPTS
    if speedup == 1.0:  # nothing to decide
        assert np.mean([done for done, _ in found]) > 1.8 * PROMPTS


def test_looks_spend_what_an_interval_may_miss() -> None:
    """Prevents a look from being added whose level is not taken from the others."""
    assert sum(miss for _, miss in FIRST_LOOKS) + LAST_LOOK <= 0.05 + 1e-12
    due = [n for n in range(1, 41) if look_after(n, 40) is not None]
    assert due == [16, 28, 40] and look_after(2, 3) is None


@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.1, 5)), min_size=2, max_size=12))
def test_an_interval_holds_the_ratio_and_shrinks_with_its_level(pairs: list[tuple[float, float]]) -> None:
    """Prevents an interval beside its own estimate, or a stricter one that is shorter."""
    plain, ours = (np.array(side) for side in zip(*pairs, strict=True))
    strict, loose = (ratio_interval(plain, ours, miss) for miss in (0.005, 0.05))
    assert strict[0] <= loose[0] <= plain.sum() / ours.sum() * (1 + 1e-9)
    assert plain.sum() / ours.sum() * (1 - 1e-9) <= loose[1] <= strict[1]
    assert ratio_interval(plain[:1], ours[:1], 0.05) == (0.0, math.inf)
