"""self_speculative: a mask as a `custom_generate` callable for `model.generate`.

Promises the output of plain `generate` under the same options, row by row (greedy: the same tokens;
sampling: the same distribution). Options that a callable cannot honour are refused by name, never ignored.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from skipsearch.compiled.backend import Backend, Progress, compiled_for, state_of, warm_draft
from skipsearch.compiled.model import CompiledModel
from skipsearch.decoding.accept import Sampling
from skipsearch.decoding.batch import ALIGNED
from skipsearch.decoding.loop import decode
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.processors import check
from skipsearch.decoding.rows import rows_may_differ
from skipsearch.decoding.scheduler import Pace
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block, DecodeStats
from skipsearch.decoding.tuner import Tuner
from skipsearch.draft.view import draft_view
from skipsearch.errors import BackendWarning, DecodingError
from skipsearch.generate.arguments import built_in, layout, not_handed_on, refuse_in_batch, refuse_modes
from skipsearch.joint.joint import Joint, jointly
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile
from skipsearch.model.load import check_mask_belongs
from skipsearch.model.sublayers import input_device

# Makes a model's tuner: with what runs forwards, policy and mask to begin with, and whom to tell of compiling.
Tune = Callable[
    [PreTrainedModel, CompiledModel | None, DraftPolicy, SkipMask | None, Progress | None], Tuner
]  # fmt: skip


@dataclass(slots=True)
class _Row:
    """What one sequence of the batch has produced."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


