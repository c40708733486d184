"""Candidates: which mask to try next, on little evidence.

Three sources: nested masks by influence, to begin with; flips of the incumbent, drawn by influence; and flips that a
Bayesian linear model of what flips brought so far holds for the best (Thompson sampling). SWIFT (arXiv 2410.06916,
section 4.2) mixes random masks with Bayesian ones in the same way, at a fixed skip ratio.

Shapes: D free sublayers.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from skipsearch.mask import Kind, SkipMask
from skipsearch.model.sublayers import find_sublayers

Array = NDArray[Any]
NESTED = (0.5, 0.35, 0.65, 0.2, 0.8)  # shares of sublayers skipped in the first masks, likely ones first
PRIOR, NOISE = 0.03, 0.06  # log-speed that a flip moves, and that a window's reading of it is off
BAYESIAN_FROM = 8  # comparisons; from then on every other proposal
WIDEST = 6  # flips at once


@torch.no_grad()
def influence(model: PreTrainedModel, ids: Tensor) -> dict[tuple[Kind, int], float]:
    """How much each sublayer adds to its layer's input: the ratio of norms, mean over ids [1, T]; one pass."""
    found = find_sublayers(model)
    layers = list(model.get_submodule(found.path).children())
    entering, influences = {}, dict[tuple[Kind, int], float]()
    hooks = []

    me = threading.get_ident()  # others may run the same layers

    def enter(number: int, args: Any, named: Any) -> None:
        if threading.get_ident() != me:
            return
        entering[number] = (args[0] if args else named["hidden_states"]).float().norm(dim=-1)

    def leave(sub: tuple[Kind, int], out: Any) -> None:
        if threading.get_ident() != me:
            return
        added = (out[0] if isinstance(out, tuple) else out).float().reshape(*entering[sub[1]].shape, -1)
        influences[sub] = float((added.norm(dim=-1) / entering[sub[1]].clamp(min=1e-9)).mean())

    for number, layer in enumerate(layers):
        hooks.append(
            layer.register_forward_pre_hook(lambda _m, a, k, n=number: enter(n, a, k), with_kwargs=True)
        )  # fmt: skip
        for kind, names in found.child.items():
            branch = getattr(layer, names[-1], None)
            if branch is not None:
                hooks.append(branch.register_forward_hook(lambda _m, _a, out, s=(kind, number): leave(s, out)))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return influences


class Candidates:
    """Proposes masks of one model, and learns from comparisons.

    Args:
        free: sublayers that may be skipped.
        harm: what skipping each costs beside what it saves; any scale.
        seed: of what is random.
    """

    def __init__(
        self, free: list[tuple[Kind, int]], layers: int, harm: dict[tuple[Kind, int], float], seed: int
    ) -> None:
        self.free, self.layers, self.rng = free, layers, np.random.default_rng(seed)
        order = sorted(range(len(free)), key=lambda d: harm.get(free[d], 0.0))
        self.order = order
        self.rank_D = np.empty(len(free))  # 0: the least harmful, 1: the most
        self.rank_D[order] = np.linspace(0, 1, len(free))
        self.changes: list[Array] = []
        self.gains: list[float] = []
        self.turn = 0

    def nested(self) -> list[SkipMask]:
        """The least harmful sublayers, so many shares of them."""
        return [self._mask(self.order[: round(share * len(self.free))]) for share in NESTED]

    def propose(self, incumbent: SkipMask, tried: set[SkipMask]) -> SkipMask:
        """A mask near the incumbent that was not tried."""
        self.turn += 1
        skipped_D = self._bits(incumbent)
        weights_D = np.where(skipped_D > 0, self.rank_D, 1 - self.rank_D) + 0.05
        for attempt in range(20):
            if len(self.gains) >= BAYESIAN_FROM and self.turn % 2 == 0 and attempt < 4:
                gain_D = np.where(skipped_D > 0, -1, 1) * self._draw()
                best = np.argsort(-gain_D)[: max(1, int(self.rng.integers(1, WIDEST)))]
                flips = [d for d in best if gain_D[d] > 0] or list(best[:1])
            else:
                count = min(len(self.free), 1 + int(self.rng.exponential(1.5)), WIDEST)
                flips = list(self.rng.choice(len(self.free), count, replace=False, p=weights_D / weights_D.sum()))
            bits_D = skipped_D.copy()
            bits_D[flips] = 1 - bits_D[flips]
            mask = self._mask(np.flatnonzero(bits_D))
            if mask not in tried and mask != incumbent:
                return mask
        return mask

    def learn(self, incumbent: SkipMask, challenger: SkipMask, gain: float) -> None:
        """The challenger was faster by this much, as a logarithm, on the same window."""
        self.changes.append(self._bits(challenger) - self._bits(incumbent))
        self.gains.append(gain)

    def _draw(self) -> Array:
        """What skipping each sublayer brings [D]: drawn from what is believed after all comparisons."""
        x_ND, y_N = np.array(self.changes[-400:]), np.array(self.gains[-400:])
        precision = x_ND.T @ x_ND / NOISE**2 + np.eye(len(self.free)) / PRIOR**2
        covariance = np.linalg.inv(precision)
        mean_D = covariance @ (x_ND.T @ y_N) / NOISE**2
        return np.asarray(self.rng.multivariate_normal(mean_D, covariance, method="cholesky"))

    def _bits(self, mask: SkipMask) -> Array:
        return np.array([float(mask.skips(*sub)) for sub in self.free])

    def _mask(self, chosen: Any) -> SkipMask:
        return SkipMask.from_sublayers([self.free[d] for d in chosen], self.layers)
