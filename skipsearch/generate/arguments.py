"""The arguments of `generate`: read, checked, and refused by name where a callable cannot honour them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)  # fmt: skip
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from skipsearch.decoding.batch import Layout
from skipsearch.decoding.processors import in_order
from skipsearch.decoding.rule import check_config
from skipsearch.errors import DecodingError
from skipsearch.model.cache import CACHE
from skipsearch.model.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What one call of `generate` asks for.

    Attributes:
        input_ids: [B, T] prompts, padded on the left.
        layout: their padding, and a cache to continue from.
        processors: logits processors.
        criteria: stopping criteria that `decode` does not check itself.
        config: everything else.
        eos_ids: end-of-sequence tokens.
        streamer: receives tokens, if there is one.
    """

    input_ids: Tensor
    layout: Layout
    processors: LogitsProcessorList
    criteria: tuple[StoppingCriteria, ...]
    config: GenerationConfig
    eos_ids: frozenset[int]
    streamer: BaseStreamer | None

    @property
    def batch(self) -> int:
        return self.input_ids.shape[0]

    @property
    def temperature(self) -> float:
        """0 is greedy."""
        return float(self.config.temperature or 1.0) if self.config.do_sample else 0.0

    @property
    def padded_past(self) -> bool:
        """Whether a cache holds tokens that come after padding."""
        past = self.layout.past
        return any(self.layout.pads) and past is not None and past.get_seq_length() > 0

    @property
    def processors_in_order(self) -> list[str]:
        """Class names of processors that must be called once for each token, in order."""
        return in_order(self.processors)

    @property
    def of_the_caller(self) -> list[str]:
        """Class names of processors and criteria that may remember earlier calls, or think in rows of the batch."""
        criteria = [c for c in self.criteria if type(c).__module__ != StoppingCriteria.__module__]
        return [*self.processors_in_order, *(type(criterion).__name__ for criterion in criteria)]

    @property
    def keep_scores(self) -> bool:
        return bool(self.config.return_dict_in_generate and self.config.output_scores)

    @property
    def keep_logits(self) -> bool:
        return bool(self.config.return_dict_in_generate and self.config.output_logits)

    def layout_of(self, rows: list[int]) -> Layout:
        """The layout of some rows alone."""
        return replace(self.layout, pads=tuple(self.layout.pads[row] for row in rows), rows=tuple(rows))


def read_arguments(
    target: Target, input_ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList,
    config: GenerationConfig, model_kwargs: dict[str, Any], dropped: dict[str, Any],
) -> Arguments:  # fmt: skip
    """Check what a callable was given by `generate`.

    Args:
        dropped: see `dropped_arguments`.

    Raises:
        DecodingError: something that cannot be honoured.
    """
    streamer = dropped.get("streamer")
    _refuse_modes(config, {**model_kwargs, **dropped, "streamer": None})
    if target.model.training and any(getattr(m, "gradient_checkpointing", False) for m in target.model.modules()):
        raise DecodingError(
            "the model is in training mode with gradient checkpointing, which keeps no cache; call model.eval() before"
        )
    if getattr(target.model.prepare_inputs_for_generation, "__self__", target.model) is not target.model:
        raise DecodingError(
            "the model's inputs are prepared by a wrapper (prompt or prefix tuning), which drafts would not see; "
            "merge the adapter, or decode without custom_generate"
        )
    if target.device.type != input_ids.device.type:
        raise DecodingError(
            f"input_ids lie on {input_ids.device}, the model takes them on {target.device}; "
            f"move them with .to({str(target.device)!r})"
        )
    if input_ids.shape[0] > 1:
        _refuse_in_batch(model_kwargs.get(CACHE), streamer)
    eos = config._eos_token_tensor  # type: ignore[attr-defined]
    eos_ids = frozenset() if eos is None else frozenset(eos.flatten().tolist())
    return Arguments(
        input_ids=input_ids, layout=_read_layout(input_ids, config, model_kwargs), processors=processors,
        criteria=tuple(c for c in criteria if not _built_in(c, eos_ids, config.max_length)), config=config,
        eos_ids=eos_ids, streamer=streamer,
    )  # fmt: skip


def dropped_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `generate` that it does not pass to a callable, read from its frame so that none is ignored.

    The callable may be called by another one, which `generate` was given.
    """
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        if caller.f_code.co_name == "generate" and caller.f_locals.get("self") is model:
            names = ("streamer", "assistant_model", "synced_gpus")
            return {name: caller.f_locals.get(name) or None for name in names}
        caller = caller.f_back
    return {}


def _built_in(criterion: Any, eos_ids: frozenset[int], max_length: int) -> bool:
    """Whether `decode` checks this criterion itself."""
    if isinstance(criterion, MaxLengthCriteria):
        return bool(criterion.max_length >= max_length)
    return isinstance(criterion, EosTokenCriteria) and set(criterion.eos_token_id.flatten().tolist()) == eos_ids


def _read_layout(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Layout:
    """Padding on the left of each row, the cache to continue from, and how many tokens only the cache holds."""
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
    return Layout(
        pads=tuple(pads), past=model_kwargs.get(CACHE), past_only=length - input_ids.shape[1],
        chunk=config.prefill_chunk_size,
    )  # fmt: skip


_HONOURED = {CACHE, "attention_mask", "position_ids", "use_cache", "logits_to_keep"}


def _refuse_modes(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise DecodingError for what self-speculative decoding cannot honour."""
    if model_kwargs.get("use_cache") is False:
        raise DecodingError(
            "use_cache is False, must be True: draft and target share the cache; pass use_cache=True to generate"
        )
    check_config(config)
    if given := sorted(k for k, v in model_kwargs.items() if v is not None and k not in _HONOURED):
        raise DecodingError(
            f"generate was given {', '.join(given)}, which self_speculative cannot honour; leave it out"
        )


def _refuse_in_batch(past: Cache | None, streamer: BaseStreamer | None) -> None:
    """Raise DecodingError for what is possible with a single sequence alone."""
    if streamer is not None:
        raise DecodingError("a streamer takes one sequence, got a batch; stream prompts one by one")
    if past is not None and past.get_seq_length():
        raise DecodingError(f"{CACHE} holds tokens of a batch; continue its sequences one by one")
