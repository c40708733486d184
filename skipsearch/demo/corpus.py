"""The standard library as a corpus: modules that trained the bundled model, and held-out modules.

A hash of the module's path decides, so the split is the same for every version of the interpreter, in training and
in prompts. Test modules are never held out: some distributions of Python do not contain them.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

# Tables of characters and help texts are not code; learning them would waste capacity of a small model.
_NOT_CODE = ("encodings/", "pydoc_data/", "lib2to3/tests/data/")
_NOT_STDLIB = ("site-packages", "dist-packages", "__pycache__")
_HELD_OUT_ONE_IN = 16


def _is_held_out(name: str) -> bool:
    """Whether the module is kept from training; `name` is its posix path relative to the root of the library."""
    is_test = any(part in ("test", "tests", "idle_test") for part in name.split("/"))
    return not is_test and zlib.crc32(name.encode()) % _HELD_OUT_ONE_IN == 0


def modules(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """Yield (relative posix path, source text) of every readable module on one side of the split, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in _NOT_STDLIB for part in path.parts) or name.startswith(_NOT_CODE):
            continue
        if _is_held_out(name) != held_out:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few test modules are in other encodings on purpose
        if text.strip():
            yield name, text
