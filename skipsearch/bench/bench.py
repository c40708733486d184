"""`skipsearch bench`: all decoding methods side by side in one process, on groups of prompts.

Arms are interleaved after a warm-up, with synchronised clocks. The prefill is timed separately. Tokens are counted
up to the end of sequence in all arms alike, and compared with those of `generate`.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from skipsearch.bench.arms import NAMES, NEED_MASK, OF_PLANS, PLAIN, RIVALS, arms, drafted_by
from skipsearch.bench.groups import prompt_groups
from skipsearch.bench.machine import copy_bandwidth, peak_memory, read_bandwidth
from skipsearch.bench.rows import group_rows, joined
from skipsearch.compiled.backend import Backend, Progress, warm_plan, with_backend
from skipsearch.decoding.rule import SelectionRule
from skipsearch.draft.forms import is_quantised
from skipsearch.draft.head import DraftHead
from skipsearch.draft.view import draft_view
from skipsearch.errors import BackendWarning, SkipsearchError
from skipsearch.evaluate.clock import step_costs
from skipsearch.evaluate.energy import EnergyMeter, devices_of
from skipsearch.evaluate.prompt_row import Ids
from skipsearch.evaluate.timing import Arm, time_interleaved
from skipsearch.evaluate.trace import DecodeSettings
from skipsearch.maskfile import MaskFile
from skipsearch.model.device import device_name
from skipsearch.model.identity import check_mask_belongs
from skipsearch.model.load import Loaded
from skipsearch.model.target import Target
from skipsearch.plan import DraftPlan
from skipsearch.policy import DraftPolicy
from skipsearch.search.options import MAX_LENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """Settings of a benchmark.

    Attributes:
        new_tokens: tokens to decode from each prompt.
        rounds: repetitions; the median of each prompt counts.
        backend: for our arms.
        hf: whether to measure the methods of transformers too.
        only: names of the arms to measure; empty for all. Plain decoding is always measured.
        temperature: see `SearchOptions`.
        sources, per_group: where prompts come from and how many of each group; see `prompt_groups`.
    """

    new_tokens: int = 96
    rounds: int = 2
    backend: Backend = "auto"
    hf: bool = True
    only: tuple[str, ...] = ()
    temperature: float | None = None
    sources: tuple[str, ...] = ("builtin",)
    per_group: int = 8
    seed: int = 0


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a forward of a few tokens reads: all but an embedding that is not also the head."""
    tensors = [*model.parameters(), *(b for m in model.modules() if is_quantised(m) for b in m.buffers())]
    unique = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    if embedding is not None and (not shared or isinstance(head, DraftHead)):
        unique.pop(embedding.weight.data_ptr(), None)
    if isinstance(head, DraftHead):  # reads the product's weights, and few rows of these
        unique.pop(head.weight.data_ptr(), None)
    return sum(unique.values())


