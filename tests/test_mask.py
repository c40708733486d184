"""SkipMask as a value: round trips, set algebra, equality, drawing, and every refusal."""

from __future__ import annotations

import operator
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from conftest import assert_one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st

from skipsearch.errors import MaskError, SkipsearchError
from skipsearch.mask import KINDS, SkipMask

PATIENT = settings(deadline=None)  # a busy machine is not a bug
OPERATORS = [operator.or_, operator.and_, operator.sub, operator.xor]


def masks_of(num_layers: int) -> st.SearchStrategy[SkipMask]:
    ids = st.sets(st.integers(0, num_layers - 1))
    return st.builds(SkipMask, attention=ids, mlp=ids, num_layers=st.just(num_layers))


masks = st.integers(1, 40).flatmap(masks_of)
pairs = st.integers(1, 8).flatmap(lambda layers: st.tuples(masks_of(layers), masks_of(layers)))


# Round trips


@PATIENT
@given(st.integers(1, 40).flatmap(lambda layers: st.lists(st.integers(0, 1), min_size=2 * layers, max_size=2 * layers)))
def test_bits_round_trip(bits: list[int]) -> None:
    """Prevents the vector that a sampler proposes from turning into another mask."""
    mask = SkipMask.from_bits(bits)
    assert mask.bits() == tuple(bits)
    assert mask.num_layers == len(bits) // 2


def test_bits_order() -> None:
    """Prevents a swap of attention and MLP, or interleaving, that a round trip cannot see."""
    mask = SkipMask.from_bits([1, 0, 0, 0, 1, 1])
    assert mask == SkipMask(attention={0}, mlp={1, 2}, num_layers=3)
    assert mask.bits() == (1, 0, 0, 0, 1, 1)


def test_bits_take_booleans_and_any_nonzero() -> None:
    """Prevents True or 2 from counting as "run"."""
    assert SkipMask.from_bits([True, 2, False, 0]) == SkipMask(attention={0, 1}, num_layers=2)


@PATIENT
@given(masks)
def test_sublayers_round_trip(mask: SkipMask) -> None:
    """Prevents a list of sublayers from losing or moving one of them."""
    assert SkipMask.from_sublayers(mask.sublayers(), mask.num_layers) == mask


def test_sublayers_order() -> None:
    """Prevents an order that changes from run to run, and so seeds that are not reproducible."""
    mask = SkipMask(attention=[17, 3, 9], mlp=[11, 2], num_layers=20)
    assert list(mask.sublayers()) == [("attention", 3), ("attention", 9), ("attention", 17), ("mlp", 2), ("mlp", 11)]


@PATIENT
@given(masks)
def test_dict_round_trip(mask: SkipMask) -> None:
    """Prevents `to_dict` from giving what the constructor does not take back, or unsorted ids."""
    data = mask.to_dict()
    assert SkipMask(**data) == mask
    assert data["attention"] == sorted(mask.attention)
    assert data["mlp"] == sorted(mask.mlp)


@PATIENT
@given(masks)
def test_skips_agrees_with_the_sets(mask: SkipMask) -> None:
    """Prevents `skips` from asking the wrong kind."""
    for kind in KINDS:
        assert {i for i in range(mask.num_layers) if mask.skips(kind, i)} == set(getattr(mask, kind))


def test_per_layer_config() -> None:
    """Prevents a spelling that transformers does not read, and entries for layers that run whole."""
    mask = SkipMask(attention={0, 2}, mlp={2, 3}, num_layers=5)
    assert mask.to_per_layer_config() == {
        "0": {"skip": ["attention"]},
        "2": {"skip": ["attention", "mlp"]},
        "3": {"skip": ["mlp"]},
    }


@PATIENT
@given(masks)
def test_pickle_round_trip(mask: SkipMask) -> None:
    """Prevents a frozen slotted value that cannot be sent to a worker process."""
    assert pickle.loads(pickle.dumps(mask)) == mask


# Set algebra


@pytest.mark.parametrize("combine", OPERATORS)
@PATIENT
@given(pair=pairs)
def test_operators_are_those_of_the_sublayer_sets(combine: Any, pair: tuple[SkipMask, SkipMask]) -> None:
    """Prevents an operator that treats one kind of sublayer unlike the other, or forgets the layer count."""
    a, b = pair
    result = combine(a, b)
    assert set(result.sublayers()) == combine(set(a.sublayers()), set(b.sublayers()))
    assert result.num_layers == a.num_layers


@PATIENT
@given(pairs)
def test_laws_of_the_algebra(pair: tuple[SkipMask, SkipMask]) -> None:
    """Prevents neighbourhoods and differences of masks that do not add up."""
    a, b = pair
    empty = SkipMask(num_layers=a.num_layers)
    assert (a - b) | (a & b) == a
    assert a ^ b ^ b == a
    assert a ^ a == empty
    assert a | b == b | a
    assert len(a | b) == len(a) + len(b) - len(a & b)
    assert a & b <= a <= a | b


@PATIENT
@given(pairs)
def test_order_is_inclusion_of_both_kinds(pair: tuple[SkipMask, SkipMask]) -> None:
    """Prevents `<=` from looking at attention alone."""
    a, b = pair
    assert (a <= b) == (set(a.sublayers()) <= set(b.sublayers()))
    assert (a >= b) == (b <= a)


@PATIENT
@given(masks)
def test_length_and_truth(mask: SkipMask) -> None:
    """Prevents the empty mask from passing for one that skips something."""
    assert len(mask) == sum(mask.bits())
    assert bool(mask) == any(mask.bits())


# Equality


