"""The standard library as a corpus: which modules teach the bundled model, and which it never sees.

The split is a hash of the module's path, so that it is the same for every interpreter version
and for training and prompting alike. Test modules never serve as held-out text: some
distributions of Python leave them out.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

# Tables of characters and of help text are not code: learning them would waste a small model.
_NOT_CODE = ("encodings/", "pydoc_data/", "lib2to3/tests/data/")
_NOT_STDLIB = ("site-packages", "dist-packages", "__pycache__")
_HELD_OUT_ONE_IN = 16


def _is_test(name: str) -> bool:
    return any(part in ("test", "tests", "idle_test") for part in name.split("/"))


def is_held_out(name: str) -> bool:
    """Whether the module at posix path `name` (relative to the library's root) is kept from training."""
    return not _is_test(name) and zlib.crc32(name.encode()) % _HELD_OUT_ONE_IN == 0


def modules(*, held_out: bool, root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (relative posix path, source text) of every readable module on one side of the split, sorted."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in _NOT_STDLIB for part in path.parts) or name.startswith(_NOT_CODE):
            continue
        if is_held_out(name) != held_out:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few test modules are in other encodings on purpose
        if text.strip():
            yield name, text
