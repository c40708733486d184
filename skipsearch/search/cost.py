"""Costs: seconds of a draft step and of a verify on this device, measured once by difference.

Times the runtime's own draft and verify, so every overhead of serving is inside. Knows no tokens.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from skipsearch.decoding.compiled import CompiledModel
from skipsearch.decoding.policy import DraftPolicy, ExitRule
from skipsearch.decoding.sequences import Sequences
from skipsearch.files import write_json
from skipsearch.mask import KINDS, Kind, SkipMask
from skipsearch.model.cache import layer_windows
from skipsearch.model.sublayers import find_sublayers, input_device
from skipsearch.search.trace import Progress

DRAFTS = 6  # draft steps in one timing of a draft
NEVER = 1e-9  # an exit threshold that is checked at every step and never met


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Costs at one context length, in seconds.

    Attributes:
        context: tokens attended to.
        attention, mlp: of each layer's sublayer in a draft step.
        rest: of a draft step without any sublayer.
        exit_check: what a confidence exit adds to a draft step.
        verify: of verifying k drafted tokens, rollback and commit included; index k = 0 is plain decoding.
    """

    context: int
    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    rest: float
    exit_check: float
    verify: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Curves over context length, linear between the measured points and held beyond them."""

    identity: str
    points: tuple[Point, ...]

    def at(self, context: float) -> Point:
        """The point at a context length, interpolated."""
        where = [p.context for p in self.points]

        def between(values: Sequence[float]) -> float:
            return float(np.interp(context, where, values))

        def each(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
            return tuple(map(between, zip(*rows, strict=True)))

        return Point(
            context=round(context), attention=each([p.attention for p in self.points]),
            mlp=each([p.mlp for p in self.points]), rest=between([p.rest for p in self.points]),
            exit_check=between([p.exit_check for p in self.points]), verify=each([p.verify for p in self.points]),
        )  # fmt: skip

    def mix(self, contexts: Sequence[float]) -> Point:
        """The mean of the points at several context lengths: what serving an even mix of them costs."""
        points = [self.at(context) for context in contexts]

        def each(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
            return tuple(statistics.fmean(values) for values in zip(*rows, strict=True))

        return Point(
            context=round(statistics.fmean(contexts)), attention=each([p.attention for p in points]),
            mlp=each([p.mlp for p in points]), rest=statistics.fmean(p.rest for p in points),
            exit_check=statistics.fmean(p.exit_check for p in points), verify=each([p.verify for p in points]),
        )  # fmt: skip


def draft_step(point: Point, mask: SkipMask, exit_check: bool) -> float:
    """Seconds of one draft step under a mask."""
    attention = sum(s for i, s in enumerate(point.attention) if i not in mask.attention)
    mlp = sum(s for i, s in enumerate(point.mlp) if i not in mask.mlp)
    return point.rest + attention + mlp + exit_check * point.exit_check


def device_name(device: torch.device) -> str:
    """The processor that a figure belongs to."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def set_up(model: PreTrainedModel, backend: str = "eager") -> str:
    """What measured seconds depend on beside the model: device, dtype, backend, library version."""
    return f"{device_name(input_device(model))} | {model.dtype} | {backend} | torch {torch.__version__}"


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle, so that a host clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(
    model: PreTrainedModel,
    identity: str,
    *,
    contexts: list[int],
    max_length: int,
    progress: Progress,
    repeats: int = 9,
    compiled: CompiledModel | None = None,
) -> Costs:
    """Measure at each context length: drafts with sublayers left out, verifies of 0..max_length tokens.

    Arms take turns and medians are kept, so that a passing disturbance hits all of them alike. Sublayers of one
    kind that are built alike count as equally dear; others (dense and mixture layers, full and sliding attention)
    are told apart.
    """
    layers = find_sublayers(model).num_layers
    groups = alike(model)
    empty, everything = SkipMask(num_layers=layers), [sub for group in groups for sub in group]
    masks = [empty, SkipMask.from_sublayers(everything, layers), SkipMask.from_sublayers(everything[::2], layers)]
    for group in groups:
        masks += [SkipMask.from_sublayers(part, layers) for part in (group, group[::2])]
    points = []
    for number, context in enumerate(contexts):
        sequences = [_sequence(model, mask, context, max_length, compiled) for mask in masks]
        plain = sequences[0]
        arms: list[tuple[Any, ...]] = [("draft", i) for i in range(len(masks))]
        arms += [("exit",)] + [("verify", k) for k in range(max_length + 1)]
        times: dict[tuple[Any, ...], list[float]] = {arm: [] for arm in arms}
        for turn in range(repeats + 3):
            for arm in arms:
                if arm[0] == "verify":
                    seconds = _time_verify(plain, arm[1])
                else:
                    sequence = sequences[arm[1]] if arm[0] == "draft" else sequences[1]
                    seconds = _time_draft(sequence, asks=arm[0] == "exit")
                if turn >= 3:  # the first turns warm up
                    times[arm].append(seconds)
            progress("profile", number * (repeats + 3) + turn + 1, len(contexts) * (repeats + 3))
        median = {arm: statistics.median(values) for arm, values in times.items()}
        run = np.array([[1, *(sum(not m.skips(*sub) for sub in group) for group in groups)] for m in masks], float)
        seconds_of = np.array([median["draft", i] for i in range(len(masks))]) / DRAFTS
        rest, *each = np.maximum(0.0, np.linalg.lstsq(run, seconds_of, rcond=None)[0]).tolist()
        price = {sub: seconds for group, seconds in zip(groups, each, strict=True) for sub in group}
        points.append(
            Point(
                context=context, rest=rest, attention=tuple(price["attention", i] for i in range(layers)),
                mlp=tuple(price["mlp", i] for i in range(layers)),
                exit_check=max(0.0, (median["exit",] - median["draft", 1]) / DRAFTS),
                verify=tuple(median["verify", k] for k in range(max_length + 1)),
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


def _sequence(
    model: PreTrainedModel, mask: SkipMask, context: int, max_length: int, compiled: CompiledModel | None
) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, context), generator=generator).to(input_device(model))
    capacity = context + max(max_length, DRAFTS) + 4
    sequence = Sequences(model, ids, capacity=capacity, mask=mask, compiled=compiled)
    sequence.verify([0])
    return sequence


