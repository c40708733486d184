"""SWIFT's search while it serves (arXiv 2410.06916, section 4): a `Tuner` after the paper, in our runtime.

As published: once 32 tokens are generated, each step of decoding tries one candidate on the 32 latest, by matchness in
one pass behind the full model's keys; 45 % of the sublayers between the first and the last layer are skipped; most
candidates are random, every 25th is Bayesian; it ends after 300 without improvement, at 0.95, or after 1,000. Drafts
end below a confidence of 0.8. Not built: the tree of top-k candidates, which belongs to verification, not to search.
"""

from __future__ import annotations

import random
import time
import warnings
from pathlib import Path
from typing import Any

import optuna

from rivals.swift import CONTEXT, ENOUGH, INTERVAL, PATIENCE, RATIO
from skipsearch import SkipMask, draft_view
from skipsearch.decoding.drafter import Draft, Drafter
from skipsearch.decoding.sequences import Sequences
from skipsearch.decoding.stats import Block
from skipsearch.evaluate.draft_replay import DraftReplay
from skipsearch.evaluate.replay import Replay
from skipsearch.evaluate.trace import Trace
from skipsearch.model.target import Target
from skipsearch.policy import DraftPolicy
from skipsearch.search.options import MAX_LENGTH

MOST = 1000


class Swift:
    def __init__(self, target: Target, free: list[Any], seed: int = 0, enough: float = ENOUGH) -> None:
        self.target, self.enough = target, enough
        self.layers = layers = target.num_layers
        self.free = [(kind, i) for kind, i in free if 0 < i < layers - 1]
        self.rng, self.policy = random.Random(seed), DraftPolicy(max_length=MAX_LENGTH, exit_threshold=0.8)
        self.best, self.match, self.tried, self.since = SkipMask(num_layers=layers), 0.0, 0, 0
        self.view: Any = None
        self.searching, self.decoding, self.proposing, self._last = 0.0, 0.0, 0.0, 0.0
        self.space = {f"{kind}.{i}": optuna.distributions.FloatDistribution(0, 1) for kind, i in self.free}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = optuna.create_study(direction="maximize", sampler=optuna.samplers.GPSampler(seed=seed))

    def begin(self, sequences: Sequences, temperature: float) -> Drafter:
        self._last, self.first = time.perf_counter(), sequences.lengths[0]
        sequences.draft_with(self.view)
        return Drafter(sequences, self.policy)

    def after(self, drafter: Drafter, draft: Draft, block: Block, ended: bool) -> None:
        now = time.perf_counter()
        self.decoding += now - self._last
        resting = self.match >= self.enough or self.since >= PATIENCE or self.tried >= MOST
        if not resting and drafter.sequences.lengths[0] - self.first >= CONTEXT:
            self._try(drafter)
        self._last = time.perf_counter()
        self.searching += self._last - now

    def _try(self, drafter: Drafter) -> None:
        self.tried, self.since = self.tried + 1, self.since + 1
        count, trial = int(RATIO * len(self.free)), None
        if self.tried % INTERVAL == 0:
            begun = time.perf_counter()
            trial = self.study.ask(self.space)
            self.proposing += time.perf_counter() - begun
            chosen = sorted(self.free, key=lambda sub: -trial.params[f"{sub[0]}.{sub[1]}"])[:count]
        else:
            chosen = self.rng.sample(self.free, count)
        mask = SkipMask.from_sublayers(chosen, self.layers)
        match = self._matchness(drafter.sequences, mask)
        if trial is not None:
            self.study.tell(trial, match)
        elif self.tried % 5 == 0:  # the process would be slow with all of them
            params = {f"{kind}.{i}": float(mask.skips(kind, i)) for kind, i in self.free}
            self.study.add_trial(optuna.trial.create_trial(params=params, distributions=self.space, value=match))
        if match > self.match:
            self.best, self.match, self.since = mask, match, 0
            self.view = draft_view(self.target.model, mask)
            drafter.change(self.view, self.policy)

    def _matchness(self, sequences: Sequences, mask: SkipMask) -> float:
        text = sequences.ids[0, sequences.offset : sequences.lengths[0]].tolist()
        start = len(text) - CONTEXT
        trace = Trace(prompts=(tuple(text[:start]),), continuations=(tuple(text[start:]),), new_tokens=CONTEXT)
        reference = sequences.cache.keys_and_values(len(text) + 2 * CONTEXT)
        replay = Replay(self.target, trace, CONTEXT, reference=reference)
        correct_SK, _ = DraftReplay(replay, mask).evaluate([(0, start)])
        return float(correct_SK.float().mean())

    @property
    def prepared(self) -> float:
        """Seconds before it serves."""
        return 0.0

    def save(self, path: str | Path, name: str | None = None) -> None:
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        return {
            "searching_s": round(self.searching, 3), "decoding_s": round(self.decoding, 3), "passes": self.tried,
            "of_which_proposing_s": round(self.proposing, 3), "matchness": round(self.match, 3),
            "share": round(self.searching / max(self.decoding, 1e-9), 4),
        }  # fmt: skip
