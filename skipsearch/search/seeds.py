"""Seeds: plans to try before the sampler has seen any score. Each heuristic is one function."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.hidden_states import HiddenStates, nearest
from skipsearch.mask import KINDS, SkipMask, Sublayer
from skipsearch.model.preset import Preset
from skipsearch.model.space import Space
from skipsearch.plan import FORMS, DraftPlan, Form, HeadForm, Quantised
from skipsearch.search.sensitivity import Loss

Seed = tuple[str, DraftPlan]
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8)  # one seed for each: the share of layers to skip, or of all harm to allow
PLAN_SHARES = (0.02, 0.05, 0.1, 0.2)  # likewise for plans, whose quantised sublayers do little harm
LEVELS = 256  # of harm, in the knapsack


def all_seeds(
    space: Space, loss: Loss, states: HiddenStates, point: Point, preset: Preset | None, earlier: DraftPlan | None
) -> list[Seed]:
    """What a study tries first. The most promising seeds lead: a good first score lets the scorer abort more plans.

    Args:
        loss: of `single_losses`.
        states: of the layers.
        earlier: the plan of an earlier run.
    """
    before: list[Seed] = [] if earlier is None else [("earlier", earlier)]
    none: list[Seed] = [("empty", DraftPlan(SkipMask(num_layers=space.num_layers)))]
    masks = [
        *published(preset, space), *by_sensitivity(space, loss["skip"], point),
        *knapsack(space, {"skip": loss["skip"]}, point), *nearest_states(space, states),
        *block_influence(space, states), *uniform(space),
    ] if "skip" in loss else []  # fmt: skip
    return [*none, *before, *quantised_seeds(space, loss, point, masks), *masks]


def quantised_seeds(space: Space, loss: Loss, point: Point, masks: list[Seed]) -> list[Seed]:
    """Plans that quantise: everything in one form, with smaller heads, with the least harmful sublayers skipped.

    Args:
        masks: seeds that only skip; the best of them are tried on top of the mildest quantised form.
    """
    forms = space.quantised
    if not forms:
        return []
    every = SkipMask.from_sublayers(space.free, space.num_layers)

    def plan(form: Quantised, skip: SkipMask | None = None, size: int | None = None) -> DraftPlan:
        head = form if form in space.heads else space.heads[-1]
        return DraftPlan.in_form(form, every, skip, head, None if size is None else space.ids(size))

    seeds = [(f"all {form}", plan(form)) for form in forms]
    mild = forms[0]
    others = [head for head in space.heads[1:] if head != plan(mild).head]
    seeds += [(f"all {mild}, {head} head", replaced(plan(mild), head)) for head in others]
    seeds += [(f"all {mild}, {size} tokens", plan(mild, size=size)) for size in space.sizes]
    if len(forms) > 1:
        by_harm = sorted(space.free, key=lambda sub: loss[forms[-1]][sub])
        half = SkipMask.from_sublayers(by_harm[: len(by_harm) // 2], space.num_layers)
        seeds.append(
            (f"{forms[-1]} half", DraftPlan(SkipMask(num_layers=space.num_layers), every - half, half, plan(mild).head))
        )
    if "skip" in loss:
        order = sorted(space.free, key=lambda sub: (loss["skip"][sub] + 1e-3) / max(point.of(mild, *sub), 1e-12))
        for count in (2, 4, 8, len(order) // 4):
            seeds.append((f"{mild} less {count}", plan(mild, SkipMask.from_sublayers(order[:count], space.num_layers))))
    heads = {"head": plan(mild).head}
    seeds += [(f"plan {label}", replaced(found, **heads)) for label, found in knapsack(space, loss, point, PLAN_SHARES)]
    seen = dict(masks)
    on_top = [
        label for label in seen if label.startswith(("published", "knapsack:0.125", "knapsack:0.25", "knapsack:0.5"))
    ]
    return [*seeds, *((f"{mild} under {label}", plan(mild, seen[label].skip)) for label in on_top)]


def replaced(plan: DraftPlan, head: HeadForm) -> DraftPlan:
    """The plan with another form of its head."""
    return DraftPlan(plan.skip, plan.int8, plan.int4, head, plan.head_ids)


def published(preset: Preset | None, space: Space) -> list[Seed]:
    """Masks from the literature for this model."""
    masks = () if preset is None else preset.masks
    return [(f"published:{m.name}", DraftPlan(m.mask - space.fixed)) for m in masks]


def uniform(space: Space) -> list[Seed]:
    """Every n-th layer is skipped, or its attention alone. The first and the last layer are kept."""
    inner = range(1, space.num_layers - 1)
    seeds = [(f"uniform:{n}", _whole([i for i in inner if i % n == 1], space)) for n in (2, 3, 4)]
    attention = SkipMask(attention=[i for i in inner if i % 2 == 1], num_layers=space.num_layers)
    return [*seeds, ("uniform:attention", DraftPlan(attention - space.fixed))]


def seconds_saved(point: Point, sub: Sublayer, form: Form = "skip") -> float:
    """Seconds that a draft step saves by this form of a sublayer."""
    return max(point.of("run", *sub) - point.of(form, *sub), 1e-12)


def by_sensitivity(space: Space, loss: dict[Sublayer, float], point: Point) -> list[Seed]:
    """Skip 1/8, 2/8, ... 7/8 of the free sublayers, those with the least loss for each second saved."""
    order = sorted(space.free, key=lambda sub: (loss[sub] + 1e-3) / seconds_saved(point, sub))
    seeds = []
    for eighths in range(1, 8):
        count = round(len(order) * eighths / 8)
        seeds.append((f"sensitivity:{count}", DraftPlan(SkipMask.from_sublayers(order[:count], space.num_layers))))
    return seeds


def knapsack(space: Space, loss: Loss, point: Point, shares: Sequence[float] = SHARES) -> list[Seed]:
    """Save the most seconds for a given harm: an exact solution if the harms of sublayers add up.

    KnapSpec's formulation (arXiv 2602.20217) with measured costs, and with each sublayer in one of several forms. The
    harm of a form is minus the logarithm of the share of tokens that stay the same when one sublayer alone has it, so a
    sum of harms is a product of these shares. Shares are of the harm that the last form does everywhere.
    """
    forms = [form for form in FORMS if form in loss]
    harm = {(sub, form): -math.log(max(1e-3, 1 - loss[form][sub])) + 1e-4 for sub in space.free for form in forms}
    unit = sum(harm[sub, forms[-1]] for sub in space.free) / LEVELS
    best, taken = np.zeros(LEVELS + 1), []
    for sub in space.free:
        choice, gain = np.zeros(LEVELS + 1, dtype=int), best.copy()
        weights = [max(form == "skip", round(harm[sub, form] / unit)) for form in forms]
        for number, (form, weight) in enumerate(zip(forms, weights, strict=True), 1):
            with_it = np.full(LEVELS + 1, -np.inf)
            if weight <= LEVELS:
                with_it[weight:] = best[: LEVELS + 1 - weight] + seconds_saved(point, sub, form)
            choice[with_it > gain] = number
            gain = np.maximum(gain, with_it)
        taken.append((weights, choice))
        best = gain
    seeds = []
    for share in shares:
        level, chosen = round(share * LEVELS), dict[Sublayer, Form]()
        for sub, (weights, choice) in zip(reversed(space.free), reversed(taken), strict=True):
            if number := int(choice[level]):
                chosen[sub] = forms[number - 1]
                level -= weights[number - 1]
        every = [chosen.get((kind, i), "run") for kind in KINDS for i in range(space.num_layers)]
        seeds.append((f"knapsack:{share:.3g}", DraftPlan.from_forms(every)))
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


def _whole(layers: Collection[int], space: Space) -> DraftPlan:
    return DraftPlan(SkipMask(attention=layers, mlp=layers, num_layers=space.num_layers) - space.fixed)
