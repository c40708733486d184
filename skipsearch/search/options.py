"""Settings of a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from skipsearch.compiled.backend import Backend
from skipsearch.decoding.rule import GREEDY, SelectionRule
from skipsearch.errors import SkipsearchError
from skipsearch.evaluate.prompts import PromptSource
from skipsearch.evaluate.trace import DecodeSettings

MAX_LENGTH = 12  # the longest draft that a policy may have
TRIAL_LENGTH, SIDE = 6, 16  # in a trial: tokens of a draft; drafts of one prompt side by side
TIME_BUDGET = 330.0
SAMPLERS = ("trust-region", "gp", "tpe", "nsga2", "random")


def drafts_side_by_side(new_tokens: int) -> int:
    """How many drafts of one prompt a trial's pass holds."""
    return min(SIDE, -(-new_tokens // TRIAL_LENGTH))


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Settings of a run; the defaults give a good mask.

    Attributes:
        trials: finished trials in the study at which the search stops.
        time_budget: seconds for the run, shared out over its stages; the first compilation on a machine comes on top.
            None: no limit.
        sampler: one of SAMPLERS.
        source: where prompts come from.
        prompts, held_out: number of prompts to search with, and to validate on.
        prompt_tokens: longer prompts are cut to so many tokens; None: no cut.
        new_tokens: tokens decoded from each prompt.
        trial_tokens: tokens of each of 8 prompts on which sublayers are skipped one at a time, for the seeds.
        rounds: repetitions of validation.
        backend: what will serve the mask: compiled, eager, or auto (compiled where possible).
        contexts: context lengths in tokens to serve, with equal weight; empty: those of the calibration prompts.
        temperature: of the sampling that the mask is for; 0: greedy decoding; None: as the model's generation config
            says, whose other fields always hold.
        memory: bytes that a pass of replay may use; None: as the device allows.
        space: a TOML file whose [space] table replaces the preset's.
        pareto: search the front of acceptance rate against cost ratio; the resulting mask is still the fastest.
        seed: of prompts, sampler and sampling.
        storage: Optuna URL; None: study.db in the results folder.
        study: name of the study in the storage.
        workers: processes on this machine that run trials, this one included.

    Raises:
        SkipsearchError: a setting is out of range, or the sampler does not support `pareto`.
    """

    trials: int = 200
    time_budget: float | None = TIME_BUDGET
    sampler: str = "trust-region"
    source: PromptSource = field(default_factory=PromptSource)
    prompts: int = 24
    held_out: int = 20
    prompt_tokens: int | None = None
    new_tokens: int = 96
    trial_tokens: int = 36
    rounds: int = 2
    backend: Backend = "auto"
    contexts: tuple[int, ...] = ()
    temperature: float | None = None
    memory: float | None = None
    space: Path | None = None
    pareto: bool = False
    seed: int = 0
    storage: str | None = None
    study: str = "search"
    workers: int = 1

    def decoding(self, rule: SelectionRule = GREEDY) -> DecodeSettings:
        """How prompts are decoded, for the trace and for validation."""
        return DecodeSettings(new_tokens=self.new_tokens, rule=rule, seed=self.seed, rounds=self.rounds)

    def __post_init__(self) -> None:
        for name in ("trials", "prompts", "held_out", "new_tokens", "trial_tokens", "rounds", "workers"):
            if getattr(self, name) < 1:
                raise SkipsearchError(
                    f"{name} is {getattr(self, name)}, must be at least 1; leave it out for the default"
                )
        if self.temperature is not None and not self.temperature >= 0:
            raise SkipsearchError(f"temperature is {self.temperature}, must be at least 0; 0 is greedy")
        if self.pareto and self.sampler == "trust-region":
            raise SkipsearchError(
                "sampler is 'trust-region', which climbs one objective; pass --sampler nsga2 with --pareto"
            )
        if self.sampler not in SAMPLERS:
            raise SkipsearchError(f"sampler is {self.sampler!r}, must be one of {', '.join(SAMPLERS)}")
