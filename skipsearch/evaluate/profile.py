"""The profile: blocks timed as decoding runs them, and told apart into costs by difference.

Times the runtime's own draft and verify, so every overhead of serving is inside.
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
import torch
from scipy.optimize import nnls
from transformers import DynamicCache, PreTrainedModel

from skipsearch.compiled.model import CompiledModel
from skipsearch.decoding.drafter import Drafter
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.processors import at_temperature
from skipsearch.decoding.sequences import Sequences
from skipsearch.draft.view import draft_view
from skipsearch.evaluate.cost import Costs, Point, crowd
from skipsearch.evaluate.trace import Progress
from skipsearch.files import write_json
from skipsearch.mask import KINDS, Kind, SkipMask
from skipsearch.model.cache import layer_windows
from skipsearch.model.sublayers import find_sublayers, input_device

FEW = 5  # tokens of the longer one of two blocks that tell a draft step from a verify
NEVER = 1e-9  # an exit threshold that is checked at every step and never met


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle, so that a host clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class _Arm:
    """A draft to be timed: number of the mask, tokens, whether their confidence is looked at, and with its verify."""

    mask: int
    length: int
    asks: bool = False
    verifies: bool = True

    @property
    def policy(self) -> DraftPolicy:
        return DraftPolicy(max_length=self.length, exit_threshold=NEVER if self.asks else None)

    def steps(self, masks: list[SkipMask], groups: list[list[tuple[Kind, int]]], first: float) -> list[float]:
        """How often it takes the rest of a step, a look at the confidence, crowding, and a sublayer of each group."""
        run = [sum(not masks[self.mask].skips(*sub) for sub in group) for group in groups]
        return [(self.length + first) * count for count in (1, int(self.asks), crowd(masks[self.mask]), *run)]

    def verify(self, max_length: int) -> list[int]:
        """How often it takes a verify of one token, and what each further token adds: never less than nothing."""
        return [int(self.verifies and self.length >= k) for k in range(1, max_length + 1)]


def profile(
    model: PreTrainedModel,
    identity: str,
    *,
    contexts: list[int],
    max_length: int,
    progress: Progress,
    repeats: int = 6,
    compiled: CompiledModel | None = None,
    temperature: float = 0.0,
) -> Costs:
    """Measure whole blocks at each context length, as decoding runs them, and tell their parts apart by difference.

    A block of K tokens takes K steps, something to begin, and a verify; a step takes the sum of what runs. One system
    of equations tells them apart: blocks of one mask at every length, of masks of all densities at two lengths, and a
    draft without its verify. Masks like those to be priced, and not all or nothing: what fits into a cache costs less
    than its share. Arms take turns and medians are kept, so that a passing disturbance hits all of them alike.
    A verify of more tokens costs no less than one of fewer; that keeps one disturbed arm from drawing drafts to it.
    Sublayers of one kind that are built alike count as equally dear; others (dense and mixture layers, full and
    sliding attention) are told apart.
    """
    layers = find_sublayers(model).num_layers
    groups = alike(model)
    rng = random.Random(0)
    masks = [SkipMask(attention=range(0, layers, 2), mlp=range(1, layers, 2), num_layers=layers)]
    for _ in range(4 * len(groups) + 3):
        densities = [rng.uniform(0, 0.9) for _ in groups]
        chosen = [sub for group, share in zip(groups, densities, strict=True) for sub in group if rng.random() < share]
        masks.append(SkipMask.from_sublayers(chosen, layers))
    masks.append(SkipMask(num_layers=layers))  # else masks that skip little are priced too low
    few = min(FEW, max_length)
    arms = [_Arm(0, k) for k in range(1, max_length + 1)] + [_Arm(0, few, asks=True), _Arm(0, few, verifies=False)]
    arms += [_Arm(i, k) for i in range(1, len(masks)) for k in sorted({1, few})]
    views = [draft_view(model, mask) for mask in masks]
    points = []
    for number, context in enumerate(contexts):
        sequence = sequence_at(
            model, masks[0], context, max_length, compiled, temperature
        )  # one cache, whatever drafts
        times: dict[_Arm | None, list[float]] = {arm: [] for arm in (None, *arms)}
        for turn in range(repeats + 2):
            for arm, known in times.items():
                sequence.draft_with(views[0 if arm is None else arm.mask])
                before = partial(sequence.verify, [0]) if arm is None else partial(_block, sequence, arm.policy)
                run = before if arm is None or arm.verifies else partial(sequence.draft, [arm.length])
                seconds = timed(sequence, run, before)
                if turn >= 2:  # the first turns warm up
                    known.append(seconds)
            progress("profile", number * (repeats + 2) + turn + 1, len(contexts) * (repeats + 2))
        plain, *medians = [statistics.median(known) for known in times.values()]
        weights = 1 / np.array(medians)  # relative errors count
        solved = []
        for first in np.linspace(0, 1, 11).tolist() if few > 1 else [0.0]:  # not a linear unknown
            rows = np.array([[*arm.steps(masks, groups, first), *arm.verify(max_length)] for arm in arms], float)
            found, error = nnls(rows * weights[:, None], np.ones(len(arms)))
            solved.append((error, first, found.tolist()))
        _, first, (rest, exit_check, crowding, *found) = min(solved)
        price = {sub: seconds for group, seconds in zip(groups, found, strict=False) for sub in group}
        points.append(
            Point(
                context=context, rest=rest, attention=tuple(price["attention", i] for i in range(layers)),
                mlp=tuple(price["mlp", i] for i in range(layers)), exit_check=exit_check,
                verify=(plain, *itertools.accumulate(found[len(groups) :])), first=first, crowding=crowding,
            )
        )  # fmt: skip
    return Costs(identity=identity, points=tuple(points))


def alike(model: PreTrainedModel) -> list[list[tuple[Kind, int]]]:
    """Sublayers in groups of the same kind and build."""
    found = find_sublayers(model)
    windows = layer_windows(DynamicCache(config=model.config))
    groups: dict[Any, list[tuple[Kind, int]]] = {}
    for kind in KINDS:
        for i, layer in enumerate(model.get_submodule(found.path).children()):
            modules = [getattr(layer, name) for name in found.child[kind]]
            shapes = tuple(tuple(p.shape) for module in modules for p in module.parameters())
            window = windows[i] if kind == "attention" else None
            groups.setdefault((kind, type(modules[0]), shapes, window), []).append((kind, i))
    return list(groups.values())


def sequence_at(
    model: PreTrainedModel, mask: SkipMask, context: int, max_length: int, compiled: CompiledModel | None,
    temperature: float = 0.0,
) -> Sequences:  # fmt: skip
    """A sequence of random tokens, its prompt processed, to time blocks on."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, context), generator=generator).to(input_device(model))
    capacity = context + max_length + 4
    sampling = at_temperature(temperature, 0, ids.device)
    sequence = Sequences(model, ids, capacity=capacity, mask=mask, compiled=compiled, **sampling)
    sequence.verify([0])
    return sequence