def bench(
    target: Target, groups: dict[str, tuple[Ids, ...]], plan: DraftPlan | None, policy: DraftPolicy,
    options: BenchOptions, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Measure all arms on all groups of prompts.

    Args:
        groups: token ids of prompts, by name of the group.
        plan, policy: for the arms that draft with a plan; None leaves them out.

    Returns:
        {"machine": .., "settings": .., "rows": one per group and arm, those of group "all" last}, ready for JSON.

    Raises:
        SkipsearchError: an arm is unknown, or needs a mask that was not given.
    """
    _check_arms(options, target, plan)
    rule = SelectionRule.of(target.model, options.temperature)
    target = with_backend(target, options.backend, progress)
    for name, drafted in drafted_by(target, plan).items():
        if not options.only or name in options.only:
            warm_plan(target, drafted, progress)
    longest = max(len(prompt) for group in groups.values() for prompt in group) + options.new_tokens + MAX_LENGTH + 1
    every = arms(target, plan, policy, longest, options.hf, rule)
    chosen = {name: arm for name, arm in every.items() if not options.only or name in options.only or name == PLAIN}
    memory = _warm_up(target, chosen, next(iter(groups.values()))[0], options.new_tokens, progress)
    chosen = {name: arm for name, arm in chosen.items() if name in memory}
    context = round(statistics.mean(len(p) + options.new_tokens / 2 for group in groups.values() for p in group))
    costs, full = _draft_costs(target, plan, chosen, context), weight_bytes(target.model)
    bandwidth = copy_bandwidth(target.device)
    settings = DecodeSettings(new_tokens=options.new_tokens, rule=rule, rounds=options.rounds, seed=options.seed)
    meter = EnergyMeter(target.device, devices_of(target.model))
    timings = [
        (group, time_interleaved(chosen, prompts, settings, progress, stage=group, meter=meter))
        for group, prompts in groups.items()
    ]
    timings.append(("all", {name: joined([found[name] for _, found in timings]) for name in chosen}))
    rows = []
    for group, found in timings:
        rows += group_rows(group, found, costs, full, bandwidth, options.seed)
    if rule.temperature:  # the texts are samples
        rows = [{**row, "greedy_equal": None, "equal_to_plain": None} for row in rows]
    for row in rows[-len(chosen) :]:
        row["peak_memory_bytes"] = memory[row["arm"]]
    return {
        "machine": {
            "device": device_name(target.device), "copy_bytes_per_second": bandwidth,
            "read_bytes_per_second": read_bandwidth(target.device), "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "dtype": str(target.dtype).removeprefix("torch."), "backend": target.backend, "decoding": str(rule),
            "new_tokens": options.new_tokens, "rounds": options.rounds, "policy": str(policy),
            "parameters": sum(p.numel() for p in target.model.parameters()), "weight_bytes": full,
            "prompts": {group: len(prompts) for group, prompts in groups.items()},
        },
        "rows": rows,
    }  # fmt: skip


def _check_arms(options: BenchOptions, target: Target, plan: DraftPlan | None) -> None:
    for name in options.only:
        if name not in NAMES:
            raise SkipsearchError(f"arm is {name!r}, must be one of: {'; '.join(NAMES)}")
        if name in NEED_MASK and plan is None:
            raise SkipsearchError(f"arm {name!r} needs a mask, got none; pass one with --mask")
        if name in OF_PLANS and name not in drafted_by(target, plan):
            raise SkipsearchError(f"arm {name!r} does not go with this file or model; leave it out")


def _warm_up(
    target: Target, chosen: dict[str, Arm], prompt: Ids, new_tokens: int, progress: Progress
) -> dict[str, float]:
    """Run each arm, so that all that is compiled at first use is compiled; returns its peak memory in bytes.

    Methods of transformers in which the installed release fails are left out, with a warning.
    """
    memory = {}
    for number, (name, arm) in enumerate(chosen.items()):
        try:
            arm(prompt, min(24, new_tokens))
            memory[name] = peak_memory(target.device, partial(arm, prompt, new_tokens))
        except Exception as error:
            if name not in RIVALS:
                raise
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            warnings.warn(f"arm {name!r} is left out, transformers fails in it ({why})", BackendWarning, stacklevel=3)
        progress("warm-up", number + 1, len(chosen))
    return memory


def _draft_costs(
    target: Target, plan: DraftPlan | None, chosen: Container[str], context: int
) -> dict[str, dict[str, float]]:  # fmt: skip
    """For each arm that drafts with a plan: cost ratio "c" and "bytes" of weights that a draft step reads."""
    costs = {}
    for name, drafted in drafted_by(target, plan).items():
        if name in chosen:
            draft, plain = step_costs(target, drafted, context)
            costs[name] = {"c": draft / plain, "bytes": weight_bytes(draft_view(target.model, drafted))}
    return costs


def bench_file(loaded: Loaded, file: MaskFile | None, options: BenchOptions, progress: Progress) -> dict[str, Any]:
    """`bench` with a mask file, or with the arms that need none, on the prompts that the options name.

    Raises:
        SkipsearchError: an arm or a source of prompts is wrong, the mask is for another model, or no room is left
            for prompts.
    """
    room = loaded.target.context - options.new_tokens - MAX_LENGTH - 1
    if room < 1:
        raise SkipsearchError(f"new_tokens is {options.new_tokens}, too many for the model's context; pass fewer")
    groups = prompt_groups(
        options.sources, loaded.tokenizer, per_group=options.per_group, room=room, seed=options.seed,
        vocabulary=loaded.target.vocabulary,
    )  # fmt: skip
    plan, policy = None, DraftPolicy()
    if file is not None:
        check_mask_belongs(file, loaded.target)
        plan, policy = file.drafting_plan, file.draft
        tuned = file.evidence.backend if file.evidence is not None else None
        now = with_backend(loaded.target, options.backend, progress).backend
        if tuned is not None and tuned != now:
            text = f"the mask was tuned for backend {tuned!r}, measuring with {now!r}: another mask may be faster"
            warnings.warn(text, BackendWarning, stacklevel=2)
    return bench(loaded.target, groups, plan, policy, options, progress)
