"""Worker: claims trials of a study, has them scored, and finishes them. Several may share one study.

A claim is a running trial with all its parameters, added in one transaction; the database numbers it. Two workers that
claim at the same moment look again: the smaller number keeps the plan. No trial ever waits in the storage, because
two workers could take the same one. A worker that dies leaves a running trial: others fail it once its heart has
stopped, or at once where its process is known to be gone, and try its plan again.
"""

from __future__ import annotations

import math
import os
import random
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, fail_stale_trials
from optuna.storages._heartbeat import get_heartbeat_thread  # what `Study.optimize` uses; there is no public one
from optuna.trial import FrozenTrial, TrialState, create_trial

from skipsearch.errors import StudyWarning
from skipsearch.files import has_ended, this_process
from skipsearch.search.attributes import never_beaten, set_attributes
from skipsearch.search.integrity import CHECK, sum_of
from skipsearch.search.sampler import TrustRegionSampler
from skipsearch.search.storage import EXPERIMENTAL, GRACE, HEARTBEAT

LOST, DRAWS = 3, 1000  # claims lost in a row, behind which plans are drawn at random; how often
POLL = 0.2  # seconds between two looks at what other workers do
WORKER = "worker"  # the system attribute that names the process of a trial's worker

Params = dict[str, Any]
Key = tuple[tuple[str, Any], ...]
Scored = tuple[tuple[float, ...], dict[str, Any]]  # a trial's values and attributes


