"""SWIFT (arXiv 2410.06916, section 4): matchness of one pass over a short context, at a fixed skip ratio.

As published: candidates skip 45 % of the sublayers, first and last layers kept; most are random, every 25th comes from
Bayesian optimisation; the score is the share of the context's last tokens that the draft's argmax agrees with; it ends
after 300 candidates without improvement, or at a matchness of 0.98. Contexts follow each other as they are generated.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import optuna
import torch

from skipsearch.mask import SkipMask
from skipsearch.model.view import draft_view

RATIO, INTERVAL, CONTEXT, PATIENCE, ENOUGH = 0.45, 25, 32, 300, 0.98


@torch.no_grad()
def matchness(bench: Any, mask: SkipMask, number: int) -> float:
    trace = bench.prepared.trace
    prompt, continuation = trace.prompts[number % len(trace.prompts)], trace.continuations[number % len(trace.prompts)]
    ids = torch.tensor([prompt + continuation[:CONTEXT]], device=bench.model.device)
    said = draft_view(bench.model, mask)(input_ids=ids[:, :-1], use_cache=False).logits[0].argmax(-1)
    kept = min(CONTEXT, len(continuation))
    return float((said[-kept:] == ids[0, -kept:]).float().mean())


def search(bench: Any, seed: int, evaluations: int) -> Iterator[tuple[int, SkipMask, float]]:
    rng, layers = random.Random(seed), bench.space.num_layers
    free = [(kind, i) for kind, i in bench.space.free if 0 < i < layers - 1]
    count = round(RATIO * 2 * layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.GPSampler(seed=seed))
    ask = {f"{kind}.{i}": optuna.distributions.FloatDistribution(0, 1) for kind, i in free}
    best, best_match, since = SkipMask(num_layers=layers), 0.0, 0
    for number in range(1, evaluations + 1):
        trial = None
        if number % INTERVAL == 0:
            trial = study.ask(ask)
            chosen = sorted(free, key=lambda sub: -trial.params[f"{sub[0]}.{sub[1]}"])[:count]  # type: ignore[union-attr]
        else:
            chosen = rng.sample(free, count)
        mask = SkipMask.from_sublayers(chosen, layers)
        context = number // INTERVAL  # as decoding goes on, candidates are scored on what was generated last
        match = matchness(bench, mask, context)
        params = {f"{kind}.{i}": float(mask.skips(kind, i)) for kind, i in free}
        if trial is not None:
            study.tell(trial, match)
        elif number % 5 == 0:  # the process would be slow with all of them
            study.add_trial(optuna.trial.create_trial(params=params, distributions=ask, value=match))
        since += 1
        if match > best_match:
            best, best_match, since = mask, match, 0
        yield number, best, best_match
        if since >= PATIENCE or best_match >= ENOUGH:
            return
