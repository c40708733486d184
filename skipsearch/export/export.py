"""Export a draft: refuse what a format cannot hold, write it beside its place, load it back, compare, then move it."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from skipsearch.errors import ExportError, ResultsError, SkipsearchError, first_line, out_of_memory, shown
from skipsearch.export import checkpoint, custom_generate, gguf, mergekit, nemotron_nas
from skipsearch.export.draft import ANY, Draft, check_skips, compare_logits
from skipsearch.model.identity import check_mask_belongs

# Each module has `write`, which returns how the folder is used, and `load_back` or `compare`.
FORMATS: dict[str, Any] = {
    "hf": checkpoint, "nemotron-nas": nemotron_nas, "mergekit": mergekit, "gguf": gguf,
    "custom-generate": custom_generate,
}  # fmt: skip


def export_mask(draft: Draft, to: str, out: Path) -> dict[str, Any]:
    """Write the draft to a new folder `out` in one of `FORMATS`, and compare it with the draft view.

    Returns:
        format, folder, files with their bytes, layers, of, skipped, check, and next, how the folder is used.

    Raises:
        ExportError: the format is unknown or cannot hold this draft; names the first sublayer that does not fit.
        MaskError: the mask is for another model.
        ResultsError: the folder holds files, or cannot be written.
    """
    if to not in FORMATS:
        raise ExportError(f"format is {shown(to)}, must be one of {', '.join(FORMATS)}; correct it")
    check_mask_belongs(draft.file, draft.loaded.target)
    if not draft.file.plan.drafts and not draft.file.draft.ngram:
        raise ExportError("the mask skips nothing, so its draft is the model itself; export one that skips")
    if to != "custom-generate":
        check_skips(draft, to, whole=to != "nemotron-nas")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ResultsError(f"folder {out} exists and is not empty; choose another with --out, or remove it")
    try:
        found, next_step = _write(draft, to, out)
    except SkipsearchError:
        raise
    except Exception as error:  # libraries raise anything where a class and its weights do not fit
        if out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.strerror:
            raise ResultsError(f"cannot write {out} ({error.strerror}); choose another with --out") from error
        raise ExportError(f"{to} cannot hold this model ({first_line(error)}); {ANY}") from error
    files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    return {
        "format": to, "folder": str(out), "files": files, "layers": len(draft.kept), "of": draft.mask.num_layers,
        "skipped": len(draft.mask), "check": found, "next": next_step,
    }  # fmt: skip


def _write(draft: Draft, to: str, out: Path) -> tuple[dict[str, Any], str]:
    form, place = FORMATS[to], out.resolve()
    made = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _compared(draft, form, out, place)
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()  # if nothing else is in it
        raise


def _compared(draft: Draft, form: Any, out: Path, place: Path) -> tuple[dict[str, Any], str]:
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".export-") as beside:
        folder = Path(beside) / place.name  # the library keeps code by the folder's name
        folder.mkdir()
        draft.file.save(folder / "mask.json")
        next_step = form.write(draft, folder).replace(str(folder), str(out))
        if form is custom_generate:
            found = form.compare(draft, folder)
        else:
            found = compare_logits(draft, form.load_back(draft, folder))
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)  # the library writes them for their owner alone
        if place.is_dir():
            place.rmdir()
        shutil.move(folder, place)
    return found, next_step
