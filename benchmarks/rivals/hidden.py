"""CLaSp (arXiv 2505.24196) and KnapSpec (arXiv 2602.20217): dynamic programming over hidden states, no evaluations.

CLaSp skips half of the layers, whole, such that the hidden states stay nearest the full model's; here the mean over
many tokens of one pass, where the paper takes the last verified token alone and searches anew while it decodes.
KnapSpec solves a knapsack of sublayers, measured seconds against the loss of cosine similarity, and takes the budget
whose cosine, read as the acceptance rate, promises most tokens a second. Hidden states come from passes over whole
sequences, so that a skipped layer's harm reaches later tokens through the keys as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from skipsearch.draft.view import draft_view
from skipsearch.evaluate.cost import draft_step
from skipsearch.evaluate.hidden_states import layer_states
from skipsearch.evaluate.objective import score
from skipsearch.evaluate.windows import WindowReplay
from skipsearch.mask import KINDS, SkipMask
from skipsearch.online.candidates import Candidates, nearest_masks
from skipsearch.online.live_costs import LiveCosts
from skipsearch.plan import DraftPlan
from skipsearch.search.seeds import knapsack, nearest_states
from skipsearch.search.sensitivity import Loss

PROMPTS, TOKENS = 8, 36
BUDGETS = [level / 64 for level in range(1, 64)]  # of all harm


def clasp(bench: Any, seed: int, evaluations: int) -> Iterator[tuple[int, SkipMask, float]]:
    part = bench.prepared.trace.head(PROMPTS, TOKENS)
    states = layer_states(bench.target, *part.padded(bench.target.device))
    ((_, plan),) = nearest_states(bench.space, states, shares=(1 / 2,))
    yield 1, plan.skip, 0.0


def by_sublayers(bench: Any, seed: int, evaluations: int) -> Iterator[tuple[int, SkipMask, float]]:
    """The same with sublayers in place of layers, as we begin with while serving: the best share by our objective."""
    layers, views = bench.space.num_layers, LiveCosts(bench.target).views
    ids, seen = bench.prepared.trace.head(PROMPTS, TOKENS).padded(bench.target.device)
    near = nearest_masks(bench.target, [views[kind] for kind in KINDS], ids, seen)
    best, top = SkipMask(num_layers=layers), 0.0
    for number, chosen in enumerate(Candidates(layers, near, seed).first(), 1):
        mask = bench.space.plan_within(DraftPlan(chosen)).skip
        speed = score(WindowReplay(bench.prepared.windows, mask), bench.prepared.point).tokens_per_second
        if speed > top:
            best, top = mask, speed
        yield number, best, top


@torch.no_grad()
def last_states(model: Any, path: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [P, T, V] of a model or a view of it, and what its last layer gives [P, T, H]."""
    found: list[torch.Tensor] = []
    last = model.get_submodule(path)[-1]
    hook = last.register_forward_hook(lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out))
    try:
        return model(input_ids=ids, use_cache=False).logits, found[0]
    finally:
        hook.remove()


def knapspec(bench: Any, seed: int, evaluations: int) -> Iterator[tuple[int, SkipMask, float]]:
    part, point = bench.prepared.trace.head(PROMPTS, TOKENS), bench.prepared.point
    ids, generated = part.padded(bench.target.device)
    states = layer_states(bench.target, ids, generated)
    path = bench.target.sublayers.path

    def cosine(mask: SkipMask) -> float:
        return states.cosine(last_states(draft_view(bench.target.model, mask), path, ids)[1], states.hidden[-1])

    layers = bench.space.num_layers
    loss: Loss = {"skip": {sub: 1 - cosine(SkipMask.from_sublayers([sub], layers)) for sub in bench.space.free}}
    best, best_rate = SkipMask(num_layers=layers), 0.0
    for number, (_, plan) in enumerate(knapsack(bench.space, loss, point, BUDGETS), 1):
        mask = plan.skip
        accept = min(0.999, max(0.0, cosine(mask)))
        step = draft_step(point, mask, exit_check=False)
        rate = max(
            (1 - accept ** (k + 1)) / (1 - accept) / (k * step + point.verify[k]) for k in range(1, len(point.verify))
        )  # fmt: skip
        if rate > best_rate and math.isfinite(rate):
            best, best_rate = mask, rate
        yield number, best, best_rate
