"""Presets: a short name for a model, its search space, and the masks others published for it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from skipsearch.errors import ModelLoadError
from skipsearch.mask import KINDS, SkipMask

Structure = Literal["sublayers", "layers", "spans"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedMask:
    """A mask from the literature, tried first by a search; `source` says whose it is."""

    name: str
    source: str
    mask: SkipMask


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One file of search_spaces/.

    Attributes:
        name: the file's name, as in `--model NAME`.
        model_id: hub id, or "demo".
        fixed: sublayers that the search never skips.
        masks: warm starts.
        structure, spans, max_skipped: see `search.space.Space`.
    """

    name: str
    model_id: str
    num_layers: int
    fixed: SkipMask
    masks: tuple[PublishedMask, ...]
    structure: Structure = "sublayers"
    spans: int = 1
    max_skipped: int | None = None


def _folder() -> Path:
    """search_spaces/ inside an installed package, or beside the package in a source tree."""
    package = Path(__file__).resolve().parents[1]
    return next((f for f in (package / "search_spaces", package.parent / "search_spaces") if f.is_dir()), package)


def presets() -> dict[str, Preset]:
    """Every preset by name, sorted.

    Raises:
        ModelLoadError: a preset file that does not follow the format.
    """
    return {path.stem: read_preset(path) for path in sorted(_folder().glob("*.toml"))}


def read_preset(path: Path) -> Preset:
    """Parse one preset file; see `presets`."""
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        model = data["model"]
        layers = model["num_layers"]
        return Preset(
            name=path.stem, model_id=model["id"], num_layers=layers,
            masks=tuple(
                PublishedMask(
                    name=m["name"], source=m["source"],
                    mask=SkipMask(attention=m["attention"], mlp=m["mlp"], num_layers=layers),
                )
                for m in data.get("masks", [])
            ),
            **_space(data.get("space", {}), layers),
        )  # fmt: skip
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"search space {path} cannot be read ({error!r}); compare it with demo.toml") from error


def with_space(preset: Preset | None, path: Path, num_layers: int, model_id: str) -> Preset:
    """The preset (or none) with the [space] table of another file in place of its own.

    Raises:
        ModelLoadError: no such file, no such table, or a value that it may not have.
    """
    base = preset or Preset(
        name=path.stem, model_id=model_id, num_layers=num_layers, fixed=SkipMask(num_layers=num_layers), masks=()
    )
    try:
        return replace(base, **_space(tomllib.loads(path.read_text(encoding="utf-8"))["space"], num_layers))
    except (OSError, KeyError, TypeError, ValueError) as error:
        why = "it has no [space] table" if isinstance(error, KeyError) else str(error)
        raise ModelLoadError(f"search space {path} cannot be read ({why}); see search_spaces/README.md") from error


def _space(table: dict[str, Any], layers: int) -> dict[str, Any]:
    known = {"fixed_attention", "fixed_mlp", "only", "structure", "spans", "max_skipped"}
    if unknown := sorted(table.keys() - known):
        raise ValueError(f"space.{unknown[0]} is not known, must be one of {', '.join(sorted(known))}")
    fixed = {kind: list(table.get(f"fixed_{kind}", [])) for kind in KINDS}
    only = table.get("only")
    if only is not None:
        if only not in KINDS:
            raise ValueError(f"space.only is {only!r}, must be attention or mlp")
        fixed["mlp" if only == "attention" else "attention"] = list(range(layers))
    structure = table.get("structure", "sublayers")
    if structure not in get_args(Structure):
        raise ValueError(f"space.structure is {structure!r}, must be one of {', '.join(get_args(Structure))}")
    if only is not None and structure != "sublayers":
        raise ValueError(f"space.only is {only!r}, which leaves no whole layers for structure {structure!r}")
    for name, least in (("spans", 1), ("max_skipped", 1 if structure == "sublayers" else 2)):
        value = table.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"space.{name} is {value!r}, must be a whole number of at least {least}")
    return {
        "fixed": SkipMask(attention=fixed["attention"], mlp=fixed["mlp"], num_layers=layers),
        "structure": structure, "spans": table.get("spans", 1), "max_skipped": table.get("max_skipped"),
    }  # fmt: skip
