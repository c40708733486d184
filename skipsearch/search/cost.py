"""Costs: seconds of a draft step and of a verify on this device, measured once by difference.

Times the runtime's own draft and verify, so every overhead of serving is inside. Knows no tokens.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from skipsearch.decoding.compiled import CompiledModel
from skipsearch.decoding.policy import DraftPolicy, ExitRule
from skipsearch.decoding.sequences import Sequences
from skipsearch.files import write_json
from skipsearch.mask import SkipMask
from skipsearch.model.sublayers import find_sublayers, input_device
from skipsearch.search.trace import Progress

DRAFTS = 6  # draft steps in one timing of a draft
NEVER = 1e-9  # an exit threshold that is checked at every step and never met


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Costs at one context length, in seconds.

    Attributes:
        context: tokens attended to.
        attention, mlp: of one sublayer in a draft step.
        rest: of a draft step without any sublayer.
        exit_check: what a confidence exit adds to a draft step.
        verify: of verifying k drafted tokens, rollback and commit included; index k = 0 is plain decoding.
    """

    context: int
    attention: float
    mlp: float
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

        def between(values: list[float]) -> float:
            return float(np.interp(context, where, values))

        return Point(
            context=round(context),
            attention=between([p.attention for p in self.points]),
            mlp=between([p.mlp for p in self.points]),
            rest=between([p.rest for p in self.points]),
            exit_check=between([p.exit_check for p in self.points]),
            verify=tuple(between([p.verify[k] for p in self.points]) for k in range(len(self.points[0].verify))),
        )


def draft_step(point: Point, mask: SkipMask, exit_check: bool) -> float:
    """Seconds of one draft step under a mask."""
    run_attention, run_mlp = mask.num_layers - len(mask.attention), mask.num_layers - len(mask.mlp)
    return point.rest + run_attention * point.attention + run_mlp * point.mlp + exit_check * point.exit_check


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

    Arms take turns and medians are kept, so that a passing disturbance hits all of them alike.
    """
    layers = find_sublayers(model).num_layers
    every = range(layers)
    half = range(0, layers, 2)
    masks = [
        SkipMask(num_layers=layers),
        SkipMask(attention=every, num_layers=layers),
        SkipMask(mlp=every, num_layers=layers),
        SkipMask(attention=half, mlp=half, num_layers=layers),
        SkipMask(attention=half, num_layers=layers),
        SkipMask(mlp=half, num_layers=layers),
        SkipMask(attention=every, mlp=every, num_layers=layers),
    ]
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
                    sequence = sequences[arm[1]] if arm[0] == "draft" else sequences[-1]
                    seconds = _time_draft(sequence, asks=arm[0] == "exit")
                if turn >= 3:  # the first turns warm up
                    times[arm].append(seconds)
            progress("profile", number * (repeats + 3) + turn + 1, len(contexts) * (repeats + 3))
        median = {arm: statistics.median(values) for arm, values in times.items()}
        run = np.array([[1, layers - len(m.attention), layers - len(m.mlp)] for m in masks], dtype=float)
        seconds_of = np.array([median["draft", i] for i in range(len(masks))]) / DRAFTS
        rest, attention, mlp = np.linalg.lstsq(run, seconds_of, rcond=None)[0]
        points.append(
            Point(
                context=context, attention=max(0.0, float(attention)), mlp=max(0.0, float(mlp)),
                rest=max(0.0, float(rest)),
                exit_check=max(0.0, (median["exit",] - median["draft", len(masks) - 1]) / DRAFTS),
                verify=tuple(median["verify", k] for k in range(max_length + 1)),
            )
        )  # fmt: skip
    return Costs(identity=identity, points=tuple(points))


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
            points = tuple(Point(**{**p, "verify": tuple(p["verify"])}) for p in data["points"])
            return Costs(identity=key, points=points)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or not ours: measured anew
    costs = profile(
        model, key, contexts=contexts, max_length=max_length, progress=progress, compiled=compiled
    )  # fmt: skip
    write_json(path, asdict(costs))
    return costs
