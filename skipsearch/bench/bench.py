"""skipsearch bench: every way to decode, side by side in one process, on groups of prompts.

Promises interleaved arms after a warm-up, synchronised clocks, prefill timed apart, tokens counted alike
up to the end of sequence, and a check of every arm's tokens against `generate`.
"""

from __future__ import annotations

import statistics
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from skipsearch.bench.arms import EAGER, HF_EAGER, HYBRID, MASK, NAMES, NEED_MASK, PLAIN, PREFIX, arms, prefix_mask
from skipsearch.bench.groups import prompt_groups
from skipsearch.bench.machine import Energy, copy_bandwidth, peak_memory, read_bandwidth
from skipsearch.compiled.backend import Backend, backend_name, compiled_for, warm_mask
from skipsearch.compiled.model import CompiledModel
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.draft.view import draft_view
from skipsearch.errors import BackendWarning, SkipsearchError
from skipsearch.evaluate.cost import device_name
from skipsearch.evaluate.profile import sequence_at, timed
from skipsearch.evaluate.prompts import Ids
from skipsearch.evaluate.trace import Progress
from skipsearch.evaluate.validate import Arm, Run, Timing, interval, race
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile
from skipsearch.model.load import Loaded, check_mask_belongs
from skipsearch.model.sublayers import context_limit, input_device
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


def step_costs(
    model: PreTrainedModel, mask: SkipMask, compiled: CompiledModel | None, context: int, repeats: int = 15
) -> tuple[float, float]:
    """Seconds of a draft step and of a plain step at a context length, measured in turns."""
    drafting, plain = (
        sequence_at(model, m, context, MAX_LENGTH, compiled) for m in (mask, SkipMask(num_layers=mask.num_layers))
    )
    draft, step = [], []
    for turn in range(repeats + 3):
        drafted = timed(drafting, lambda: drafting.draft([STEPS])) / STEPS
        stepped = timed(plain, lambda: plain.verify([0]))
        if turn >= 3:
            draft.append(drafted)
            step.append(stepped)
    return statistics.median(draft), statistics.median(step)


