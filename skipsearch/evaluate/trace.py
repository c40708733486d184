"""Trace: the full model's own continuation of each calibration prompt.

Every mask is scored against it, so it is made once and kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipsearch.compiled.backend import Progress
from skipsearch.decoding.loop import Ending, decode
from skipsearch.decoding.rule import GREEDY, SelectionRule
from skipsearch.decoding.scheduler import Scheduler
from skipsearch.decoding.sequences import Sequences
from skipsearch.evaluate.prompt_row import Ids
from skipsearch.evaluate.prompts import fingerprint
from skipsearch.files import read_checked, write_checked
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy

LEAST = 4  # prompts of a recording that ends early


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """How prompts are decoded, to record or to time.

    Attributes:
        new_tokens: decoded from each prompt.
        rule: how tokens are chosen.
        seed: of sampling, and of the order in which arms take turns.
        rounds: repetitions of a timing.
    """

    new_tokens: int = 96
    rule: SelectionRule = GREEDY
    seed: int = 0
    rounds: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Prompts and the target's continuations.

    Attributes:
        prompts: token ids, one row a prompt.
        continuations: its own tokens, each row at most `new_tokens` long, shorter after an end of sequence.
        new_tokens: the length asked for.
        rule: how they were chosen.
    """

    prompts: tuple[Ids, ...]
    continuations: tuple[Ids, ...]
    new_tokens: int
    rule: SelectionRule = GREEDY

    def head(self, prompts: int, new_tokens: int) -> Trace:
        """The first prompts and tokens alone, for scoring at lower fidelity."""
        return Trace(
            prompts=self.prompts[:prompts],
            continuations=tuple(c[:new_tokens] for c in self.continuations[:prompts]),
            new_tokens=min(new_tokens, self.new_tokens),
            rule=self.rule,
        )

    def padded(self, device: torch.device, room: int = 0) -> tuple[Tensor, Tensor]:
        """Token ids [P, T] of prompts and continuations, with room behind the longest; a mask of the continuations."""
        sequences = [p + c for p, c in zip(self.prompts, self.continuations, strict=True)]
        shape = (len(sequences), max(map(len, sequences)) + room)
        ids, generated = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        for i, (prompt, sequence) in enumerate(zip(self.prompts, sequences, strict=True)):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            generated[i, len(prompt) : len(sequence)] = True
        return ids.to(device), generated.to(device)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.continuations))

    @property
    def mean_context(self) -> float:
        """Mean number of tokens that a step attends to."""
        pairs = zip(self.prompts, self.continuations, strict=True)
        return sum((len(p) + len(c) / 2) * len(c) for p, c in pairs) / max(1, self.tokens)


def record(
    target: Target, prompts: tuple[Ids, ...], settings: DecodeSettings, progress: Progress, *,
    known: Sequence[Ids] = (), seconds: float = math.inf, keep: Callable[[list[Ids]], None] = lambda rows: None,
) -> Trace:  # fmt: skip
    """Decode every prompt by the settings' rule.

    Greedily in fp32 n-grams draft, which change no token; in half precision they could, where two are nearly tied.

    Args:
        known: continuations of the first prompts, from a recording that was stopped.
        seconds: stop recording once they are spent, with the prompts so far, `LEAST` at least.
        keep: called with all continuations so far after each prompt.
    """
    rows, rule = list(known), settings.rule
    exact = not rule.temperature and target.dtype == torch.float32
    policy = DraftPolicy.ngrams_alone() if exact else None
    scheduler, begin = Scheduler(), time.monotonic()
    for i, prompt in enumerate(prompts[len(rows) :], len(rows)):
        spent = time.monotonic() - begin
        if len(rows) >= LEAST and spent * (1 + 1 / max(1, len(rows) - len(known))) > seconds:
            break
        ending = Ending(max_length=len(prompt) + settings.new_tokens, eos_ids=target.eos_ids)
        ids = target.ids(prompt)
        selection = rule.selection(target.model, ids, settings.new_tokens, settings.seed + 2 * i)
        sequences = Sequences(target, ids, capacity=ending.max_length, selection=selection)
        blocks = decode(sequences, ending, policy=policy, scheduler=scheduler)
        rows.append(tuple(token for block in blocks for token in block.tokens))
        keep(rows)
        pace = (time.monotonic() - begin) / (len(rows) - len(known))
        within = i + 1 + max(0.0, begin + seconds - time.monotonic()) / pace  # what the seconds suffice for
        progress("record", i + 1, round(min(len(prompts), max(LEAST, within))))
    return Trace(
        prompts=prompts[: len(rows)], continuations=tuple(rows), new_tokens=settings.new_tokens, rule=rule
    )  # fmt: skip


def record_or_load(
    path: Path, target: Target, prompts: tuple[Ids, ...], settings: DecodeSettings, identity: str, progress: Progress,
    *, seconds: float = math.inf, may_grow: bool = True,
) -> Trace:  # fmt: skip
    """The trace in `path` if it was made for this identity (model, dtype) and these prompts; else a new one, saved.

    A recording that was stopped, or that had too little time, goes on behind its last prompt.

    Args:
        may_grow: whether it may go on; not once masks are scored on it.
    """
    new_tokens, rule = settings.new_tokens, settings.rule
    key = {"identity": identity, "prompts_sha256": fingerprint(prompts), "new_tokens": new_tokens}
    if rule.fields:
        key |= {"chosen": str(rule)}
    if rule.temperature:
        key |= {"temperature": rule.temperature, "seed": settings.seed}

    def take(data: dict[str, Any]) -> list[Ids]:
        rows = [tuple(row) for row in data["continuations"]]
        fits = all(type(token) is int and 0 <= token < target.vocabulary for row in rows for token in row)
        return rows if fits and data["key"] == key and len(rows) <= len(prompts) else []

    known = read_checked(path, take) or []  # none: there is no trace yet, or it is another one's
    if len(known) == len(prompts) or (known and not may_grow):
        return Trace(
            prompts=prompts[: len(known)], continuations=tuple(known), new_tokens=new_tokens, rule=rule
        )  # fmt: skip

    def keep(rows: list[Ids]) -> None:
        write_checked(path, {"key": key, "prompts": prompts[: len(rows)], "continuations": rows})

    return record(target, prompts, settings, progress, known=known, seconds=seconds, keep=keep)
