"""`hf`: a Hugging Face checkpoint of the draft without the layers that it skips, for engines that take a draft model.

Layers are found as everywhere (`find_sublayers`), so names are those of the model's own class. What its config says
of single layers is cut to the layers that stay.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from skipsearch.errors import ExportError, first_line
from skipsearch.export.draft import ANY, Draft, check_whole_layers, compare_logits

# Fields that name layers by number, and those that count the first layers, which are of another kind.
INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "rope_scaling_layers")
FIRST = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")


def check(draft: Draft) -> None:
    """Raises ExportError: a layer is skipped in part, or a plan does more than skip."""
    check_whole_layers(draft, "hf")


def write(draft: Draft, folder: Path) -> str:
    """Write the checkpoint with tokenizer and generation config; returns how it is used.

    Raises:
        ExportError: the model's class has no config for these layers.
    """
    small = draft.with_kept(draft.kept)
    small.config = trimmed(draft.model.config, draft.kept)
    _check_layers(small)
    small.save_pretrained(folder)
    draft.loaded.tokenizer.save_pretrained(folder)
    length = draft.file.draft.max_length
    speculative = f'{{"method": "draft_model", "model": "{folder}", "num_speculative_tokens": {length}}}'
    return f"vllm serve {draft.name} --speculative-config '{speculative}'"


def compare(draft: Draft, folder: Path) -> dict[str, Any]:
    """Raises ExportError: what was written has other logits than the draft view."""
    return compare_logits(draft, _load_back(draft, folder))


def _load_back(draft: Draft, folder: Path) -> PreTrainedModel:
    """The checkpoint as transformers loads it."""
    options = {"dtype": draft.model.dtype, "trust_remote_code": draft.trust}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.to(draft.loaded.target.device).eval()


def trimmed(config: PreTrainedConfig, kept: list[int]) -> PreTrainedConfig:
    """The config of a model that has these layers alone, in this order."""
    new = copy.deepcopy(config)
    text = new.get_text_config(decoder=True)
    layers, place = text.num_hidden_layers, {i: at for at, i in enumerate(kept)}
    for name, value in list(vars(text).items()):
        if name in INDICES and isinstance(value, list):
            setattr(text, name, [place[i] for i in value if i in place])
        elif name in FIRST and isinstance(value, int):
            setattr(text, name, sum(i < value for i in kept))
        elif isinstance(value, list | tuple) and len(value) == layers and not _of_model(name):
            setattr(text, name, [value[i] for i in kept])
        elif isinstance(value, dict) and value and all(_is_layer(key, layers) for key in value):
            setattr(text, name, {type(k)(place[int(k)]): v for k, v in value.items() if int(k) in place})
    text.num_hidden_layers = len(kept)
    return new


def _of_model(name: str) -> bool:
    return name == "architectures" or "token_id" in name


def _is_layer(key: Any, layers: int) -> bool:
    return str(key).isdecimal() and int(key) < layers


def _check_layers(small: PreTrainedModel) -> None:
    """Compare the tensors with those that the class would make from the config, before gigabytes are written."""
    try:
        with torch.device("meta"):
            made = type(small)(copy.deepcopy(small.config)).state_dict()
    except Exception as error:  # a class may raise anything for a config that it does not expect
        raise ExportError(
            f"{type(small).__name__} has no config without these layers ({first_line(error)}); {ANY}"
        ) from error
    own = small.state_dict()
    for name in sorted(made.keys() ^ own.keys()) or sorted(n for n in made if made[n].shape != own[n].shape):
        raise ExportError(
            f"{type(small).__name__} cannot tell from its config which layers stay ({name} has no place); {ANY}"
        )
