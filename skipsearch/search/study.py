"""The study: trials in an Optuna storage, so that the dashboard, other storages and many workers just work.

Promises that a finished trial is never lost, that a killed run continues where it stopped, and that
trials of different set-ups never mix. This module and the sampler alone import Optuna.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import sqlalchemy
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from skipsearch.decoding.policy import DraftPolicy
from skipsearch.errors import ResultsError, StudyMismatch
from skipsearch.evaluate.objective import Score
from skipsearch.files import write_text
from skipsearch.mask import SkipMask
from skipsearch.search.sampler import TrustRegionSampler
from skipsearch.search.seeds import Seed
from skipsearch.search.space import Space

optuna.logging.set_verbosity(optuna.logging.ERROR)

HEARTBEAT, GRACE = 5, 15  # seconds: a killed worker's trial is taken up again after the grace period


def make_sampler(name: str, space: Space, seed: int) -> BaseSampler:
    """One of `options.SAMPLERS`."""
    if name == "trust-region":
        return TrustRegionSampler(space.bounds, seed)
    if name == "gp":  # the seeds give the model its first points; random masks at 50 % teach it nothing
        return GPSampler(seed=seed, deterministic_objective=True, n_startup_trials=4)
    if name == "tpe":
        return TPESampler(seed=seed, multivariate=False, constant_liar=True, n_startup_trials=4)
    return NSGAIISampler(seed=seed, population_size=24) if name == "nsga2" else RandomSampler(seed=seed)


def storage_url(folder: Path) -> str:
    """The default storage of a results folder."""
    return f"sqlite:///{(folder / 'study.db').resolve()}"


def open_storage(url: str) -> RDBStorage:
    """An RDB storage with heartbeat; SQLite runs in WAL mode, twelve times faster for our trials.

    Raises:
        ResultsError: the database cannot be opened or is not one.
    """
    try:
        sqlite = url.startswith("sqlite")
        with _experiments_welcome():
            storage = RDBStorage(
                url, heartbeat_interval=HEARTBEAT, grace_period=GRACE,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
                engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else None,
            )  # fmt: skip
        if sqlite:
            sqlalchemy.event.listen(storage.engine, "connect", _write_ahead)
            storage.engine.dispose()  # connections made before the listener know nothing of it
            with storage.engine.connect():
                pass
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ResultsError(
            f"storage {url} cannot be opened ({reason}); choose another with --storage or --out"
        ) from None
    return storage


@contextmanager
def _experiments_welcome() -> Iterator[None]:
    """Optuna marks heartbeats and deterministic objectives as experimental; we know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _write_ahead(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


class Study:
    """Trials of one set-up.

    Args:
        url: an Optuna storage.
        name: of the study.
        space: what a trial may skip.
        identity: everything that scores depend on, by name; stored with the study.
        sampler: one of `options.SAMPLERS`.
        pareto: maximise the acceptance rate and minimise the cost ratio, instead of maximising tokens per second.

    Raises:
        StudyMismatch: the storage holds a study of this name with another identity.
    """

    def __init__(
        self, url: str, name: str, space: Space, identity: dict[str, str], sampler: str, seed: int,
        pareto: bool = False,
    ) -> None:  # fmt: skip
        self.space, self.url, self.pareto = space, url, pareto
        self.distributions: dict[str, optuna.distributions.BaseDistribution] = {
            n: optuna.distributions.IntDistribution(*b) for n, b in space.bounds.items()
        }
        identity = {**identity, "objective": "acceptance rate, cost ratio" if pareto else "tokens per second"}
        with _experiments_welcome():
            self.study = optuna.create_study(
                storage=open_storage(url), study_name=name, load_if_exists=True,
                directions=["maximize", "minimize"] if pareto else ["maximize"],
                sampler=make_sampler(sampler, space, seed),
            )  # fmt: skip
            known = self.study.user_attrs.get("identity")
            if known is None:
                names = ["acceptance rate", "cost ratio"] if pareto else ["tokens per second (predicted)"]
                self.study.set_metric_names(names)
        if known is None:
            self.study.set_user_attr("identity", identity)
        elif different := sorted(k for k in known.keys() | identity.keys() if known.get(k) != identity.get(k)):
            field = different[0]
            raise StudyMismatch(
                f"study {name} was made with another {', '.join(different)} ({field}: {known.get(field)!r} then, "
                f"{identity.get(field)!r} now); run with the old settings, or start anew with --out or --study"
            )
        self._queue: deque[tuple[dict[str, Any], str]] = deque()
        self.memo: dict[SkipMask, tuple[float, ...]] = {self.mask_of(t): tuple(t.values) for t in self.finished()}

    def shared(self, name: str, value: Any) -> Any:
        """What the study has kept by this name; this value, as JSON, if it has none yet."""
        if name not in self.study.user_attrs:
            self.study.set_user_attr(name, value)
        return self.study.user_attrs[name]

    def finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def mask_of(self, trial: FrozenTrial) -> SkipMask:
        return self.space.mask(trial.params)

    def enqueue(self, seeds: list[Seed]) -> None:
        """Put seeds in front of the sampler's own proposals; those already in the study are left out.

        They enter the storage one at a time, when their turn comes: Optuna reads all that wait again for each trial. Of
        two workers, each with its own queue, one leaves out what the other has added.
        """
        self._queue += [(self.space.params(mask), label) for label, mask in seeds]
        # What an interrupted run was working on when it was stopped is worth finishing.
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
            if len(trial.params) == len(self.distributions) and self.mask_of(trial) not in self.memo:
                self._queue.append((trial.params, f"again:{trial.number}"))

    def _propose(self, trials: list[FrozenTrial]) -> None:
        """Add the next trial: a seed, or our own sampler's unless some wait."""
        known = {tuple(t.params.items()) for t in trials if t.state != TrialState.FAIL} if self._queue else set()
        while self._queue:  # whatever waits: it may be another worker's
            params, label = self._queue.popleft()
            if tuple(params.items()) not in known:
                return self._add(params, {"seed": label})
        waiting = any(t.state == TrialState.WAITING for t in trials)
        if isinstance(self.study.sampler, TrustRegionSampler) and not waiting:
            self._add(self.study.sampler.propose(trials), {})

    def _add(self, params: dict[str, Any], attrs: dict[str, str]) -> None:
        """A trial to be run, with all its parameters in one transaction."""
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING, params=params, distributions=self.distributions, user_attrs=attrs
            )
        )

    def optimize(
        self, scorer: Callable[[SkipMask], Score], *, trials: int, time_budget: float | None,
        report: Callable[[int, float], None],
    ) -> None:  # fmt: skip
        """Run until the study holds `trials` finished ones, or `time_budget` seconds are over.

        Args:
            report: told the number of finished trials and the best value after each.
        """

        def objective(trial: optuna.Trial) -> tuple[float, ...]:
            params = {name: trial.suggest_int(name, *bounds) for name, bounds in self.space.bounds.items()}
            mask = self.space.mask(params)
            if mask not in self.memo:  # samplers repeat themselves; replay would only do so too
                result = scorer(mask)
                for key, value in (
                    ("mask", "".join(map(str, mask.bits()))), ("skipped", len(mask)),
                    ("tokens_per_second", round(result.tokens_per_second, 4)),
                    ("acceptance_rate", round(result.acceptance_rate, 4)), ("tau", round(result.tau, 4)),
                    ("cost_ratio", round(result.cost_ratio, 4)), ("speedup_predicted", round(result.speedup, 4)),
                    ("max_length", result.policy.max_length), ("exit_threshold", result.policy.exit_threshold),
                    ("fidelity", result.fidelity),
                ):  # fmt: skip
                    trial.set_user_attr(key, value)
                both = (result.acceptance_rate, result.cost_ratio)
                self.memo[mask] = both if self.pareto else (result.tokens_per_second,)
            return self.memo[mask]

        def after(study: optuna.Study, trial: FrozenTrial) -> None:
            trials_now = self.study.get_trials(deepcopy=False)
            done = [t for t in trials_now if t.state == TrialState.COMPLETE]
            report(len(done), max((t.user_attrs.get("tokens_per_second", 0.0) for t in done), default=0.0))
            if len(done) >= trials:
                study.stop()
            else:
                self._propose(trials_now)

        if len(self.finished()) < trials:
            deadline = None if time_budget is None else max(0.0, time_budget)
            self._propose(self.study.get_trials(deepcopy=False))
            self.study.optimize(objective, timeout=deadline, callbacks=[after])

    def best(self, count: int) -> list[tuple[SkipMask, DraftPolicy, int]]:
        """The best different masks with their policies and trial numbers, best first."""
        scored = [t for t in self.finished() if t.user_attrs.get("fidelity") == "whole"]  # not repeats, nor given up
        found: dict[SkipMask, tuple[SkipMask, DraftPolicy, int]] = {}
        for trial in sorted(scored, key=lambda t: -t.user_attrs["tokens_per_second"]):
            mask = self.mask_of(trial)
            if mask not in found:
                attrs = trial.user_attrs
                policy = DraftPolicy(max_length=attrs["max_length"], exit_threshold=attrs["exit_threshold"])
                found[mask] = (mask, policy, trial.number)
            if len(found) == count:
                break
        return list(found.values())

    def front(self) -> list[dict[str, Any]]:
        """Trials that none other beats in both acceptance rate and cost ratio, cheapest drafts first."""
        rows = [{"trial": t.number, **t.user_attrs} for t in self.finished() if t.user_attrs.get("fidelity") == "whole"]
        rows.sort(key=lambda row: (row["cost_ratio"], -row["acceptance_rate"]))
        kept: list[dict[str, Any]] = []
        for row in rows:
            if not kept or row["acceptance_rate"] > kept[-1]["acceptance_rate"]:
                kept.append(row)
        return kept

    def export_csv(self, path: Path) -> None:
        """All finished trials as a table, written whole or not at all."""
        rows, front = [], {row["trial"] for row in self.front()}
        for t in self.finished():
            seconds = t.duration.total_seconds() if t.duration else None
            rows.append({"trial": t.number, "seconds": seconds, "on_front": t.number in front, **t.user_attrs})
        write_text(path, pd.DataFrame(rows).to_csv(index=False))
