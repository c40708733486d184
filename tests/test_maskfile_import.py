"""Published skip sets become mask files, by the same checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import assert_one_sentence
from documents import write

from skipsearch.errors import MaskError
from skipsearch.mask import SkipMask
from skipsearch.maskfile import load_mask
from skipsearch.maskimport import import_mask

SELF_SD = {
    "llama-2-13b": {"attention": [3, 5, 6], "mlp": [6, 9]},
    "codellama-13b": {"attention": [5], "mlp": [10, 39]},
}
SWIFT = {
    "llama-2-13b_cnndm": {"attention": [2, 5], "mlp": [9]},
    "llama-2-13b_chat_cnndm": {"attention": [7], "mlp": [7, 8]},
}


@pytest.mark.parametrize(("entries", "key"), [(entries, key) for entries in (SELF_SD, SWIFT) for key in entries])
def test_both_published_formats_are_read(tmp_path: Path, entries: dict[str, Any], key: str) -> None:
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
    """Prevents a required --key for a file with one entry."""
    mask = import_mask(write(tmp_path / "skip.json", data), num_layers=40).mask
    assert mask == SkipMask(attention={3, 5, 6}, mlp={6, 9}, num_layers=40)


@pytest.mark.parametrize("key", ["llama-2-70b", None])
def test_a_wrong_key_lists_the_choices(tmp_path: Path, key: str | None) -> None:
    """Prevents the first entry from being taken by default, and a KeyError that leaves the user guessing."""
    path = write(tmp_path / "skip_layers.json", SELF_SD)
    with pytest.raises(MaskError) as error:
        import_mask(path, num_layers=40, key=key)
    what = repr(key) if key else f"{len(SELF_SD)} skip sets"
    assert_one_sentence(error, str(path), what, "--key", "codellama-13b, llama-2-13b")


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
