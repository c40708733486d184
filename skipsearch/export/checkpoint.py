"""`hf`: a Hugging Face checkpoint of the draft without the layers that it skips, for engines that take a draft model.

Layers are found as everywhere (`find_sublayers`), so names are those of the model's own class. What its config says
of single layers is cut to the layers that stay.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from skipsearch.export.draft import Draft
from skipsearch.files import write_json

# Fields that name layers by number, and those that count the first layers, which are of another kind.
INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "rope_scaling_layers")
FIRST = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")


def write(draft: Draft, folder: Path) -> str:
    """Write the checkpoint with tokenizer and generation config; returns how it is used."""
    small = draft.with_layers(draft.kept)
    small.config = trimmed(draft.model.config, draft.kept)
    small.save_pretrained(folder)
    draft.loaded.tokenizer.save_pretrained(folder)
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (data, data.get("text_config") or {}):
        part |= old_rope(part.get("rope_parameters") or {})
    write_json(folder / "config.json", data)
    return speculative(draft, folder)


def load_back(draft: Draft, folder: Path) -> PreTrainedModel:
    """The checkpoint as transformers loads it."""
    options = {"dtype": draft.model.dtype, "trust_remote_code": draft.trust}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.to(draft.loaded.target.device).eval()


def speculative(draft: Draft, folder: Path) -> str:
    """A command that drafts with the folder."""
    length = draft.file.draft.max_length
    settings = f'{{"method": "draft_model", "model": "{folder}", "num_speculative_tokens": {length}}}'
    return f"vllm serve {draft.weights.source} --speculative-config '{settings}'"


def trimmed(config: PreTrainedConfig, kept: list[int]) -> PreTrainedConfig:
    """The config of a model that has these layers alone, in this order."""
    new = copy.deepcopy(config)
    text = new.get_text_config(decoder=True)
    layers, place = text.num_hidden_layers, {i: at for at, i in enumerate(kept)}
    tables = text.to_dict().get("per_layer_config")  # kept by the library in a form of its own
    if tables:
        text.per_layer_config = None
    for name, value in list(vars(text).items()):
        if name in INDICES and isinstance(value, list):
            setattr(text, name, [place[i] for i in value if i in place])
        elif name in FIRST and isinstance(value, int):
            setattr(text, name, sum(i < value for i in kept))
        elif name == "architectures" or "token_id" in name:
            pass
        elif isinstance(value, list | tuple) and len(value) == layers:
            setattr(text, name, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)
    if tables:
        text.per_layer_config = {place[int(i)]: table for i, table in tables.items() if int(i) in place}
    return new


def old_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Names that engines read in place of `rope_parameters`; without them some take a default, and draft badly."""
    if "rope_theta" not in rope:  # none, or one for each kind of layer
        return {}
    rest = {name: value for name, value in rope.items() if name != "rope_theta"}
    scaled = rest.get("rope_type", "default") != "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": rest if scaled else None}
