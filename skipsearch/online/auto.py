"""A model's tuner, ready to serve: compiled, tried for scoring drafts side by side, and with measured costs."""

from __future__ import annotations

import time
import warnings

from skipsearch.compiled.backend import Progress, warm_plan
from skipsearch.decoding.sequences import Sequences
from skipsearch.errors import BackendWarning
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.trace import Trace
from skipsearch.generate.drafting import Drafting
from skipsearch.mask import KINDS, SkipMask
from skipsearch.model.target import Target
from skipsearch.online.tuner import OnTheFly
from skipsearch.plan import DraftPlan

TRIED_WITH = 24  # tokens that show whether drafts can be scored side by side
TIMED_AT, TIMES, ROOM = 128, 3, 64  # context at which steps are timed, how often, and places behind it


def make_tuner(
    target: Target, drafting: Drafting, progress: Progress | None, *, share: float, seed: int
) -> OnTheFly:  # fmt: skip
    """A tuner that has timed the steps of this model, and compiled what any mask may need.

    Where drafts cannot be scored side by side it searches nothing, and a warning says so.
    """
    layers = target.num_layers
    for kind in KINDS:  # masks that are found later compile nothing more
        warm_plan(target, SkipMask.from_sublayers([(kind, i) for i in range(layers)], layers), progress)
    begun = time.perf_counter()
    prompt = target.random_ids(TIMED_AT)
    ids, half = tuple(prompt[0, :TRIED_WITH].tolist()), TRIED_WITH // 2
    if not Replay(target, Trace(prompts=(ids[:half],), continuations=(ids[half:],), new_tokens=half)).together:
        warnings.warn(
            f"{type(target.model).__name__} cannot score drafts side by side, so no mask is searched while it serves",
            BackendWarning, stacklevel=2,
        )  # fmt: skip
        share = 0.0
    mask = None if drafting.plan is None else DraftPlan.of(drafting.plan).skip
    tuner = OnTheFly(target, drafting.policy, mask, share, seed)
    prompt = prompt[:, : max(1, target.context - ROOM)]
    sequences = Sequences(target, prompt, capacity=prompt.shape[1] + ROOM)
    for _ in range(TIMES if share else 0):
        sequences.verify([0])
        tuner.measure(sequences)
    tuner.prepared = time.perf_counter() - begun
    return tuner
