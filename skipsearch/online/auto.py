"""A model's tuner, ready: compiled, tried for scoring drafts side by side, and with prices of its own."""

from __future__ import annotations

import time
import warnings

import torch
from transformers import PreTrainedModel

from skipsearch.compiled.backend import Progress, warm_mask
from skipsearch.compiled.model import CompiledModel
from skipsearch.decoding.policy import DraftPolicy
from skipsearch.decoding.sequences import Sequences
from skipsearch.errors import BackendWarning
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.trace import Trace
from skipsearch.mask import KINDS, SkipMask
from skipsearch.model.sublayers import find_sublayers, input_device
from skipsearch.online.tuner import OnTheFly

TRIED_WITH = 24  # tokens that show whether drafts may be scored side by side
PRICED_AT, PRICED, ROOM = 128, 3, 64  # tokens behind which steps are timed, how often, and places behind them


def make_tuner(
    model: PreTrainedModel, compiled: CompiledModel | None, policy: DraftPolicy, mask: SkipMask | None,
    progress: Progress | None, *, share: float, seed: int,
) -> OnTheFly:  # fmt: skip
    """A tuner that has priced the steps of this model, and compiled what any mask may need.

    Where drafts cannot be scored side by side it searches nothing, and a warning says so.
    """
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
