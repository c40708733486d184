"""Which backend serves a model: compiled pieces where they are proven to agree with the model, else eager."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Literal

import torch
from transformers import DynamicCache, PreTrainedModel

from skipsearch.compiled.model import GUESS, WIDTHS, CompiledModel
from skipsearch.draft.view import draft_view
from skipsearch.errors import BackendError, BackendWarning
from skipsearch.mask import SkipMask
from skipsearch.model.sublayers import context_limit, input_device

Backend = Literal["auto", "eager", "compiled"]
Progress = Callable[[str, int, int], None]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}  # of the largest logit

_known: weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, CompiledModel | str]] = weakref.WeakKeyDictionary()
_log = logging.getLogger(__name__)
_lock = threading.RLock()  # the compiler sets what is global to the process


def state_of(model: PreTrainedModel) -> int:
    """A number that changes when the model is moved, converted, or given other modules or weights."""
    return hash(tuple((p.data_ptr(), p.dtype, p.device) for p in model.parameters()))


def compiled_for(
    model: PreTrainedModel, backend: Backend, *, progress: Progress | None = None,
) -> CompiledModel | None:  # fmt: skip
    """The compiled model, or None for eager decoding.

    The first call compiles, or reads what was compiled before from the disk, and compares with the model.
    Later calls with the same model object are cheap; a model that was moved or changed is compiled again.

    Args:
        backend: "auto" and "compiled" compile where possible and warn once, saying why, where not.
        progress: told (stage, done, total).
    """
    if backend not in ("auto", "eager", "compiled"):
        raise BackendError(f"backend is {backend!r}, must be auto, eager or compiled")
    if backend == "eager":
        return None
    with _lock:
        state = state_of(model)
        known, found = _known.get(model, (None, ""))
        if known == state and isinstance(found, str):
            return None
        try:
            if known != state or isinstance(found, str):
                found = compile_and_prove(model, progress)
            else:
                found.warm(found.pieces.layers_of(model), widths_of(found), progress)
            _known[model] = state, found
        except Exception as error:
            # Whatever a tracer or a compiler makes of a model it does not know: eager decoding is always there.
            said = str(error).strip().splitlines() or [type(error).__name__]
            why = (
                said[0] if isinstance(error, BackendError) else f"compiling failed ({type(error).__name__}: {said[0]})"
            )
            _known[model] = state, why[:300]
            warnings.warn(f"decoding eagerly: {why[:300]}", BackendWarning, stacklevel=2)
            return None
        return found


def widths_of(compiled: CompiledModel) -> list[int]:
    """Every width, the prefill's first: what is left of a prompt may be of any length."""
    return [compiled.chunk, *WIDTHS]


@torch.no_grad()
def compile_and_prove(model: PreTrainedModel, progress: Progress | None) -> CompiledModel:
    """Compile the model's pieces and compare logits with its own: a full forward, then single and several tokens.

    Raises:
        BackendError: the logits differ by more than rounding, or the model or machine cannot.
    """
    if progress is None:  # nobody is told how far it is, so at least that it has begun
        _log.warning("compiling for this machine: about a minute at the first use, then read from the disk")
    compiled = CompiledModel(model)
    layers = compiled.pieces.layers_of(model)
    compiled.warm(layers, widths_of(compiled), progress)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    length = min(compiled.chunk + 9, context_limit(model))
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(input_device(model))
    expected = model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True).logits[0]
    owner = _Owner()
    buffers = compiled.lease(length, owner)
    buffers.ids[:, :length] = ids
    buffers.positions.copy_(torch.arange(len(buffers.positions)).clamp(max=length - 1))
    at, got = 0, []
    for tokens in (min(compiled.chunk, length - 3), 1, length):
        tokens = min(tokens, length - at)
        scores = compiled.forward(layers, buffers, at, at, tokens, keep_last=tokens == compiled.chunk)
        got.append((at + tokens - 1, scores.logits[0, min(tokens, scores.said.shape[1]) - 1].clone()))
        at += tokens
    for place, logits in got:
        error = float((logits - expected[place]).abs().max() / expected[place].abs().max())
        if not error < TOLERANCE.get(model.dtype, 0.1):
            raise BackendError(f"compiled logits differ from the model's by {error:.2g} of the largest")
    return compiled


def warm_mask(
    compiled: CompiledModel | None, model: PreTrainedModel, mask: SkipMask, progress: Progress | None = None
) -> None:
    """Compile what drafting with a mask needs: at most the layers of which one sublayer alone is left."""
    if compiled is not None:
        warm_draft(compiled, draft_view(model, mask), progress)


def warm_draft(compiled: CompiledModel, draft: PreTrainedModel, progress: Progress | None = None) -> None:
    """The same for a draft view."""
    with _lock:
        compiled.warm(compiled.pieces.layers_of(draft), [1, compiled.width_for(1 + GUESS)], progress)


def backend_name(compiled: CompiledModel | None) -> str:
    """As mask.json calls it."""
    return "eager" if compiled is None else "compiled"


class _Owner:
    """Somebody to lend buffers to."""
