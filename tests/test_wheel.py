"""The wheel, unpacked in another folder: what it holds, and that it needs no repository."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
NEEDED = {
    "skipsearch/py.typed", "skipsearch/search_spaces/llama-2-13b.toml", "skipsearch/demo/model/model.safetensors",
    "skipsearch/demo/model/tokenizer.json", "skipsearch/evaluate/instructions.jsonl", "skipsearch/report/page.css",
}  # fmt: skip


def build(kind: str, out: Path, source: Path = REPOSITORY) -> Path:
    """Without pip, which would make an environment for the build and ask the network for it."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    made = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(out)], cwd=source,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, without those of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("wheel", folder / "dist")) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the unpacked wheel, in its folder's neighbour."""
    elsewhere = site.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "skipsearch.cli", *arguments], cwd=elsewhere, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)}, check=False,
    )  # fmt: skip


def test_the_wheel_holds_what_the_package_reads(unpacked: Path) -> None:
    """Prevents a wheel without the bundled model, presets, the page's style, types or licence; or with tests."""
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert files >= NEEDED
    information = f"skipsearch-{PROJECT['version']}.dist-info"
    assert files >= {f"{information}/licenses/LICENSE", f"{information}/entry_points.txt"}
    assert {Path(name).parts[0] for name in files} == {"skipsearch", information}
    known = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "skipsearch").rglob("*.*")}
    assert not [name for name in known if "__pycache__" not in name and (REPOSITORY / name).is_file()
                and name not in files]  # fmt: skip


def test_the_wheel_runs_where_there_is_no_repository(unpacked: Path) -> None:
    """Prevents a file that is found beside the package in the repository alone."""
    assert run(unpacked, "--version").stdout.strip() == PROJECT["version"]
    assert "skipsearch run --model demo" in run(unpacked).stdout
    presets: dict[str, Any] = json.loads(run(unpacked, "models", "--json").stdout)
    assert {"demo", "llama-2-13b"} <= set(presets)
    few = "--trials 2 --time-budget 1 --num-prompts 2 --num-held-out 2 --prompt-tokens 12 --new-tokens 8 --rounds 1"
    space = unpacked.parent / "space.toml"
    space.write_text('[space]\nforms = ["skip"]\n')
    found = run(unpacked, "run", "-m", "demo", "--backend", "eager", "--space", str(space), *few.split(), "--json")
    assert found.returncode in (0, 1) and json.loads(found.stdout)["trials"] >= 1, found.stderr
    assert (unpacked.parent / "elsewhere/results/demo/report.html").is_file()
    assert not found.stderr  # no bar of weights that are loaded


def test_the_source_distribution_builds_the_same_wheel(unpacked: Path, tmp_path: Path) -> None:
    """Prevents a source distribution without the presets, or with anyone's results."""
    with tarfile.open(build("sdist", tmp_path / "dist")) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.glob("skipsearch-*"))
    assert (
        (source / "LICENSE").is_file() and (source / "constraints.txt").is_file() and not (source / "results").exists()
    )
    with zipfile.ZipFile(build("wheel", tmp_path / "again", source)) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    assert names == {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")
                     if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip


def test_every_import_is_declared() -> None:
    """Prevents a package that another one brings today from missing tomorrow, or in an empty environment."""
    texts = [*PROJECT["dependencies"], *itertools.chain.from_iterable(PROJECT["optional-dependencies"].values())]
    declared = {re.split("[^A-Za-z0-9_-]", text)[0].replace("_", "-").lower() for text in texts}
    known, missing = {"pynvml": ["nvidia-ml-py"], **packages_distributions()}, set[str]()
    for path in (REPOSITORY / "skipsearch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for top in {name.partition(".")[0] for name in names} - {"skipsearch", ""} - sys.stdlib_module_names:
                if not {found.replace("_", "-").lower() for found in known.get(top, [top])} & declared:
                    missing.add(top)
    assert not missing
