"""The rows of a benchmark: speed, speed-ups with intervals, equal tokens, bounds and bytes of each arm."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np

from skipsearch.bench.arms import EAGER, HF_EAGER, HYBRID, MASK, PLAIN, PREFIX
from skipsearch.evaluate.looks import interval
from skipsearch.evaluate.timing import Timing


def joined(timings: list[Timing]) -> Timing:
    """The timings of one arm on several groups, as one timing."""
    return Timing(
        seconds=np.concatenate([t.seconds for t in timings]), prefill=np.concatenate([t.prefill for t in timings]),
        runs=tuple(run for t in timings for run in t.runs),
        energy=functools.reduce(operator.add, [t.energy for t in timings]),
    )  # fmt: skip


def group_rows(
    group: str, timed: dict[str, Timing], costs: dict[str, Any], full: int, bandwidth: float, seed: int
) -> list[dict[str, Any]]:
    """A row for each arm of one group, ready for JSON.

    Args:
        timed: timing of each arm by name; plain decoding is always among them.
        costs: by arm, the cost ratio "c" of its draft and the "bytes" of weights that a draft step reads.
        full: bytes of weights that a verify reads.
        bandwidth: bytes per second of a large copy on this machine.
        seed: of the bootstrap intervals.
    """
    reference = timed.get(HF_EAGER, timed.get(EAGER, timed[PLAIN]))
    rows = []
    for name, timing in timed.items():
        stats, seconds = timing.stats, float(timing.seconds.sum())
        tokens = np.array([run.tokens for run in timing.runs])
        row: dict[str, Any] = {
            "group": group, "arm": name, "prompts": len(timing.runs), "tokens": timing.tokens,
            "tokens_per_second": timing.tokens_per_second,
            "tokens_per_second_ci": interval(tokens, timing.seconds, seed),
            "prefill_seconds": float(timing.prefill.mean()), **timing.energy.to_dict(),
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
            if name != HYBRID:  # part of its drafts are n-grams, which read no weights
                row |= {"bytes_per_second": moved / seconds, "of_copy_bandwidth": moved / seconds / bandwidth}
        if name in costs:
            c = costs[name]["c"]
            row |= {"cost_ratio": c, "bound": 1 / c}
            if name in (MASK, PREFIX) and stats.verifies:
                # The speed-up at this acceptance if a verify cost as much as a plain step, and all else were free.
                row["own_bound"] = stats.tau / (1 + c * stats.drafted / stats.verifies)
                row["share_of_own_bound"] = row["speedup_plain"] / row["own_bound"]
        rows.append(row)
    return rows
