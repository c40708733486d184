"""TrustRegionSampler: proposals from a ball around the best mask, ranked by a Gaussian process.

With many 0/1 parameters, global samplers spend most trials far from any good mask, and random bit flips use no
knowledge of earlier trials. This sampler flips few bits of the best mask, and a model of all trials chooses which.
The region grows after successes and shrinks after failures (TuRBO, arXiv 1910.01739; for discrete spaces
CASMOPOLITAN, arXiv 2102.07188). When its radius is below 1, a new region begins elsewhere. The sampler's whole state
is derived from the study's trials, so a resumed study continues exactly, and workers share all trials.

Shapes: N trials, M candidates, D parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna import Study as OptunaStudy
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.spatial.distance import cdist
from scipy.stats import norm

Array = NDArray[Any]

CANDIDATES, CLIMBERS = 400, 3  # random candidates for each proposal; how many of the best are improved further
ELSEWHERE = 1000  # random points that are drawn until one is new, where the whole region was tried
FIRST_RADIUS = 8.0  # parameters changed at once, at most half of them
SUCCESSES = 3  # in a row: the radius doubles
ENOUGH = 1e-3  # of the best value: the least improvement that counts as a success
FLOOR = 0.7  # of the best value: all values below count as this one
# Kernels to choose from: length scale in units of D; linear share; noise (scores of parts of the trace are estimates)
LENGTHS, LINEAR, NOISES = (0.15, 0.5, 1.5), (0.2, 0.8), (1e-4, 1e-2)
LATEST, FITTED = 400, 100  # the newest trials: for the Gaussian process; for the choice of its kernel


@dataclass(frozen=True, slots=True)
class TrustRegion:
    """Where to search next.

    Attributes:
        centre: of the ball [D].
        radius: how many parameters may differ from the centre.
        since: how many trials were finished when the region began.
    """

    centre: Array
    radius: float
    since: int


class TrustRegionSampler(BaseSampler):
    """For studies of one objective that is maximised over whole numbers.

    Args:
        bounds: lowest and highest value of each parameter.
        seed: of the candidates.
    """

    def __init__(self, bounds: Mapping[str, tuple[int, int]], seed: int) -> None:
        self.names = list(bounds)
        self.low, self.high = np.array(list(bounds.values()), dtype=float).reshape(-1, 2).T
        self.seed = seed

    def infer_relative_search_space(self, study: OptunaStudy, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if trial.params:  # enqueued, with all its parameters
            return {}
        pairs = zip(self.names, self.low, self.high, strict=True)
        return {name: IntDistribution(int(low), int(high)) for name, low, high in pairs}

    def sample_relative(
        self, study: OptunaStudy, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.propose(study.get_trials(deepcopy=False)) if search_space else {}

    def propose(self, trials: Sequence[FrozenTrial], salt: Sequence[int] = ()) -> dict[str, Any]:
        """The parameters of the next trial, from all trials so far.

        Args:
            salt: numbers with which workers that propose at the same moment propose different plans.
        """
        # Trials that failed do not count: an interrupted search proposes what an undisturbed one does.
        rng = np.random.default_rng((self.seed, sum(t.state != TrialState.FAIL for t in trials), *salt))
        done = [t for t in trials if t.state == TrialState.COMPLETE and t.params.keys() >= set(self.names)]
        started = [t for t in trials if not t.state.is_finished() and t.params.keys() >= set(self.names)]
        x_ND, started_ND = self._points(done), self._points(started)
        seen = {x_D.tobytes() for x_D in (*x_ND, *started_ND)}
        y_N = np.array([t.value for t in done], dtype=float)
        proposed = np.array(["seed" not in t.user_attrs for t in done], dtype=bool)
        region = trust_region_after(x_ND, y_N, proposed, self.low, self.high, self.seed)
        candidates = self._candidates(region.centre, region.radius, rng)
        fresh = np.array([c for c in candidates if c.tobytes() not in seen])
        if not len(fresh):
            for _ in range(ELSEWHERE):
                chosen = rng.integers(self.low.astype(int), self.high.astype(int) + 1).astype(float)
                if chosen.tobytes() not in seen:
                    break
        elif len(done) < 2 or not np.ptp(y_N):
            chosen = fresh[rng.integers(len(fresh))]
        else:
            best = float(y_N[region.since :].max()) if len(y_N) > region.since else float(y_N.max())
            gain = self._improvement(x_ND[-LATEST:], y_N[-LATEST:], best)
            chosen = self._climb(gain, fresh, seen, region)
        return {name: int(value) for name, value in zip(self.names, chosen, strict=True)}

    def sample_independent(
        self, study: OptunaStudy, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise ValueError(f"parameter {param_name!r} is not one of this study's; make the sampler with its bounds")

    def _points(self, trials: Sequence[FrozenTrial]) -> Array:
        points = [[trial.params[name] for name in self.names] for trial in trials]
        return np.array(points, dtype=float).reshape(-1, len(self.names))

    def _changes(self, point: Array) -> list[Array]:
        """All points that differ in one parameter, by at most 2."""
        out = []
        for d in range(len(point)):
            for step in (-1, 1, -2, 2):
                if self.low[d] <= point[d] + step <= self.high[d]:
                    out.append(point.copy())
                    out[-1][d] += step
        return out

    def _climb(self, gain: Callable[[Array], Array], fresh_MD: Array, seen: set[bytes], region: TrustRegion) -> Array:
        """The point with the most gain. Hill climbing from the best candidates, one change at a time, in the region."""
        gain_M = gain(fresh_MD)
        found: list[tuple[float, Array]] = []
        for start in np.argsort(-gain_M)[:CLIMBERS]:
            point, value = fresh_MD[start], float(gain_M[start])
            while True:
                near = [
                    p for p in self._changes(point)
                    if (p != region.centre).sum() <= max(2.0, region.radius) and p.tobytes() not in seen
                ]  # fmt: skip
                values = gain(np.array(near)) if near else np.array([-np.inf])
                if values.max() <= value:
                    break
                point, value = near[int(values.argmax())], float(values.max())
            found.append((value, point))
        return max(found, key=lambda pair: pair[0])[1]

    def _candidates(self, centre: Array, radius: float, rng: np.random.Generator) -> Array:
        """Every single change [M, D], and random changes of up to `radius` parameters; half of these are exchanges."""
        single, dims = self._changes(centre), len(self.names)
        count, most = max(0, CANDIDATES - len(single)), min(dims, max(2, round(radius)))
        everywhere, room_up, room_down = np.ones(dims, dtype=bool), centre < self.high, centre > self.low

        def some(allowed_D: Array, how_many_M: Array) -> Array:
            """For each candidate, so many random ones of the allowed parameters, as booleans [M, D]."""
            keys_MD = np.where(allowed_D, rng.random((count, dims)), 2)
            return allowed_D & (keys_MD.argsort(1).argsort(1) < how_many_M[:, None])

        # An exchange changes as many parameters up as down: another mask that skips as many sublayers.
        pairs_M = np.minimum(rng.integers(1, max(1, most // 2) + 1, count), min(room_up.sum(), room_down.sum()))
        exchange_MD = some(room_up, pairs_M).astype(float) - some(room_down, pairs_M)
        up_MD = room_up & (~room_down | (rng.random((count, dims)) < 0.5))
        reach_D = np.maximum(1, (self.high - self.low) // 2).astype(int)  # the largest step of each parameter
        steps_MD = np.where(up_MD, 1, -1) * rng.integers(1, reach_D + 1, (count, dims))
        change_MD = steps_MD * some(everywhere, rng.integers(1, most + 1, count))
        moved_MD = np.where(rng.random((count, 1)) < 0.5 if most >= 2 else False, exchange_MD, change_MD)
        return np.array([*single, *np.clip(centre + moved_MD, self.low, self.high)])

    def _improvement(self, x_ND: Array, y_N: Array, best: float) -> Callable[[Array], Array]:
        """A function: the expected improvement [M] of points [M, D] over `best`, by the most likely kernel."""
        if (floor := FLOOR * y_N.max()) > 0:  # speeds are compared by their ratio
            y_N, best = np.log(np.maximum(y_N, floor)), float(np.log(max(best, floor)))
        mean, scale = y_N.mean(), y_N.std() + 1e-12
        z_N = (y_N - mean) / scale
        spread = np.maximum(1, self.high - self.low)
        x_ND = (x_ND - self.low) / spread
        middle = x_ND.mean(0)
        x_ND = x_ND - middle
        flat_scale = max(1e-9, float((x_ND**2).sum(1).mean()))

        def kernel(apart_AB: Array, alike_AB: Array, length: float, linear: float) -> Array:
            bumps = np.exp(-apart_AB / (length * len(self.names)))
            return np.asarray((1 - linear) * bumps + linear * alike_AB)

        def related(a_AD: Array, b_BD: Array) -> tuple[Array, Array]:
            """The inputs of a kernel: distances of the points [A, B], and scaled scalar products [A, B]."""
            return cdist(a_AD, b_BD, "cityblock"), a_AD @ b_BD.T / flat_scale

        def fit(
            pairs: tuple[Array, Array], z_N: Array, length: float, linear: float, noise: float
        ) -> tuple[float, Array, Array, float]:  # fmt: skip
            """Log-evidence, Cholesky factor, weights, and the kernel's scale, which has a closed form."""
            factor = cholesky(kernel(*pairs, length, linear) + noise * np.eye(len(z_N)), lower=True)
            alpha = cho_solve((factor, True), z_N)
            variance = float(z_N @ alpha) / len(z_N)
            return -0.5 * len(z_N) * np.log(variance) - np.log(np.diag(factor)).sum(), factor, alpha, variance

        few, few_z = related(x_ND[-FITTED:], x_ND[-FITTED:]), z_N[-FITTED:]
        shapes = itertools.product(LENGTHS, LINEAR, NOISES)
        length, linear, noise = max(shapes, key=lambda shape: fit(few, few_z, *shape)[0])
        _, factor, alpha, variance = fit(related(x_ND, x_ND), z_N, length, linear, noise)
        inverse = solve_triangular(factor, np.eye(len(z_N)), lower=True)  # of the factor, used for many points

        def gain(points_MD: Array) -> Array:
            points_MD = (points_MD - self.low) / spread - middle
            k_MN = kernel(*related(points_MD, x_ND), length, linear)
            own_M = (1 - linear) + linear * (points_MD**2).sum(1) / flat_scale
            sigma_M = np.sqrt(np.maximum(1e-12, variance * (own_M - ((k_MN @ inverse.T) ** 2).sum(1))))
            gain_M = k_MN @ alpha - (best - mean) / scale
            t = gain_M / sigma_M
            return np.asarray(gain_M * norm.cdf(t) + sigma_M * norm.pdf(t))

        return gain


