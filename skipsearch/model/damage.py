"""Damage: what is wrong with the files or weights of a checkpoint that does not load, or says nothing finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from skipsearch.errors import ModelLoadError, first_line, shown
from skipsearch.mask import MOST_LAYERS

POINTER = b"version https://git-lfs"
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # their number in configs


# Files by which folders are known that hold no causal LM, or not all of one.
OTHER_KINDS = {
    "model_index.json": "a diffusers pipeline", "modules.json": "a sentence-transformers model",
    "*.onnx": "an ONNX export", "*.safetensors": "weights alone",
}  # fmt: skip


def mended(reason: str, error: Exception) -> str:
    """Why the library did not load a checkpoint, in its own words, and what to do."""
    reason = reason.rstrip(".")
    if isinstance(error, ImportError):
        return f"{reason}; install that, or give a checkpoint that is not quantised"
    if "trust_remote_code" in str(error) or "custom code" in reason:
        return f"{reason}; read it, then pass --trust-remote-code"
    if "Unrecognized configuration class" in reason:
        return "it is no causal language model of this transformers (it may have an encoder); give one that is"
    if reason.startswith("Weights only load failed"):
        return "its .bin file is damaged, or holds code, which is not run; convert it to safetensors"
    return f"{reason}; check its files"


def damaged_file(folder: Path) -> str | None:
    """The first file of a checkpoint that cannot be read, and why; None if all can, or the folder is none."""
    if not folder.is_dir():
        return None
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".json", ".bin", ".model") or not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                return f"{path.name} is a Git LFS pointer in place of the file; fetch it with `git lfs pull`"
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # type: ignore[no-untyped-call]
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:  # the readers raise kinds of their own
            return f"{path.name} is truncated or damaged ({first_line(error, 120)}); download it again"
    return None


def check_layers(config: Any) -> None:
    """Refuse a config, as a dictionary, of more layers than any model has: the library would make them all.

    Raises:
        ValueError: it has more.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_layers(value)
        elif name in LAYERS and isinstance(value, int) and value > MOST_LAYERS:
            raise ValueError(f"{name} is {shown(value)}, no model has more than {MOST_LAYERS}")


def not_a_model(folder: Path) -> str:
    """Why a folder without a config is no model, in words."""
    if (folder / "adapter_config.json").is_file():
        try:
            base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            base = None
        of = shown(base)[1:-1] if isinstance(base, str) and base else "another model"
        return (
            f"is an adapter of {of}; load both, call merge_and_unload() of peft, "
            f"and give the folder that save_pretrained makes"
        )
    for pattern, kind in OTHER_KINDS.items():
        if next(folder.glob(pattern), None):
            return f"holds {kind} and no config.json of a language model; give the folder that save_pretrained makes"
    if found := sorted(folder.glob("*.gguf")):
        return f"holds a GGUF file; give the file itself, {found[0]}"
    if (folder / "mask.json").is_file():
        return "holds the results of a search; give the model that was searched, and the file with --mask"
    return "has no config.json; give a folder saved by save_pretrained, or a .gguf file"


@torch.no_grad()
def check_weights(name: str, model: PreTrainedModel) -> None:
    """Refuse weights that nothing can be decoded with.

    Raises:
        ModelLoadError: logits are not finite.
    """
    ids: Any = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)  # type: ignore[union-attr]
    if ids.device.type == "meta" or bool(model(input_ids=ids, use_cache=False).logits.isfinite().all()):
        return
    broken = [n for n, p in model.named_parameters() if p.device.type != "meta" and not bool(p.isfinite().all())]
    where = f"{len(broken)} of its weights hold NaN or infinity, {broken[0]} first" if broken else "its dtype overflows"
    raise ModelLoadError(
        f"the logits of {name} are NaN or infinite ({where}); "
        + ("download or convert it again" if broken else "load it with --dtype float32 or bfloat16")
    )
