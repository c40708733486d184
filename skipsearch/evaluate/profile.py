"""Profile: whole blocks timed as decoding runs them, and separated into costs by difference.

Times the runtime's own draft and verify, so every overhead of serving is included. It ends when the costs are known
well enough, or when its seconds are spent.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from scipy.optimize import nnls
from transformers import PreTrainedModel

from skipsearch.compiled.backend import Progress
from skipsearch.decoding.rule import GREEDY, SelectionRule
from skipsearch.decoding.sequences import Sequences
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.clock import sequence_at
from skipsearch.evaluate.cost import Costs, Point, draft_step
from skipsearch.evaluate.design import Arm, Design, choose_design, timed_arm
from skipsearch.files import read_checked, write_checked
from skipsearch.mask import KINDS, SkipMask
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan, Form, Quantised

WARM_UP, LEAST, MOST = 1, 3, 12  # turns that are not counted; the fewest that are counted if there is time; the most
RESAMPLED = 16  # times, for a standard error
ERROR = 0.02  # relative standard error at which costs are known
FIRST_CONTEXT = 0.65  # of the seconds; the others price attention and verify anew, and nothing else
# By arm (None: a plain step), by turn: draft and verify in seconds.
Times = dict[Arm | None, list[list[tuple[float, float]]]]


def profile(
    target: Target, *, contexts: list[int], max_length: int, progress: Progress, seconds: float = 60,
    rule: SelectionRule = GREEDY, forms: Sequence[Quantised] = (), known: Sequence[Point] = (),
    keep: Callable[[list[Point], bool], None] = lambda points, hurried: None,
) -> tuple[Point, ...]:  # fmt: skip
    """Measure whole blocks at each context length, as decoding runs them, and separate their parts by difference.

    A draft of K tokens takes K steps and something to begin; a step takes the sum of what runs. One system of equations
    separates them. Its rows are drafts of plans of all densities, since weights that fit into a cache cost less than
    their share, each in front of a verify of another length. Arms take turns and the median counts, so that a short
    disturbance affects all of them alike. Turns end when the plain step, a draft step and the verifies have a relative
    standard error under 2 % (bootstrap over turns). A verify of more tokens never costs less than one of fewer;
    otherwise one disturbed arm would attract drafts. Sublayers of one kind and build have one cost; others (dense
    layers and mixtures of experts, full and sliding attention) have their own. At every context but the first,
    attention and verify alone are measured anew.

    Args:
        seconds: the most that timing may take.
        forms: quantised forms to price.
        known: points of the first contexts, which are not measured again.
        keep: called after each context with all points so far, and whether there was too little time for one.
    """
    design = choose_design(target, max_length, forms)
    views = [draft_view(target.model, plan) for plan in design.plans]
    points, hurried = list(known), False
    begin = time.perf_counter()
    for number, context in enumerate(contexts[len(points) :], len(points)):
        share = FIRST_CONTEXT + (1 - FIRST_CONTEXT) * number / max(1, len(contexts) - 1) if len(contexts) > 1 else 1.0
        sequence = sequence_at(target, views[0], context, max_length, rule)  # one cache for all plans
        solve = partial(_solve, design=design, context=context, known=points[0] if points else None)

        def turned(part: float, number: int = number) -> None:
            progress("profile", round(100 * (number + part) / len(contexts)), 100)

        arms = design.again if points else design.arms
        times = _take_turns(sequence, [None, *arms], views, solve, begin + share * seconds, turned)
        points.append(solve(times))
        hurried |= len(times[None]) < LEAST
        keep(points, hurried)
    return tuple(points)


def _take_turns(
    sequence: Sequences, arms: Sequence[Arm | None], views: list[PreTrainedModel],
    solve: Callable[[Times], Point], end: float, turned: Callable[[float], None],
) -> Times:  # fmt: skip
    """Seconds of each arm, turn by turn, until what they give is known well enough, or there is no time for more."""
    times: Times = {arm: [] for arm in arms}
    for turn in range(WARM_UP + MOST):
        begin = time.perf_counter()
        for arm, known in times.items():
            sequence.draft_with(views[0 if arm is None else arm.plan])
            known.append(timed_arm(sequence, arm))
        counted, now = turn + 1 - WARM_UP, time.perf_counter()
        left = (end - now) / max(now - begin, 1e-9)  # turns for which there is time
        if left < 0:  # a slow machine's budget is kept: in its first turn too each arm ran once before it was timed
            break
        if turn < WARM_UP:
            times = {arm: [] for arm in times}
        turned(min(1.0, (turn + 1) / min(WARM_UP + MOST, max(turn + 1 + left, WARM_UP + LEAST))))
        if counted >= LEAST and (left < 1 or _relative_error(times, solve) < ERROR):
            break
    turned(1.0)
    return times


def _relative_error(times: Times, solve: Callable[[Times], Point]) -> float:
    """The largest relative standard error of the plain step, a half draft's step, and verifies."""
    rng, turns = random.Random(0), len(times[None])
    found = []
    for _ in range(RESAMPLED):
        chosen = rng.choices(range(turns), k=turns)
        point = solve({arm: [known[turn] for turn in chosen] for arm, known in times.items()})
        layers = len(point.attention)
        half = SkipMask(attention=range(0, layers, 2), mlp=range(1, layers, 2), num_layers=layers)
        quantised = [draft_step(point, DraftPlan.everywhere("int8", layers), False)] if "int8" in point.forms else []
        found.append([draft_step(point, half, False), *quantised, *point.verify])
    columns = np.array(found)
    return float((columns.std(0) / columns.mean(0).clip(1e-12)).max())


