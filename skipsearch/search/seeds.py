"""Seeds: masks to try before the sampler has seen any score. Each heuristic is one function."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from skipsearch.compiled.backend import Progress
from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.hidden_states import HiddenStates, nearest
from skipsearch.evaluate.windows import Part, WindowReplay, Windows
from skipsearch.files import write_json
from skipsearch.mask import KINDS, SkipMask, Sublayer
from skipsearch.model.preset import Preset
from skipsearch.model.space import Space

Seed = tuple[str, SkipMask]
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8)  # one seed for each: the share of layers to skip, or of all harm to allow
LEVELS = 256  # of harm, in the knapsack


def all_seeds(
    space: Space, loss: dict[Sublayer, float], states: HiddenStates, point: Point, preset: Preset | None,
    earlier: SkipMask | None,
) -> list[Seed]:  # fmt: skip
    """What a study tries first. The most promising seeds lead: a good first score lets the scorer abort more masks.

    Args:
        loss: of `single_skip_loss`.
        states: of the layers.
        earlier: the mask of an earlier run.
    """
    before = [] if earlier is None else [("earlier", earlier)]
    return [
        ("empty", SkipMask(num_layers=space.num_layers)), *before, *published(preset, space),
        *by_sensitivity(space, loss, point), *knapsack(space, loss, point), *nearest_states(space, states),
        *block_influence(space, states), *uniform(space),
    ]  # fmt: skip


def published(preset: Preset | None, space: Space) -> list[Seed]:
    """Masks from the literature for this model."""
    return [] if preset is None else [(f"published:{m.name}", m.mask - space.fixed) for m in preset.masks]


def uniform(space: Space) -> list[Seed]:
    """Every n-th layer is skipped, or its attention alone. The first and the last layer are kept."""
    inner = range(1, space.num_layers - 1)
    seeds = [(f"uniform:{n}", _whole([i for i in inner if i % n == 1], space)) for n in (2, 3, 4)]
    attention = SkipMask(attention=[i for i in inner if i % 2 == 1], num_layers=space.num_layers)
    return [*seeds, ("uniform:attention", attention - space.fixed)]


def single_skip_loss(
    windows: Windows, part: Part, space: Space, progress: Progress, *, known: dict[Sublayer, float] | None = None,
    keep: Callable[[dict[Sublayer, float]], None] = lambda loss: None,
) -> dict[Sublayer, float]:  # fmt: skip
    """For each free sublayer: the share of a trace's tokens that drafts without this sublayer alone get wrong.

    Drafts begin behind the reference keys of the full model, and at the layer that holds the sublayer.

    Args:
        part: the windows to draft.
        known: losses that need not be computed again.
        keep: called with all losses so far.
    """
    loss = dict(known or {})
    for number, sub in enumerate(space.free):
        if sub not in loss:
            replayed = WindowReplay(windows, SkipMask.from_sublayers([sub], space.num_layers))
            correct = [right for found in replayed.outcomes(part) for right in found.correct]
            loss[sub] = 1 - sum(correct) / len(correct)
            keep(loss)
        progress("sensitivity", number + 1, len(space.free))
    return loss


def sensitivity_or_load(
    path: Path, identity: str, windows: Windows, choose: Callable[[], Part], space: Space, progress: Progress
) -> tuple[dict[Sublayer, float], Part]:
    """The losses in `path` if they are of this trace and model; else new ones. Each is saved when it is known.

    Args:
        choose: chooses the windows for new losses.

    Returns:
        the losses, and the windows that they were computed on.
    """
    known: dict[Sublayer, float] = {}
    part: Part | None = None
    try:
        data = json.loads(path.read_text())
        if data["identity"] == identity and len(data["windows"]) == len(windows.counts):
            part = tuple(range(min(int(n), most)) for n, most in zip(data["windows"], windows.counts, strict=True))
            known = {(kind, int(i)): float(loss) for kind in KINDS for i, loss in data["loss"][kind].items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there are none yet, or they are another trace's
    chosen = choose() if part is None else part

    def keep(loss: dict[Sublayer, float]) -> None:
        by_kind = {kind: {str(i): round(loss[kind, i], 4) for k, i in loss if k == kind} for kind in KINDS}
        write_json(path, {"identity": identity, "windows": [len(some) for some in chosen], "loss": by_kind})

    return single_skip_loss(windows, chosen, space, progress, known=known, keep=keep), chosen


def seconds_saved(point: Point, sub: Sublayer) -> float:
    """Seconds that a draft step saves by skipping this sublayer."""
    return max(float(getattr(point, sub[0])[sub[1]]), 1e-12)


def by_sensitivity(space: Space, loss: dict[Sublayer, float], point: Point) -> list[Seed]:
    """Skip 1/8, 2/8, ... 7/8 of the free sublayers, those with the least loss for each second saved."""
    order = sorted(space.free, key=lambda sub: (loss[sub] + 1e-3) / seconds_saved(point, sub))
    seeds = []
    for eighths in range(1, 8):
        count = round(len(order) * eighths / 8)
        seeds.append((f"sensitivity:{count}", SkipMask.from_sublayers(order[:count], space.num_layers)))
    return seeds


def knapsack(space: Space, loss: dict[Sublayer, float], point: Point, shares: Sequence[float] = SHARES) -> list[Seed]:
    """Save the most seconds for a given harm: an exact solution if the harms of sublayers add up.

    KnapSpec's formulation (arXiv 2602.20217) with measured costs. The harm of a sublayer is minus the logarithm of the
    share of tokens that stay the same when it alone is skipped, so a sum of harms is a product of these shares.
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
    """Skip the whole layers without which hidden states stay nearest to the full model's (CLaSp, arXiv 2505.24196).

    The paper uses the last token; this uses many tokens at once.
    """
    free = {i for _, i in space.free}
    counts = [max(1, round(share * space.num_layers)) for share in shares]
    chosen = {len(layers): layers for layers in nearest(
        states, [i in free for i in range(space.num_layers)], min(counts), max(counts)
    )}  # fmt: skip
    return [(f"states:{count}", _whole(chosen[count], space)) for count in counts if count in chosen]


def block_influence(space: Space, states: HiddenStates) -> list[Seed]:
    """Skip the whole layers whose output is most similar to their input (ShortGPT, arXiv 2403.03853)."""
    free = {i for _, i in space.free}
    similarity = {i: states.cosine(states.hidden[i], states.hidden[i + 1]) for i in free}
    order = sorted(free, key=lambda i: -similarity[i])
    counts = [max(1, round(share * space.num_layers)) for share in SHARES]
    return [(f"influence:{count}", _whole(order[:count], space)) for count in counts]


def _whole(layers: Collection[int], space: Space) -> SkipMask:
    return SkipMask(attention=layers, mlp=layers, num_layers=space.num_layers) - space.fixed
