"""SearchResult: what a run found, and its summary."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipsearch.evaluate.energy import Energy
from skipsearch.evaluate.objective import Score
from skipsearch.evaluate.validate import Measured, arm_of
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile
from skipsearch.plan import DraftPlan
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import Prepared
from skipsearch.search.verdict import next_step


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a run found.

    Attributes:
        plan: the best plan.
        file: mask.json as written, with evidence and verdict: of the plan, or of n-grams alone where no plan pays.
        predicted: the plan's score on the whole trace.
        standard_error: of the predicted speed-up, over prompts.
        scored_tokens: tokens of the trace.
        front: trials that no other trial beats in both acceptance rate and cost ratio.
        measured: the plan's validation.
        folder: the results folder.
        trials: finished trials in the study.
        seconds: wall-clock time by stage.
        cut_short: what the time budget did not suffice for.
        used_up: whether every plan of the space was tried.
        given: the model as it was named, for the next command.
        chat: whether prompts were asked through a chat template.
        origin: where the plan came from, in words.
    """

    plan: DraftPlan
    file: MaskFile
    predicted: Score
    standard_error: float
    scored_tokens: int
    front: list[dict[str, Any]]
    measured: Measured
    folder: Path
    trials: int
    seconds: dict[str, float]
    cut_short: tuple[str, ...] = ()
    used_up: bool = False
    given: str = "MODEL"
    chat: bool = False
    origin: str = ""

    @property
    def mask(self) -> SkipMask:
        """What the plan skips."""
        return self.plan.skip


def summary(result: SearchResult) -> dict[str, Any]:
    """The result as plain JSON, for the CLI and for summary.json."""
    assert result.file.evidence is not None
    then = next_step(
        result.file.evidence.verdict, result.given, result.folder / "mask.json", cut_short=bool(result.cut_short),
        chat=result.chat,
    )  # fmt: skip
    return {
        "model": result.file.model.id, "mask": result.mask.to_dict(), "plan": result.plan.to_dict(),
        "quantised_bytes": result.file.quantised_bytes, "draft": asdict(result.file.draft),
        "evidence": result.file.evidence.model_dump(mode="json"),
        "predicted": {
            "standard_error": round(result.standard_error, 4), "tokens": result.scored_tokens,
        } | {
            k: round(getattr(result.predicted, k), 4)
            for k in ("tokens_per_second", "speedup", "acceptance_rate", "tau", "cost_ratio")
        },
        "measured": {
            name: {
                "speedup": round(arm.speedup, 4), "speedup_ci": [round(bound, 4) for bound in arm.speedup_ci],
                "tokens_per_second": round(arm.tokens_per_second, 2),
                "joules_per_token": result.measured.energy.get(name, Energy()).per_token,
            }
            for name, arm in result.measured.arms.items()
        },
        "serves": "n-grams" if result.file.drafting_plan is None else arm_of(result.plan),
        "cut_short": list(result.cut_short), "used_up": result.used_up, "next": then,
        "origin": result.origin,
        "trials": result.trials, "seconds": {k: round(v, 1) for k, v in result.seconds.items()},
        "files": {name: str(result.folder / name) for name in ("mask.json", "trials.csv", "sensitivity.json")},
    }  # fmt: skip


def cut_short(
    prepared: Prepared, trials: int, used_up: bool, options: SearchOptions, measured: Measured
) -> tuple[str, ...]:
    """What the time budget did not suffice for. A validation that ends early because it is decided is not cut short.

    Args:
        trials: finished ones.
        used_up: whether every plan of the space was tried.
    """
    prompts, found = len(prepared.prompts.calibration), list[str]()
    if len(prepared.trace.prompts) < prompts:
        found.append(f"{len(prepared.trace.prompts)} of {prompts} prompts recorded (kept; another --out records anew)")
    if prepared.costs.cut_short:
        found.append("a profile of fewer timings than it needs")
    if trials < options.trials and not used_up:
        found.append(f"{trials} of {options.trials} trials")
    if not measured.decided:
        found.append(f"{measured.prompts} of {len(prepared.prompts.held_out)} held-out prompts timed")
    return tuple(found)
