"""Random draft plans for property tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import strategies as st

from skipsearch.plan import DraftPlan

FORMS = ("run", "int8", "skip")  # tiny models are too small for groups of int4


def plans(layers: int, vocabulary: int | None = None, forms: Sequence[str] = FORMS) -> st.SearchStrategy[DraftPlan]:
    """Plans of so many layers; with a vocabulary, some heads choose from part of it."""
    ids = st.none()
    if vocabulary is not None:
        ids = st.none() | st.sets(st.integers(0, vocabulary - 1), min_size=1)
    heads = st.sampled_from(["full", *(form for form in forms if form in ("int8", "int4"))])
    every = st.lists(st.sampled_from(forms), min_size=2 * layers, max_size=2 * layers)
    return st.builds(DraftPlan.from_forms, every, heads, ids)


def random_plan(rng: random.Random, layers: int, vocabulary: int, forms: Sequence[str] = FORMS) -> DraftPlan:
    chosen = [rng.choice(forms) for _ in range(2 * layers)]
    ids = rng.sample(range(vocabulary), max(1, vocabulary // 2)) if rng.random() < 0.5 else None
    return DraftPlan.from_forms(chosen, rng.choice(["full", "int8"]), ids)
