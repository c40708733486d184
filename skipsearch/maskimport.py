"""Skip sets in the formats of Self-SD and SWIFT, as mask files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skipsearch.errors import MaskError, shown
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile, ModelCard, Provenance, read_json


def import_mask(path: str | Path, *, num_layers: int, key: str | None = None, model_id: str = "unknown") -> MaskFile:
    """Read a skip set in the format of Self-SD or SWIFT: `{"name": {"attention": [..], "mlp": [..]}}`.

    A single `{"attention": .., "mlp": ..}` is also read, and so are several such sets under a "sources" table.

    Args:
        num_layers: decoder layers of the model.
        key: name of the entry; not needed if the file has only one.
        model_id: hub id of the model, for the new file.

    Raises:
        MaskError: the entry does not exist, or its ids do not fit `num_layers`.
    """
    try:
        entries = dict(_skip_sets(read_json(Path(path), "check the path")))
    except RecursionError:
        raise MaskError(f"{path} holds no skip set, its tables are nested too deep; check the path") from None
    if key is None and len(entries) == 1:
        key = next(iter(entries))
    if key not in entries:
        what = f"no skip set named {shown(key)}" if key is not None or not entries else f"{len(entries)} skip sets"
        names = shown(", ".join(sorted(entries)) or "none", 2000)[1:-1]
        raise MaskError(f"{path} holds {what}; pass --key with one of: {names}")
    sets = entries[key]
    for kind in ("attention", "mlp"):
        if not isinstance(sets.get(kind, []), list):
            got, name = shown(sets[kind]), shown(f"{key}.{kind}")[1:-1]
            raise MaskError(f"{path}: {name} must be a list of layer numbers, got {got}; correct it")
    mask = SkipMask(attention=sets.get("attention", []), mlp=sets.get("mlp", []), num_layers=num_layers)
    return MaskFile.of(
        mask, model=ModelCard(id=model_id, num_layers=num_layers), provenance=Provenance(study=f"import:{key}")
    )


def _skip_sets(data: Any, name: str = "mask") -> list[tuple[str, dict[str, Any]]]:
    """Every skip set in the file with its key: the names of the tables around it, joined by "/"."""
    if not isinstance(data, dict):
        return []
    if "attention" in data or "mlp" in data:
        return [(name, data)]
    found = []
    for key, value in data.items():
        path = key if name in ("mask", "sources") else f"{name}/{key}"
        found += _skip_sets(value, path)
    return found
