"""Seeds: masks worth trying before any sampler has seen a score. A heuristic is one function here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from skipsearch.compiled.backend import Progress
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.hidden_states import HiddenStates, layer_states, nearest
from skipsearch.evaluate.trace import Trace
from skipsearch.mask import SkipMask, Sublayer
from skipsearch.model.preset import Preset
from skipsearch.model.target import Target
from skipsearch.search.space import Space

Seed = tuple[str, SkipMask]
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8)  # of layers, or of all harm, that a family of seeds goes up to
LEVELS = 256  # of harm, in the knapsack


def all_seeds(
    target: Target, trace: Trace, space: Space, point: Point, progress: Progress, preset: Preset | None = None,
    earlier: SkipMask | None = None,
) -> list[Seed]:  # fmt: skip
    """What a study tries first, the most promising in front: later masks are given up by comparison with the best."""
    loss = single_skip_loss(target, trace, space, progress)
    before = [] if earlier is None else [("earlier", earlier)]
    states = layer_states(target, *trace.padded(target.device))
    return [
        ("empty", SkipMask(num_layers=space.num_layers)), *before, *published(preset, space),
        *by_sensitivity(space, loss, point), *knapsack(space, loss, point), *nearest_states(space, states),
        *block_influence(space, states), *uniform(space),
    ]  # fmt: skip


def published(preset: Preset | None, space: Space) -> list[Seed]:
    """Masks from the literature for this model."""
    return [] if preset is None else [(f"published:{m.name}", m.mask - space.fixed) for m in preset.masks]


def uniform(space: Space) -> list[Seed]:
    """Every n-th layer skipped, whole or its attention alone; first and last layers are kept."""
    inner = range(1, space.num_layers - 1)
    seeds = []
    for stride in (2, 3, 4):
        layers = [i for i in inner if i % stride == 1]
        seeds.append((f"uniform:{stride}", SkipMask(attention=layers, mlp=layers, num_layers=space.num_layers)))
    layers = [i for i in inner if i % 2 == 1]
    seeds.append(("uniform:attention", SkipMask(attention=layers, num_layers=space.num_layers)))
    return [(name, mask - space.fixed) for name, mask in seeds]


@torch.no_grad()
def single_skip_loss(target: Target, trace: Trace, space: Space, progress: Progress) -> dict[Sublayer, float]:
    """For each free sublayer: the share of trace tokens whose argmax changes when it alone is skipped.

    One teacher-forced pass a sublayer over prompts and continuations.
    """
    ids, generated = trace.padded(target.device)
    wanted, predicted_here = target.model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1), generated[:, 1:]
    loss = {}
    for number, (kind, layer) in enumerate(space.free):
        view = draft_view(target.model, SkipMask.from_sublayers([(kind, layer)], space.num_layers))
        same = view(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1) == wanted
        loss[kind, layer] = 1 - float(same[predicted_here].float().mean())
        progress("sensitivity", number + 1, len(space.free))
    return loss


def seconds_saved(point: Point, sub: Sublayer) -> float:
    """Seconds that a draft step without this sublayer saves."""
    return max(float(getattr(point, sub[0])[sub[1]]), 1e-12)


def by_sensitivity(space: Space, loss: dict[Sublayer, float], point: Point) -> list[Seed]:
    """The least harmful sublayers first, weighed by the seconds that skipping them saves: 1/8, 2/8, ... 7/8 of all."""
    order = sorted(space.free, key=lambda sub: (loss[sub] + 1e-3) / seconds_saved(point, sub))
    seeds = []
    for eighths in range(1, 8):
        count = round(len(order) * eighths / 8)
        seeds.append((f"sensitivity:{count}", SkipMask.from_sublayers(order[:count], space.num_layers)))
    return seeds


def knapsack(space: Space, loss: dict[Sublayer, float], point: Point, shares: Sequence[float] = SHARES) -> list[Seed]:
    """The most seconds saved for a given harm, exactly, if harms added up.

    KnapSpec's formulation (arXiv 2602.20217) under the measured costs; the harm of a sublayer is the logarithm of how
    many tokens survive skipping it alone, so that a sum of harms is a product of survivals.
    """
    harm = {sub: -math.log(max(1e-3, 1 - loss[sub])) + 1e-4 for sub in space.free}
    unit = sum(harm.values()) / LEVELS
    best, taken = np.zeros(LEVELS + 1), []
    for sub in space.free:
        weight = max(1, round(harm[sub] / unit))
        with_it = np.full(LEVELS + 1, -np.inf)
        if weight <= LEVELS:
            with_it[weight:] = best[: LEVELS + 1 - weight] + seconds_saved(point, sub)
        taken.append((weight, with_it > best))
        best = np.maximum(best, with_it)
    seeds = []
    for share in shares:
        level, chosen = round(share * LEVELS), []
        for sub, (weight, better) in zip(reversed(space.free), reversed(taken), strict=True):
            if better[level]:
                chosen.append(sub)
                level -= weight
        seeds.append((f"knapsack:{share:.3g}", SkipMask.from_sublayers(chosen, space.num_layers)))
    return seeds


def nearest_states(space: Space, states: HiddenStates, shares: Sequence[float] = SHARES) -> list[Seed]:
    """Whole layers whose absence leaves the hidden states nearest the full model's (CLaSp, arXiv 2505.24196).

    On many tokens at once, where the paper takes the last one.
    """
    free = {i for _, i in space.free}
    counts = [max(1, round(share * space.num_layers)) for share in shares]
    chosen = {len(layers): layers for layers in nearest(
        states, [i in free for i in range(space.num_layers)], min(counts), max(counts)
    )}  # fmt: skip
    return [(f"states:{count}", _whole(chosen[count], space)) for count in counts if count in chosen]


def block_influence(space: Space, states: HiddenStates) -> list[Seed]:
    """Whole layers whose output is most like their input (ShortGPT, arXiv 2403.03853)."""
    free = {i for _, i in space.free}
    likeness = {i: states.cosine(states.hidden[i], states.hidden[i + 1]) for i in free}
    order = sorted(free, key=lambda i: -likeness[i])
    counts = [max(1, round(share * space.num_layers)) for share in SHARES]
    return [(f"influence:{count}", _whole(order[:count], space)) for count in counts]


def _whole(layers: Any, space: Space) -> SkipMask:
    layers = list(layers)
    return SkipMask(attention=layers, mlp=layers, num_layers=space.num_layers) - space.fixed
