"""Weights: where the files of a model lie: a folder, a GGUF file, an installed package, or the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from skipsearch.errors import ModelLoadError
from skipsearch.model.damage import not_a_model
from skipsearch.model.gguf_header import excess_of
from skipsearch.model.preset import Preset

GGUF = ".gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Arguments of `from_pretrained`.

    Attributes:
        source: a folder or a hub id.
        gguf_file: the file in that folder that holds weights, config and tokenizer; None: a Hugging Face checkpoint.
    """

    source: str
    gguf_file: str | None = None

    @property
    def is_local(self) -> bool:
        return self.gguf_file is not None or Path(self.source).is_dir()

    @property
    def stem(self) -> str:
        """The name of the folder or file."""
        return Path(self.gguf_file or Path(self.source).resolve()).name.removesuffix(GGUF)

    @property
    def short(self) -> str:
        """A name for the results: of the folder or file, or the hub id."""
        return self.stem if self.is_local else self.source.replace("/", "--")

    @property
    def for_tokenizer(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def for_model(self, dtype: torch.dtype | str) -> dict[str, Any]:
        """A GGUF file is dequantised: its blocks are made into plain weights of this dtype."""
        if self.gguf_file is None:
            return {"dtype": dtype}
        from transformers import GgufConfig  # older versions of the library lack it, and load everything else

        dense = torch.bfloat16 if dtype == "auto" else dtype  # the file's own types are those of its blocks
        return {"gguf_file": self.gguf_file, "dtype": dense, "quantization_config": GgufConfig(dequantize=True)}


def find_weights(name: str, preset: Preset | None) -> Weights:
    """Where the weights of a model lie. A preset's package, if it is installed, is preferred to the hub.

    Raises:
        ModelLoadError: the file or folder does not exist, is empty or is none of a model, or `gguf` is not installed.
    """
    if preset is not None:
        packed = packaged(preset)
        return _gguf(packed) if packed and find_spec("gguf") else Weights(source=preset.model_id)
    path = Path(name).expanduser()
    if path.suffix.lower() == GGUF:
        return _gguf(path)
    if name.startswith((".", "/", "~")) or path.is_dir():
        if not (path / "config.json").is_file():
            if not path.is_dir():
                raise ModelLoadError(f"model folder {path} does not exist; check the path")
            raise ModelLoadError(f"model folder {path} {not_a_model(path)}")
        return Weights(source=str(path))
    return Weights(source=name)


def packaged(preset: Preset) -> Path | None:
    """The file that the preset's package has installed; None without the package."""
    if preset.package is None or preset.file is None:
        return None
    try:
        path = Path(str(distribution(preset.package).locate_file(preset.file)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _gguf(path: Path) -> Weights:
    if not path.is_file():
        raise ModelLoadError(f"model file {path} does not exist; check the path")
    if find_spec("gguf") is None:
        raise ModelLoadError(f"model file {path} needs the package gguf; pip install 'skipsearch[gguf]'")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelLoadError(f"model file {path} is no GGUF file; download or convert it again")
    if excess := excess_of(path):
        raise ModelLoadError(f"model file {path} is truncated or damaged ({excess}); download it again")
    return Weights(source=str(path.parent), gguf_file=path.name)


def explain_gguf(weights: Weights, error: Exception) -> str:
    """One sentence on why a GGUF file was not loaded. The library's readers raise whatever parsing gives."""
    path = Path(weights.source) / str(weights.gguf_file)
    text = str(error).replace(str(path), "it").strip()
    first = (text.splitlines() or [type(error).__name__])[0]
    if isinstance(error, ImportError | MemoryError):
        return f"model file {path} cannot be loaded ({first}); install or free what is missing"
    kinds: tuple[tuple[str, Callable[[], str]], ...] = (
        ("tokenizer", lambda: f"holds no tokenizer that can be read ({first}); convert the model again with its "
                              f"tokenizer"),
        ("architecture", lambda: f"holds a model that transformers cannot dequantise ({first}); convert the model to "
                                 f"a Hugging Face folder"),
        ("Unrecognized configuration class", lambda: "holds no causal LM; give another file"),
    )  # fmt: skip
    for sign, said in kinds:
        if sign in text:
            return f"model file {path} {said()}"
    return f"model file {path} is truncated or damaged; download it again"
