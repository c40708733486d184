"""Job: what a worker needs beside the model, so that it neither records nor profiles. A run leaves it in the study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from skipsearch.decoding.rule import SelectionRule
from skipsearch.errors import StudyMismatch
from skipsearch.evaluate.trace import Trace
from skipsearch.mask import SkipMask
from skipsearch.model.space import Space
from skipsearch.search.options import SearchOptions
from skipsearch.search.prepare import Prepared
from skipsearch.search.seeds import Seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Work that several processes share. The study also holds the costs, the share of the trace and the identity.

    Attributes:
        dtype: of the model that made the trace.
        trace: prompts and the target's continuations.
        space: with what was chosen by measurement.
        contexts: context lengths that the mask will serve, in tokens; empty: those of the trace.
        ranks: of each token of the trace [P, T], see `frequency.Frequency`; empty: no plan has a smaller head.
        seeds: parameters and names of the plans to try first.
        sampler, seed, pareto: see `SearchOptions`.
    """

    dtype: str
    trace: Trace
    space: Space
    contexts: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    seeds: tuple[tuple[dict[str, int], str], ...]
    sampler: str
    seed: int
    pareto: bool

    @classmethod
    def of(cls, prepared: Prepared, seeds: Sequence[Seed], options: SearchOptions) -> Job:
        ranks = prepared.windows.replay.ranks_PT
        return cls(
            dtype=str(prepared.target.dtype).removeprefix("torch."), trace=prepared.trace, space=prepared.space,
            contexts=prepared.contexts, ranks=() if ranks is None else tuple(map(tuple, ranks.tolist())),
            seeds=tuple((prepared.space.params(plan), label) for label, plan in seeds),
            sampler=options.sampler, seed=options.seed, pareto=options.pareto,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        trace, space = self.trace, self.space
        return {
            "tool_version": version("skipsearch"), "dtype": self.dtype, "contexts": self.contexts, "ranks": self.ranks,
            "seeds": self.seeds, "sampler": self.sampler, "seed": self.seed, "pareto": self.pareto,
            "trace": {
                "prompts": trace.prompts, "continuations": trace.continuations, "new_tokens": trace.new_tokens,
                "temperature": trace.rule.temperature, "fields": trace.rule.fields,
            },
            "space": asdict(space) | {"fixed": [sorted(space.fixed.attention), sorted(space.fixed.mlp)]},
        }  # fmt: skip

    @classmethod
    def read(cls, data: dict[str, Any], study: str) -> Job:
        """The job that `to_dict` wrote, as JSON gives it back.

        Raises:
            StudyMismatch: another version of this tool wrote it, whose scores may be others.
        """
        theirs, ours = data["tool_version"], version("skipsearch")
        if theirs != ours:
            raise StudyMismatch(
                f"study {study} was prepared by skipsearch {theirs}, this is {ours}; install that version here, or "
                f"start a new study with --study"
            )
        trace, space = data["trace"], data["space"]
        attention, mlp = space.pop("fixed")
        space["fixed"] = SkipMask(attention=attention, mlp=mlp, num_layers=space["num_layers"])
        space |= {name: tuple(space[name]) for name in ("forms", "heads", "tokens", "sizes") if space[name] is not None}
        fields = tuple((str(name), str(value)) for name, value in trace["fields"])
        return cls(
            trace=Trace(
                prompts=tuple(map(tuple, trace["prompts"])), continuations=tuple(map(tuple, trace["continuations"])),
                new_tokens=trace["new_tokens"], rule=SelectionRule(temperature=trace["temperature"], fields=fields),
            ),
            space=Space(**space), contexts=tuple(data["contexts"]), ranks=tuple(map(tuple, data["ranks"])),
            seeds=tuple((params, label) for params, label in data["seeds"]),
            **{name: data[name] for name in ("dtype", "sampler", "seed", "pareto")},
        )  # fmt: skip

    def ranks_PT(self, device: torch.device) -> torch.Tensor | None:
        return torch.tensor(self.ranks, device=device) if self.ranks else None
