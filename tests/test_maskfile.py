"""mask.json: what is saved loads again, what is wrong is refused in one sentence, a failed write harms nothing."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipsearch.errors import MaskError, ResultsError
from skipsearch.files import write_json
from skipsearch.mask import SkipMask
from skipsearch.maskfile import (
    Draft,
    Evidence,
    MaskFile,
    ModelCard,
    Provenance,
    SkipSets,
    import_mask,
    load_mask,
    parse_mask,
)

PATIENT = settings(deadline=None, max_examples=50)

EVIDENCE = {
    "acceptance_rate": 0.875, "tau": 4.5, "cost_ratio": 0.5, "speedup": 1.25, "speedup_ci": [1.125, 1.375],
    "baseline": "greedy, same runtime", "tokens_per_second": 50.0, "baseline_tokens_per_second": 40.0,
    "greedy_equal": True, "backend": "eager", "dtype": "float32", "device": "cpu", "prompts": 16, "tokens": 2048,
    "prompts_sha256": "ab12", "verdict": "use",
}  # fmt: skip

DOCUMENT: dict[str, Any] = {
    "format": "skipsearch-mask",
    "version": 1,
    "model": {
        "id": "demo", "revision": None, "architecture": "LlamaForCausalLM", "num_layers": 4, "config_sha256": "cd34",
    },
    "skip": {"attention": [0, 2], "mlp": [2, 3]},
    "draft": {"max_length": 7, "exit_threshold": 0.5},
    "evidence": EVIDENCE,
    "provenance": {
        "tool_version": "0.1.0", "torch": "2.9.0", "transformers": "5.17.0", "study": "demo", "trial": 12, "seed": 0,
        "created": "2026-01-01T00:00:00Z",
    },
}  # fmt: skip


def edited(field: str, *value: Any) -> dict[str, Any]:
    """DOCUMENT with the dotted field set to the value, or, with no value, removed."""
    data = copy.deepcopy(DOCUMENT)
    *parents, last = field.split(".")
    place = data
    for parent in parents:
        place = place[parent]
    if value:
        place[last] = value[0]
    else:
        del place[last]
    return data


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def assert_one_sentence(error: pytest.ExceptionInfo[Any], *parts: str) -> None:
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert part in message


# Round trips

numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
counts = st.integers(0, 10**6)


@st.composite
def mask_files(draw: st.DrawFn) -> MaskFile:
    layers = draw(st.integers(1, 24))
    ids = st.sets(st.integers(0, layers - 1))
    evidence = st.builds(
        Evidence,
        acceptance_rate=numbers, tau=numbers, cost_ratio=numbers, speedup=numbers,
        speedup_ci=st.tuples(numbers, numbers), baseline=texts, tokens_per_second=numbers,
        baseline_tokens_per_second=numbers, greedy_equal=st.booleans(), backend=texts, dtype=texts, device=texts,
        prompts=counts, tokens=counts, prompts_sha256=texts, verdict=st.sampled_from(["use", "do not use"]),
    )  # fmt: skip
    return MaskFile.of(
        SkipMask(attention=draw(ids), mlp=draw(ids), num_layers=layers),
        model=ModelCard(id=draw(texts), revision=draw(st.none() | texts), num_layers=layers),
        draft=Draft(
            max_length=draw(st.integers(1, 64)),
            exit_threshold=draw(st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True)),
        ),
        evidence=draw(st.none() | evidence),
        provenance=Provenance(study=draw(st.none() | texts), trial=draw(st.none() | counts)),
    )


@PATIENT
@given(file=mask_files())
def test_what_is_saved_loads_again(tmp_path_factory: pytest.TempPathFactory, file: MaskFile) -> None:
    """Prevents a field that is lost, rounded or respelt between save and load, or a second save that differs."""
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    file.save(path)
    first = path.read_bytes()
    loaded = load_mask(path)
    assert loaded == file
    assert loaded.mask == file.mask
    loaded.save(path)
    assert path.read_bytes() == first


def test_load_reads_every_part(tmp_path: Path) -> None:
    """Prevents a writer and a reader that agree with each other but not with the documented schema."""
    file = load_mask(write(tmp_path / "mask.json", DOCUMENT))
    assert file.mask == SkipMask(attention={0, 2}, mlp={2, 3}, num_layers=4)
    assert (file.draft.max_length, file.draft.exit_threshold) == (7, 0.5)
    assert (file.model.id, file.model.architecture, file.model.config_sha256) == ("demo", "LlamaForCausalLM", "cd34")
    assert (file.provenance.study, file.provenance.trial, file.provenance.created) == (
        "demo", 12, "2026-01-01T00:00:00Z",
    )  # fmt: skip


def test_evidence_is_kept(tmp_path: Path) -> None:
    """Prevents a mask that loses what was measured, even what a later skipsearch added to it."""
    later = {**EVIDENCE, "verdict": "do not use", "energy_joules": [1.5, 2.5]}
    load_mask(write(tmp_path / "in.json", edited("evidence", later))).save(tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["evidence"] == later
    evidence = load_mask(tmp_path / "out.json").evidence
    assert evidence is not None
    assert (evidence.speedup_ci, evidence.verdict) == ((1.125, 1.375), "do not use")


def test_only_the_skip_sets_and_the_model_are_needed() -> None:
    """Prevents a mask that nobody has validated from being refused, or from being given evidence."""
    file = parse_mask({k: DOCUMENT[k] for k in ("format", "version", "model", "skip")})
    assert file.evidence is None
    assert file.draft == Draft(max_length=5, exit_threshold=None)


def test_saved_file_is_spelt_as_documented(tmp_path: Path) -> None:
    """Prevents a drift of the file format under those who read it without skipsearch."""
    parse_mask(DOCUMENT).save(tmp_path / "mask.json")
    assert json.loads((tmp_path / "mask.json").read_text()) == {
        **DOCUMENT,
        "per_layer_config": {
            "0": {"skip": ["attention"]},
            "2": {"skip": ["attention", "mlp"]},
            "3": {"skip": ["mlp"]},
        },
    }


def test_ids_are_written_sorted(tmp_path: Path) -> None:
    """Prevents files of one mask that differ by set order."""
    mask = SkipMask(attention=[33, 2, 17, 8], mlp=[64, 1], num_layers=80)
    MaskFile.of(mask, model=ModelCard(num_layers=80)).save(tmp_path / "mask.json")
    assert json.loads((tmp_path / "mask.json").read_text())["skip"] == {"attention": [2, 8, 17, 33], "mlp": [1, 64]}


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


@pytest.mark.parametrize("value", [0, 2, "1", None, [1]])
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


def test_a_folder_is_refused(tmp_path: Path) -> None:
    """Prevents a traceback for the folder of a mask in place of the mask."""
    with pytest.raises(MaskError) as error:
        load_mask(tmp_path)
    assert_one_sentence(error, str(tmp_path), "cannot be read")


# Writing whole or not at all


def fail(number: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    """Prevents a failed save from harming what stands in its way, or from leaving files about."""
    blocker = write(tmp_path / "results", "old")
    path = blocker / "mask.json"
    with pytest.raises(ResultsError) as error:
        parse_mask(DOCUMENT).save(path)
    assert_one_sentence(error, str(path), "--out")
    assert blocker.read_text() == "old"
    assert os.listdir(tmp_path) == ["results"]


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("tempfile.NamedTemporaryFile", errno.EACCES),
        ("os.fsync", errno.ENOSPC),
        ("os.chmod", errno.EPERM),
        ("os.replace", errno.ENOSPC),
    ],
)
@pytest.mark.parametrize("old", ["old mask", None])
def test_a_failure_in_mid_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, old: str | None
) -> None:
    """Prevents a full disk from costing the user the mask that was there, or a half-written one from appearing."""
    path = tmp_path / "mask.json"
    if old is not None:
        write(path, old)
    with monkeypatch.context() as patch, pytest.raises(ResultsError) as error:
        patch.setattr(call, fail(number))
        parse_mask(DOCUMENT).save(path)
    assert_one_sentence(error, str(path), os.strerror(number))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([] if old is None else [("mask.json", old)])


def test_the_new_file_is_whole_before_it_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents readers, and a power cut, from meeting a file that is still being written."""
    path = write(tmp_path / "mask.json", "old mask")
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        events.append("fsync")
        assert os.fstat(descriptor).st_size > 0
        fsync(descriptor)

    def watched_replace(source: str, target: Path) -> None:
        events.append("replace")
        assert load_mask(source) == parse_mask(DOCUMENT)
        assert Path(target).read_text() == "old mask"
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", watched_fsync)
        patch.setattr("os.replace", watched_replace)
        parse_mask(DOCUMENT).save(path)
    assert events == ["fsync", "replace"]
    assert os.listdir(tmp_path) == ["mask.json"]


