"""skipsearch bench: every way to decode, side by side in one process, on groups of prompts.

Promises interleaved arms after a warm-up, synchronised clocks, prefill timed apart, tokens counted alike
up to the end of sequence, and a check of every arm's tokens against `generate`.
"""

from __future__ import annotations

import statistics
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from skipsearch.bench.arms import HYBRID, MASK, NAMES, NEED_MASK, PLAIN, PREFIX, arms, prefix_mask
from skipsearch.bench.groups import prompt_groups
from skipsearch.bench.machine import Energy, copy_bandwidth, peak_memory, read_bandwidth
from skipsearch.bench.rows import group_rows, joined
from skipsearch.compiled.backend import Backend, Progress, warm_mask, with_backend
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.draft.view import draft_view
from skipsearch.errors import BackendWarning, SkipsearchError
from skipsearch.evaluate.profile import sequence_at, timed
from skipsearch.evaluate.prompts import Ids
from skipsearch.evaluate.timing import Arm, Run, Timing, time_interleaved
from skipsearch.evaluate.trace import DecodeSettings
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile
from skipsearch.model.device import device_name
from skipsearch.model.load import Loaded, check_mask_belongs
from skipsearch.model.target import Target
from skipsearch.search.options import MAX_LENGTH

Group = tuple[Ids, ...]
STEPS = 6  # of a draft, in one timing


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """Settings of a benchmark.

    Attributes:
        new_tokens: decoded from each prompt.
        rounds: repetitions; each prompt's median counts.
        backend: of our arms.
        hf: whether to measure transformers' own arms too.
        sources, per_group: where prompts come from (see `prompt_groups`), and how many of each group.
        only: names of the arms to measure; empty: all. Plain decoding is always measured.
    """

    new_tokens: int = 96
    rounds: int = 2
    backend: Backend = "auto"
    hf: bool = True
    only: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("builtin",)
    per_group: int = 8
    seed: int = 0


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one forward of a few tokens reads: all but an embedding that is only looked up in."""
    unique = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is not None and (head is None or head.weight.data_ptr() != embedding.weight.data_ptr()):
        unique.pop(embedding.weight.data_ptr(), None)
    return sum(unique.values())


def step_costs(target: Target, mask: SkipMask, context: int, repeats: int = 15) -> tuple[float, float]:
    """Seconds of a draft step and of a plain step at a context length, measured in turns."""
    drafting = sequence_at(target, draft_view(target.model, mask), context, MAX_LENGTH)
    plain = sequence_at(target, None, context, MAX_LENGTH)
    draft, step = [], []
    for turn in range(repeats + 3):
        drafted = timed(drafting, lambda: drafting.draft([STEPS])) / STEPS
        stepped = timed(plain, lambda: plain.verify([0]))
        if turn >= 3:
            draft.append(drafted)
            step.append(stepped)
    return statistics.median(draft), statistics.median(step)


def bench(
    target: Target, groups: dict[str, Group], mask: SkipMask | None, policy: DraftPolicy, options: BenchOptions,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Measure all arms on all groups.

    Returns:
        {"machine": .., "settings": .., "rows": one a group and arm, "all" last}, ready for JSON.

    Raises:
        SkipsearchError: an unknown arm.
    """
    _check_arms(options, mask)
    target = with_backend(target, options.backend, progress)
    if mask is not None:
        for drafted in (mask, prefix_mask(mask)):
            warm_mask(target, drafted, progress)
    longest = max(len(prompt) for group in groups.values() for prompt in group) + options.new_tokens + MAX_LENGTH + 1
    every = arms(target, mask, policy, longest, options.hf)
    chosen = {name: arm for name, arm in every.items() if not options.only or name in options.only or name == PLAIN}
    memory = _warm_up(target, chosen, next(iter(groups.values()))[0], options.new_tokens, progress)
    energy, joules = Energy(target.device), dict[str, list[float]]()
    metered = {name: _metered(arm, energy, joules.setdefault(name, [])) for name, arm in chosen.items()}
    context = round(statistics.mean(len(p) + options.new_tokens / 2 for group in groups.values() for p in group))
    costs, full = _draft_costs(target, mask, context), weight_bytes(target.model)
    bandwidth = copy_bandwidth(target.device)
    settings = DecodeSettings(new_tokens=options.new_tokens, rounds=options.rounds, seed=options.seed)
    rows, total = [], dict[str, list[Timing]]()
    for group, prompts in groups.items():
        found = time_interleaved(metered, prompts, settings, progress, stage=group)
        rows += group_rows(group, found, costs, full, bandwidth, options.seed)
        for name, timing in found.items():
            total.setdefault(name, []).append(timing)
    summary = group_rows(
        "all", {name: joined(timings) for name, timings in total.items()}, costs, full, bandwidth, options.seed
    )
    for row in summary:
        row["peak_memory_bytes"] = memory[row["arm"]]
        used = joules[row["arm"]]  # joules and tokens by turns
        row["joules_per_token"] = sum(used[::2]) / max(1.0, sum(used[1::2])) if used else None
    return {
        "machine": {
            "device": device_name(target.device), "copy_bytes_per_second": bandwidth,
            "read_bytes_per_second": read_bandwidth(target.device), "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "dtype": str(target.dtype).removeprefix("torch."), "backend": target.backend,
            "new_tokens": options.new_tokens, "rounds": options.rounds, "policy": str(policy),
            "parameters": sum(p.numel() for p in target.model.parameters()), "weight_bytes": full,
            "prompts": {group: len(prompts) for group, prompts in groups.items()},
        },
        "rows": rows + summary,
    }  # fmt: skip


