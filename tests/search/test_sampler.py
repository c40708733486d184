"""The samplers: our own against its rivals, its region, and fronts of two objectives."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipsearch import DraftPlan, SkipMask
from skipsearch.errors import SkipsearchError
from skipsearch.search.options import SearchOptions
from skipsearch.search.sampler import TrustRegionSampler, trust_region_after
from skipsearch.search.storage import storage_url
from skipsearch.search.study import Study


def rugged(bits: dict[str, int], seed: int) -> float:
    """A synthetic objective of skipping: additive gains, pairs that harm each other, a product of survivals."""
    rng = np.random.default_rng(seed)
    n = len(bits)
    x = np.array(list(bits.values()))
    harm, pairs = rng.gamma(0.5, 0.02, n), rng.gamma(0.2, 0.01, (n, n))
    survival = np.exp(-(harm @ x + x @ pairs @ x / 2))
    cost = 1 - 0.9 * x.mean()
    return float(max((1 - survival ** (k + 1)) / (1 - min(survival, 0.9999)) / (1 + k * cost) for k in range(1, 9)))


def climb(seed: int, sampler: str, trials: int = 120, n: int = 40) -> float:
    bounds = {f"b{i}": (0, 1) for i in range(n)}
    made = (
        TrustRegionSampler(bounds, seed) if sampler == "trust-region" else optuna.samplers.RandomSampler(seed=seed)
    )  # fmt: skip
    study = optuna.create_study(direction="maximize", sampler=made)
    study.enqueue_trial(dict.fromkeys(bounds, 0), user_attrs={"seed": "empty"})
    ask = {name: optuna.distributions.IntDistribution(*b) for name, b in bounds.items()}
    if sampler == "flips":
        rng, best = random.Random(seed), dict.fromkeys(bounds, 0)
        value = rugged(best, seed)
        for _ in range(trials):
            new = dict(best)
            for name in rng.sample(list(bounds), rng.choice((1, 1, 2))):
                new[name] ^= 1
            if (found := rugged(new, seed)) > value:
                best, value = new, found
        return value
    for _ in range(trials):
        trial = study.ask(ask)
        study.tell(trial, rugged(trial.params, seed))
    return float(study.best_value)


def test_the_trust_region_beats_flips_and_chance_at_equal_trials() -> None:
    """Prevents a sampler that learns nothing from what it saw: plain bit flips are the rival to beat."""
    ours, flips, chance = (
        np.mean([climb(seed, name) for seed in range(3)]) for name in ("trust-region", "flips", "random")
    )
    assert ours > flips > chance


def test_a_resumed_study_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    """Prevents sampler state that only one process has."""
    from test_study import SPACE, nothing, scorer

    def plans(folder: Path, stops: tuple[int, ...]) -> list[DraftPlan]:
        folder.mkdir()
        for stop in stops:
            study = Study(storage_url(folder), "search", SPACE, {"a": "b"}, "trust-region", 0)
            study.enqueue([("empty", DraftPlan(SkipMask(num_layers=4)))])
            study.optimize(scorer, trials=stop, time_budget=None, report=nothing)
        return [study.plan_of(t) for t in study.finished()]

    assert plans(tmp_path / "once", (24,)) == plans(tmp_path / "twice", (9, 24))


def test_nothing_is_proposed_twice_while_something_is_new() -> None:
    """Prevents trials from being spent on masks that are known, on running ones too."""
    bounds = {f"b{i}": (0, 1) for i in range(7)} | {"first": (0, 5)}
    study = optuna.create_study(direction="maximize", sampler=TrustRegionSampler(bounds, 0))
    ask = {name: optuna.distributions.IntDistribution(*b) for name, b in bounds.items()}
    asked: list[tuple[int, ...]] = []
    for _ in range(30):
        trials = [study.ask(ask), study.ask(ask)]
        asked += [tuple(trial.params.values()) for trial in trials]
        for trial in trials:
            study.tell(trial, -sum(abs(v - 1) for v in trial.params.values()))
    assert len(set(asked)) >= 58
    assert study.best_value == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_candidates_lie_in_the_region(sizes: list[tuple[int, int]], seed: int) -> None:
    """Prevents proposals out of bounds or too far away, for one parameter, wide ones and ones without room too."""
    sampler = TrustRegionSampler({f"p{i}": (low, low + size) for i, (low, size) in enumerate(sizes)}, 0)
    rng = np.random.default_rng(seed)
    centre = rng.integers(sampler.low.astype(int), sampler.high.astype(int) + 1).astype(float)
    radius = float(rng.integers(1, 7))
    candidates = sampler._candidates(centre, radius, rng)
    assert candidates.shape[1] == len(sizes) and len(candidates) >= 400
    assert (candidates >= sampler.low).all() and (candidates <= sampler.high).all()
    assert ((candidates != centre).sum(1) <= max(2, radius)).all()
    assert (candidates == candidates.round()).all()


def test_the_region_grows_shrinks_and_restarts() -> None:
    """Prevents a region that stays where no better point is left."""
    low, high = np.zeros(8), np.ones(8)
    x = np.eye(8)[np.arange(60) % 8]
    up = trust_region_after(x[:9], np.arange(1.0, 10.0), np.ones(9, bool), low, high, 0)
    assert up.radius == 4.0 and (up.centre == x[8]).all()
    flat = trust_region_after(x[:14], np.array([5.0] + [1.0] * 13), np.ones(14, bool), low, high, 0)
    assert flat.radius == 1.0 and (flat.centre == x[0]).all()
    spent = trust_region_after(x[:19], np.array([5.0] + [1.0] * 18), np.ones(19, bool), low, high, 0)
    assert spent.since == 19 and spent.radius == 4.0 and (spent.centre != x[0]).sum() == 1
    seeds = trust_region_after(x[:20], np.array([5.0] + [1.0] * 19), np.zeros(20, bool), low, high, 0)
    assert seeds.radius == 4.0 and seeds.since == 0


def test_pareto_keeps_what_nothing_beats(tmp_path: Path) -> None:
    """Prevents a front with masks that another beats in both respects, and a climber of one objective on two."""
    from test_study import SPACE, nothing

    from skipsearch.evaluate.objective import Score
    from skipsearch.policy import DraftPolicy

    def both(plan: DraftPlan) -> Score:
        cost = 1 - len(plan.skip) / 10
        return Score(
            plan=plan, policy=DraftPolicy(), tokens_per_second=10 * cost, speedup=1.0,
            acceptance_rate=max(0.0, 1 - 0.02 * sum(i * i for _, i in plan.skip.sublayers())), tau=2.0, cost_ratio=cost,
        )  # fmt: skip

    study = Study(storage_url(tmp_path), "search", SPACE, {"a": "b"}, "nsga2", 0, pareto=True)
    study.enqueue([("empty", DraftPlan(SkipMask(num_layers=4)))])
    study.optimize(both, trials=60, time_budget=None, report=nothing)
    front = study.front()
    assert len(front) >= 4 and front[-1]["acceptance_rate"] == 1.0
    rows = [t.user_attrs for t in study.finished() if "cost_ratio" in t.user_attrs]
    for kept in front:
        assert not any(
            r["cost_ratio"] <= kept["cost_ratio"] and r["acceptance_rate"] > kept["acceptance_rate"] for r in rows
        )
    assert len(study.best(3)) == 3
    study.export_csv(tmp_path / "trials.csv")
    with pytest.raises(SkipsearchError, match="one objective; pass --sampler nsga2"):
        SearchOptions(pareto=True)


def test_a_single_parameter_can_be_searched() -> None:
    """Prevents a space of one parameter, or one whose points were all tried, from ending a search."""
    sampler = TrustRegionSampler({"layer.00": (0, 1)}, seed=0)
    trials = [
        optuna.trial.create_trial(
            params={"layer.00": n % 2}, distributions={"layer.00": optuna.distributions.IntDistribution(0, 1)}, value=n
        )
        for n in range(4)
    ]
    assert sampler.propose(trials[:1])["layer.00"] in (0, 1) and sampler.propose(trials)["layer.00"] in (0, 1)
