"""Profile: whole blocks timed as decoding runs them, and separated into costs by difference.

Times the runtime's own draft and verify, so every overhead of serving is included.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from transformers import PreTrainedModel

from skipsearch.compiled.backend import Progress
from skipsearch.decoding.drafter import Drafter
from skipsearch.decoding.processors import TokenSelection
from skipsearch.decoding.sequences import Sequences
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.cost import Costs, Point, crowding_factor
from skipsearch.files import write_json
from skipsearch.mask import KINDS, SkipMask, Sublayer
from skipsearch.model.device import synchronize
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

FEW = 5  # tokens of the longer one of two blocks that separate a draft step from a verify
WARM_UP = 2  # turns that are not counted
NEVER = 1e-9  # an exit threshold that is checked at every step and never met


@dataclass(frozen=True, slots=True)
class _Arm:
    """A draft to be timed.

    Attributes:
        mask: number of its mask.
        length: tokens drafted.
        with_confidence: whether their confidence is read, as an exit does.
        verifies: whether the verify behind the draft is timed with it.
    """

    mask: int
    length: int
    with_confidence: bool = False
    verifies: bool = True

    @property
    def policy(self) -> DraftPolicy:
        return DraftPolicy(max_length=self.length, exit_threshold=NEVER if self.with_confidence else None)

    def steps(self, masks: list[SkipMask], groups: list[list[Sublayer]], first: float) -> list[float]:
        """How often it contains the rest of a step, an exit check, crowding, and a sublayer of each group."""
        mask = masks[self.mask]
        run = [sum(not mask.skips(*sub) for sub in group) for group in groups]
        counts = (1, int(self.with_confidence), crowding_factor(mask), *run)
        return [(self.length + first) * count for count in counts]

    def verify(self, max_length: int) -> list[int]:
        """How often it contains a verify of one token, and what each further token adds."""
        return [int(self.verifies and self.length >= k) for k in range(1, max_length + 1)]


def profile(
    target: Target, *, contexts: list[int], max_length: int, progress: Progress, repeats: int = 6,
    temperature: float = 0.0,
) -> tuple[Point, ...]:  # fmt: skip
    """Measure whole blocks at each context length, as decoding runs them, and separate their parts by difference.

    A block of K tokens takes K draft steps, something to begin, and a verify; a step takes the sum of what runs. One
    system of equations separates them. Its rows are blocks of one mask at every length, blocks of masks of all
    densities at two lengths, and a draft without its verify. The masks are like those of a search, since
    weights that fit into a cache cost less than their share. Arms take turns and the median counts, so that a short
    disturbance affects all of them alike. A verify of more tokens never costs less than one of fewer; otherwise one
    disturbed arm would attract drafts. Sublayers of one kind and build have one cost; others (dense layers and
    mixtures of experts, full and sliding attention) have their own.
    """
    groups = build_groups(target)
    masks = _masks(target.num_layers, groups)
    few = min(FEW, max_length)
    arms = [_Arm(0, k) for k in range(1, max_length + 1)]
    arms += [_Arm(0, few, with_confidence=True), _Arm(0, few, verifies=False)]
    arms += [_Arm(i, k) for i in range(1, len(masks)) for k in sorted({1, few})]
    views = [draft_view(target.model, mask) for mask in masks]
    points = []
    for number, context in enumerate(contexts):

        def turned(turn: int, number: int = number) -> None:
            progress("profile", number * (repeats + WARM_UP) + turn + 1, len(contexts) * (repeats + WARM_UP))

        sequence = sequence_at(target, views[0], context, max_length, temperature)  # one cache for all masks
        plain, *medians = _time_arms(sequence, arms, views, repeats, turned)
        points.append(_solve(arms, masks, groups, medians, context, plain))
    return tuple(points)


def _masks(layers: int, groups: list[list[Sublayer]]) -> list[SkipMask]:
    """Masks of all densities to time drafts with; the first one is timed at every length."""
    rng = random.Random(0)
    masks = [SkipMask(attention=range(0, layers, 2), mlp=range(1, layers, 2), num_layers=layers)]
    for _ in range(4 * len(groups) + 3):
        densities = [rng.uniform(0, 0.9) for _ in groups]
        chosen = [sub for group, share in zip(groups, densities, strict=True) for sub in group if rng.random() < share]
        masks.append(SkipMask.from_sublayers(chosen, layers))
    return [*masks, SkipMask(num_layers=layers)]  # without the empty mask, those that skip little would cost too little


def _time_arms(
    sequence: Sequences, arms: list[_Arm], views: list[PreTrainedModel], repeats: int, turned: Callable[[int], None]
) -> list[float]:
    """Median seconds of a plain step, then of each arm."""
    times: dict[_Arm | None, list[float]] = {arm: [] for arm in (None, *arms)}
    for turn in range(repeats + WARM_UP):
        for arm, known in times.items():
            sequence.draft_with(views[0 if arm is None else arm.mask])
            before = partial(sequence.verify, [0]) if arm is None else partial(_block, sequence, arm.policy)
            run = before if arm is None or arm.verifies else partial(sequence.draft, [arm.length])
            seconds = timed(sequence, run, before)
            if turn >= WARM_UP:
                known.append(seconds)
        turned(turn)
    return [statistics.median(known) for known in times.values()]


def _solve(
    arms: list[_Arm], masks: list[SkipMask], groups: list[list[Sublayer]], medians: list[float], context: int,
    plain: float,
) -> Point:  # fmt: skip
    """The costs that explain the seconds of all arms best: least squares of relative errors, none below zero."""
    weights = 1 / np.array(medians)
    max_length, layers = max(arm.length for arm in arms), masks[0].num_layers
    solved = []
    for first in np.linspace(0, 1, 11).tolist() if max_length > 1 else [0.0]:  # enters non-linearly, so a grid search
        rows = [[*arm.steps(masks, groups, first), *arm.verify(max_length)] for arm in arms]
        found, error = nnls(np.array(rows, float) * weights[:, None], np.ones(len(arms)))
        solved.append((error, first, found.tolist()))
    _, first, (rest, exit_check, crowding, *found) = min(solved)
    cost = {sub: seconds for group, seconds in zip(groups, found, strict=False) for sub in group}
    return Point(
        context=context, rest=rest, attention=tuple(cost["attention", i] for i in range(layers)),
        mlp=tuple(cost["mlp", i] for i in range(layers)), exit_check=exit_check,
        verify=(plain, *itertools.accumulate(found[len(groups) :])), first=first, crowding=crowding,
    )  # fmt: skip


def build_groups(target: Target) -> list[list[Sublayer]]:
    """Sublayers in groups of the same kind and build: those of one group cost the same."""
    groups: dict[Any, list[Sublayer]] = {}
    for kind in KINDS:
        for i, layer in enumerate(target.layers):
            modules = [getattr(layer, name) for name in target.sublayers.child[kind]]
            shapes = tuple(tuple(p.shape) for module in modules for p in module.parameters())
            window = target.attention.windows[i] if kind == "attention" else None
            groups.setdefault((kind, type(modules[0]), shapes, window), []).append((kind, i))
    return list(groups.values())


def sequence_at(
    target: Target, draft: PreTrainedModel | None, context: int, max_length: int, temperature: float = 0.0
) -> Sequences:
    """A sequence of random tokens, its prompt processed, to time blocks on."""
    sequence = Sequences(
        target, target.random_ids(context), capacity=context + max_length + 4, draft=draft,
        selection=TokenSelection.at_temperature(temperature, 0, target.device),
    )  # fmt: skip
    sequence.verify([0])
    return sequence


def timed(sequence: Sequences, run: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Seconds that `run` takes on a sequence, which is put back to its length afterwards.

    Args:
        before: what is done just before it, as in decoding; by default the same.
    """
    length, seconds = sequence.lengths[0], 0.0
    for action in (before or run, run):
        synchronize(sequence.target.device)
        start = time.perf_counter()
        action()
        synchronize(sequence.target.device)
        seconds = time.perf_counter() - start
        sequence.truncate(0, length)
    return seconds


def _block(sequence: Sequences, policy: DraftPolicy) -> None:
    drafter = Drafter(sequence, policy)
    draft = drafter.draft([policy.max_length])
    drafter.learn(draft, sequence.verify(draft.drafted, draft.probs))


def profile_or_load(
    path: Path, target: Target, identity: str, *, contexts: list[int], max_length: int, progress: Progress,
    temperature: float = 0.0,
) -> Costs:  # fmt: skip
    """The costs in `path` if they were measured for this model and set-up at these lengths; else new ones, saved."""
    key = f"{identity} | contexts {contexts} | K <= {max_length} | whole blocks, rising, crowding"
    key += f" | temperature {temperature}" * bool(temperature)
    try:
        known = Costs.of(json.loads(path.read_text()))
        if known.identity == key:
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there are none yet, or they are another one's: measure anew
    points = profile(target, contexts=contexts, max_length=max_length, progress=progress, temperature=temperature)
    costs = Costs(identity=key, points=points)
    write_json(path, asdict(costs))
    return costs