def _median(times: Times, arms: Sequence[Arm | None], which: int) -> float:
    """The median seconds of the drafts (0) or the verifies (1) of some arms."""
    return statistics.median(pair[which] for arm in arms for turn in times[arm] for pair in turn)


def _solve(times: Times, *, design: Design, context: int, known: Point | None = None) -> Point:
    """The costs that explain the seconds of all drafts best: least squares of relative errors, none below zero.

    Args:
        known: costs at another context; all but those of attention and verify are taken from it.
    """
    arms, groups = [arm for arm in times if arm is not None], design.groups
    seconds = np.array([_median(times, [arm], 0) for arm in arms])
    verify = [_median(times, [arm for arm in arms if arm.verified == length], 1) for length in design.lengths]
    heads, forms = len(design.heads), list[Form](["run", *design.forms])
    free = np.array([True] * (heads + 3 + len(forms) * len(groups)))
    given, firsts = np.zeros(len(free)), np.linspace(0, 1, 11).tolist() if max(a.drafted for a in arms) > 1 else [0.0]
    if known is not None:
        priced = [dict(known.heads.get(form, ())).get(tokens, known.rest) for form, tokens in design.heads]
        of_groups = [known.of(form, *group[0]) for form in forms for group in groups]
        given = np.array([*priced, known.exit_check, known.crowding, known.mixing, *of_groups])
        free[:] = False
        free[heads + 3 : heads + 3 + len(groups)] = [group[0][0] == "attention" for group in groups]
        firsts = [known.first]
    solved = []
    for first in firsts:  # enters non-linearly, so a grid search
        steps = np.array([design.steps(arm, first) for arm in arms])
        found, error = nnls(steps[:, free] / seconds[:, None], 1 - steps @ np.where(free, 0.0, given) / seconds)
        solved.append((error, first, found.tolist()))
    _, first, found = min(solved)
    given[free] = found
    point = _point(design, given.tolist(), context, first)
    if known is not None:  # what keys and values of more tokens cost, they cost in every form
        more = [now - before for now, before in zip(point.attention, known.attention, strict=True)]
        changed = {}
        for form, of_kind in point.forms.items():
            both = zip(of_kind["attention"], more, strict=True)
            changed[form] = {**of_kind, "attention": tuple(max(0.0, seconds + m) for seconds, m in both)}
        point = replace(point, forms=changed)
    return replace(
        point, verify=(_median(times, [None], 1), *design.verify(list(itertools.accumulate(verify, max))))
    )  # fmt: skip


def _point(design: Design, found: list[float], context: int, first: float) -> Point:
    """The solution as a point, yet without verifies."""
    heads, groups, layers = len(design.heads), design.groups, design.plans[0].num_layers
    rest, (exit_check, crowding, mixing) = found[:heads], found[heads : heads + 3]
    by_form: dict[str, dict[str, tuple[float, ...]]] = {}
    for number, form in enumerate(("run", *design.forms)):
        start = heads + 3 + number * len(groups)
        values = found[start : start + len(groups)]
        cost = {sub: value for group, value in zip(groups, values, strict=True) for sub in group}
        by_form[form] = {kind: tuple(cost[kind, i] for i in range(layers)) for kind in KINDS}
    of_heads: dict[str, list[tuple[float, float]]] = {}
    for (form, tokens), value in zip(design.heads, rest, strict=True):
        of_heads.setdefault(form, []).append((tokens, value))
    run = by_form.pop("run")
    return Point(
        context=context, rest=rest[0], attention=run["attention"], mlp=run["mlp"], exit_check=exit_check, verify=(),
        first=first, crowding=crowding, forms=by_form, mixing=mixing,
        heads={form: tuple(sorted(pairs)) for form, pairs in of_heads.items() if len(pairs) > 1},
    )  # fmt: skip


def profile_or_load(
    path: Path, target: Target, identity: str, *, contexts: list[int], max_length: int, progress: Progress,
    rule: SelectionRule = GREEDY, seconds: float = 60, forms: Sequence[Quantised] = (),
) -> Costs:  # fmt: skip
    """The costs in `path` if they were measured for this model and set-up at these lengths; else new ones, saved.

    They are saved context by context, and a profile that was stopped goes on behind the last one. One that had too
    little time is made anew where there is twice as much.
    """
    key = f"{identity} | contexts {contexts} | K <= {max_length} | drafts and verifies apart, rising, crowding"
    key += f" | {rule}" * (rule != GREEDY)
    key += f" | {', '.join(forms)}" * bool(forms)
    key += " | packed weights" * (target.compiled is not None and target.compiled.packs)
    found = read_checked(path, Costs.of)
    if found is None or found.identity != key or (found.cut_short and seconds > 2 * found.cut_short):
        found = Costs(identity=key, points=())  # others are another set-up's

    def keep(points: list[Point], hurried: bool) -> None:
        nonlocal found
        assert found is not None
        short = found.cut_short or (seconds if hurried else 0.0)
        found = Costs(identity=key, points=tuple(points), cut_short=short)
        write_checked(path, asdict(found))

    if len(found.points) < len(contexts):
        profile(
            target, contexts=contexts, max_length=max_length, progress=progress, seconds=seconds, rule=rule,
            forms=forms, known=found.points, keep=keep,
        )  # fmt: skip
    return found
