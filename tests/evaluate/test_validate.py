"""Validation: the interval of a speedup."""

from __future__ import annotations

import pytest

from skipsearch.evaluate.timing import interval


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
