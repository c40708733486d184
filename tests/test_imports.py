"""The rooms of the package: imports point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "skipsearch"
# A room may import itself and the rooms of lower rank; rooms of one rank do not know each other.
RANKS = {
    "values": 0, "demo": 0, "model": 1, "draft": 2, "compiled": 3, "decoding": 4, "joint": 5, "evaluate": 5,
    "generate": 6, "search": 6, "online": 7, "bench": 8, "report": 9, "export": 9, "cli": 10,
}  # fmt: skip
VALUES = {"mask.py", "plan.py", "policy.py", "maskfile.py", "maskimport.py", "errors.py", "files.py"}


def room(path: Path) -> str:
    name = path.relative_to(PACKAGE).parts[0]
    return "values" if name in VALUES else name


def imported(path: Path) -> set[str]:
    """Modules named at any depth of a file, functions and TYPE_CHECKING blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively; write the whole name"
            assert node.module != "skipsearch", f"{path.name} imports from the package; name the module"
            found.add(str(node.module))
    return found


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    """Prevents a room from leaning on one that is built on top of it, or beside it."""
    here = room(path)
    for name in imported(path):
        if name.startswith("skipsearch."):
            target = name.split(".")[1]
            target = "values" if f"{target}.py" in VALUES else target
            assert target == here or RANKS[target] < RANKS[here], f"{path.name} of {here} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optuna_lives_in_the_study_and_its_sampler(path: Path) -> None:
    """Prevents more places that must change with Optuna; and nothing may import the CLI."""
    names = imported(path)
    if path.name not in ("study.py", "storage.py", "sampler.py", "worker.py"):
        assert not {n for n in names if n == "optuna" or n.startswith("optuna.")}
    assert room(path) == "cli" or not {n for n in names if n.startswith("skipsearch.cli")}


@pytest.mark.parametrize("path", [PACKAGE / name for name in sorted(VALUES)], ids=lambda p: p.name)
def test_values_know_no_framework(path: Path) -> None:
    """Prevents masks from needing torch to be read."""
    assert not {n.split(".")[0] for n in imported(path)} & {"torch", "transformers", "optuna"}


def test_help_does_not_wait_for_torch() -> None:
    """Prevents `skipsearch --help` from taking seconds."""
    code = "import sys, skipsearch, skipsearch.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
