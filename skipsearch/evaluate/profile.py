"""Profile: whole blocks timed as decoding runs them, and separated into costs by difference.

Times the runtime's own draft and verify, so every overhead of serving is included. It ends when the costs are known
well enough, or when its seconds are spent.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from scipy.optimize import nnls
from transformers import PreTrainedModel

from skipsearch.compiled.backend import Progress
from skipsearch.decoding.sequences import Sequences
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.clock import sequence_at
from skipsearch.evaluate.cost import Costs, Point, draft_step
from skipsearch.evaluate.design import Arm, Design, choose_design, timed_arm
from skipsearch.files import write_json
from skipsearch.mask import SkipMask
from skipsearch.model.target import Target

WARM_UP, LEAST, MOST = 1, 3, 12  # turns that are not counted; the fewest and the most that are
RESAMPLED = 16  # times, for a standard error
ERROR = 0.02  # relative standard error at which costs are known
FIRST_CONTEXT = 0.65  # of the seconds; the others price attention and verify anew, and nothing else
# By arm (None: a plain step), by turn: draft and verify in seconds.
Times = dict[Arm | None, list[list[tuple[float, float]]]]


def profile(
    target: Target, *, contexts: list[int], max_length: int, progress: Progress, seconds: float = 60,
    temperature: float = 0.0, known: Sequence[Point] = (), keep: Callable[[list[Point]], None] = lambda points: None,
) -> tuple[Point, ...]:  # fmt: skip
    """Measure whole blocks at each context length, as decoding runs them, and separate their parts by difference.

    A draft of K tokens takes K steps and something to begin; a step takes the sum of what runs. One system of equations
    separates them. Its rows are drafts of masks of all densities, since weights that fit into a cache cost less than
    their share, each in front of a verify of another length. Arms take turns and the median counts, so that a short
    disturbance affects all of them alike. Turns end when the plain step, a draft step and the verifies have a relative
    standard error under 2 % (bootstrap over turns). A verify of more tokens never costs less than one of fewer;
    otherwise one disturbed arm would attract drafts. Sublayers of one kind and build have one cost; others (dense
    layers and mixtures of experts, full and sliding attention) have their own. At every context but the first,
    attention and verify alone are measured anew.

    Args:
        seconds: the most that timing may take.
        known: points of the first contexts, which are not measured again.
        keep: called with all points so far after each context.
    """
    design = choose_design(target, max_length)
    views = [draft_view(target.model, mask) for mask in design.masks]
    points = list(known)
    begin = time.perf_counter()
    for number, context in enumerate(contexts[len(points) :], len(points)):
        share = FIRST_CONTEXT + (1 - FIRST_CONTEXT) * number / max(1, len(contexts) - 1) if len(contexts) > 1 else 1.0
        sequence = sequence_at(target, views[0], context, max_length, temperature)  # one cache for all masks
        solve = partial(_solve, design=design, context=context, known=points[0] if points else None)

        def turned(part: float, number: int = number) -> None:
            progress("profile", round(100 * (number + part) / len(contexts)), 100)

        arms = design.again if points else design.arms
        times = _take_turns(sequence, [None, *arms], views, solve, begin + share * seconds, turned)
        points.append(solve(times))
        keep(points)
    return tuple(points)


def _take_turns(
    sequence: Sequences, arms: Sequence[Arm | None], views: list[PreTrainedModel],
    solve: Callable[[Times], Point], end: float, turned: Callable[[float], None],
) -> Times:  # fmt: skip
    """Seconds of each arm, turn by turn, until what they give is known well enough."""
    times: Times = {arm: [] for arm in arms}
    for turn in range(WARM_UP + MOST):
        begin = time.perf_counter()
        for arm, known in times.items():
            sequence.draft_with(views[0 if arm is None else arm.mask])
            found = timed_arm(sequence, arm)
            if turn >= WARM_UP:
                known.append(found)
        counted, now = turn + 1 - WARM_UP, time.perf_counter()
        left = (end - now) / max(now - begin, 1e-9)  # turns for which there is time
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
        found.append([draft_step(point, half, False), *point.verify])
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
    arms = [arm for arm in times if arm is not None]
    seconds, groups = np.array([_median(times, [arm], 0) for arm in arms]), design.groups
    verify = [_median(times, [arm for arm in arms if arm.verified == length], 1) for length in design.lengths]
    given, free = [0.0] * (3 + len(groups)), [True] * (3 + len(groups))
    firsts = np.linspace(0, 1, 11).tolist() if max(arm.drafted for arm in arms) > 1 else [0.0]
    if known is not None:
        given = [known.rest, known.exit_check, known.crowding, *(getattr(known, g[0][0])[g[0][1]] for g in groups)]
        free, firsts = [False] * 3 + [group[0][0] == "attention" for group in groups], [known.first]
    columns = np.flatnonzero(free)
    rest_of = np.where(free, 0.0, given)
    solved = []
    for first in firsts:  # enters non-linearly, so a grid search
        steps = np.array([arm.steps(design.masks, groups, first) for arm in arms], float)
        found, error = nnls(steps[:, columns] / seconds[:, None], 1 - steps @ rest_of / seconds)
        solved.append((error, first, found.tolist()))
    _, first, found = min(solved)
    rest_of[columns] = found
    rest, exit_check, crowding, *of_groups = map(float, rest_of)
    cost = {sub: value for group, value in zip(groups, of_groups, strict=True) for sub in group}
    layers = design.masks[0].num_layers
    return Point(
        context=context, rest=rest, attention=tuple(cost["attention", i] for i in range(layers)),
        mlp=tuple(cost["mlp", i] for i in range(layers)), exit_check=exit_check, first=first, crowding=crowding,
        verify=(_median(times, [None], 1), *design.verify(list(itertools.accumulate(verify, max)))),
    )  # fmt: skip


def profile_or_load(
    path: Path, target: Target, identity: str, *, contexts: list[int], max_length: int, progress: Progress,
    temperature: float = 0.0, seconds: float = 60,
) -> Costs:  # fmt: skip
    """The costs in `path` if they were measured for this model and set-up at these lengths; else new ones, saved.

    They are saved context by context, and a profile that was stopped goes on behind the last one.
    """
    key = f"{identity} | contexts {contexts} | K <= {max_length} | drafts and verifies apart, rising, crowding"
    key += f" | temperature {temperature}" * bool(temperature)
    key += " | packed weights" * (target.compiled is not None and target.compiled.packs)
    known: tuple[Point, ...] = ()
    try:
        found = Costs.of(json.loads(path.read_text()))
        known = found.points if found.identity == key else ()
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there are none yet, or they are another one's: measure anew
    if len(known) < len(contexts):
        known = profile(
            target, contexts=contexts, max_length=max_length, progress=progress, seconds=seconds,
            temperature=temperature, known=known,
            keep=lambda points: write_json(path, asdict(Costs(identity=key, points=tuple(points)))),
        )  # fmt: skip
    return Costs(identity=key, points=known)
