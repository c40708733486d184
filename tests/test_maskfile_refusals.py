"""mask.json: what is wrong in a file, or with it, is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_one_sentence
from documents import DOCUMENT, EVIDENCE, edited, write

from skipsearch.errors import MaskError
from skipsearch.maskfile import load_mask, parse_mask

# Refusals by content


@pytest.mark.parametrize("data", [[], "mask", 3, None, True])
def test_json_that_is_no_object_is_refused(tmp_path: Path, data: Any) -> None:
    """Prevents a traceback for a JSON file that is something else altogether."""
    path = write(tmp_path / "mask.json", json.dumps(data))
    with pytest.raises(MaskError) as error:
        load_mask(path)
    assert_one_sentence(error, str(path), "format", type(data).__name__)


@pytest.mark.parametrize("value", ["swift", "skipsearch-mask-2", None, 1, ["skipsearch-mask"]])
def test_another_format_is_refused(value: Any) -> None:
    """Prevents somebody else's JSON from being read as a mask."""
    with pytest.raises(MaskError) as error:
        parse_mask(edited("format", value))
    assert_one_sentence(error, "format", repr(value), "skipsearch import")


@pytest.mark.parametrize("value", [0, 3, "1", None, [1]])
def test_another_version_is_refused(value: Any) -> None:
    """Prevents a file of a later schema from being read by the rules of this one."""
    with pytest.raises(MaskError) as error:
        parse_mask(edited("version", value))
    assert_one_sentence(error, "version", repr(value), "update skipsearch")


REQUIRED = ["format", "version", "model", "model.num_layers", "skip", "skip.attention", "skip.mlp"]


@pytest.mark.parametrize("field", [*REQUIRED, *(f"evidence.{name}" for name in EVIDENCE)])
def test_a_missing_field_is_named(field: str) -> None:
    """Prevents a silent default: no mask without skip sets, no evidence that was never measured."""
    with pytest.raises(MaskError) as error:
        parse_mask(edited(field))
    assert_one_sentence(error, field)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize(
    ("ids", "parts"),
    [
        ([0, 4], ["layer 4,", "0..3"]),
        ([-1], ["layer -1,", "0..3"]),
        ([1, 2, 1], ["layer 1 twice"]),
        ([0, "1"], ["'1'"]),
        ([0, 1.0], ["1.0"]),
        ([True], ["True"]),
        ([None], ["None"]),
        ([[0]], ["[0]"]),
        ("0", ["'0'"]),
        (2, ["2"]),
        (None, ["None"]),
        ({"0": 1}, ["{'0': 1}"]),
    ],
)
def test_malformed_layer_ids_are_refused(kind: str, ids: Any, parts: list[str]) -> None:
    """Prevents a file edited by hand, or made for another model, from skipping other layers than it says."""
    with pytest.raises(MaskError) as error:
        parse_mask(edited(f"skip.{kind}", ids), "mask.json")
    assert_one_sentence(error, "mask.json", f"skip.{kind}", *parts)


@pytest.mark.parametrize("value", [0, -3, True, 4.0, 4.5, "4", None, [4]])
def test_a_malformed_layer_count_is_refused(value: Any) -> None:
    """Prevents true from counting as one layer, and a mask of no layers."""
    with pytest.raises(MaskError) as error:
        parse_mask(edited("model.num_layers", value))
    assert_one_sentence(error, "num_layers", repr(value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_length", value) for value in (0, -1, 2.5, True, "5", None)),
        *(("exit_threshold", value) for value in (0, 1, -0.5, 1.5, "high", float("nan"))),
    ],
)
def test_a_draft_out_of_range_is_refused(field: str, value: Any) -> None:
    """Prevents a policy that never drafts, or whose threshold is no probability, from reaching the decoder."""
    with pytest.raises(MaskError) as error:
        parse_mask(edited(f"draft.{field}", value))
    assert_one_sentence(error, f"draft.{field}", repr(value))


@pytest.mark.parametrize("field", ["max_lenght", "temperature", "two\nlines"])
def test_unknown_draft_arguments_are_refused(field: str) -> None:
    """Prevents a misspelt policy from being ignored, and a key from breaking the sentence."""
    with pytest.raises(MaskError) as error:
        parse_mask(edited(f"draft.{field}", "odd value"))
    assert_one_sentence(error, "draft." + field.replace("\n", r"\n"), "'odd value'")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", []), ("skip", None), ("draft", 5), ("evidence", "good"), ("provenance", None),
        ("model.id", 3), ("evidence.speedup", "fast"), ("evidence.speedup", None), ("evidence.speedup", float("nan")),
        ("evidence.tau", float("inf")), ("evidence.speedup_ci", 1.25), ("evidence.greedy_equal", "perhaps"),
        ("evidence.prompts", 1.5), ("evidence.verdict", "maybe"), ("provenance.seed", "lucky"),
    ],
)  # fmt: skip
def test_wrong_types_are_refused(field: str, value: Any) -> None:
    """Prevents numbers that cannot be computed with, or cannot be saved again, from being loaded as evidence."""
    with pytest.raises(MaskError) as error:
        parse_mask(edited(field, value))
    assert_one_sentence(error, field, repr(value))


@pytest.mark.parametrize("interval", [[], [1.0], [1.0, 1.1, 1.2]])
def test_an_interval_has_two_ends(interval: list[float]) -> None:
    """Prevents a confidence interval that cannot be unpacked."""
    with pytest.raises(MaskError) as error:
        parse_mask(edited("evidence.speedup_ci", interval))
    assert_one_sentence(error, "evidence.speedup_ci")


# Refusals by file


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """Prevents a traceback, or an empty mask, for a mistyped path."""
    path = tmp_path / "no" / "mask.json"
    with pytest.raises(MaskError) as error:
        load_mask(path)
    assert_one_sentence(error, str(path), "does not exist")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """Prevents a copy that was cut short from being read as a smaller mask."""
    path = tmp_path / "mask.json"
    parse_mask(DOCUMENT).save(path)
    whole = path.read_text().rstrip()
    for length in range(len(whole)):
        write(path, whole[:length])
        with pytest.raises(MaskError) as error:
            load_mask(path)
        assert_one_sentence(error, str(path), "not whole JSON", "line")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"[" * 100_000, b'{"format": ' + b"1" * 5000 + b"}"], ids=["binary", "deep", "digits"]
)
def test_unreadable_content_is_refused(tmp_path: Path, content: bytes) -> None:
    """Prevents the JSON parser's other errors from reaching the user as tracebacks."""
    path = tmp_path / "mask.json"
    path.write_bytes(content)
    with pytest.raises(MaskError) as error:
        load_mask(path)
    assert_one_sentence(error, str(path), "cannot be read")


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "[" * 280 + "]" * 280])
def test_what_could_not_be_written_again_is_refused(tmp_path: Path, value: str) -> None:
    """Prevents a field that this version does not know from being another one, or a traceback, after it is saved."""
    path = write(tmp_path / "mask.json", json.dumps(DOCUMENT)[:-1] + f', "later": {value}}}')
    with pytest.raises(MaskError) as error:
        load_mask(path)
    assert_one_sentence(error, str(path), "cannot be written again")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """Prevents a traceback for the folder of a mask in place of the mask."""
    with pytest.raises(MaskError) as error:
        load_mask(tmp_path)
    assert_one_sentence(error, str(tmp_path), "cannot be read")
