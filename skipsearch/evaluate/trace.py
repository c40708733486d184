"""Trace: the full model's own continuation of each calibration prompt.

Everything the search scores is scored against it, so it is made once and kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skipsearch.compiled.model import CompiledModel
from skipsearch.decoding.loop import decode
from skipsearch.decoding.processors import at_temperature
from skipsearch.decoding.sequences import Sequences
from skipsearch.evaluate.prompts import Ids, fingerprint
from skipsearch.files import write_json
from skipsearch.model.sublayers import input_device

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Prompts and what the target says to them.

    Attributes:
        prompts: token ids, one row a prompt.
        continuations: its own tokens, each row at most `new_tokens` long, shorter after an end of sequence.
        new_tokens: the length asked for.
        temperature: at which they were sampled; 0: greedily.
    """

    prompts: tuple[Ids, ...]
    continuations: tuple[Ids, ...]
    new_tokens: int
    temperature: float = 0.0

    def head(self, prompts: int, new_tokens: int) -> Trace:
        """The first prompts and tokens alone, for scoring at lower fidelity."""
        return Trace(
            prompts=self.prompts[:prompts],
            continuations=tuple(c[:new_tokens] for c in self.continuations[:prompts]),
            new_tokens=min(new_tokens, self.new_tokens),
            temperature=self.temperature,
        )

    def padded(self, device: torch.device, room: int = 0) -> tuple[Tensor, Tensor]:
        """Prompts with their continuations [P, T], with room behind the longest, and where continuations stand."""
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
        """Mean length of what a step attends to, in tokens."""
        pairs = zip(self.prompts, self.continuations, strict=True)
        return sum((len(p) + len(c) / 2) * len(c) for p, c in pairs) / max(1, self.tokens)


def eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """End-of-sequence tokens of the model's generation config."""
    config = model.generation_config
    eos = config.eos_token_id if config is not None else None
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def record(
    model: PreTrainedModel, prompts: tuple[Ids, ...], new_tokens: int, progress: Progress,
    compiled: CompiledModel | None = None, temperature: float = 0.0, seed: int = 0,
) -> Trace:  # fmt: skip
    """Decode every prompt plainly: greedily, or sampling at a temperature."""
    rows = []
    for i, prompt in enumerate(prompts):
        limit = len(prompt) + new_tokens
        ids = torch.tensor([prompt], device=input_device(model))
        sampling = at_temperature(temperature, seed + 2 * i, ids.device)
        sequences = Sequences(model, ids, capacity=limit, compiled=compiled, **sampling)
        blocks = decode(sequences, max_length=limit, policy=None, eos_ids=eos_ids(model))
        rows.append(tuple(token for block in blocks for token in block.tokens))
        progress("record", i + 1, len(prompts))
    return Trace(prompts=prompts, continuations=tuple(rows), new_tokens=new_tokens, temperature=temperature)


def record_or_load(
    path: Path, model: PreTrainedModel, prompts: tuple[Ids, ...], new_tokens: int, identity: str, progress: Progress,
    compiled: CompiledModel | None = None, temperature: float = 0.0, seed: int = 0,
) -> Trace:  # fmt: skip
    """The trace in `path` if it was made for this identity (model, dtype) and these prompts; else a new one, saved."""
    key = {"identity": identity, "prompts_sha256": fingerprint(prompts), "new_tokens": new_tokens}
    if temperature:
        key |= {"temperature": temperature, "seed": seed}
    try:
        data = json.loads(path.read_text())
        if data["key"] == key:
            rows = tuple(tuple(row) for row in data["continuations"])
            return Trace(prompts=prompts, continuations=rows, new_tokens=new_tokens, temperature=temperature)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or not ours: it is made anew
    trace = record(model, prompts, new_tokens, progress, compiled, temperature, seed)
    write_json(path, {"key": key, "prompts": trace.prompts, "continuations": trace.continuations})
    return trace
