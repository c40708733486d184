"""Settings of a search, with defaults that give a good mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from skipsearch.compiled.backend import Backend
from skipsearch.errors import SkipsearchError
from skipsearch.evaluate.prompts import PromptSource
from skipsearch.evaluate.trace import DecodeSettings

MAX_LENGTH = 12  # the longest draft that a policy may have
TRIAL_LENGTH, TRIAL_SEGMENTS = 6, 5  # of a trial: the longest draft, and parts of a continuation walked at once
SAMPLERS = ("trust-region", "gp", "tpe", "nsga2", "random")
NGRAM = 10  # the longest continuation that is looked up


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Settings of a run; the defaults give a good mask.

    Attributes:
        trials: finished trials that the study shall hold.
        time_budget: seconds for trials, None without limit.
        sampler: one of SAMPLERS.
        source: where prompts come from.
        prompts, held_out: how many to search with and to validate on.
        prompt_tokens: cut prompts to so many tokens.
        new_tokens: decoded from each prompt.
        trial_tokens: tokens of 8 prompts on which sublayers are skipped one at a time.
        rounds: repetitions of validation.
        backend: what the mask shall be served with: compiled, eager, or auto: compiled where possible.
        contexts: context lengths that the mask is to serve, evenly mixed; empty: those of the calibration prompts.
        temperature: search a mask for sampling at it; 0: for greedy decoding.
        memory: bytes that a pass of replay may take; None fits the device.
        space: a TOML file whose [space] table takes the place of the preset's.
        pareto: search the front of acceptance rate against cost ratio; the mask is still the fastest.
        storage: Optuna URL; by default study.db in the results folder.
    """

    trials: int = 200
    time_budget: float | None = None
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
    temperature: float = 0.0
    memory: float | None = None
    space: Path | None = None
    pareto: bool = False
    seed: int = 0
    storage: str | None = None
    study: str = "search"

    @property
    def decoding(self) -> DecodeSettings:
        """How prompts are decoded, to record and to validate."""
        return DecodeSettings(
            new_tokens=self.new_tokens, temperature=self.temperature, seed=self.seed, rounds=self.rounds
        )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("trials", "prompts", "held_out", "new_tokens", "trial_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise SkipsearchError(
                    f"{name} is {getattr(self, name)}, must be at least 1; leave it out for the default"
                )
        if not self.temperature >= 0:
            raise SkipsearchError(f"temperature is {self.temperature}, must be at least 0; 0 is greedy")
        if self.pareto and self.sampler == "trust-region":
            raise SkipsearchError(
                "sampler is 'trust-region', which climbs one objective; pass --sampler nsga2 with --pareto"
            )
        if self.sampler not in SAMPLERS:
            raise SkipsearchError(f"sampler is {self.sampler!r}, must be one of {', '.join(SAMPLERS)}")