def trust_region_after(
    x_ND: Array, y_N: Array, proposed_N: Array, low: Array, high: Array, seed: int
) -> TrustRegion:  # fmt: skip
    """Replay the finished trials in order to find the current trust region.

    Args:
        proposed_N: whether the sampler proposed the trial. Seeds move the centre, and never change the radius.
        low, high: bounds of the parameters [D].
    """
    rng = np.random.default_rng(seed)
    patience, widest = max(6, len(low) // 4), max(2.0, len(low) / 2)
    first = min(FIRST_RADIUS, widest)
    centre, best, radius, since = low, -np.inf, first, 0
    good = bad = 0
    for n, (x, y, proposed) in enumerate(zip(x_ND, y_N, proposed_N, strict=True)):
        if proposed:
            better = y > best + ENOUGH * abs(best) if np.isfinite(best) else True
            good, bad = (good + 1, 0) if better else (0, bad + 1)
        if y > best:
            centre, best = x, y
        if good == SUCCESSES:
            radius, good = min(2 * radius, widest), 0
        elif bad == patience:
            radius, bad = radius / 2, 0
        if radius < 1:  # a new region, at the best point of all with one sixth of its parameters changed
            centre = x_ND[int(np.argmax(y_N[: n + 1]))].copy()
            where = rng.choice(len(low), max(1, len(low) // 6), replace=False)
            down = centre[where] > low[where]
            centre[where] = np.where(down, centre[where] - 1, np.minimum(high[where], centre[where] + 1))
            best, radius, since, good, bad = -np.inf, first, n + 1, 0, 0
    return TrustRegion(centre, radius, since)