class SelfSpeculative:
    """What `self_speculative` returns; pass it as `custom_generate`. One object serves any model and call.

    Attributes:
        mask, policy: what it drafts with; mask None decodes plainly.
        deterministic: whether verification runs in blocks of one fixed shape.
        joint: settings of joint decoding, which is lossy; None decodes losslessly.
        backend: what runs forwards; "auto" is the one that the mask file was tuned for, eager for a bare mask.
        stats: raw counts of the last call.
    """

    def __init__(
        self, mask: SkipMask | None, policy: DraftPolicy, file: MaskFile | None, streamer: BaseStreamer | None,
        deterministic: bool = False, backend: Backend = "auto", tune: Tune | None = None,
        joint: Joint | None = None, draft_model: PreTrainedModel | None = None,
    ) -> None:  # fmt: skip
        self._tune, self.joint, self._draft_model = tune, joint, draft_model
        self._tuners: weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, Tuner]] = weakref.WeakKeyDictionary()
        self._tuning = threading.Lock()  # two first calls at once have one tuner
        self.mask, self.policy, self.deterministic, self.stats = mask, policy, deterministic, DecodeStats()
        self.backend, self._file, self._streamer, self._said = backend, file, streamer, set[str]()
        self._paces: weakref.WeakKeyDictionary[PreTrainedModel, Pace] = weakref.WeakKeyDictionary()
        self._drafts: weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, PreTrainedModel]] = (
            weakref.WeakKeyDictionary()
        )

    def _draft_for(self, model: PreTrainedModel) -> PreTrainedModel | None:
        if self.mask is None:
            return None
        state = state_of(model)
        if model not in self._drafts or self._drafts[model][0] != state:
            if self._file is not None:
                check_mask_belongs(self._file, model)
            self._drafts[model] = state, draft_view(model, self.mask)
        return self._drafts[model][1]

    def warm_up(self, model: PreTrainedModel, progress: Progress | None = None) -> None:
        """Compile what decoding of one sequence needs, or read it from the disk, so that no call has to wait for it.

        Raises:
            MaskError: the mask file is for another model.
        """
        draft, compiled = self._draft_for(model), self._compiled_for(model, 1, progress=progress)
        if compiled is not None and draft is not None:
            warm_draft(compiled, draft, progress)
        if self._tune is not None:
            self.tuner_for(model, compiled, progress)

    def tuner_for(
        self, model: PreTrainedModel, compiled: CompiledModel | None = None, progress: Progress | None = None
    ) -> Tuner:
        """Who changes the mask while this model serves, and what it has found: one a model.

        Args:
            compiled: what runs forwards, of a tuner that is not there yet; None: as decoding of one sequence will.

        Raises:
            DecodingError: nobody does: this object was made with a mask.
        """
        if self._tune is None:
            raise DecodingError("this method has one mask, nothing is searched; make it with self_speculative('auto')")
        state = state_of(model)
        with self._tuning:
            if model not in self._tuners or self._tuners[model][0] != state:
                compiled = compiled or self._compiled_for(model, 1, progress=progress)
                self._tuners[model] = state, self._tune(model, compiled, self.policy, self.mask, progress)
            return self._tuners[model][1]

    def _compiled_for(
        self, model: PreTrainedModel, rows: int, padded_past: bool = False, progress: Progress | None = None
    ) -> CompiledModel | None:
        tuned = self._file.evidence.backend if self._file is not None and self._file.evidence is not None else None
        wanted = self.backend if self.backend != "auto" else "compiled" if tuned == "compiled" else "eager"
        if wanted == "compiled" and self.deterministic and self.backend == "auto":
            return None
        if wanted == "compiled" and (rows > 1 or self.deterministic or padded_past):
            what = "sequences one at a time" if rows > 1 else "no deterministic decoding" if self.deterministic else ""
            what = what or "no past_key_values behind padding"
            self._warn(f"decoding eagerly: backend 'compiled' takes {what}")
            return None
        compiled = compiled_for(model, wanted, progress=progress)
        now = "eager" if compiled is None else "compiled"
        if tuned is not None and tuned != now and self.joint is None:  # which is eager in any case
            self._warn(f"the mask was tuned for backend {tuned!r}, decoding with {now!r}: another mask may be faster")
        return compiled

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, BackendWarning, stacklevel=4)

    def _pace_for(self, model: PreTrainedModel, sampled: bool) -> Pace:
        """Estimates go on from call to call. With sampling they know no clock, so that a seed decides all."""
        if sampled:
            return Pace(self.policy.costs or (0.5, 1.0), clock=False)
        return self._paces.setdefault(model, Pace(self.policy.costs))

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Called by `generate`; see there for the arguments.

        Raises:
            DecodingError: an option that cannot be honoured.
            MaskError: the mask file is for another model.
        """
        # `generate` hands a callable's own argument names over twice, so these come as keywords alone.
        batch, config = input_ids.shape[0], generation_config
        past: Cache | None = model_kwargs.get("past_key_values")
        unseen = not_handed_on()
        streamer = self._streamer or unseen.get("streamer")
        refuse_modes(config, {**model_kwargs, **unseen, "streamer": None})
        check(logits_processor)
        if (device := input_device(model)).type != input_ids.device.type:
            raise DecodingError(
                f"input_ids lie on {input_ids.device}, the model takes them on {device}; "
                f"move them with .to({str(device)!r})"
            )
        if batch > 1:
            refuse_in_batch(past, streamer)
        pads, past_only = layout(input_ids, config, model_kwargs)
        eos = config._eos_token_tensor  # type: ignore[attr-defined]
        eos_ids = frozenset() if eos is None else frozenset(eos.flatten().tolist())
        others = [c for c in stopping_criteria if not built_in(c, eos_ids, config.max_length)]
        rows = [_Row() for _ in range(batch)]
        keep_scores = bool(config.return_dict_in_generate and config.output_scores)
        keep_logits = bool(config.return_dict_in_generate and config.output_logits)

        self.stats = stats = DecodeStats()
        padded_past = any(pads) and past is not None and past.get_seq_length() > 0
        draft, compiled = self._draft_for(model), self._compiled_for(model, batch, padded_past)
        if compiled is not None and draft is not None:
            warm_draft(compiled, draft)
        pace = self._pace_for(model, bool(config.do_sample))
        tuner = self.tuner_for(model, compiled) if self._tune and batch == 1 and not self.deterministic else None
        temperature = float(config.temperature or 1.0) if config.do_sample else 0.0
        together = batch == 1 or (not (self.deterministic or self.joint) and rows_may_differ(model))
        for group in [list(range(batch))] if together else [[b] for b in range(batch)]:
            seed = int(torch.randint(2**62, ())) if config.do_sample else None
            sampling = None if seed is None else Sampling.from_seed(seed, input_ids.device)
            sequences = Sequences(
                model, input_ids[group], capacity=max(config.max_length, input_ids.shape[1]) + 1,
                mask=None if tuner else self.mask, draft=None if tuner else draft, processors=logits_processor,
                past=past, pads=[pads[b] for b in group], past_only=past_only, numbers=group,
                aligned=ALIGNED if self.deterministic else 0, chunk=config.prefill_chunk_size, compiled=compiled,
                sampling=sampling,
            )  # fmt: skip

            def should_stop(block: Block, i: int, ids: Tensor) -> bool:
                seen = None
                if keep_scores:
                    seen = (*rows[block.row].scores, *_steps(block.scores_KV[: i + 1]))
                return any(bool(criterion(ids, seen).all()) for criterion in others)  # type: ignore[arg-type]

            ends: dict[str, Any] = {
                "max_length": config.max_length, "eos_ids": eos_ids, "should_stop": should_stop if others else None,
                "stats": stats,
            }  # fmt: skip
            if self.joint is not None:
                blocks = jointly(
                    model, draft, self._draft_model, sequences, self.joint, logits_processor, sampling, **ends
                )
            else:
                blocks = decode(sequences, policy=self.policy, pace=pace, tuner=tuner, temperature=temperature, **ends)
            for block in blocks:
                row = rows[block.row]
                row.tokens += block.tokens
                if keep_logits:
                    row.logits += _steps(block.logits_KV[: len(block.tokens)])
                if keep_scores:
                    row.scores += _steps(block.scores_KV[: len(block.tokens)])
                if streamer is not None:
                    for token in block.tokens:
                        streamer.put(torch.tensor([token]))
        if streamer is not None:
            streamer.end()
        if past is not None and batch == 1:
            sequences.cache.hand_over(past)
        output = _padded(input_ids, rows, config)
        if not config.return_dict_in_generate:
            return output
        return GenerateDecoderOnlyOutput(
            sequences=output,  # type: ignore[arg-type]
            scores=_stacked([row.scores for row in rows]) if keep_scores else None,  # type: ignore[arg-type]
            logits=_stacked([row.logits for row in rows]) if keep_logits else None,  # type: ignore[arg-type]
            past_key_values=past if batch == 1 else None,
        )


def _padded(input_ids: Tensor, rows: list[_Row], config: GenerationConfig) -> Tensor:
    """Prompts and new tokens [B, T]; rows that ended early are filled with the padding token."""
    pad = config._pad_token_tensor  # type: ignore[attr-defined]
    longest = max(len(row.tokens) for row in rows)
    fill = 0 if pad is None else int(pad)
    tokens = [row.tokens + [fill] * (longest - len(row.tokens)) for row in rows]
    return torch.cat([input_ids, torch.tensor(tokens, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def _steps(logits_KV: Tensor) -> list[Tensor]:
    return [logits_V[None].to(torch.float32, copy=True) for logits_V in logits_KV]


def _stacked(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Step by step [B, V]; zeros where a row has ended."""
    longest = max(map(len, rows))
    nothing = torch.zeros_like(rows[0][0])
    return tuple(torch.cat([row[step] if step < len(row) else nothing for row in rows]) for step in range(longest))
