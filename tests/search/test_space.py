"""Search spaces of every structure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipsearch import SkipMask
from skipsearch.errors import ModelLoadError
from skipsearch.model.preset import read_space
from skipsearch.model.space import Space
from skipsearch.plan import DraftPlan

L = 9
spaces = st.builds(
    Space, num_layers=st.just(L),
    fixed=st.builds(
        SkipMask, attention=st.sets(st.integers(0, L - 1), max_size=3), mlp=st.sets(st.integers(0, L - 1), max_size=3),
        num_layers=st.just(L),
    ),
    structure=st.sampled_from(["sublayers", "layers", "spans"]), spans=st.integers(1, 2),
    max_skipped=st.none() | st.integers(2, 8),
)  # fmt: skip


def runs(layers: frozenset[int]) -> int:
    """Runs of consecutive layers."""
    return sum(i - 1 not in layers for i in layers)


@given(space=spaces, data=st.data())
def test_parameters_only_make_masks_of_the_space(space: Space, data: Any) -> None:
    """Prevents a mask that the engine cannot serve: with parts of layers, or with too many of them."""
    plan = space.plan({name: data.draw(st.integers(*bounds)) for name, bounds in space.bounds.items()})
    mask = plan.skip
    assert plan.only_skips and not mask & space.fixed
    assert space.max_skipped is None or len(mask) <= space.max_skipped
    if space.structure != "sublayers":
        assert mask.attention == mask.mlp
    if space.structure == "spans":
        assert runs(mask.attention) <= space.spans
    if space.structure != "spans":  # spans that overlap, or hold fixed layers, have several spellings
        assert space.plan(space.params(mask)) == DraftPlan(mask)


@given(space=spaces, data=st.data())
def test_seeds_are_cut_to_the_space(space: Space, data: Any) -> None:
    """Prevents a seed from breaking a rule of the space, or from skipping what it did not ask for."""
    seed = SkipMask.from_bits(data.draw(st.lists(st.booleans(), min_size=2 * L, max_size=2 * L)))
    params = space.params(seed)
    assert params.keys() == space.bounds.keys()
    assert all(low <= params[name] <= high for name, (low, high) in space.bounds.items())
    plan = space.plan(params)
    assert plan.only_skips and plan.skip <= seed - space.fixed


def test_space_tables_of_a_file(tmp_path: Path) -> None:
    """Prevents a file's rules from being ignored."""
    path = tmp_path / "space.toml"
    path.write_text('[space]\nstructure = "layers"\nfixed_attention = [0]\nmax_skipped = 6\n')
    space = read_space(path, 20)
    assert space.structure == "layers" and len(space.bounds) == 19 and space.max_skipped == 6
    path.write_text('[space]\nonly = "attention"\n')
    space = read_space(path, 12)
    assert [kind for kind, _ in space.free] == ["attention"] * 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[space]\nstructure = "rows"', "structure is 'rows', must be one of sublayers, layers, spans"),
        ('[space]\nonly = "norms"', "only is 'norms', must be attention or mlp"),
        ('[space]\nonly = "mlp"\nstructure = "layers"', "leaves no whole layers"),
        ("[space]\nmax_skipped = 0", "max_skipped is 0, must be a whole number of at least 1"),
        ("[space]\nspans = true", "spans is True"),
        ("[space]\nfixed = [1]", "space.fixed is not known"),
        ("[space]\nfixed_mlp = [99]", "layer 99"),
        ("[model]\nid = 'x'", r"it has no \[space\] table"),
        ("[space", "cannot be read"),
    ],
)
def test_bad_space_tables_are_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    """Prevents a typing error from changing the space silently."""
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(ModelLoadError, match=message):
        read_space(path, 12)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_space(tmp_path / "none.toml", 12)


def test_a_span_ends_at_a_fixed_layer() -> None:
    """Prevents a run of layers from becoming two, which an engine that takes one run could not serve."""
    space = Space(num_layers=10, fixed=SkipMask(attention=[5], num_layers=10), structure="spans")
    plan = space.plan({"span.0.first": 3, "span.0.length": 5})
    assert plan.only_skips and plan.skip.attention == plan.skip.mlp == {3, 4}
    assert space.plan(space.params(plan)) == plan


@given(one=spaces, other=spaces)
def test_two_spaces_have_different_texts(one: Space, other: Space) -> None:
    """Prevents a study from being continued with another space, and Python types in its error message."""
    assert "frozenset" not in str(one)
    if one.structure != "spans":  # the number of spans only counts in this structure
        one, other = replace(one, spans=1), replace(other, spans=other.spans if other.structure == "spans" else 1)
    elif other.structure != "spans":
        other = replace(other, spans=1)
    assert (str(one) == str(other)) == (one == other)
