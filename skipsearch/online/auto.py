"""The public `self_speculative`: with a mask, or with "auto", which finds its masks while it serves."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from skipsearch.decoding import generate
from skipsearch.decoding.backend import Progress, warm_mask
from skipsearch.decoding.compiled import CompiledModel
from skipsearch.decoding.generate import SelfSpeculative
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.sequences import Sequences
from skipsearch.errors import BackendWarning, DecodingError
from skipsearch.mask import KINDS, SkipMask
from skipsearch.maskfile import MaskFile
from skipsearch.model.sublayers import find_sublayers, input_device
from skipsearch.online.tuner import SHARE, OnTheFly
from skipsearch.search.options import NGRAM
from skipsearch.search.replay import Replay
from skipsearch.search.trace import Trace

TRIED_WITH = 24  # tokens that show whether drafts may be scored side by side
PRICED_AT, PRICED, ROOM = 128, 3, 64  # tokens behind which steps are timed, how often, and places behind them


def self_speculative(
    mask_or_path: SkipMask | MaskFile | str | Path | None, *, start: SkipMask | MaskFile | str | Path | None = None,
    share: float | None = None, seed: int = 0, **settings: Any,
) -> SelfSpeculative:  # fmt: skip
    """A decoding method for `model.generate(..., custom_generate=...)`.

    Args:
        mask_or_path: a mask, a mask file or its path; None decodes plainly in the same loop; "auto" finds masks while
            it serves single sequences, from what it generates (`OnTheFly`); keep the object for the whole stream. With
            sampling the output has the target's distribution, but the clock has a say in it beside the seed.
        start: with "auto", what to draft with until something better is found.
        share: with "auto", of decoding's seconds that the search may take; 0.05.
        seed: with "auto", of what is random in the search.
        settings: see `skipsearch.decoding.generate.self_speculative`. "auto" proposes n-grams as well, falls back to
            plain steps where nothing pays, and runs compiled where it can, unless they say otherwise.

    Raises:
        MaskError: the file or the policy is malformed.
        DecodingError: share is not between 0 and 1, or start is given without "auto".
    """
    if mask_or_path != "auto":
        if start is not None:
            raise DecodingError(f"start is {start!r}, which goes with 'auto' alone; pass it as the first argument")
        if share is not None:
            raise DecodingError(f"share is {share}, which goes with 'auto' alone; leave it out")
        return generate.self_speculative(mask_or_path, **settings)
    share = SHARE if share is None else share
    if not 0 <= share < 1:
        raise DecodingError(f"share is {share}, must be at least 0 and below 1; try 0.05")

    def tune(
        model: PreTrainedModel, compiled: CompiledModel | None, policy: DraftPolicy, mask: SkipMask | None,
        progress: Progress | None,
    ) -> OnTheFly:  # fmt: skip
        return _tuner(model, compiled, policy, mask, progress, share, seed)

    chosen: dict[str, Any] = settings
    if settings.get("decoding", "lossless") == "lossless":
        chosen = {"ngram": NGRAM, "never_slower": True, "backend": "compiled", **settings}
    return generate.self_speculative(start, tune=tune, **chosen)


def _tuner(
    model: PreTrainedModel, compiled: CompiledModel | None, policy: DraftPolicy, mask: SkipMask | None,
    progress: Progress | None, share: float, seed: int,
) -> OnTheFly:  # fmt: skip
    layers = find_sublayers(model).num_layers
    for half in KINDS:  # whatever is found later compiles nothing more
        warm_mask(compiled, model, SkipMask(**{half: range(layers)}, num_layers=layers), progress)  # type: ignore[arg-type]
    begun = time.perf_counter()
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(vocabulary, (1, PRICED_AT), generator=torch.Generator().manual_seed(0))
    ids, half_way = prompt[0, :TRIED_WITH].tolist(), TRIED_WITH // 2
    trial = Trace(prompts=(tuple(ids[:half_way]),), continuations=(tuple(ids[half_way:]),), new_tokens=half_way)
    if not Replay(model, trial).together:
        warnings.warn(
            f"{type(model).__name__} cannot score drafts side by side, so no mask is searched while it serves",
            BackendWarning, stacklevel=2,
        )  # fmt: skip
        share = 0.0
    free = [(kind, i) for i in range(layers) for kind in KINDS]
    tuner = OnTheFly(model, free, layers, policy, mask, share, seed)
    prompt = prompt[:, : max(1, tuner.context - ROOM)].to(input_device(model))
    sequences = Sequences(model, prompt, capacity=prompt.shape[1] + ROOM, compiled=compiled)
    for _ in range(PRICED if share else 0):
        sequences.verify([0])
        tuner.measure(sequences)
    tuner.prepared = time.perf_counter() - begun
    return tuner
