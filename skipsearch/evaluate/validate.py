"""Validation: a mask against plain decoding, really decoded and timed, on prompts that no search saw.

Promises equal tokens (checked), an interval, and a verdict that may be no. `timing` interleaves the arms.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipsearch.compiled.backend import Progress
from skipsearch.decoding.stats import DecodeStats
from skipsearch.evaluate.prompts import Ids, fingerprint
from skipsearch.evaluate.timing import Arm, our_arm, time_interleaved
from skipsearch.evaluate.trace import DecodeSettings
from skipsearch.mask import SkipMask
from skipsearch.maskfile import Evidence
from skipsearch.model.device import device_name
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Plain decoding, the mask with its policy alone, and as it is served, on the same prompts.

    Attributes:
        served, served_ci: speed-up with n-grams and fallback to plain steps; None if that is not asked for.
    """

    speedup: float
    speedup_ci: tuple[float, float]
    tokens_per_second: float
    plain_tokens_per_second: float
    greedy_equal: bool | None
    stats: DecodeStats
    tokens: int
    served: float | None = None
    served_ci: tuple[float, float] | None = None


def measure(
    target: Target, prompts: tuple[Ids, ...], mask: SkipMask, policy: DraftPolicy, settings: DecodeSettings,
    progress: Progress, served: DraftPolicy | None = None,
) -> Measured:  # fmt: skip
    """Time plain decoding, the mask with `policy`, and with the policy `served` if there is one."""
    temperature, seed = settings.temperature, settings.seed
    arms: dict[str, Arm] = {
        "plain": our_arm(target, temperature=temperature), "mask": our_arm(target, mask, policy, temperature),
    }  # fmt: skip
    if served is not None:
        arms["served"] = our_arm(target, mask, served, temperature)
    timed = time_interleaved(arms, prompts, settings, progress)
    plain, masked = timed["plain"], timed["mask"]
    speedup, low_high = masked.speedup(plain, seed)
    as_served = timed["served"].speedup(plain, seed) if served is not None else (None, None)
    return Measured(
        speedup=speedup, speedup_ci=low_high, tokens_per_second=masked.tokens_per_second,
        plain_tokens_per_second=plain.tokens_per_second,
        greedy_equal=None if temperature else all(timing.ids() == plain.ids() for timing in timed.values()),
        stats=masked.stats, tokens=masked.tokens, served=as_served[0], served_ci=as_served[1],
    )  # fmt: skip


def evidence(
    target: Target, prompts: tuple[Ids, ...], measured: Measured, cost_ratio: float, temperature: float = 0.0
) -> Evidence:  # fmt: skip
    """What goes into mask.json. The verdict is "use" only if the whole interval lies above 1."""
    low, high = measured.speedup_ci
    return Evidence(
        acceptance_rate=round(measured.stats.acceptance_rate, 4), tau=round(measured.stats.tau, 4),
        cost_ratio=round(cost_ratio, 4), speedup=round(measured.speedup, 4),
        speedup_ci=(round(low, 4), round(high, 4)), baseline="plain decoding in the same runtime",
        tokens_per_second=round(measured.tokens_per_second, 2),
        baseline_tokens_per_second=round(measured.plain_tokens_per_second, 2), greedy_equal=measured.greedy_equal,
        backend=target.backend, dtype=str(target.dtype).removeprefix("torch."), device=device_name(target.device),
        prompts=len(prompts), tokens=measured.tokens, prompts_sha256=fingerprint(prompts),
        temperature=temperature or None,
        verdict="use" if low > 1.0 else "do not use", served_speedup=measured.served and round(measured.served, 4),
        served_speedup_ci=measured.served_ci and (round(measured.served_ci[0], 4), round(measured.served_ci[1], 4)),
    )  # fmt: skip