def timed(sequence: Sequences, run: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Seconds of what is done to a sequence, which is put back.

    Args:
        before: what is done just before it, as in decoding; by default the same.
    """
    length, seconds = sequence.lengths[0], 0.0
    for action in (before or run, run):
        synchronize(sequence.ids.device)
        start = time.perf_counter()
        action()
        synchronize(sequence.ids.device)
        seconds = time.perf_counter() - start
        sequence.truncate(0, length)
    return seconds


def _block(sequence: Sequences, policy: DraftPolicy) -> None:
    drafter = Drafter(sequence, policy)
    draft = drafter.draft([policy.max_length])
    drafter.learn(draft, sequence.verify(draft.drafted, draft.probs))


def profile_or_load(
    path: Path, model: PreTrainedModel, identity: str, *, contexts: list[int], max_length: int, progress: Progress,
    compiled: CompiledModel | None = None, temperature: float = 0.0,
) -> Costs:  # fmt: skip
    """The costs in `path` if they were measured for this model and set-up at these lengths; else new ones, saved."""
    key = f"{identity} | contexts {contexts} | K <= {max_length} | whole blocks, rising, crowding"
    key += f" | temperature {temperature}" * bool(temperature)
    try:
        known = Costs.of(json.loads(path.read_text()))
        if known.identity == key:
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or not ours: measured anew
    costs = profile(
        model, key, contexts=contexts, max_length=max_length, progress=progress, compiled=compiled,
        temperature=temperature,
    )  # fmt: skip
    write_json(path, asdict(costs))
    return costs
