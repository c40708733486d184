"""The study: trials in an Optuna storage, which the dashboard reads and several workers can share.

A finished trial is never lost, and trials of different set-ups never mix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from skipsearch.evaluate.objective import Score
from skipsearch.files import write_text
from skipsearch.model.space import Space
from skipsearch.plan import DraftPlan
from skipsearch.search.attributes import backend, sealed, set_once
from skipsearch.search.integrity import CHECK, check_trials, kept, tells_damage
from skipsearch.search.sampler import TrustRegionSampler
from skipsearch.search.seeds import Seed
from skipsearch.search.storage import EXPERIMENTAL, must_agree, open_storage
from skipsearch.search.worker import Params, Scored, Worker

optuna.logging.set_verbosity(optuna.logging.ERROR)
STAGES = "stages"  # the user attribute of a trial: the stages of its score


def make_sampler(name: str, space: Space, seed: int, counted: int = 0, salt: Sequence[int] = ()) -> BaseSampler:
    """One of `options.SAMPLERS`, for the trial behind so many: an interrupted study goes on as if it had not been."""
    if name == "trust-region":  # counts by itself
        return TrustRegionSampler(space.bounds, seed)
    seed = int(np.random.SeedSequence((seed, counted, *salt)).generate_state(1)[0])
    with warnings.catch_warnings(action="ignore", category=EXPERIMENTAL):
        if name == "gp":  # its first points are the seeds: random masks, with half of the bits set, are useless
            return GPSampler(seed=seed, deterministic_objective=True, n_startup_trials=4)
        if name == "tpe":
            return TPESampler(seed=seed, multivariate=False, constant_liar=True, n_startup_trials=4)
        return NSGAIISampler(seed=seed, population_size=24) if name == "nsga2" else RandomSampler(seed=seed)


def columns_of(trial: FrozenTrial) -> dict[str, Any]:
    """What a table shows of a trial."""
    return {name: value for name, value in trial.user_attrs.items() if name not in (STAGES, CHECK)}


class Study:
    """Trials of one set-up.

    Args:
        url: an Optuna storage.
        name: of the study.
        space: what a trial may propose.
        identity: everything that scores depend on, by name; stored with the study.
        sampler: one of `options.SAMPLERS`.
        seed: of the sampler.
        pareto: maximise the acceptance rate and minimise the cost ratio, instead of maximising tokens per second.

    Raises:
        StudyMismatch: the storage holds a study of this name with another identity.
        ResultsError: see `open_storage`; or the study is damaged.
    """

    @tells_damage
    def __init__(
        self, url: str, name: str, space: Space, identity: dict[str, str], sampler: str, seed: int,
        pareto: bool = False,
    ) -> None:  # fmt: skip
        self.pareto = pareto
        identity = {**identity, "objective": "acceptance rate, cost ratio" if pareto else "tokens per second"}
        with warnings.catch_warnings(action="ignore", category=EXPERIMENTAL):
            self.study = optuna.create_study(
                storage=open_storage(url), study_name=name, load_if_exists=True,
                directions=["maximize", "minimize"] if pareto else ["maximize"],
            )  # fmt: skip
            names = ["acceptance rate", "cost ratio"] if pareto else ["tokens per second (predicted)"]
            if self.study.metric_names is None:
                self.study.set_metric_names(names)
        known = self.shared("identity", identity)
        must_agree(name, known, identity, known.keys() | identity.keys())
        self.space = space.chosen_as(self.shared("space", space.choice()))
        bounds = self.space.bounds.items()
        self.distributions: dict[str, BaseDistribution] = {name: IntDistribution(*pair) for name, pair in bounds}
        self._worker = Worker(
            self.study, self.distributions, self.space.size,
            lambda counted, salt: make_sampler(sampler, self.space, seed, counted, salt),
        )  # fmt: skip
        check_trials(self.study, self.space.bounds)
        self.memo: dict[DraftPlan, tuple[float, ...]] = {self.plan_of(t): tuple(t.values) for t in self.finished()}

    def shared(self, name: str, value: Any) -> Any:
        """The value stored with the study under this name. If there is none yet, `value` is stored, as JSON.

        Of several workers that come at once, one is the first, and all get its value.
        """
        if self.known(name) is None:
            set_once(self.study, name, value)
        return self.known(name)

    def store(self, name: str, value: Any) -> None:
        """Store a value that studies of earlier versions do not have, unless there is one."""
        if name not in self.study.user_attrs:
            set_once(self.study, name, value)

    def known(self, name: str) -> Any:
        """The value stored with the study under this name; None if there is none yet."""
        return kept(self.study, name)

    @property
    def used_up(self) -> bool:
        """Whether all parameters of the space were tried."""
        return len({tuple(sorted(t.params.items())) for t in self.finished()}) >= self.space.size

    def finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def plan_of(self, trial: FrozenTrial) -> DraftPlan:
        return self.space.plan(trial.params)

    def queue(self, seeds: Iterable[tuple[Params, str]]) -> None:
        """Try seeds, as parameters with names, before the sampler's proposals.

        Each worker has its own queue, and leaves out what it or another worker has added to the storage.
        """
        self._worker.queue += seeds

    def origin(self, trial: int) -> str:
        """Where a trial's plan came from: a seed's name, or that the sampler proposed it."""
        seed = self.study.get_trials(deepcopy=False)[trial].user_attrs.get("seed")
        return f"the seed '{seed}'" if seed else f"trial {trial}, which the sampler proposed"

    def enqueue(self, seeds: list[Seed]) -> None:
        """`queue` of plans with names."""
        self.queue((self.space.params(plan), label) for label, plan in seeds)

    def replace(self, name: str, value: Any) -> None:
        """Store a small value with the study in place of an earlier one."""
        self.study.set_user_attr(name, sealed(value))

    @property
    def waited(self) -> float:
        """Seconds for which the storage did not answer."""
        return float(backend(self.study).patience.seconds)

    def stages(self) -> list[tuple[float, ...]]:
        """Stages of the scores so far, for another scorer."""
        return [tuple(t.user_attrs[STAGES]) for t in self.finished() if t.user_attrs.get(STAGES)]

    def optimize(
        self, scorer: Callable[[DraftPlan], Score], *, trials: int, time_budget: float | None,
        report: Callable[[int, float], None],
    ) -> int:  # fmt: skip
        """Run trials until `trials` are finished in the study, or `time_budget` seconds have passed.

        Args:
            scorer: gives the score of a plan.
            report: called with the number of finished trials, of all workers, and the most tokens per second so far.

        Returns:
            How many trials this process has finished.
        """

        def score(params: Params) -> Scored:
            plan, attributes = self.space.plan(params), dict[str, Any]()
            if plan not in self.memo:  # samplers propose some plans again; their score is known
                found = scorer(plan)
                attributes = {
                    **plan.columns(),
                    "tokens_per_second": round(found.tokens_per_second, 4),
                    "acceptance_rate": round(found.acceptance_rate, 4), "tau": round(found.tau, 4),
                    "cost_ratio": round(found.cost_ratio, 4), "speedup_predicted": round(found.speedup, 4),
                    "max_length": found.policy.max_length, "exit_threshold": found.policy.exit_threshold,
                    "fidelity": found.fidelity, STAGES: found.stages,
                }  # fmt: skip
                both = (found.acceptance_rate, found.cost_ratio)
                self.memo[plan] = both if self.pareto else (found.tokens_per_second,)
            return self.memo[plan], attributes

        def after(done: Sequence[FrozenTrial]) -> None:
            report(len(done), max((t.user_attrs.get("tokens_per_second", 0.0) for t in done), default=0.0))

        return self._worker.run(score, trials=trials, seconds=time_budget, report=after)

    def _scored(self) -> list[FrozenTrial]:
        """Finished trials that were scored on the whole trace: not repeated plans, not aborted scores."""
        return [t for t in self.finished() if t.user_attrs.get("fidelity") == "whole"]

    def best(self, count: int) -> list[tuple[DraftPlan, int]]:
        """The best different plans with their trial numbers, best first; the empty one only if there is no other."""
        found: dict[DraftPlan, int] = {}
        for trial in sorted(self._scored(), key=lambda t: -t.user_attrs["tokens_per_second"]):
            found.setdefault(self.plan_of(trial), trial.number)
        if len(found) > 1:
            found = {plan: number for plan, number in found.items() if plan.drafts}
        return list(found.items())[:count]

    def front(self) -> list[dict[str, Any]]:
        """Trials that no other trial beats in both acceptance rate and cost ratio, by rising cost ratio."""
        rows = [{"trial": t.number, **columns_of(t)} for t in self._scored()]
        rows.sort(key=lambda row: (row["cost_ratio"], -row["acceptance_rate"]))
        kept: list[dict[str, Any]] = []
        for row in rows:
            if not kept or row["acceptance_rate"] > kept[-1]["acceptance_rate"]:
                kept.append(row)
        return kept

    def export_csv(self, path: Path) -> None:
        """Write all finished trials as a CSV table, atomically."""
        rows, front = [], {row["trial"] for row in self.front()}
        for t in self.finished():
            rows.append({"trial": t.number, "on_front": t.number in front, **columns_of(t)})
        write_text(path, pd.DataFrame(rows).to_csv(index=False))
