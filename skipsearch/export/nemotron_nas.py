"""`nemotron-nas`: a checkpoint of a Llama-like draft in the format of Nemotron-NAS, where any sublayer may be missing.

Compared with what loaders read, at these commits: vLLM `models/nemotron_nas.py` (00bd149), SGLang
`models/nemotron_nas.py` (15a024d), TensorRT-LLM `modeling_nemotron_nas.py` (0193dbd) and `modeling_utils.py` (000a01d),
mlx-lm `nemotron-nas.py` (13c89f4), llama.cpp `conversion/deci.py` (2bbcf7f) and `src/models/deci.cpp` (75dc8f6).
All read `attention.no_op`, `attention.n_heads_in_group` and `ffn.no_op` of each block, take the width of an MLP from
`ffn.ffn_mult` (mlx-lm refuses further keys), expect no weights and no norm of a missing sublayer, and tie the head if
the config says so. vLLM and SGLang need a residual before the first MLP. llama.cpp drops the attention of a layer
without MLP. TensorRT-LLM has no biases. mlx-lm takes heads of hidden_size / num_attention_heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from skipsearch.errors import ExportError
from skipsearch.export import configuration_decilm
from skipsearch.export.checkpoint import old_rope, speculative
from skipsearch.export.draft import ANY, Draft
from skipsearch.files import write_json, write_text
from skipsearch.mask import KINDS

LIKE_LLAMA = ("LlamaForCausalLM", "MistralForCausalLM")
MULTIPLE = 256  # loaders round the width of an MLP up to it
COPIED = (
    "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps",
    "max_position_embeddings", "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


def _check(draft: Draft) -> None:
    config, name = draft.model.config, type(draft.model).__name__
    if name not in LIKE_LLAMA:
        raise ExportError(f"{name} is not like Llama, and nemotron-nas holds {' and '.join(LIKE_LLAMA)} alone; {ANY}")
    biases = [n for n in draft.model.state_dict() if n.endswith(".bias")]
    width = config.hidden_size // config.num_attention_heads
    for wrong, what in (
        (biases, f"{biases[:1]} is a bias"),
        (getattr(config, "sliding_window", None), f"sliding_window is {getattr(config, 'sliding_window', None)}"),
        (config.hidden_act != "silu", f"hidden_act is {config.hidden_act!r}"),
        ((config.head_dim or width) != width, f"head_dim is {config.head_dim}, not hidden_size / heads = {width}"),
    ):
        if wrong:
            raise ExportError(f"{what} in this model, which not every loader of nemotron-nas can express; {ANY}")
    if draft.mask.skips("attention", draft.kept[0]):
        raise ExportError(
            f"attention of layer {draft.kept[0]} is skipped and its mlp runs first, which vLLM and SGLang cannot load; "
            f"search with fixed_attention = [{draft.kept[0]}], or {ANY}"
        )


def write(draft: Draft, folder: Path) -> str:
    """Write config, its class, weights and tokenizer; returns how they are used.

    Raises:
        ExportError: the model is not like Llama, or the first layer that stays has no attention.
    """
    _check(draft)
    write_json(folder / "config.json", _config(draft))
    source = Path(str(configuration_decilm.__file__))
    write_text(folder / source.name, source.read_text(encoding="utf-8"))
    save_torch_state_dict(_tensors(draft), folder)
    draft.model.generation_config.save_pretrained(folder)
    draft.loaded.tokenizer.save_pretrained(folder)
    return f"{speculative(draft, folder)} --trust-remote-code"


def _config(draft: Draft) -> dict[str, Any]:
    config = draft.model.config.to_dict()
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    mult = round(3 * _width(draft) / (2 * config["hidden_size"]), 6)
    assert width_of(mult, config["hidden_size"]) == _width(draft)

    def part(kind: Any, i: int, name: str, value: float) -> dict[str, Any]:
        skipped = draft.mask.skips(kind, i)
        return {"no_op": skipped, "replace_with_linear": False, name: None if skipped else value}

    return {
        "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "block_configs": [
            {"attention": part("attention", i, "n_heads_in_group", group), "ffn": part("mlp", i, "ffn_mult", mult)}
            for i in draft.kept
        ],
        "num_hidden_layers": len(draft.kept), **{name: config.get(name) for name in COPIED},
        **old_rope(config["rope_parameters"]), "attention_bias": False, "mlp_bias": False,
        "torch_dtype": str(draft.model.dtype).removeprefix("torch."),
    }  # fmt: skip


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """The width of an MLP as loaders compute it."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // MULTIPLE) * MULTIPLE


def _width(draft: Draft) -> int:
    return -(-int(draft.model.config.intermediate_size) // MULTIPLE) * MULTIPLE


def _tensors(draft: Draft) -> dict[str, Tensor]:
    """The weights that stay. MLPs are widened by zeros, which give zero, to a width that loaders can name."""
    names = draft.loaded.target.sublayers
    gone = {
        f"{names.path}.{at}.{name}."
        for at, i in enumerate(draft.kept) for kind in KINDS if draft.mask.skips(kind, i)
        for name in (*names.child[kind], *names.norms[kind])
    }  # fmt: skip
    found = {}
    more = _width(draft) - draft.model.config.intermediate_size
    for name, tensor in draft.with_layers(draft.kept).state_dict().items():
        if name.startswith(tuple(gone)) or (name == "lm_head.weight" and draft.model.config.tie_word_embeddings):
            continue
        if more and ".mlp." in name:
            tensor = torch.nn.functional.pad(tensor, (0, more) if ".down_proj." in name else (0, 0, 0, more))
        found[name] = tensor
    return found


def load_back(draft: Draft, folder: Path) -> PreTrainedModel:
    """The folder as a Llama: weights of sublayers that the config calls missing are zero, all others must be there."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.intermediate_size = max(
        (width_of(block.ffn.ffn_mult, config.hidden_size) for block in config.block_configs if not block.ffn.no_op),
        default=MULTIPLE,
    )
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    for i, block in enumerate(config.block_configs):
        branches: tuple[str, ...] = ("self_attn", "input_layernorm") if block.attention.no_op else ()
        branches += ("mlp", "post_attention_layernorm") if block.ffn.no_op else ()
        for name in wanted:
            if name.startswith(tuple(f"model.layers.{i}.{branch}." for branch in branches)):
                tensors[name] = torch.zeros(wanted[name].shape, dtype=draft.model.dtype)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if wrong := sorted(tensors.keys() ^ wanted.keys()):
        raise ExportError(f"the export holds other weights than its config says, {wrong[0]} among them; {ANY}")
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=tensors, dtype=draft.model.dtype
    )
    return model.to(draft.loaded.target.device).eval()