def bench(
    model: PreTrainedModel, groups: dict[str, Group], mask: SkipMask | None, policy: DraftPolicy,
    options: BenchOptions, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Measure all arms on all groups.

    Returns:
        {"machine": .., "settings": .., "rows": one a group and arm, "all" last}, ready for JSON.

    Raises:
        SkipsearchError: an unknown arm.
    """
    for name in options.only:
        if name not in NAMES:
            raise SkipsearchError(f"arm is {name!r}, must be one of: {'; '.join(NAMES)}")
        if name in NEED_MASK and mask is None:
            raise SkipsearchError(f"arm {name!r} needs a mask, got none; pass one with --mask")
    device = input_device(model)
    compiled = compiled_for(model, options.backend, progress=progress)
    if mask is not None:
        for drafted in (mask, prefix_mask(mask)):
            warm_mask(compiled, model, drafted, progress)
    longest = max(len(prompt) for group in groups.values() for prompt in group) + options.new_tokens + MAX_LENGTH + 1
    every = arms(model, mask, policy, compiled, longest, options.hf)
    chosen = {name: arm for name, arm in every.items() if not options.only or name in options.only or name == PLAIN}
    energy, memory, used = Energy(device), dict[str, float](), dict[str, list[float]]()
    first = next(iter(groups.values()))[0]
    for number, (name, arm) in enumerate(chosen.items()):  # what is compiled at first use is compiled here
        found: dict[str, float] = {}
        arm(first, min(24, options.new_tokens))
        with peak_memory(device, found):
            arm(first, options.new_tokens)
        memory[name] = found["bytes"]
        progress("warm-up", number + 1, len(chosen))
    metered = {name: _metered(arm, energy, used.setdefault(name, [])) for name, arm in chosen.items()}
    context = round(statistics.mean(len(p) + options.new_tokens / 2 for group in groups.values() for p in group))
    costs = {}
    for name, m in {MASK: mask, HYBRID: mask, PREFIX: prefix_mask(mask) if mask else None}.items():
        if m is not None:
            draft, plain = step_costs(model, m, compiled, context)
            costs[name] = {"c": draft / plain, "bytes": weight_bytes(draft_view(model, m))}
    bandwidth = copy_bandwidth(device)
    rows, total = [], dict[str, list[Timing]]()
    for group, prompts in groups.items():
        timed = race(
            metered, prompts, new_tokens=options.new_tokens, rounds=options.rounds, seed=options.seed,
            progress=progress, stage=group,
        )  # fmt: skip
        rows += _rows(group, timed, costs, weight_bytes(model), bandwidth, options.seed)
        for name, timing in timed.items():
            total.setdefault(name, []).append(timing)
    joined = {name: _joined(timings) for name, timings in total.items()}
    summary = _rows("all", joined, costs, weight_bytes(model), bandwidth, options.seed)
    for row in summary:
        row["peak_memory_bytes"] = memory[row["arm"]]
        joules = used[row["arm"]]
        row["joules_per_token"] = sum(joules[::2]) / max(1.0, sum(joules[1::2])) if joules else None
    return {
        "machine": {
            "device": device_name(device), "copy_bytes_per_second": bandwidth,
            "read_bytes_per_second": read_bandwidth(device), "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "dtype": str(model.dtype).removeprefix("torch."), "backend": backend_name(compiled),
            "new_tokens": options.new_tokens, "rounds": options.rounds, "policy": str(policy),
            "parameters": sum(p.numel() for p in model.parameters()), "weight_bytes": weight_bytes(model),
            "prompts": {group: len(prompts) for group, prompts in groups.items()},
        },
        "rows": rows + summary,
    }  # fmt: skip


def bench_file(loaded: Loaded, file: MaskFile | None, options: BenchOptions, progress: Progress) -> dict[str, Any]:
    """`bench` of a mask file, or of the arms that need none, on the prompts that the options name."""
    room = context_limit(loaded.model) - options.new_tokens - MAX_LENGTH - 1
    if room < 1:
        raise SkipsearchError(f"new_tokens is {options.new_tokens}, too many for the model's context; pass fewer")
    groups = prompt_groups(
        options.sources, loaded.tokenizer, per_group=options.per_group, room=room, seed=options.seed,
        vocabulary=loaded.model.config.get_text_config(decoder=True).vocab_size,
    )  # fmt: skip
    mask, policy = None, DraftPolicy()
    if file is not None:
        check_mask_belongs(file, loaded.model)
        mask, policy = file.mask, DraftPolicy(**file.draft.model_dump())
        tuned = file.evidence.backend if file.evidence is not None else None
        now = backend_name(compiled_for(loaded.model, options.backend, progress=progress))
        if tuned is not None and tuned != now:
            text = f"the mask was tuned for backend {tuned!r}, measuring with {now!r}: another mask may be faster"
            warnings.warn(text, BackendWarning, stacklevel=2)
    return bench(loaded.model, groups, mask, policy, options, progress)


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


def _joined(timings: list[Timing]) -> Timing:
    return Timing(
        seconds=np.concatenate([t.seconds for t in timings]), prefill=np.concatenate([t.prefill for t in timings]),
        runs=tuple(run for t in timings for run in t.runs),
    )  # fmt: skip


def _rows(
    group: str, timed: dict[str, Timing], costs: dict[str, Any], full: int, bandwidth: float, seed: int
) -> list[dict[str, Any]]:
    reference = timed.get(HF_EAGER, timed.get(EAGER, timed[PLAIN]))
    rows = []
    for name, timing in timed.items():
        stats, seconds = timing.stats, float(timing.seconds.sum())
        tokens = np.array([run.tokens for run in timing.runs])
        row: dict[str, Any] = {
            "group": group, "arm": name, "prompts": len(timing.runs), "tokens": timing.tokens,
            "tokens_per_second": timing.tokens_per_second,
            "tokens_per_second_ci": interval(tokens, timing.seconds, seed),
            "prefill_seconds": float(timing.prefill.mean()),
        }  # fmt: skip
        for label, baseline in (("hf", timed.get(HF_EAGER)), ("plain", timed[PLAIN])):
            if baseline is not None:
                row[f"speedup_{label}"], row[f"speedup_{label}_ci"] = timing.speedup(baseline, seed)
        row["greedy_equal"] = sum(a == b for a, b in zip(timing.ids(), reference.ids(), strict=True))
        row["equal_to_plain"] = sum(a == b for a, b in zip(timing.ids(), timed[PLAIN].ids(), strict=True))
        if stats.verifies:
            of_mask = stats.drafted if name in (MASK, PREFIX) else 0
            row |= {"acceptance_rate": stats.acceptance_rate, "tau": stats.tau, "blocks_from": dict(stats.blocks_from)}
            row["accepted_from"] = dict(stats.accepted_from)
            moved = stats.verifies * full + of_mask * costs.get(name, {}).get("bytes", 0)
            if name != HYBRID:  # whose drafts come from two sources, and only one of them reads weights
                row |= {"bytes_per_second": moved / seconds, "of_copy_bandwidth": moved / seconds / bandwidth}
        if name in costs:
            c = costs[name]["c"]
            row |= {"cost_ratio": c, "bound": 1 / c}
            if name in (MASK, PREFIX) and stats.verifies:
                # What this acceptance could bring if a verify cost no more than a plain step, and nothing else a thing.
                row["own_bound"] = stats.tau / (1 + c * stats.drafted / stats.verifies)
                row["share_of_own_bound"] = row["speedup_plain"] / row["own_bound"]
        rows.append(row)
    return rows
