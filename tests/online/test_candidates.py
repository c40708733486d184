"""Candidates: first masks, and proposals that learn which flips help."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from online_parts import free_of

from skipsearch import SkipMask
from skipsearch.mask import KINDS
from skipsearch.model.target import Target
from skipsearch.online.candidates import Candidates, nearest_masks
from skipsearch.online.live_costs import LiveCosts


def test_candidates_learn_which_flips_help(demo: Any) -> None:
    """Prevents proposals that were tried already, and a model that does not learn from comparisons."""
    free, layers = free_of(demo.model)
    rng = np.random.default_rng(0)
    worth = dict(zip(free, rng.normal(0, 0.03, len(free)), strict=True))
    near = [SkipMask.from_sublayers(free[:count], layers) for count in range(len(free))]
    candidates = Candidates(layers, near, 0)
    first = candidates.first()
    assert len({len(mask) for mask in first}) == len(first) == 3
    value = lambda mask: sum(worth[sub] for sub in free if mask.skips(*sub))
    incumbent, tried = first[0], set[SkipMask]()
    begin = value(incumbent)
    for _ in range(150):
        mask = candidates.propose(incumbent, tried)
        assert mask not in tried and mask != incumbent
        tried.add(mask)
        gain = value(mask) - value(incumbent) + float(rng.normal(0, 0.02))
        candidates.learn(incumbent, mask, gain)
        if gain > 0:
            incumbent = mask
    best = sum(v for v in worth.values() if v > 0)
    assert value(incumbent) > begin + 0.6 * (best - begin)


def test_first_masks_skip_what_does_nothing(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents sublayers that do nothing from being kept."""
    import copy

    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    target = Target.of(model)
    halves = [LiveCosts(target).views[kind] for kind in KINDS]
    masks = nearest_masks(target, halves, ids[:1])
    assert masks and all(mask.skips("mlp", 1) for mask in masks)
