"""The presets in search_spaces/: each follows the schema, and holds the published masks as published."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from skipsearch.mask import SkipMask

FOLDER = Path(__file__).parents[1] / "search_spaces"

LAYERS = {
    "codellama-13b": 40, "codellama-34b": 48, "demo": 20,
    "llama-2-7b": 32, "llama-2-7b-chat": 32, "llama-2-13b": 40, "llama-2-13b-chat": 40,
    "llama-2-70b": 80, "llama-2-70b-chat": 80, "llama-3.1-8b": 32, "llama-3.1-70b": 80,
    "mistral-7b": 32, "qwen3-8b": 36, "smollm2-135m-instruct": 30,
}  # fmt: skip

# (preset, mask) -> attention and MLP sublayers skipped, then the sums of their ids, all as published.
PUBLISHED = {
    ("llama-2-13b", "self-sd"): (24, 10, 530, 190),
    ("llama-2-13b", "swift-cnndm"): (20, 14, 422, 308),
    ("llama-2-13b-chat", "self-sd"): (24, 10, 577, 239),
    ("llama-2-13b-chat", "swift-cnndm"): (18, 16, 462, 335),
    ("llama-2-70b", "self-sd"): (47, 37, 2131, 1436),
    ("llama-2-70b", "swift-cnndm"): (41, 37, 1755, 1601),
    ("codellama-13b", "self-sd"): (22, 12, 499, 269),
    ("codellama-13b", "swift-humaneval"): (14, 20, 301, 399),
    ("codellama-34b", "swift-humaneval"): (22, 24, 626, 581),
}

SOURCES = {
    "self-sd": ("arXiv 2309.08168", "dilab-zju/self-speculative-decoding"),
    "swift": ("arXiv 2410.06916", "hemingkx/SWIFT"),
}


def read(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def mask_of(preset: dict[str, Any], entry: dict[str, Any]) -> SkipMask:
    return SkipMask(attention=entry["attention"], mlp=entry["mlp"], num_layers=preset["model"]["num_layers"])


presets = pytest.mark.parametrize("name", LAYERS)


def test_the_presets_are_those_expected() -> None:
    """Prevents a preset from being lost, or added without a layer count checked here."""
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(LAYERS)


@presets
def test_keys_are_exactly_those_of_the_schema(name: str) -> None:
    """Prevents a misspelt key, which would be ignored silently."""
    preset = read(name)
    assert {"model"} <= set(preset) <= {"model", "space", "masks"}
    assert set(preset["model"]) - {"id", "num_layers"} in (set(), {"package", "file"})
    known = {"fixed_attention", "fixed_mlp", "only", "structure", "spans", "max_skipped", "forms"}
    assert set(preset.get("space", {})) <= known
    assert all(preset.get("space", {"": [0]}).values()), "an empty list says nothing: leave it out"
    for entry in preset.get("masks", []):
        assert set(entry) == {"name", "source", "attention", "mlp"}


@presets
def test_model_id_and_layers(name: str) -> None:
    """Prevents a preset that searches the wrong number of layers, or a hub id without its owner."""
    model = read(name)["model"]
    assert model["num_layers"] == LAYERS[name]
    assert model["id"] == "demo" if name == "demo" else model["id"].count("/") == 1


def test_model_ids_are_unique() -> None:
    """Prevents a copied preset that still names the other model."""
    assert len({read(name)["model"]["id"] for name in LAYERS}) == len(LAYERS)


@presets
def test_every_mask_fits_its_model(name: str) -> None:
    """Prevents a warm start that is out of range, duplicate, or unsorted and so edited by hand."""
    preset = read(name)
    for entry in preset.get("masks", []):
        mask = mask_of(preset, entry)
        assert mask.to_dict() == {k: entry[k] for k in ("attention", "mlp")} | {"num_layers": mask.num_layers}


@presets
def test_no_mask_skips_a_fixed_sublayer(name: str) -> None:
    """Prevents a warm start that lies outside the space it is meant to start."""
    preset = read(name)
    space = preset.get("space", {})
    fixed = SkipMask(
        attention=space.get("fixed_attention", []),
        mlp=space.get("fixed_mlp", []),
        num_layers=preset["model"]["num_layers"],
    )
    for entry in preset.get("masks", []):
        assert not mask_of(preset, entry) & fixed


@presets
def test_every_mask_names_its_source(name: str) -> None:
    """Prevents somebody else's result from being shipped without paper, repository and licence."""
    entries = read(name).get("masks", [])
    for entry in entries:
        method = next(method for method in SOURCES if entry["name"].startswith(method))
        for part in (*SOURCES[method], "Apache-2.0"):
            assert part in entry["source"]
    assert len({entry["name"] for entry in entries}) == len(entries)


def test_the_published_masks_are_as_published() -> None:
    """Prevents a mask that is lost, altered, or filed under another model."""
    found = {
        (name, entry["name"]): (
            len(entry["attention"]),
            len(entry["mlp"]),
            sum(entry["attention"]),
            sum(entry["mlp"]),
        )
        for name in LAYERS
        for entry in read(name).get("masks", [])
    }
    assert found == PUBLISHED


@presets
def test_a_comment_says_what_the_model_is(name: str) -> None:
    """Prevents a preset without a description of its model."""
    first = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
