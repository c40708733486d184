"""mask.json: what is saved loads again, spelt as documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documents import DOCUMENT, EVIDENCE, edited, write
from hypothesis import given, settings
from hypothesis import strategies as st

from skipsearch.mask import SkipMask
from skipsearch.maskfile import Evidence, MaskFile, ModelCard, Provenance, load_mask, parse_mask
from skipsearch.policy import DraftPolicy

PATIENT = settings(deadline=None, max_examples=50)
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
        draft=DraftPolicy(
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
    assert file.draft == DraftPolicy(max_length=5, exit_threshold=None)


def test_saved_file_is_spelt_as_documented(tmp_path: Path) -> None:
    """Prevents a drift of the file format under those who read it without skipsearch."""
    parse_mask(DOCUMENT).save(tmp_path / "mask.json")
    written = json.loads((tmp_path / "mask.json").read_text())
    assert len(written.pop("checksum")) == 64
    assert written == {
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


def test_a_mask_measured_while_sampling_is_read_back(tmp_path: Path) -> None:
    """Prevents a file that its own writer cannot read: greedy_equal is null in it."""
    mask = load_mask(Path(__file__).parents[1] / "results" / "measured" / "demo.mask.json")
    assert mask.evidence is not None
    sampled = mask.model_copy(
        update={"evidence": mask.evidence.model_copy(update={"greedy_equal": None, "temperature": 0.7})}
    )
    sampled.save(tmp_path / "mask.json")
    assert load_mask(tmp_path / "mask.json") == sampled