def test_saving_makes_the_folder_and_a_file_that_others_can_read(tmp_path: Path) -> None:
    """Prevents the private mode of temporary files from sticking to results."""
    path = tmp_path / "results" / "demo" / "mask.json"
    parse_mask(DOCUMENT).save(path)
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_inconsistent_mask_is_not_written(tmp_path: Path) -> None:
    """Prevents a file that `load_mask` would refuse."""
    path = write(tmp_path / "mask.json", "old mask")
    with pytest.raises(MaskError) as error:
        MaskFile(model=ModelCard(num_layers=4), skip=SkipSets(attention=[9], mlp=[])).save(path)
    assert_one_sentence(error, "skip.attention", "layer 9")
    assert path.read_text() == "old mask"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_json_is_not_written(tmp_path: Path, value: float) -> None:
    """Prevents NaN, which Python writes and other JSON readers refuse, from replacing a good file."""
    path = write(tmp_path / "row.json", "old row")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"speedup": value})
    assert path.read_text() == "old row"


# Import

SELF_SD = {
    "llama-2-13b": {"attention": [3, 5, 6], "mlp": [6, 9]},
    "codellama-13b": {"attention": [5], "mlp": [10, 39]},
}
SWIFT = {
    "llama-2-13b_cnndm": {"attention": [2, 5], "mlp": [9]},
    "llama-2-13b_chat_cnndm": {"attention": [7], "mlp": [7, 8]},
}


