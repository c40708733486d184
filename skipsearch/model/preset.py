"""Presets: a short name for a model, its search space, and the masks others published for it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipsearch.errors import ModelLoadError
from skipsearch.mask import SkipMask


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
    """

    name: str
    model_id: str
    num_layers: int
    fixed: SkipMask
    masks: tuple[PublishedMask, ...]


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
        model, space = data["model"], data.get("space", {})
        layers = model["num_layers"]
        return Preset(
            name=path.stem, model_id=model["id"], num_layers=layers,
            fixed=SkipMask(
                attention=space.get("fixed_attention", []), mlp=space.get("fixed_mlp", []), num_layers=layers
            ),
            masks=tuple(
                PublishedMask(
                    name=m["name"], source=m["source"],
                    mask=SkipMask(attention=m["attention"], mlp=m["mlp"], num_layers=layers),
                )
                for m in data.get("masks", [])
            ),
        )  # fmt: skip
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"search space {path} cannot be read ({error!r}); compare it with demo.toml") from error