class Worker:
    """Runs trials of one study until there are enough.

    Args:
        study: of Optuna, with its sampler.
        distributions: of all parameters.
        size: how many different sets of parameters there are.
        sampler: makes the sampler for the trial behind so many; further numbers make it another one.
    """

    def __init__(
        self, study: optuna.Study, distributions: dict[str, BaseDistribution], size: int,
        sampler: Callable[[int, Sequence[int]], BaseSampler],
    ) -> None:  # fmt: skip
        self.study, self.distributions, self.size, self.sampler = study, distributions, size, sampler
        self.queue: deque[tuple[Params, str]] = deque()
        self._storage: BaseStorage = study._storage
        self._looked = -math.inf  # when dead workers were looked for
        self._lost = 0  # claims one after the other for which another worker was faster
        self._seen: dict[int, float] = {}  # when a running trial was first seen, by its id

    def run(
        self, score: Callable[[Params], Scored], *, trials: int, seconds: float | None,
        report: Callable[[Sequence[FrozenTrial]], None],
    ) -> int:  # fmt: skip
        """Run trials until `trials` are finished, all plans were tried, or the seconds have passed.

        Args:
            score: the values and attributes of parameters.
            report: called with the finished trials whenever there are more, of this worker or others.

        Returns:
            How many trials this worker has finished.
        """
        end, own, told = time.monotonic() + (seconds if seconds is not None else math.inf), 0, 0
        while True:
            self._fail_dead()
            now = self.study.get_trials(deepcopy=False)
            done = _of(now, TrialState.COMPLETE)
            if len(done) > told:
                told = len(done)
                report(done)
            if time.monotonic() >= end:
                break
            if len(done) >= trials or len({_key(t) for t in done}) >= self.size:
                break
            running = _of(now, TrialState.RUNNING)
            if len(done) + len(running) >= trials or len({_key(t) for t in (*done, *running)}) >= self.size:
                time.sleep(POLL)  # the others are at the last ones
                continue
            if (trial := self._claim(now, trials)) is None:
                self._lost += 1
                time.sleep(POLL * self._lost / 4)
                continue
            self._lost = 0
            own += self._score(trial, score, trials)
        return own

    def _claim(self, now: Sequence[FrozenTrial], trials: int) -> optuna.Trial | None:
        """A running trial of our own; None if another worker was faster."""
        params, label = self._next(now)
        if params is None:
            try:
                with warnings.catch_warnings(action="ignore", category=UserWarning):  # of heartbeats, which beat below
                    trial = self.study.ask(self.distributions)
                self._storage.set_trial_system_attr(trial._trial_id, WORKER, this_process())
            except UpdateFinishedTrialError:  # taken for dead: the sampler took long, or this process was paused
                return None
        else:
            trial = self._begin(params, {"seed": label} if label else {})
        return trial if self._is_ours(trial, trials, params is None) else None

    def _begin(self, params: Params, attributes: dict[str, Any]) -> optuna.Trial:
        template = create_trial(
            state=TrialState.RUNNING, params=params, distributions=self.distributions, user_attrs=attributes,
            system_attrs={WORKER: this_process()},
        )  # fmt: skip
        return optuna.Trial(self.study, self._storage.create_new_trial(self.study._study_id, template))

    def _is_ours(self, trial: optuna.Trial, trials: int, repeats: bool) -> bool:
        """Whether nobody began the plan before, and it is wanted; else it has failed.

        Args:
            repeats: whether a plan that is finished may be tried again.
        """
        before = [t for t in self.study.get_trials(deepcopy=False) if t.number < trial.number]
        before = _of(before, TrialState.COMPLETE, TrialState.RUNNING)
        others = {_key(t) for t in before if t.state == TrialState.RUNNING or not repeats}
        if len(before) >= trials or tuple(sorted(trial.params.items())) in others:
            self._fail(trial._trial_id)
            return False
        return True

    def _next(self, now: Sequence[FrozenTrial]) -> tuple[Params | None, str]:
        """A seed's parameters and name, or those of our sampler; None where Optuna's sampler must be asked."""
        known_trials = _of(now, TrialState.COMPLETE, TrialState.RUNNING)
        known = {_key(t) for t in known_trials}
        # The first choice is the same for all workers, so that it does not depend on how many there are. Who was not
        # the first to claim it chooses otherwise than the rest.
        salt = (os.getpid(), self._lost) if self._lost else ()
        if salt:
            self.queue.rotate(random.Random(sum(salt)).randrange(len(self.queue) + 1))
        while self.queue:
            params, label = self.queue.popleft()
            if tuple(sorted(params.items())) not in known:
                return params, label
        if self._lost >= LOST:
            return self._untried(known), ""
        sampler = self.study.sampler = self.sampler(len(known_trials), salt)
        return (sampler.propose(now, salt), "") if isinstance(sampler, TrustRegionSampler) else (None, "")

    def _untried(self, known: set[Key]) -> Params:
        """Random parameters that nobody has begun, if some draws find any: samplers may repeat themselves."""
        rng = random.Random(f"{this_process()} {len(known)} {self._lost}")
        for _ in range(DRAWS):
            ranges = ((name, cast(IntDistribution, d)) for name, d in self.distributions.items())
            params = {name: rng.randint(d.low, d.high) for name, d in ranges}
            if tuple(sorted(params.items())) not in known:
                break
        return params

    def _score(self, trial: optuna.Trial, score: Callable[[Params], Scored], trials: int) -> bool:
        """Score a trial and finish it; whether its result is in the study."""
        begin = time.monotonic()  # Optuna's clock may be set meanwhile
        try:
            with get_heartbeat_thread(trial._trial_id, self._storage):
                values, attributes = score(trial.params)
        except BaseException:
            self._fail(trial._trial_id)
            raise
        attributes |= {"seconds": round(time.monotonic() - begin, 6)}
        attributes |= {CHECK: sum_of(trial.params, self.distributions, values, {**trial.user_attrs, **attributes})}
        if self._finish(trial, values, attributes):
            return True
        # Taken for dead: this process was paused. The result counts, unless another worker has begun the plan again.
        again = self._begin(trial.params, trial.user_attrs)
        kept = self._is_ours(again, trials, False) and self._finish(again, values, attributes)
        what = "its result is kept" if kept else "its result is not needed"
        _tell(f"trial {trial.number} was given up by another worker, which heard nothing of this one; {what}")
        return kept

    def _finish(self, trial: optuna.Trial, values: Sequence[float], attributes: dict[str, Any]) -> bool:
        """Whether the trial could be finished, now or when the server was lost."""
        try:
            set_attributes(self.study, trial._trial_id, attributes)
            self.study.tell(trial, list(values))
        except (UpdateFinishedTrialError, ValueError):
            return self._storage.get_trial(trial._trial_id).state == TrialState.COMPLETE
        return True

    def _fail_dead(self) -> None:
        """Fail the trials of dead workers, every few seconds; what failed is tried again first, as it was."""
        if time.monotonic() < self._looked + HEARTBEAT:
            return
        begin, self._looked = self._looked == -math.inf, time.monotonic()
        before = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        first = {t._trial_id: self._seen.setdefault(t._trial_id, self._looked) for t in before}
        silent = never_beaten(self.study, [i for i, seen in first.items() if seen < self._looked - GRACE])
        for trial in before:
            if trial._trial_id in silent or has_ended(str(trial.system_attrs.get(WORKER, ""))):
                self._fail(trial._trial_id)
        with suppress(UpdateFinishedTrialError), warnings.catch_warnings(action="ignore", category=EXPERIMENTAL):
            fail_stale_trials(self.study)
        running, given_up = {t.number for t in before}, list[str]()
        for t in reversed(self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))):
            # At first all, of runs that have ended; then those that this worker or another has just given up.
            if (begin or t.number in running) and t.params.keys() == self.distributions.keys():
                self.queue.appendleft((t.params, t.user_attrs.get("seed", "")))
                given_up.append(str(t.number))
        if given_up and not begin:
            which = f"trial {given_up[0]}" if len(given_up) == 1 else f"trials {', '.join(reversed(given_up))}"
            _tell(f"nothing is heard of the worker of {which}; tried again")

    def _fail(self, trial_id: int) -> None:
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)


def _tell(what: str) -> None:
    warnings.warn(what, StudyWarning, stacklevel=2)


def _of(trials: Sequence[FrozenTrial], *states: TrialState) -> list[FrozenTrial]:
    return [t for t in trials if t.state in states]


def _key(trial: FrozenTrial) -> Key:
    return tuple(sorted(trial.params.items()))
