"""Continuing a text prompt through `model.generate`, as `skipsearch generate` does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers.generation.streamers import BaseStreamer

from skipsearch.compiled.backend import Progress
from skipsearch.decoding.rule import ONE_TEXT
from skipsearch.errors import DecodingError
from skipsearch.generate.method import SelfSpeculative
from skipsearch.model.load import Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """Arguments of `generate`. `chat` asks through the chat template, if any.

    Temperature 0 is greedy. What is None is left to the model's generation config.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    chat: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False}
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        given = {name: value for name, value in given.items() if value is not None}
        return {"do_sample": True, **given} if self.temperature else given


def continue_text(
    loaded: Loaded, prompt: str, method: SelfSpeculative, settings: GenerateSettings, *,
    streamer: BaseStreamer | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Generate with this method and time it. The time includes the prefill, but not compiling.

    Args:
        streamer: gets the prompt, then the tokens as they come.

    Returns:
        text, tokens (the new ones), seconds, tokens_per_second, and the raw counts of blocks.

    Raises:
        DecodingError: an empty prompt, or one that leaves no room in the context.
    """
    inputs = encode(loaded, prompt, settings).to(loaded.target.device)
    # Every causal LM takes these; some tokenizers also return token types.
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    method.warm_up(loaded.model, progress)
    torch.manual_seed(settings.seed)
    start = time.perf_counter()
    output = loaded.model.generate(
        **inputs, max_new_tokens=settings.max_new_tokens, custom_generate=method, streamer=streamer,
        **ONE_TEXT, **settings.sampling,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    tokens, stats = output[0, inputs["input_ids"].shape[1] :].tolist(), method.stats
    return {
        "text": loaded.tokenizer.decode(tokens), "tokens": tokens, "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds, "drafted": stats.drafted, "accepted": stats.accepted,
        "verifies": stats.verifies, "lossy": stats.lossy,
        "accepted_from": dict(stats.accepted_from), "acceptance_rate": stats.acceptance_rate, "tau": stats.tau,
    }  # fmt: skip


def encode(loaded: Loaded, prompt: str, settings: GenerateSettings) -> Any:
    """Tokenize a prompt.

    Raises:
        DecodingError: it is empty, or leaves no room in the context.
    """
    tokenizer, max_new_tokens = loaded.tokenizer, settings.max_new_tokens
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise DecodingError(f"prompt {ascii(prompt)[:80]} is not Unicode text; give it in UTF-8") from None
    if settings.chat and tokenizer.chat_template and prompt.strip():
        try:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except TemplateError as error:
            raise DecodingError(f"the chat template refuses the prompt ({error}); pass --no-chat") from error
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    context = loaded.target.context
    if not length:
        raise DecodingError(f"prompt {prompt!r} has no tokens; give some text with --prompt")
    if length + max_new_tokens > context:
        raise DecodingError(
            f"the prompt's {length} tokens and max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{context}; pass --max-new-tokens {max(1, context - length)} or a shorter prompt"
        )
    return inputs
