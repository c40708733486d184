"""What `generate` was asked for: read, checked, and refused by name where a callable cannot honour it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from skipsearch.errors import DecodingError


def not_handed_on() -> dict[str, Any]:
    """Arguments of `generate` that it drops for a callable, read where it keeps them so that none is ignored.

    To be called by the callable itself: `generate` is the frame above its own.
    """
    caller = sys._getframe(2)
    names = ("streamer", "assistant_model", "synced_gpus") if caller.f_code.co_name == "generate" else ()
    return {name: caller.f_locals.get(name) or None for name in names}


def built_in(criterion: Any, eos_ids: frozenset[int], max_length: int) -> bool:
    """Whether `decode` looks after this criterion itself."""
    if isinstance(criterion, MaxLengthCriteria):
        return bool(criterion.max_length >= max_length)
    return isinstance(criterion, EosTokenCriteria) and set(criterion.eos_token_id.flatten().tolist()) == eos_ids


def layout(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> tuple[list[int], int]:
    """Padding on the left of each row, and how many tokens only `past_key_values` knows."""
    mask: Tensor | None = model_kwargs.get("attention_mask")
    length = mask.shape[1] if mask is not None else getattr(config, "_mask_length", input_ids.shape[1])
    pads = [0] * input_ids.shape[0] if mask is None else (mask == 0).sum(1).tolist()
    expected = torch.arange(length, device=input_ids.device)[None]
    if mask is not None:
        if any(row[:pad].any() for row, pad in zip(mask, pads, strict=True)):
            raise DecodingError("attention_mask has zeros inside the prompt; only padding on the left is supported")
        expected = (mask.long().cumsum(-1) - 1).clamp(min=0)
    given = model_kwargs.get("position_ids")
    if given is not None and (given.shape[1] != length or bool((given != expected).any())):
        raise DecodingError("position_ids are not those of the attention_mask; leave them out")
    return pads, length - input_ids.shape[1]


_HONOURED = {"past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}


def refuse_modes(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise DecodingError for what self-speculative decoding cannot honour."""
    if config.num_beams and config.num_beams > 1:
        raise DecodingError(f"num_beams is {config.num_beams}, must be 1: beams cannot be drafted by skipping")
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise DecodingError(
            f"the generation config asks for {mode.value}, must be greedy search or sampling; unset what selects it"
        )
    if model_kwargs.get("use_cache") is False:
        raise DecodingError(
            "use_cache is False, must be True: draft and target share the cache; pass use_cache=True to generate"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False) and config.return_dict_in_generate:
            raise DecodingError(f"{name} is True, must be False: a block has no such outputs for single tokens")
    if given := sorted(k for k, v in model_kwargs.items() if v is not None and k not in _HONOURED):
        raise DecodingError(
            f"generate was given {', '.join(given)}, which self_speculative cannot honour; leave it out"
        )


def refuse_in_batch(past: Cache | None, streamer: BaseStreamer | None) -> None:
    """Raise DecodingError for what only a single sequence can have."""
    if streamer is not None:
        raise DecodingError("a streamer takes one sequence, got a batch; stream prompts one by one")
    if past is not None and past.get_seq_length():
        raise DecodingError("past_key_values holds tokens of a batch; continue its sequences one by one")
