"""mask.json: written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_one_sentence
from documents import DOCUMENT, write

from skipsearch.errors import MaskError, ResultsError
from skipsearch.files import write_json
from skipsearch.maskfile import MaskFile, ModelCard, SkipSets, load_mask, parse_mask


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
