"""Looks: a timing may end before its last prompt once its interval decides, and the interval keeps its coverage.

Each look at the data spends a part of the 5 % that a 95 % interval may miss. Whichever look ends the timing, the chance
that the interval reported there misses the true speed-up is at most the sum of these parts (repeated confidence
intervals, Jennison and Turnbull 1989, with a Bonferroni bound). `interval` is for what is timed to its end.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import bootstrap
from scipy.stats import t as student

FIRST_LOOKS = ((0.4, 0.005), (0.7, 0.005), (1.0, 0.01))  # share of the prompts timed once; what the look may miss
LAST_LOOK = 0.03
LEAST = 4  # prompts timed before a look


def look_after(done: int, prompts: int) -> float | None:
    """What an interval may miss after the first round of so many prompts; None: no look is due."""
    for share, miss in FIRST_LOOKS:
        if done == max(LEAST, math.ceil(share * prompts)):
            return miss
    return None


def ratio_interval(plain: np.ndarray, ours: np.ndarray, miss: float) -> tuple[float, float]:
    """Interval of sum(plain) / sum(ours) that misses the true ratio with this chance, over prompts in pairs.

    Student's t on the logarithm, whose standard error is a jackknife; prompts are few, for which resampling them gives
    intervals that are too short. One prompt alone says nothing: 0 to infinity.
    """
    n = len(plain)
    if n < 2:
        return 0.0, math.inf
    ratio = math.log(plain.sum() / ours.sum())
    without = np.log((plain.sum() - plain) / (ours.sum() - ours))
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    far = float(student.ppf(1 - miss / 2, n - 1)) * error
    return math.exp(ratio - far), math.exp(ratio + far)


def decides(interval: tuple[float, float]) -> bool:
    """Whether an interval lies wholly above 1, or wholly at or below it."""
    return interval[0] > 1 or interval[1] <= 1


def interval(plain: np.ndarray, masked: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of sum(plain) / sum(masked), resampling prompts in pairs."""
    found = bootstrap(
        (plain, masked), lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis), paired=True,
        method="percentile", n_resamples=2000, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