def _time_draft(sequence: Sequences, asks: bool) -> float:
    rule = ExitRule(DraftPolicy(max_length=DRAFTS, exit_threshold=NEVER))
    synchronize(sequence.ids.device)
    start = time.perf_counter()
    sequence.draft([DRAFTS], (lambda _place, _token, confidence: rule.stops(confidence)) if asks else None)
    synchronize(sequence.ids.device)
    return time.perf_counter() - start


def _time_verify(sequence: Sequences, k: int) -> float:
    length = sequence.lengths[0]  # what lies behind it serves as a draft: the work does not depend on the tokens
    synchronize(sequence.ids.device)
    start = time.perf_counter()
    sequence.verify([k])
    synchronize(sequence.ids.device)
    seconds = time.perf_counter() - start
    sequence.truncate(0, length)
    return seconds


def profile_or_load(
    path: Path, model: PreTrainedModel, identity: str, *, contexts: list[int], max_length: int, progress: Progress,
    compiled: CompiledModel | None = None,
) -> Costs:  # fmt: skip
    """The costs in `path` if they were measured for this model and set-up at these lengths; else new ones, saved."""
    key = f"{identity} | contexts {contexts} | K <= {max_length}"
    try:
        data = json.loads(path.read_text())
        if data["identity"] == key:
            lists = ("attention", "mlp", "verify")
            points = tuple(Point(**{**p, **{name: tuple(p[name]) for name in lists}}) for p in data["points"])
            return Costs(identity=key, points=points)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or not ours: measured anew
    costs = profile(
        model, key, contexts=contexts, max_length=max_length, progress=progress, compiled=compiled
    )  # fmt: skip
    write_json(path, asdict(costs))
    return costs
