"""SelectionRule: how a model's tokens are chosen where nobody passes arguments: as its generation config says.

A model's own folder may ask for sampling, penalties and banned tokens. `generate` obeys, so what is recorded, timed and
predicted for it must obey too. The processors are those that `generate` itself makes of the config.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from skipsearch.decoding.accept import Sampling
from skipsearch.decoding.processors import TokenSelection
from skipsearch.errors import DecodingError, DecodingWarning

# Fields of a generation config that change scores, with the value at which they do not.
ALWAYS: dict[str, Any] = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None, "bad_words_ids": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "guidance_scale": None,
    "watermarking_config": None, "remove_invalid_values": False,
}  # fmt: skip
SAMPLING: dict[str, Any] = {
    "top_k": 0, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip


ENDS = ("stop_strings", "max_time")
# Arguments of `generate` with which it gives one text as a tensor, ended by end tokens alone.
ONE_TEXT: dict[str, Any] = {
    **dict.fromkeys(ENDS), "num_return_sequences": 1, "return_dict_in_generate": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRule:
    """How tokens are chosen; made by `of`, or with a temperature alone.

    Attributes:
        temperature: of sampling; 0: greedily.
        fields: what else of the model's generation config is in force, by name, as text.
    """

    temperature: float = 0.0
    fields: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel, temperature: float | None = None, **asked: Any) -> SelectionRule:
        """The rule of a model's generation config.

        Args:
            temperature: in place of the config's own; 0: greedily. Everything else holds.
            asked: other arguments of `generate` in place of the config's own.

        Raises:
            DecodingError: the config asks for beams or another mode that cannot be drafted for, or is invalid.
        """
        ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        config, processors = _asked(model, ids, 8, temperature, **asked)
        check_config(config)
        own = model.generation_config
        if left := [name for name in ENDS if own is not None and getattr(own, name, None) is not None]:
            warnings.warn(
                f"{' and '.join(left)} of the model's generation config: not applied, texts end at end tokens alone",
                DecodingWarning, stacklevel=3,
            )  # fmt: skip
        sampled = config.get_generation_mode(None) == GenerationMode.SAMPLE
        neutral = {**ALWAYS, **(SAMPLING if sampled else {})}
        found = ((name, getattr(config, name, unset)) for name, unset in neutral.items())
        fields = tuple((name, _short(value)) for name, value in found if value is not None and value != neutral[name])
        return cls(
            temperature=float(config.temperature or 1.0) if sampled else 0.0, fields=fields if processors else ()
        )

    def __str__(self) -> str:
        first = f"sampling, temperature {self.temperature:g}" if self.temperature else "greedy"
        return ", ".join([first, *(f"{name} {value}" for name, value in self.fields)])

    def selection(self, model: PreTrainedModel, prompt: Tensor, new_tokens: int, seed: int = 0) -> TokenSelection:
        """How the tokens behind one prompt [1, T] are chosen."""
        if not self.fields:
            return TokenSelection.at_temperature(self.temperature, seed, prompt.device)
        config, processors = _asked(model, prompt, new_tokens, self.temperature)
        eos = config._eos_token_tensor  # type: ignore[attr-defined]
        return TokenSelection(
            processors=processors, sampling=Sampling.from_seed(seed, prompt.device) if self.temperature else None,
            ends=frozenset() if eos is None else frozenset(eos.flatten().tolist()),
        )  # fmt: skip


GREEDY = SelectionRule()


def check_config(config: GenerationConfig) -> None:
    """Refuse what nothing can be drafted for.

    Raises:
        DecodingError: another mode than greedy search and sampling, no cache, or outputs that a block has not.
    """
    mode, at = config.get_generation_mode(None), "of the generation config"
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        asks = f"the generation config asks for {mode.value}"
        raise DecodingError(
            f"{asks}, must be greedy search or sampling; unset what selects it (num_beams and the like)"
        )
    if config.use_cache is False:
        raise DecodingError(
            f"use_cache {at} is False, must be True: draft and target share the cache; set use_cache=True"
        )
    if config.cache_implementation not in (None, "dynamic", "hybrid"):
        raise DecodingError(
            f"cache_implementation {at} is {config.cache_implementation!r}, which cannot be rolled back; unset it"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False) and config.return_dict_in_generate:
            raise DecodingError(f"{name} is True, must be False: a block has no such outputs for single tokens")


def _asked(
    model: PreTrainedModel, prompt: Tensor, new_tokens: int, temperature: float | None, **others: Any
) -> tuple[GenerationConfig, LogitsProcessorList]:
    """The config and the processors that `generate` hands to a decoding method."""
    found: list[tuple[GenerationConfig, LogitsProcessorList]] = []

    def keep(
        _model: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig, **_: Any,
    ) -> Tensor:  # fmt: skip
        found.append((generation_config, logits_processor))
        return input_ids

    asked: dict[str, Any] = {**others, **({} if temperature is None else {"do_sample": bool(temperature)})}
    if temperature:
        asked["temperature"] = temperature
    try:
        model.generate(  # what ends a text is not asked for: it needs a tokenizer, or a clock
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, custom_generate=keep,
            **ONE_TEXT, **asked,
        )  # fmt: skip
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise DecodingError(f"the model's generation config is refused ({first}); correct it") from error
    return found[0]


def _short(value: Any) -> str:
    return f"of {len(value)}" if isinstance(value, (list, dict)) else str(value)
