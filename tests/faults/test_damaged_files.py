"""Damaged files: what a stage reads back is right, made anew, or refused in one sentence; never wrong."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import quiet
from counts import FULL, tell, times
from small_run import Anew, anew, opened, small_run

from skipsearch import load_mask
from skipsearch.errors import MaskError, SkipsearchError
from skipsearch.evaluate import profile, trace, validate
from skipsearch.files import read_checked, write_checked
from skipsearch.maskfile import MaskFile
from skipsearch.search import prepare, sensitivity

Reader = Callable[[Path], Any]


@pytest.fixture
def kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_run(tmp_path_factory.getbasetemp() / "small-run")


@pytest.fixture
def readers(kept: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Reader]:
    """By name of a file, how its stage reads it; what would make it anew says so."""
    for place, name in ((trace, "record"), (profile, "profile")):
        monkeypatch.setattr(place, name, anew)
    monkeypatch.setattr(sensitivity, "single_losses", lambda *_, known, **__: known)

    def again(function: Callable[..., Any], name: str) -> Reader:
        (_, *args), kwargs = kept.calls[name]
        return lambda path: function(path, *args, **kwargs)

    def losses(path: Path) -> Any:
        _, identity, windows, _, space, _ = kept.calls["sensitivity_or_load"][0]
        return sensitivity.sensitivity_or_load(path, identity, windows, anew, space, quiet)

    def runs(path: Path) -> Any:
        _, key, timing = kept.calls["_read"][0]
        fresh = SimpleNamespace(prompts=timing.prompts, measured=dict.fromkeys(timing.measured))
        validate._read(path, key, fresh)
        return fresh.measured if all(fresh.measured.values()) else anew()

    def forms(path: Path) -> Any:
        found = prepare.priced_forms(path, *kept.calls["priced_forms"][0][1:])
        return anew() if found is None else found

    def mask(path: Path) -> Any:
        file = load_mask(path)
        return {name: getattr(file, name) for name in MaskFile.model_fields}

    costs = again(profile.profile_or_load, "profile_or_load")
    return {
        "trace.json": again(trace.record_or_load, "record_or_load"),
        "costs.json": lambda path: (costs(path), forms(path)),
        "sensitivity.json": losses,
        "validation.json": runs,
        "mask.json": mask,
        "study.db": lambda path: opened(kept, path),
    }


def damaged(data: bytes, name: str) -> Iterator[bytes]:
    rng = random.Random(name)
    step = 64 if FULL else max(64, len(data) // 24)
    for end in range(0, len(data), step):
        yield data[:end]
    places = [place for place, byte in enumerate(data) if byte]  # much of a database is empty
    for _ in range(times(40, 200)):
        place = rng.choice(places)
        yield data[:place] + bytes([data[place] ^ rng.randrange(1, 256)]) + data[place + 1 :]


FILES = ("trace.json", "costs.json", "sensitivity.json", "validation.json", "mask.json", "study.db")


def test_every_file_that_stages_read_is_here(kept: Any) -> None:
    """Prevents a new file that is read back without a checksum."""
    written = {path.name for path in kept.folder.iterdir()} - {"study.db-wal", "study.db-shm"}
    assert written == {*FILES, "trials.csv", "front.json", "summary.json", "texts.json"}  # these are for people


@pytest.mark.parametrize("name", FILES)
def test_damage_is_never_a_wrong_result(name: str, kept: Any, readers: dict[str, Reader], tmp_path: Path) -> None:
    """Prevents a bad disk or a cut copy from changing scores, masks or verdicts, or from ending in a traceback."""
    data, read, path = (kept.folder / name).read_bytes(), readers[name], tmp_path / name
    path.write_bytes(data)
    right, found = read(path), Counter[str]()
    for number, bad in enumerate(damaged(data, name)):
        for left in tmp_path.iterdir():
            left.unlink()
        path.write_bytes(bad)
        try:
            assert read(path) == right, f"damage {number} is taken for right"
            found["right"] += 1
        except Anew:
            found["anew"] += 1
        except SkipsearchError as error:
            assert len(str(error).splitlines()) == 1, error
            found["refused"] += 1
    tell(f"damaged {name}", found.total(), **found)
    assert found["anew"] + found["refused"] > 20


def test_files_without_a_checksum_are_read(kept: Any, readers: dict[str, Reader], tmp_path: Path) -> None:
    """Prevents results of earlier versions from being made anew, and masks written by hand from being refused."""
    for name in FILES[:-1]:
        data = json.loads((kept.folder / name).read_text())
        assert data.pop("checksum" if name == "mask.json" else "sha256")
        (tmp_path / name).write_text(json.dumps(data))
        assert readers[name](tmp_path / name) == readers[name](kept.folder / name)


def test_a_changed_mask_names_the_mend(kept: Any, tmp_path: Path) -> None:
    """Prevents an edit on purpose from being a dead end, and a checksum from being carried into a changed file."""
    data, path = json.loads((kept.folder / "mask.json").read_text()), tmp_path / "mask.json"
    data["draft"]["max_length"] = 3
    path.write_text(json.dumps(data))
    with pytest.raises(MaskError, match=r"changed after it was written.*delete the field checksum"):
        load_mask(path)
    del data["checksum"]
    path.write_text(json.dumps(data))
    load_mask(path).save(path)
    assert load_mask(path).draft.max_length == 3 and "checksum" not in load_mask(path).model_dump()


def test_a_file_of_other_content_counts_as_missing(tmp_path: Path) -> None:
    """Prevents tracebacks for files that are whole, and hold something else."""
    path = tmp_path / "x.json"
    write_checked(path, {"a": (1, 2.5)})
    assert read_checked(path, lambda data: data["a"]) == [1, 2.5]
    takes: list[Callable[[Any], Any]] = [
        lambda d: d["b"], lambda d: d["a"]["b"], lambda d: d.a, lambda d: d["a"][7], lambda d: 1 / 0, lambda d: int("x")
    ]  # fmt: skip
    assert [read_checked(path, take) for take in takes] == [None] * len(takes)
    for text in ("[1]", "3", "null", "[" * 100_000, '{"a": NaN, "sha256": ""}', "\udc80"):
        path.write_bytes(text.encode(errors="surrogateescape"))
        assert read_checked(path, lambda data: data) is None
