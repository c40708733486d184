"""The study: trials in an Optuna storage, so that the dashboard, other storages and many workers just work.

Promises that a finished trial is never lost, that a killed run continues where it stopped, and that
trials of different set-ups never mix. The only module that imports Optuna.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import sqlalchemy
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from skipsearch.decoding.policy import DraftPolicy
from skipsearch.errors import ResultsError, StudyMismatch
from skipsearch.files import write_text
from skipsearch.mask import SkipMask
from skipsearch.search.objective import Score
from skipsearch.search.seeds import Seed
from skipsearch.search.space import Space

optuna.logging.set_verbosity(optuna.logging.ERROR)

HEARTBEAT, GRACE = 5, 15  # seconds: a killed worker's trial is taken up again after the grace period


def _gp(seed: int) -> BaseSampler:
    # The seeds give the model its first points; random masks at 50 % teach it nothing.
    return GPSampler(seed=seed, deterministic_objective=True, n_startup_trials=4)


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed, multivariate=False, constant_liar=True, n_startup_trials=4)


def _random(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


MAKERS: dict[str, Callable[[int], BaseSampler]] = {"gp": _gp, "tpe": _tpe, "random": _random}


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

    Raises:
        StudyMismatch: the storage holds a study of this name with another identity.
    """

    def __init__(self, url: str, name: str, space: Space, identity: dict[str, str], sampler: str, seed: int) -> None:
        self.space, self.url = space, url
        self.climbs, self.rng = sampler == "gp", random.Random(seed)
        self.repeated = False  # whether the last trial's mask was known already
        self.distributions = {n: optuna.distributions.IntDistribution(0, 1) for n in space.names}
        with _experiments_welcome():
            self.study = optuna.create_study(
                storage=open_storage(url), study_name=name, direction="maximize", load_if_exists=True,
                sampler=MAKERS[sampler](seed),
            )  # fmt: skip
            self.study.set_metric_names(["tokens per second (predicted)"])
        known = self.study.user_attrs.get("identity")
        if known is None:
            self.study.set_user_attr("identity", identity)
        elif different := sorted(k for k in known.keys() | identity.keys() if known.get(k) != identity.get(k)):
            field = different[0]
            raise StudyMismatch(
                f"study {name} was made with another {', '.join(different)} ({field}: {known.get(field)!r} then, "
                f"{identity.get(field)!r} now); run with the old settings, or start anew with --out or --study"
            )
        self.memo: dict[SkipMask, float] = {self.mask_of(t): t.value for t in self.finished() if t.value is not None}

    def finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def mask_of(self, trial: FrozenTrial) -> SkipMask:
        return self.space.mask(trial.params)

    def enqueue(self, seeds: list[Seed]) -> None:
        """Put seeds in front of the sampler's own proposals; those already in the study are left out."""
        trials = self.study.get_trials(deepcopy=False)
        known = {tuple(t.system_attrs.get("fixed_params", t.params).items()) for t in trials}
        for label, mask in seeds:
            params = self.space.params(mask)
            if tuple(params.items()) not in known:
                known.add(tuple(params.items()))
                self.study.enqueue_trial(params, user_attrs={"seed": label})
        # What an interrupted run was working on when it was stopped is worth finishing.
        waiting = {tuple(t.system_attrs["fixed_params"].items()) for t in trials if t.state == TrialState.WAITING}
        for trial in trials:
            if trial.state == TrialState.FAIL and len(trial.params) == len(self.distributions):
                params = trial.params
                if self.mask_of(trial) not in self.memo and tuple(params.items()) not in waiting:
                    waiting.add(tuple(params.items()))
                    self.study.enqueue_trial(params, user_attrs={"seed": f"again:{trial.number}"})

    def optimize(
        self, scorer: Callable[[SkipMask], Score], *, trials: int, time_budget: float | None,
        report: Callable[[int, float], None],
    ) -> None:  # fmt: skip
        """Run until the study holds `trials` finished ones, or `time_budget` seconds are over.

        Args:
            report: told the number of finished trials and the best value after each.
        """

        def objective(trial: optuna.Trial) -> float:
            mask = self.space.mask({name: trial.suggest_int(name, 0, 1) for name in self.space.names})
            self.repeated = mask in self.memo
            if not self.repeated:  # samplers repeat themselves; replay would only do so too
                result = scorer(mask)
                for key, value in (
                    ("mask", "".join(map(str, mask.bits()))), ("skipped", len(mask)),
                    ("acceptance_rate", round(result.acceptance_rate, 4)), ("tau", round(result.tau, 4)),
                    ("cost_ratio", round(result.cost_ratio, 4)), ("speedup_predicted", round(result.speedup, 4)),
                    ("max_length", result.policy.max_length), ("exit_threshold", result.policy.exit_threshold),
                ):  # fmt: skip
                    trial.set_user_attr(key, value)
                self.memo[mask] = result.tokens_per_second
            return self.memo[mask]

        def after(study: optuna.Study, trial: FrozenTrial) -> None:
            done = self.finished()
            report(len(done), max((t.value for t in done if t.value is not None), default=0.0))
            if self.climbs:
                for _ in range(3 if self.repeated else len(done) % 2):
                    self._enqueue_neighbour()
            if len(done) >= trials:
                study.stop()

        if len(self.finished()) < trials:
            deadline = None if time_budget is None else max(0.0, time_budget)
            self.study.optimize(objective, timeout=deadline, callbacks=[after])

    def _enqueue_neighbour(self) -> None:
        """Queue the best mask so far with one or two sublayers flipped: every other trial, and whenever
        the sampler has repeated itself. The model finds the hill, the climb its top, at no cost.
        """
        if not self.memo:
            return
        best = max(self.memo, key=self.memo.__getitem__)
        for _ in range(50):
            flips = SkipMask.from_sublayers(
                self.rng.sample(self.space.free, self.rng.choice((1, 1, 2))), best.num_layers
            )
            if (mask := best ^ flips) not in self.memo:
                self.study.enqueue_trial(self.space.params(mask), user_attrs={"seed": "neighbour"})
                return

    def best(self, count: int) -> list[tuple[SkipMask, DraftPolicy, int]]:
        """The best different masks with their policies and trial numbers, best first."""
        order = sorted(self.finished(), key=lambda t: -(t.value or 0.0))
        found: dict[SkipMask, tuple[SkipMask, DraftPolicy, int]] = {}
        for trial in order:
            mask = self.mask_of(trial)
            if mask not in found and "max_length" in trial.user_attrs:
                attrs = trial.user_attrs
                policy = DraftPolicy(max_length=attrs["max_length"], exit_threshold=attrs["exit_threshold"])
                found[mask] = (mask, policy, trial.number)
            if len(found) == count:
                break
        return list(found.values())

    def export_csv(self, path: Path) -> None:
        """All finished trials as a table, written whole or not at all."""
        rows = []
        for t in self.finished():
            seconds = t.duration.total_seconds() if t.duration else None
            rows.append({"trial": t.number, "tokens_per_second": t.value, "seconds": seconds, **t.user_attrs})
        write_text(path, pd.DataFrame(rows).to_csv(index=False))
