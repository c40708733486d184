"""The notebooks run, from the committed results, and hold the outputs that they give."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.fixture
def refresh(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("refresh")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_what_it_gives(name: str, refresh: ModuleType) -> None:
    """Prevents notebooks that fail, that show older results than are committed, or that were never run."""
    path = FOLDER / name
    text = path.read_text(encoding="utf-8")
    assert refresh.refreshed(path) == text, f"{name} is out of date; run `make notebooks`"
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    shown = {kind for cell in cells for output in cell["outputs"] for kind in output.get("data", {"text/plain": ""})}
    assert {"image/svg+xml", "text/plain"} <= shown and len(text.encode()) < 300_000
