"""Terminals, homes and compilers that are not as expected: plainer output, a note, the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skipsearch import SkipMask
from skipsearch.maskfile import MaskFile, ModelCard


def skipsearch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "skipsearch.cli", *arguments], env={**os.environ, **environment}, capture_output=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_output_that_is_not_utf8(encoding: str, tmp_path: Path) -> None:
    """Prevents: a picture of a mask ends the command with UnicodeEncodeError where the terminal is not UTF-8."""
    mask = SkipMask(attention=[1], mlp=[2], num_layers=4)
    MaskFile.of(mask, model=ModelCard(num_layers=4)).save(tmp_path / "mask.json")
    found = skipsearch("show", str(tmp_path / "mask.json"), PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    shown = found.stdout.decode(encoding)
    assert found.returncode == 0 and not found.stderr
    assert ("█·██" if encoding == "utf-8" else "#.##") in shown.replace("·", "·" if encoding == "utf-8" else ".")
    broken = skipsearch("show", str(tmp_path / "тест.json"), PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert broken.returncode == 1 and b"does not exist" in broken.stderr and b"Traceback" not in broken.stderr


@pytest.mark.parametrize("there", [False, True])
def test_doctor_says_what_decoding_will_do(there: bool, tmp_path: Path) -> None:
    """Prevents "compiled" from a doctor where the compiler is missing or broken, and decoding is eager."""
    if there:
        (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "g++").chmod(0o755)
    found = skipsearch("doctor", "--json", PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    data = json.loads(found.stdout)
    assert data["backend"].startswith("eager") and "g++" in data["backend"]
    assert found.returncode == bool(data["missing"])
