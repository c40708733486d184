"""Export a draft: refuse what a format cannot hold, write it beside its place, load it back, compare, then move it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

from skipsearch.errors import ExportError, ResultsError, shown
from skipsearch.export import checkpoint, custom_generate, gguf, mergekit, nemotron_nas
from skipsearch.export.draft import Draft, check_belongs


class Format(Protocol):
    """What the module of a format offers."""

    def check(self, draft: Draft) -> None:
        """Raise ExportError for what the format cannot hold."""

    def write(self, draft: Draft, folder: Path) -> str:
        """Write the files beside mask.json; returns how they are used."""

    def compare(self, draft: Draft, folder: Path) -> dict[str, Any]:
        """Load back and compare; raise ExportError for a difference."""


FORMATS: dict[str, Format] = {
    "hf": checkpoint, "nemotron-nas": nemotron_nas, "mergekit": mergekit, "gguf": gguf,
    "custom-generate": custom_generate,
}  # fmt: skip


def export_mask(draft: Draft, to: str, out: Path) -> dict[str, Any]:
    """Write the draft to a new folder `out` in one of `FORMATS`, and compare it with the draft view.

    Returns:
        what was written and how it compared: format, folder, files with their bytes, layers, skipped, check, next.

    Raises:
        ExportError: the format is unknown or cannot hold this draft; names the first sublayer that does not fit.
        MaskError: the mask is for another model.
        ResultsError: the folder holds files, or cannot be written.
    """
    if to not in FORMATS:
        raise ExportError(f"format is {shown(to)}, must be one of {', '.join(FORMATS)}; correct --to")
    form = FORMATS[to]
    check_belongs(draft)
    form.check(draft)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ResultsError(f"folder {out} exists and is not empty; choose another with --out, or remove it")
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".export-") as beside:
            folder = Path(beside) / out.resolve().name  # code in it is cached by the folder's name
            folder.mkdir()
            draft.file.save(folder / "mask.json")
            next_step = form.write(draft, folder).replace(str(folder), str(out))
            found = form.compare(draft, folder)
            if out.is_dir():
                out.rmdir()
            shutil.move(folder, out)
    except OSError as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(
            f"cannot write {out} ({error.strerror or error}); choose another folder with --out"
        ) from error
    files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    return {
        "format": to, "folder": str(out), "files": files, "layers": len(draft.kept), "of": draft.mask.num_layers,
        "skipped": len(draft.mask), "check": found, "next": next_step,
    }  # fmt: skip
