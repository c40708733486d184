"""Continuing a text prompt through `model.generate`, as `skipsearch generate` does."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TextStreamer

from skipsearch.compiled.backend import Progress
from skipsearch.errors import DecodingError
from skipsearch.generate.method import SelfSpeculative
from skipsearch.model.load import Loaded
from skipsearch.model.sublayers import context_limit, input_device


def continue_text(
    loaded: Loaded, prompt: str, method: SelfSpeculative, *, stream: bool, max_new_tokens: int,
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Generate with this method and time it, prefill included, compiling not.

    Returns:
        text, tokens (the new ones), seconds, tokens_per_second, and the raw counts of blocks.

    Raises:
        DecodingError: an empty prompt, or one that leaves no room in the context.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    inputs = check_room(loaded, prompt, max_new_tokens).to(input_device(model))
    length = inputs["input_ids"].shape[1]
    streamer = TextStreamer(tokenizer) if stream else None  # `generate` gives it the prompt first
    method.warm_up(model, progress)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature else {
        "do_sample": False
    }  # fmt: skip
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = model.generate(
        **_known(inputs), max_new_tokens=max_new_tokens, custom_generate=method, streamer=streamer, **sampling
    )
    seconds = time.perf_counter() - start
    tokens = output[0, length:].tolist()
    stats = method.stats
    return {
        "text": tokenizer.decode(tokens), "tokens": tokens, "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds, "drafted": stats.drafted, "accepted": stats.accepted,
        "verifies": stats.verifies, "lossy": stats.lossy,
        "accepted_from": dict(stats.accepted_from), "acceptance_rate": stats.acceptance_rate, "tau": stats.tau,
    }  # fmt: skip


def check_room(loaded: Loaded, prompt: str, max_new_tokens: int) -> Any:
    """What the tokenizer makes of a prompt.

    Raises:
        DecodingError: it is empty, or leaves no room in the context.
    """
    inputs = loaded.tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    context = context_limit(loaded.model)
    if not length:
        raise DecodingError(f"prompt {prompt!r} has no tokens; give some text with --prompt")
    if length + max_new_tokens > context:
        raise DecodingError(
            f"the prompt's {length} tokens and max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{context}; pass --max-new-tokens {max(1, context - length)} or a shorter prompt"
        )
    return inputs


def _known(inputs: Any) -> dict[str, Any]:
    """What every causal LM takes of a tokenizer's output (some also return token types)."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