@PATIENT
@given(pairs)
def test_equality_and_hash_follow_the_bits(pair: tuple[SkipMask, SkipMask]) -> None:
    """Prevents a memo that scores one mask twice, or two masks once."""
    a, b = pair
    assert (a == b) == (a.bits() == b.bits())
    assert len({a, b}) == len({a.bits(), b.bits()})


def test_equal_masks_from_different_iterables_hash_alike() -> None:
    """Prevents the order or container of the ids from reaching the hash."""
    made = [
        SkipMask(attention=[8, 0, 3], mlp=(1,), num_layers=9),
        SkipMask(attention={0, 3, 8}, mlp=frozenset({1}), num_layers=9),
        SkipMask(attention=iter([3, 8, 0]), mlp=range(1, 2), num_layers=9),
    ]
    assert len(set(made)) == 1


def test_the_layer_count_and_the_kind_tell_masks_apart() -> None:
    """Prevents the masks of two models, or an attention and an MLP skip, from counting as equal."""
    assert SkipMask(attention={1}, num_layers=4) != SkipMask(attention={1}, num_layers=5)
    assert SkipMask(attention={1}, num_layers=4) != SkipMask(mlp={1}, num_layers=4)


def test_a_mask_is_frozen_and_owns_its_ids() -> None:
    """Prevents a mask that changes under a draft view or a memo key."""
    ids = {1}
    mask = SkipMask(attention=ids, num_layers=4)
    ids.add(2)
    assert mask.attention == {1}
    with pytest.raises(FrozenInstanceError):
        mask.attention = frozenset({3})  # type: ignore[misc]


# Drawing


def test_str_draws_a_column_a_layer() -> None:
    """Prevents the picture from being inverted (full = run, dot = skipped) or its rows from being misaligned."""
    mask = SkipMask(attention={0, 2}, mlp={3}, num_layers=4)
    assert str(mask) == "attention ·█·█  2 of 4 skipped\nmlp       ███·  1 of 4 skipped"


# Refusals


@pytest.mark.parametrize("combine", [*OPERATORS, operator.le])
def test_masks_of_two_models_do_not_combine(combine: Any) -> None:
    """Prevents a mask of a 32-layer model from being mixed into one of 40 layers."""
    with pytest.raises(MaskError) as error:
        combine(SkipMask(attention={1}, num_layers=32), SkipMask(attention={1}, num_layers=40))
    assert_one_sentence(error, "32", "40")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [4, 5, -1, -4])
def test_ids_out_of_range_are_refused(kind: str, layer: int) -> None:
    """Prevents id L from skipping nothing, and id -1 from meaning the last layer."""
    with pytest.raises(MaskError) as error:
        SkipMask(**{kind: [0, layer]}, num_layers=4)
    assert_one_sentence(error, f"skip.{kind}", f"layer {layer},", "0..3")


@pytest.mark.parametrize("kind", KINDS)
def test_duplicate_ids_are_refused(kind: str) -> None:
    """Prevents a typing slip (3, 3 for 3, 4) from passing as a smaller mask."""
    with pytest.raises(MaskError) as error:
        SkipMask(**{kind: [3, 1, 3]}, num_layers=4)
    assert_one_sentence(error, f"skip.{kind}", "layer 3 twice")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [True, False, "1", 1.0, None, "two\nlines"])
def test_ids_that_are_not_integers_are_refused(kind: str, value: Any) -> None:
    """Prevents a list of flags (True, False, ...) from being read as layers 1 and 0."""
    with pytest.raises(MaskError) as error:
        SkipMask(**{kind: [value]}, num_layers=4)
    assert_one_sentence(error, f"skip.{kind}", repr(value))


@pytest.mark.parametrize("num_layers", [0, -1, True, 4.0, "4", None])
def test_layer_counts_that_are_not_counts_are_refused(num_layers: Any) -> None:
    """Prevents a mask of no layers, or of True layers."""
    with pytest.raises(MaskError) as error:
        SkipMask(num_layers=num_layers)
    assert_one_sentence(error, "num_layers", repr(num_layers))


@pytest.mark.parametrize("count", [1, 3, 79])
def test_an_odd_number_of_bits_is_refused(count: int) -> None:
    """Prevents a vector with one bit lost from shifting every MLP bit."""
    with pytest.raises(MaskError) as error:
        SkipMask.from_bits([0] * count)
    assert_one_sentence(error, "even number of bits", str(count))


def test_no_bits_at_all_are_refused() -> None:
    """Prevents an empty vector from becoming a mask of no layers."""
    with pytest.raises(MaskError) as error:
        SkipMask.from_bits([])
    assert_one_sentence(error, "num_layers", "0")


def test_a_sublayer_of_unknown_kind_is_refused() -> None:
    """Prevents a misspelt kind from dropping its sublayer silently."""
    with pytest.raises(MaskError) as error:
        SkipMask.from_sublayers([("attention", 1), ("mpl", 3)], num_layers=4)  # type: ignore[list-item]
    assert_one_sentence(error, "'mpl'", "attention, mlp")


def test_from_sublayers_checks_ids() -> None:
    """Prevents a second way in that skips the checks of the constructor."""
    with pytest.raises(MaskError) as error:
        SkipMask.from_sublayers([("mlp", 2), ("mlp", 2)], num_layers=4)
    assert_one_sentence(error, "skip.mlp", "layer 2 twice")


def test_mask_errors_are_caught_as_either_root() -> None:
    """Prevents callers that catch ValueError, or the CLI that catches the root, from missing it."""
    assert issubclass(MaskError, ValueError)
    assert issubclass(MaskError, SkipsearchError)