@pytest.mark.parametrize(("entries", "key"), [(entries, key) for entries in (SELF_SD, SWIFT) for key in entries])
def test_both_published_dialects_are_read(tmp_path: Path, entries: dict[str, Any], key: str) -> None:
    """Prevents the wrong entry from being taken, or attention and MLP from being swapped."""
    file = import_mask(write(tmp_path / "skip_layers.json", entries), num_layers=40, key=key, model_id="some/model")
    assert file.mask == SkipMask(**entries[key], num_layers=40)
    assert (file.model.id, file.model.num_layers, file.provenance.study) == ("some/model", 40, f"import:{key}")
    assert file.evidence is None
    file.save(tmp_path / "mask.json")
    assert load_mask(tmp_path / "mask.json") == file


def test_sets_under_a_table_of_sources_are_read(tmp_path: Path) -> None:
    """Prevents equal names from two sources from hiding each other."""
    path = write(tmp_path / "masks.json", {"note": "two papers", "sources": {"self-sd": SELF_SD, "swift": SWIFT}})
    mask = import_mask(path, num_layers=40, key="swift/llama-2-13b_cnndm").mask
    assert mask == SkipMask(attention={2, 5}, mlp={9}, num_layers=40)


@pytest.mark.parametrize("data", [SELF_SD["llama-2-13b"], {"llama-2-13b": SELF_SD["llama-2-13b"]}])
def test_a_lone_skip_set_needs_no_key(tmp_path: Path, data: Any) -> None:
    """Prevents a question that has one answer."""
    mask = import_mask(write(tmp_path / "skip.json", data), num_layers=40).mask
    assert mask == SkipMask(attention={3, 5, 6}, mlp={6, 9}, num_layers=40)


@pytest.mark.parametrize("key", ["llama-2-70b", None])
def test_a_wrong_key_lists_the_choices(tmp_path: Path, key: str | None) -> None:
    """Prevents the first entry from being taken by default, and a KeyError that leaves the user guessing."""
    path = write(tmp_path / "skip_layers.json", SELF_SD)
    with pytest.raises(MaskError) as error:
        import_mask(path, num_layers=40, key=key)
    assert_one_sentence(error, str(path), repr(key), "--key", "codellama-13b, llama-2-13b")


@pytest.mark.parametrize("data", [{}, [], {"note": "nothing here"}, 3])
def test_a_file_without_skip_sets_is_refused(tmp_path: Path, data: Any) -> None:
    """Prevents any JSON at all from being imported as an empty mask."""
    with pytest.raises(MaskError) as error:
        import_mask(write(tmp_path / "skip.json", data), num_layers=40)
    assert_one_sentence(error, "skip.json", "none")


def test_imported_ids_must_fit_the_model(tmp_path: Path) -> None:
    """Prevents a mask of a 40-layer model from being imported for one of 32."""
    with pytest.raises(MaskError) as error:
        import_mask(write(tmp_path / "skip_layers.json", SELF_SD), num_layers=32, key="codellama-13b")
    assert_one_sentence(error, "skip.mlp", "layer 39", "0..31")


@pytest.mark.parametrize(
    ("ids", "parts"),
    [([-1], ["layer -1"]), ([3, 3], ["layer 3 twice"]), ([True], ["True"]), ("3", ["'3'"]), (None, ["None"])],
)
def test_imported_ids_are_checked(tmp_path: Path, ids: Any, parts: list[str]) -> None:
    """Prevents import from being a way around the checks of a mask."""
    with pytest.raises(MaskError) as error:
        import_mask(write(tmp_path / "skip.json", {"model": {"attention": ids, "mlp": []}}), num_layers=40)
    assert_one_sentence(error, "attention", *parts)


def test_a_missing_import_is_refused(tmp_path: Path) -> None:
    """Prevents a traceback for a mistyped path."""
    with pytest.raises(MaskError) as error:
        import_mask(tmp_path / "skip_layers.json", num_layers=40)
    assert_one_sentence(error, "skip_layers.json", "does not exist")


def test_a_mask_measured_while_sampling_is_read_back(tmp_path: Path) -> None:
    """Prevents a file that its own writer cannot read: equal tokens are no question there, and say null."""
    mask = load_mask(Path(__file__).parents[1] / "results" / "measured" / "demo.mask.json")
    assert mask.evidence is not None
    sampled = mask.model_copy(
        update={"evidence": mask.evidence.model_copy(update={"greedy_equal": None, "temperature": 0.7})}
    )
    sampled.save(tmp_path / "mask.json")
    assert load_mask(tmp_path / "mask.json") == sampled