def _check_arms(options: BenchOptions, mask: SkipMask | None) -> None:
    for name in options.only:
        if name not in NAMES:
            raise SkipsearchError(f"arm is {name!r}, must be one of: {'; '.join(NAMES)}")
        if name in NEED_MASK and mask is None:
            raise SkipsearchError(f"arm {name!r} needs a mask, got none; pass one with --mask")


def _warm_up(
    target: Target, chosen: dict[str, Arm], prompt: Ids, new_tokens: int, progress: Progress
) -> dict[str, float]:
    """Run each arm once, so that what is compiled at first use is compiled; returns its peak memory in bytes."""
    memory = {}
    for number, (name, arm) in enumerate(chosen.items()):
        found: dict[str, float] = {}
        arm(prompt, min(24, new_tokens))
        with peak_memory(target.device, found):
            arm(prompt, new_tokens)
        memory[name] = found["bytes"]
        progress("warm-up", number + 1, len(chosen))
    return memory


def _draft_costs(target: Target, mask: SkipMask | None, context: int) -> dict[str, dict[str, float]]:
    """By arm that drafts with a mask: its cost ratio, and the bytes of weights that a draft step reads."""
    costs = {}
    for name, drafted in {MASK: mask, HYBRID: mask, PREFIX: prefix_mask(mask) if mask else None}.items():
        if drafted is not None:
            draft, plain = step_costs(target, drafted, context)
            costs[name] = {"c": draft / plain, "bytes": weight_bytes(draft_view(target.model, drafted))}
    return costs


def bench_file(loaded: Loaded, file: MaskFile | None, options: BenchOptions, progress: Progress) -> dict[str, Any]:
    """`bench` of a mask file, or of the arms that need none, on the prompts that the options name."""
    room = loaded.target.context - options.new_tokens - MAX_LENGTH - 1
    if room < 1:
        raise SkipsearchError(f"new_tokens is {options.new_tokens}, too many for the model's context; pass fewer")
    groups = prompt_groups(
        options.sources, loaded.tokenizer, per_group=options.per_group, room=room, seed=options.seed,
        vocabulary=loaded.target.vocabulary,
    )  # fmt: skip
    mask, policy = None, DraftPolicy()
    if file is not None:
        check_mask_belongs(file, loaded.target)
        mask, policy = file.mask, DraftPolicy(**file.draft.model_dump())
        tuned = file.evidence.backend if file.evidence is not None else None
        now = with_backend(loaded.target, options.backend, progress).backend
        if tuned is not None and tuned != now:
            text = f"the mask was tuned for backend {tuned!r}, measuring with {now!r}: another mask may be faster"
            warnings.warn(text, BackendWarning, stacklevel=2)
    return bench(loaded.target, groups, mask, policy, options, progress)


def _metered(arm: Arm, energy: Energy, used: list[float]) -> Arm:
    """The arm, noting joules and tokens by turns where there is a meter."""

    def run(prompt: Ids, new_tokens: int) -> Run:
        before = energy.joules()
        out = arm(prompt, new_tokens)
        after = energy.joules()
        if before is not None and after is not None:
            used.extend((after - before, float(len(out.ids))))
        return out

    return run
