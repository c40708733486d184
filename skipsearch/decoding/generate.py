"""self_speculative: a mask as a `custom_generate` callable for `model.generate`.

Promises the output of plain `generate` under the same options (greedy: the same tokens; sampling: the
same distribution). Options that a callable cannot honour are refused by name, never ignored.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from skipsearch.decoding.loop import DecodeStats, Sampling, SpeculativeSequence, decode
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.errors import DecodingError, MaskError
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile, load_mask
from skipsearch.model.load import check_mask_belongs
from skipsearch.model.view import draft_view


class SelfSpeculative:
    """What `self_speculative` returns; pass it as `custom_generate`. One object serves any model and call.

    Attributes:
        mask, policy: what it drafts with; mask None decodes plainly.
        stats: raw counts of the last call.
    """

    def __init__(
        self, mask: SkipMask | None, policy: DraftPolicy, file: MaskFile | None, streamer: BaseStreamer | None
    ) -> None:
        self.mask, self.policy, self.stats = mask, policy, DecodeStats()
        self._file, self._streamer = file, streamer
        self._drafts: weakref.WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = weakref.WeakKeyDictionary()

    def _draft_for(self, model: PreTrainedModel) -> PreTrainedModel | None:
        if self.mask is None:
            return None
        if model not in self._drafts:
            if self._file is not None:
                check_mask_belongs(self._file, model)
            self._drafts[model] = draft_view(model, self.mask)
        return self._drafts[model]

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
        _refuse_unsupported(input_ids, generation_config, model_kwargs)
        past: Cache | None = model_kwargs.get("past_key_values")
        attention_mask: Tensor | None = model_kwargs.get("attention_mask")
        pad = 0
        if attention_mask is not None:
            pad = int((attention_mask[0] == 0).sum())
            if attention_mask[0, :pad].any():
                raise DecodingError("attention_mask has zeros inside the prompt; only padding on the left is supported")
        max_length = generation_config.max_length - pad
        seed = int(torch.randint(2**62, ())) if generation_config.do_sample else None
        sequence = SpeculativeSequence(
            model, input_ids[:, pad:], capacity=max(max_length, input_ids.shape[1]) + 1, mask=self.mask,
            draft=self._draft_for(model), processors=logits_processor, past=past,
            sampling=None if seed is None else Sampling.from_seed(seed, input_ids.device),
        )  # fmt: skip
        eos = generation_config._eos_token_tensor  # type: ignore[attr-defined]
        others = [c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
        padding = input_ids[:, :pad]

        def should_stop(ids: Tensor, scores: Tensor) -> bool:
            full = torch.cat([padding, ids], dim=1) if pad else ids
            return any(bool(criterion(full, scores).all()) for criterion in others)  # type: ignore[arg-type]

        self.stats = DecodeStats()
        logits: list[Tensor] = []
        scores: list[Tensor] = []
        for block in decode(
            sequence, max_length=max_length, policy=self.policy, stats=self.stats,
            eos_ids=frozenset() if eos is None else frozenset(eos.flatten().tolist()),
            should_stop=should_stop if others else None,
        ):  # fmt: skip
            if self._streamer is not None:
                for token in block.tokens:
                    self._streamer.put(torch.tensor([token]))
            if generation_config.return_dict_in_generate:
                logits += [row[None].float() for row in block.logits_KV[: len(block.tokens)]]
                scores += [row[None].float() for row in block.scores_KV[: len(block.tokens)]]
        if self._streamer is not None:
            self._streamer.end()
        sequences = torch.cat([padding, sequence.ids[:, : sequence.length]], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=tuple(scores) if generation_config.output_scores else None,  # type: ignore[arg-type]
            logits=tuple(logits) if generation_config.output_logits else None,  # type: ignore[arg-type]
            past_key_values=sequence.cache.cache,
        )


_HONOURED = {"past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}


def _refuse_unsupported(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    if config.num_beams and config.num_beams > 1:
        raise DecodingError(f"num_beams is {config.num_beams}, must be 1: beams cannot be drafted by skipping")
    if input_ids.shape[0] != 1:
        raise DecodingError(
            f"the batch holds {input_ids.shape[0]} sequences, must be 1; call generate once for each prompt"
        )
    if model_kwargs.get("use_cache") is False:
        raise DecodingError("use_cache is False, must be True: draft and target share the cache")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise DecodingError(f"{name} is True, must be False: a block has no such outputs for single tokens")
    if given := sorted(k for k, v in model_kwargs.items() if v is not None and k not in _HONOURED):
        raise DecodingError(
            f"generate was given {', '.join(given)}, which self_speculative cannot honour; leave it out"
        )


def self_speculative(
    mask_or_path: SkipMask | MaskFile | str | Path | None,
    *,
    streamer: BaseStreamer | None = None,
    max_length: int | None = None,
    exit_threshold: float | None = None,
) -> SelfSpeculative:
    """A decoding method for `model.generate(..., custom_generate=...)`.

    Args:
        mask_or_path: a mask, a mask file or its path; None decodes plainly in the same loop.
        streamer: receives tokens as they are committed (`generate` hands none to a callable).
        max_length: K; by default the mask file's own policy, or 5 for a bare mask.
        exit_threshold: stop drafting below this confidence; default as for `max_length`.

    Raises:
        MaskError: the file or the policy is malformed.
    """
    file = None
    if isinstance(mask_or_path, str | Path):
        file = load_mask(mask_or_path)
    elif isinstance(mask_or_path, MaskFile):
        file = mask_or_path
    elif mask_or_path is not None and not isinstance(mask_or_path, SkipMask):
        raise MaskError(f"mask_or_path must be a SkipMask, a MaskFile or a path, got {type(mask_or_path).__name__}")
    mask = file.mask if file is not None else mask_or_path
    policy = DraftPolicy() if file is None else DraftPolicy(**file.draft.model_dump())
    if max_length is not None or exit_threshold is not None:
        policy = DraftPolicy(
            max_length=policy.max_length if max_length is None else max_length,
            exit_threshold=policy.exit_threshold if exit_threshold is None else exit_threshold,
        )
    return SelfSpeculative(mask, policy, file, streamer)  # type: ignore[arg-type]
