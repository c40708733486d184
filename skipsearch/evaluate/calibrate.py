"""Calibration: does the cost model predict what decoding then takes? Predicted against measured tokens per second.

Plans from sparse to dense, with sublayers and heads in the forms that pay here, every other one with a confidence exit,
at two context lengths. Predicted: counts from exact replay, seconds from the profile. Measured: the same prompts
decoded, plans in random order, plain decoding among them in every round; each round has a profile of its own, and
medians are compared.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap, spearmanr

from skipsearch.compiled.backend import Progress, warm_plan
from skipsearch.evaluate.cost import Point
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.form_speed import form_seconds, paying_forms
from skipsearch.evaluate.objective import score_policy
from skipsearch.evaluate.profile import profile
from skipsearch.evaluate.prompt_row import Ids
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.timing import our_arm
from skipsearch.evaluate.trace import DecodeSettings, Trace, record
from skipsearch.model.device import device_name
from skipsearch.model.target import Target
from skipsearch.plan import QUANTISED, DraftPlan, Quantised
from skipsearch.policy import DraftPolicy

PROMPTS, TOKENS, SHORT, LONGEST = 4, 48, 64, 8
EXITS = (0.3, 0.5, 0.7)
SPEARMAN, MEDIAN_ERROR = 0.95, 0.05  # what a cost model that can be trusted reaches


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """One context length.

    Attributes:
        context: tokens of each prompt.
        rows: {"attention", "mlp" (skipped), "int8", "int4" (sublayers), "head", "policy", "predicted", "measured"
            (tokens per second)}, one a plan.
        plain: predicted and measured tokens per second of plain decoding.
        spearman, spearman_ci: rank correlation of predicted and measured.
        median_error: of predicted tokens per second, relative to measured.
        median_error_of_first: likewise with the first profile alone; a search has only one.
        median_error_of_speedup: likewise of the speed-up over plain decoding, which a slower hour does not touch.
    """

    context: int
    rows: tuple[dict[str, Any], ...]
    plain: tuple[float, float]
    spearman: float
    spearman_ci: tuple[float, float]
    median_error: float
    median_error_of_first: float
    median_error_of_speedup: float


def calibrate(
    target: Target, prompts: tuple[Ids, ...], progress: Progress, *, seed: int = 0, plans: int = 40, rounds: int = 3
) -> dict[str, Any]:
    """Measure at a short and at a long context, on the tokens of these prompts.

    Returns:
        {"device", "backend", "dtype", "passed", "forms", "contexts": [Calibration as a dict, ..]}.
    """
    forms = paying_forms(form_seconds(target))
    stream = [token for prompt in prompts for token in prompt]
    most = target.context - TOKENS - LONGEST - 4
    long = max(SHORT + 1, min(most, len(stream) // 2, 8 * SHORT))
    found = []
    for context in (min(SHORT, most), min(long, most)):
        stride = max(1, (len(stream) - context) // PROMPTS)
        pieces = tuple(tuple(stream[i * stride : i * stride + context]) for i in range(PROMPTS))
        trace = record(target, pieces, DecodeSettings(new_tokens=TOKENS), progress)
        found.append(_at(target, trace, _sparse_to_dense(target, forms, plans, seed), rounds, seed, progress))
    return {
        "device": device_name(target.device), "backend": target.backend,
        "dtype": str(target.dtype).removeprefix("torch."),
        "forms": forms,
        "passed": all(c.spearman >= SPEARMAN and c.median_error <= MEDIAN_ERROR for c in found),
        "contexts": [{name: getattr(c, name) for name in c.__slots__} for c in found],
    }  # fmt: skip


def _sparse_to_dense(
    target: Target, forms: Sequence[Quantised], plans: int, seed: int
) -> list[tuple[DraftPlan, DraftPolicy]]:  # fmt: skip
    """Plans that skip more and more, each with a policy. All keep the first layer: without it little is accepted.

    Of what is not skipped, a share that differs between plans is quantised.
    """
    layers, rng = target.num_layers, random.Random(seed)
    chosen = []
    for number in range(plans):
        density, share = (number + 0.5) / plans * 0.85, rng.random() if forms else 0.0
        drawn = [
            "skip" if i % layers > 0 and rng.random() < density
            else rng.choice(forms) if rng.random() < share
            else "run"
            for i in range(2 * layers)
        ]  # fmt: skip
        plan = DraftPlan.from_forms(drawn, rng.choice(["full", *forms]))
        exit_threshold = rng.choice(EXITS) if number % 2 else None
        chosen.append((plan, DraftPolicy(max_length=rng.randint(1, LONGEST), exit_threshold=exit_threshold)))
    return chosen


def _at(
    target: Target, trace: Trace, chosen: list[tuple[DraftPlan, DraftPolicy]], rounds: int, seed: int,
    progress: Progress,
) -> Calibration:  # fmt: skip
    """Hold predictions for these plans against decoding at the trace's context length."""
    for plan, _ in chosen:
        warm_plan(target, plan)
    arms = [our_arm(target), *(our_arm(target, plan, policy) for plan, policy in chosen)]
    forms = [form for form in QUANTISED if any(plan.head == form or getattr(plan, form) for plan, _ in chosen)]
    for arm in arms:
        arm(trace.prompts[0], 4)
    seconds: list[list[float]] = [[] for _ in arms]
    tokens, points, rng = [0] * len(arms), list[Point](), random.Random(seed)
    context = round(trace.mean_context)
    for turn in range(rounds):
        # A profile in every round: the speed of a shared machine changes within minutes.
        points += profile(target, contexts=[context], max_length=LONGEST, progress=progress, forms=forms)
        for done, i in enumerate(rng.sample(range(len(arms)), len(arms))):
            runs = [arms[i](prompt, TOKENS) for prompt in trace.prompts]
            seconds[i].append(sum(run.seconds for run in runs))
            tokens[i] = sum(run.tokens for run in runs)
            progress("calibrate", turn * len(arms) + done + 1, rounds * len(arms))
    speed, *measured = [n / statistics.median(s) for n, s in zip(tokens, seconds, strict=True)]
    expected = statistics.median(1 / point.verify[0] for point in points)
    replay, predicted, at_first = Replay(target, trace, LONGEST), list[float](), list[float]()
    for plan, policy in chosen:
        drafts = DraftReplay(replay, plan)
        speeds = [score_policy(drafts, policy, point).tokens_per_second for point in points]
        predicted.append(statistics.median(speeds))
        at_first.append(speeds[0])  # by the first profile alone, which is what a search has
    return Calibration(
        context=len(trace.prompts[0]), plain=(expected, speed),
        rows=tuple(
            {
                "attention": len(plan.skip.attention), "mlp": len(plan.skip.mlp), "int8": len(plan.int8),
                "int4": len(plan.int4), "head": plan.head, "policy": str(policy), "predicted": a, "measured": b,
            }
            for (plan, policy), a, b in zip(chosen, predicted, measured, strict=True)
        ),
        spearman=float(spearmanr(predicted, measured).statistic), spearman_ci=_interval(predicted, measured),
        median_error=_median_error(predicted, measured), median_error_of_first=_median_error(at_first, measured),
        median_error_of_speedup=statistics.median(
            abs(a / expected - b / speed) / (b / speed) for a, b in zip(predicted, measured, strict=True)
        ),
    )  # fmt: skip


def _median_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    return statistics.median(abs(a - b) / b for a, b in zip(predicted, measured, strict=True))


def _interval(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    found = bootstrap(
        (np.array(predicted), np.array(measured)), lambda a, b: spearmanr(a, b).statistic, paired=True,
        vectorized=False, n_resamples=1000, method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
