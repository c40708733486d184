"""Which backend serves a model: compiled pieces where they are proven to agree with the model, else eager."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from skipsearch.compiled.model import GUESS, CompiledModel
from skipsearch.draft.view import draft_view
from skipsearch.errors import BackendError, BackendWarning
from skipsearch.mask import SkipMask
from skipsearch.model.cache import CACHE
from skipsearch.model.state import ModelState
from skipsearch.model.target import Target
from skipsearch.model.turns import one_at_a_time
from skipsearch.plan import DraftPlan

Backend = Literal["auto", "eager", "compiled"]
Progress = Callable[[str, int, int], None]  # told a stage, steps done, steps in all
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}  # of the largest logit

# Per model: the state of its weights, and for states of its code the compiled model, or the reason why there is none.
Found = CompiledModel | str
_known: weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, dict[int, Found]]] = weakref.WeakKeyDictionary()
KEPT = 4  # states of code
_log = logging.getLogger(__name__)


def with_backend(target: Target, backend: Backend, progress: Progress | None = None) -> Target:
    """The target with what runs its forwards: compiled, or eager where it cannot be.

    The first call compiles, or reads what was compiled before from the disk, and compares with the model.
    Later calls with the same model object are cheap; a model that was moved or changed is compiled again.

    Args:
        backend: "auto" and "compiled" compile where possible; where not, one warning says why.
        progress: told (stage, done, total).

    Raises:
        BackendError: `backend` is none of the three.
    """
    if backend not in ("auto", "eager", "compiled"):
        raise BackendError(f"backend is {backend!r}, must be auto, eager or compiled")
    if backend == "eager":
        return replace(target, compiled=None)
    with torch.inference_mode(False), torch.no_grad():  # what is made here serves later calls in any mode
        return replace(target, compiled=_compiled_for(target, progress))


def _compiled_for(target: Target, progress: Progress | None) -> CompiledModel | None:
    """What was compiled for the model as it is now, or None after a warning that says why nothing is."""
    model, state = target.model, ModelState.of(target.model)
    with one_at_a_time:
        weights, by_code = _known.get(model, (state.weights, {}))
        if weights != state.weights:
            by_code = {}  # what was compiled with other weights holds them in memory
        found = by_code.get(state.code)
        if isinstance(found, str):
            return None
        try:
            if state.foreign is not None:
                raise BackendError(f"{state.foreign}, which compiled code would not call; take it off to compile")
            if found is None or not found.fits():
                found = compile_and_prove(target, progress)
            else:
                found.warm(found.stack_of(model), widths_of(found), progress)
        except Exception as error:
            # Tracer and compiler raise anything for a model they do not know; eager decoding always works.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            why = (
                lines[0]
                if isinstance(error, BackendError)
                else f"compiling failed ({type(error).__name__}: {lines[0]})"
            )
            found = why[:300]
            warnings.warn(f"decoding eagerly: {found}", BackendWarning, stacklevel=3)
        others = [(code, known) for code, known in by_code.items() if code != state.code]
        kept = [*others[1 - KEPT :], (state.code, found)]  # what was used last is last
        _known[model] = state.weights, dict(kept)
        return None if isinstance(found, str) else found


def widths_of(compiled: CompiledModel) -> list[int]:
    """Every width, the prefill's first: what is left of a prompt may be of any length."""
    return [compiled.chunk, *compiled.widths]


class _Check:
    """Owns the buffers of the check below until it returns."""


@torch.no_grad()
def compile_and_prove(target: Target, progress: Progress | None) -> CompiledModel:
    """Compile the model's pieces and compare logits with its own: a full forward, then single and several tokens.

    Raises:
        BackendError: the logits differ by more than rounding, or the model or machine cannot.
    """
    if progress is None:  # no progress is shown, so log at least the start
        _log.warning("compiling for this machine: about a minute at the first use, then read from the disk")
    compiled = CompiledModel(target)
    stack = compiled.stack_of(target.model)
    compiled.warm(stack, widths_of(compiled), progress)
    length = min(compiled.chunk + 9, target.context)
    ids, cache = target.random_ids(length), DynamicCache(config=target.model.config)
    expected = target.model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits[0]
    owner = _Check()
    buffers = compiled.acquire(length, owner)
    buffers.ids[:, :length] = ids
    buffers.positions.copy_(torch.arange(len(buffers.positions)).clamp(max=length - 1))
    at, got = 0, []
    for tokens in (min(compiled.chunk, length - 3), 1, length):
        tokens = min(tokens, length - at)
        scores = compiled.forward(stack, buffers, at, at, tokens, keep_last=tokens == compiled.chunk)
        got.append((at + tokens - 1, scores.logits[0, min(tokens, scores.top.shape[1]) - 1].clone()))
        at += tokens
    for place, logits in got:
        error = float((logits - expected[place]).abs().max() / expected[place].abs().max())
        if not error < TOLERANCE.get(target.dtype, 0.1):
            raise BackendError(f"compiled logits differ from the model's by {error:.2g} of the largest")
    compiled.choose_widths(stack, buffers)
    return compiled


def warm_plan(target: Target, plan: SkipMask | DraftPlan, progress: Progress | None = None) -> None:
    """Compile what drafting with a plan needs: one layer of each combination of forms, and the head."""
    if target.compiled is not None:
        warm_draft(target, draft_view(target.model, plan), progress)


def warm_draft(target: Target, draft: PreTrainedModel, progress: Progress | None = None) -> None:
    """The same for a draft view."""
    if target.compiled is not None:
        compiled = cast(CompiledModel, target.compiled)
        with one_at_a_time, torch.inference_mode(False), torch.no_grad():
            stack = compiled.stack_of(draft)
            widths = {compiled.width_for(n, stack) for n in (1, 1 + GUESS)[: 1 + compiled.guesses(stack)]}
            compiled.warm(stack, sorted(widths), progress)
