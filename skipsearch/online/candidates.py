"""Candidates: which mask to try next, on little evidence.

Sources: every second layer, to open; masks that keep hidden states near; flips and swaps of the incumbent, drawn by how
many of those masks skip a sublayer; and flips that a Bayesian linear model of what flips brought so far holds for the
best (Thompson sampling). SWIFT (arXiv 2410.06916, section 4.2) mixes random and Bayesian masks at a fixed skip ratio.

Shapes: D sublayers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from skipsearch.evaluate.hidden_states import layer_states, nearest, sublayer_states
from skipsearch.mask import KINDS, SkipMask, Sublayer
from skipsearch.model.target import Target

Array = NDArray[Any]
FIRST = (0.65, 0.8, 0.5)  # shares of sublayers skipped in the first masks, likely ones first
UNSEEN = 4  # tokens at the beginning whose states are like no others
PRIOR, NOISE = 0.03, 0.06  # standard deviations of log-speed: of what a flip brings, and of one window's reading
BAYESIAN_FROM = 8  # comparisons; from then on every other proposal
WIDEST = 6  # flips at once
SWAPS = 0.5  # of the random proposals leave as many sublayers as there were


@torch.no_grad()
def nearest_masks(
    target: Target, halves: Sequence[PreTrainedModel], ids: Tensor, seen: Tensor | None = None
) -> list[SkipMask]:
    """For each number of skipped sublayers that is likely, the mask that changes the hidden states least.

    CLaSp's dynamic programming (arXiv 2505.24196) over sublayers in place of layers.

    Args:
        halves: views that keep one kind of sublayer each, attention's first.
        ids: texts [P, T] of the model's own; one is run much faster than several.
        seen: places [P, T] that count; by default all but the first few.
    """
    if seen is None:
        places = torch.arange(ids.shape[1], device=ids.device) >= min(UNSEEN, ids.shape[1] - 1)
        seen = places.expand(ids.shape)
    states = sublayer_states(target, layer_states(target, ids, seen), halves)
    units = all_sublayers(target.num_layers)
    least, most = (round(share * len(units)) for share in (min(FIRST), max(FIRST)))
    found = nearest(states, [True] * len(units), least, most)
    return [SkipMask.from_sublayers([units[u] for u in chosen], target.num_layers) for chosen in found]


def all_sublayers(layers: int) -> list[Sublayer]:
    """Every sublayer, layer by layer."""
    return [(kind, i) for i in range(layers) for kind in KINDS]


def opening(layers: int) -> SkipMask:
    """The first mask to try, which needs no measurement: every second layer, the first and the last kept."""
    middle = range(1, layers - 1, 2)
    return SkipMask(attention=middle, mlp=middle, num_layers=layers)


class Candidates:
    """Proposes masks of one model, and learns from comparisons.

    Args:
        near: masks that skip more and more sublayers.
        seed: of what is random.
    """

    def __init__(self, layers: int, near: list[SkipMask], seed: int) -> None:
        self.layers, self.near, self.rng = layers, near, np.random.default_rng(seed)
        self.free = all_sublayers(layers)
        skipped_D = np.array([sum(mask.skips(*sub) for mask in near) for sub in self.free])
        order = np.argsort(-skipped_D, kind="stable")
        self.rank_D = np.empty(len(self.free))  # 0: the first to be skipped, 1: the last
        self.rank_D[order] = np.linspace(0, 1, len(self.free))
        self.changes: list[Array] = []
        self.gains: list[float] = []
        self.turn = 0

    def first(self) -> list[SkipMask]:
        """What to try before any comparison, likely ones first."""
        known = {len(mask): mask for mask in self.near}
        counts = dict.fromkeys(round(share * len(self.free)) for share in FIRST)
        return [known[count] for count in counts if count in known]

    def propose(self, incumbent: SkipMask, tried: set[SkipMask]) -> SkipMask | None:
        """A mask near the incumbent that was not tried; None if none was found."""
        self.turn += 1
        skipped_D = self._bits(incumbent)
        weights_D = np.where(skipped_D > 0, self.rank_D, 1 - self.rank_D) + 0.05
        for attempt in range(20):
            if len(self.gains) >= BAYESIAN_FROM and self.turn % 2 == 0 and attempt < 4:
                gain_D = np.where(skipped_D > 0, -1, 1) * self._draw()
                best = np.argsort(-gain_D)[: max(1, int(self.rng.integers(1, WIDEST)))]
                flips = [d for d in best if gain_D[d] > 0] or list(best[:1])
            elif self.rng.random() < SWAPS and 0 < skipped_D.sum() < len(self.free):
                of_D = [weights_D * side for side in (skipped_D, 1 - skipped_D)]
                flips = [int(self.rng.choice(len(self.free), p=side_D / side_D.sum())) for side_D in of_D]
            else:
                count = min(len(self.free), 1 + int(self.rng.exponential(1.5)), WIDEST)
                flips = list(self.rng.choice(len(self.free), count, replace=False, p=weights_D / weights_D.sum()))
            bits_D = skipped_D.copy()
            bits_D[flips] = 1 - bits_D[flips]
            mask = self._mask(np.flatnonzero(bits_D))
            if mask not in tried and mask != incumbent:
                return mask
        return None

    def learn(self, incumbent: SkipMask, challenger: SkipMask, gain: float) -> None:
        """Take in a comparison on one window: the logarithm of the challenger's speed over the incumbent's."""
        self.changes.append(self._bits(challenger) - self._bits(incumbent))
        self.gains.append(gain)

    def _draw(self) -> Array:
        """What skipping each sublayer brings [D]: drawn from the posterior after all comparisons."""
        x_ND, y_N = np.array(self.changes[-400:]), np.array(self.gains[-400:])
        precision = x_ND.T @ x_ND / NOISE**2 + np.eye(len(self.free)) / PRIOR**2
        covariance = np.linalg.inv(precision)
        mean_D = covariance @ (x_ND.T @ y_N) / NOISE**2
        return np.asarray(self.rng.multivariate_normal(mean_D, covariance, method="cholesky"))

    def _bits(self, mask: SkipMask) -> Array:
        return np.array([float(mask.skips(*sub)) for sub in self.free])

    def _mask(self, chosen: Any) -> SkipMask:
        return SkipMask.from_sublayers([self.free[d] for d in chosen], self.layers)
