"""The study: trials in an Optuna storage, which the dashboard reads and several workers can share.

A finished trial is never lost, and trials of different set-ups never mix. The sampler alone imports Optuna beside this.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from skipsearch.errors import StudyMismatch
from skipsearch.evaluate.objective import Score
from skipsearch.files import write_text
from skipsearch.model.space import Space
from skipsearch.plan import DraftPlan
from skipsearch.search.integrity import CHECK, check_trials, keep, kept, sum_of, tells_damage
from skipsearch.search.sampler import TrustRegionSampler
from skipsearch.search.seeds import Seed
from skipsearch.search.storage import EXPERIMENTAL, open_storage

optuna.logging.set_verbosity(optuna.logging.ERROR)


def make_sampler(name: str, space: Space, seed: int) -> BaseSampler:
    """One of `options.SAMPLERS`."""
    if name == "trust-region":
        return TrustRegionSampler(space.bounds, seed)
    if name == "gp":  # its first points are the seeds: random masks, with half of the bits set, are useless
        return GPSampler(seed=seed, deterministic_objective=True, n_startup_trials=4)
    if name == "tpe":
        return TPESampler(seed=seed, multivariate=False, constant_liar=True, n_startup_trials=4)
    return NSGAIISampler(seed=seed, population_size=24) if name == "nsga2" else RandomSampler(seed=seed)


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
            known = kept(self.study, "identity")
            if known is None:
                names = ["acceptance rate", "cost ratio"] if pareto else ["tokens per second (predicted)"]
                self.study.set_metric_names(names)
        if known is None:
            keep(self.study, "identity", identity)
        elif different := sorted(k for k in known.keys() | identity.keys() if known.get(k) != identity.get(k)):
            field = different[0]
            raise StudyMismatch(
                f"study {name} was made with another {', '.join(different)} ({field}: {known.get(field)!r} then, "
                f"{identity.get(field)!r} now); run with the old settings, or start a new study with --out or --study"
            )
        self.space = space.chosen_as(self.shared("space", space.choice()))
        bounds = self.space.bounds.items()
        self.distributions: dict[str, BaseDistribution] = {name: IntDistribution(*pair) for name, pair in bounds}
        with warnings.catch_warnings(action="ignore", category=EXPERIMENTAL):
            self.study.sampler = make_sampler(sampler, self.space, seed)
        self._queue: deque[tuple[dict[str, Any], str]] = deque()
        check_trials(self.study, self.space.bounds)
        self.memo: dict[DraftPlan, tuple[float, ...]] = {self.plan_of(t): tuple(t.values) for t in self.finished()}

    def shared(self, name: str, value: Any) -> Any:
        """The value stored with the study under this name. If there is none yet, `value` is stored, as JSON."""
        if self.known(name) is None:
            keep(self.study, name, value)
        return self.known(name)

    def known(self, name: str) -> Any:
        """The value stored with the study under this name; None if there is none yet."""
        return kept(self.study, name)

    @property
    def used_up(self) -> bool:
        """Whether every plan of the space was tried."""
        return len(self.memo) >= self.space.size

    def finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def plan_of(self, trial: FrozenTrial) -> DraftPlan:
        return self.space.plan(trial.params)

    def enqueue(self, seeds: list[Seed]) -> None:
        """Try seeds before the sampler's proposals. Seeds that are already in the study are not tried again.

        The queue is here and not in the storage, because Optuna reads all waiting trials again for each trial. Each
        worker has its own queue, and leaves out what another worker has added to the storage.
        """
        self._queue += [(self.space.params(plan), label) for label, plan in seeds]
        # The trials that an interrupted run did not finish.
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
            if len(trial.params) == len(self.distributions) and self.plan_of(trial) not in self.memo:
                self._queue.append((trial.params, f"again:{trial.number}"))

    def _propose(self, trials: list[FrozenTrial]) -> None:
        """Add the next trial to the storage: a seed, or a proposal of our own sampler if no trial is waiting."""
        known = {tuple(t.params.items()) for t in trials if t.state != TrialState.FAIL} if self._queue else set()
        while self._queue:  # even if a trial is waiting: it may belong to another worker
            params, label = self._queue.popleft()
            if tuple(params.items()) not in known:
                return self._add(params, {"seed": label})
        waiting = any(t.state == TrialState.WAITING for t in trials)
        if isinstance(self.study.sampler, TrustRegionSampler) and not waiting:
            self._add(self.study.sampler.propose(trials), {})

    def _add(self, params: dict[str, Any], attrs: dict[str, str]) -> None:
        """Add a waiting trial with all its parameters, in one transaction."""
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING, params=params, distributions=self.distributions, user_attrs=attrs
            )
        )

    def optimize(
        self, scorer: Callable[[DraftPlan], Score], *, trials: int, time_budget: float | None,
        report: Callable[[int, float], None],
    ) -> None:  # fmt: skip
        """Run trials until `trials` are finished in the study, or `time_budget` seconds have passed.

        Args:
            scorer: gives the score of a plan.
            report: called after each trial with the number of finished trials and the most tokens per second so far.
        """

        def objective(trial: optuna.Trial) -> tuple[float, ...]:
            params = {name: trial.suggest_int(name, *bounds) for name, bounds in self.space.bounds.items()}
            plan = self.space.plan(params)
            if plan not in self.memo:  # samplers propose some plans again; their score is known
                result = scorer(plan)
                for key, value in (
                    *plan.columns().items(),
                    ("tokens_per_second", round(result.tokens_per_second, 4)),
                    ("acceptance_rate", round(result.acceptance_rate, 4)), ("tau", round(result.tau, 4)),
                    ("cost_ratio", round(result.cost_ratio, 4)), ("speedup_predicted", round(result.speedup, 4)),
                    ("max_length", result.policy.max_length), ("exit_threshold", result.policy.exit_threshold),
                    ("fidelity", result.fidelity),
                ):  # fmt: skip
                    trial.set_user_attr(key, value)
                both = (result.acceptance_rate, result.cost_ratio)
                self.memo[plan] = both if self.pareto else (result.tokens_per_second,)
            trial.set_user_attr(CHECK, sum_of(trial, self.memo[plan]))
            return self.memo[plan]

        def after(study: optuna.Study, trial: FrozenTrial) -> None:
            trials_now = self.study.get_trials(deepcopy=False)
            done = [t for t in trials_now if t.state == TrialState.COMPLETE]
            report(len(done), max((t.user_attrs.get("tokens_per_second", 0.0) for t in done), default=0.0))
            if len(done) >= trials or self.used_up:
                study.stop()
            else:
                self._propose(trials_now)

        if len(self.finished()) < trials and not self.used_up:
            self._propose(self.study.get_trials(deepcopy=False))
            self.study.optimize(objective, timeout=time_budget, callbacks=[after])

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
        rows = [{"trial": t.number, **_shown(t)} for t in self._scored()]
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
            took = t.duration.total_seconds() if t.duration else None
            rows.append({"trial": t.number, "seconds": took, "on_front": t.number in front, **_shown(t)})
        write_text(path, pd.DataFrame(rows).to_csv(index=False))


def _shown(trial: FrozenTrial) -> dict[str, Any]:
    return {name: value for name, value in trial.user_attrs.items() if name != CHECK}
