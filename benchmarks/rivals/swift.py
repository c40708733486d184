"""SWIFT (arXiv 2410.06916, section 4): matchness of one pass over a short context, at a fixed skip ratio.

As published: candidates skip 45 % of the sublayers between the first and the last layer, which are kept; most are
random, every 25th comes from Bayesian optimisation; the score is the share of 32 generated tokens that the draft's
argmax agrees with, in one pass behind the full model's keys of the prompt; it ends after 300 candidates without
improvement, at a matchness of 0.95, or after 1,000. Contexts follow each other as they are generated.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from transformers import DynamicCache

from skipsearch.draft.view import draft_view
from skipsearch.mask import SkipMask
from skipsearch.model.cache import CACHE
from skipsearch.model.target import Target

RATIO, INTERVAL, CONTEXT, PATIENCE, ENOUGH = 0.45, 25, 32, 300, 0.95


@dataclass(frozen=True)
class Window:
    """What was generated last, and the full model's keys and values of what stands before it."""

    before: DynamicCache
    ids: torch.Tensor  # [1, 1 + CONTEXT], the last token before it in front

    @classmethod
    @torch.no_grad()
    def of(cls, target: Target, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> Window:
        cache = DynamicCache(config=target.model.config)
        target.model(input_ids=target.ids(prompt[:-1]), **{CACHE: cache}, use_cache=True)
        return cls(cache, target.ids([prompt[-1], *continuation[:CONTEXT]]))

    @torch.no_grad()
    def matchness(self, target: Target, mask: SkipMask) -> float:
        """Layer 0 is never skipped, so the cache tells the right length."""
        cache = copy.deepcopy(self.before)
        view = draft_view(target.model, mask)
        logits = view(input_ids=self.ids[:, :-1], **{CACHE: cache}, use_cache=True).logits
        return float((logits[0].argmax(-1) == self.ids[0, 1:]).float().mean())


def search(bench: Any, seed: int, evaluations: int) -> Iterator[tuple[int, SkipMask, float]]:
    rng, layers = random.Random(seed), bench.space.num_layers
    free = [(kind, i) for kind, i in bench.space.free if 0 < i < layers - 1]
    count, trace = int(RATIO * len(free)), bench.prepared.trace
    texts = [(p, c) for p, c in zip(trace.prompts, trace.continuations, strict=True) if len(p) > 1 and c]
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
        if number % INTERVAL == 1:  # as decoding goes on, candidates are scored on what was generated last
            window = Window.of(bench.target, *texts[number // INTERVAL % len(texts)])
        match = window.matchness(bench.target, mask)
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
