"""The model families that are tested: a tiny random model of each, built without a download.

The tests and `skipsearch models --families` use this registry. A family is printed as supported if the proof succeeds
on the installed transformers; otherwise the printed reason is the error message that users would get.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from skipsearch.errors import UnsupportedModel
from skipsearch.model.sublayers import find_sublayers

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 128}
_WINDOWS: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
}  # fmt: skip
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_ssm": 64,
    "mamba_d_conv": 4, "mamba_chunk_size": 8,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
# Model type: what its configuration needs in addition to SHAPE. The name after "+" is a variant of the model type.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "ministral": {"head_dim": 8, **_WINDOWS},
    "ministral3": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, **_WINDOWS},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": None},
    "smollm3": {"use_sliding_window": False},
    "starcoder2": {"sliding_window": 8},
    "granite": {"residual_multiplier": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": _MOE,
    "glm4_moe": {**_MLA, "head_dim": 8},
    "deepseek_v3": _MLA,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **_WINDOWS},
    "llama4_text": {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8, "attention_chunk_size": 8,
                    "interleave_moe_layer_step": 2},
    "glm4": {"head_dim": 8},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "exaone4": _WINDOWS,
    "cohere": {},
    "cohere2": {"head_dim": 8, **_WINDOWS},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_neox": {},
    "gpt_neox+sequential": {"use_parallel_residual": False},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "falcon+new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon+alibi": {"alibi": True, "new_decoder_architecture": False},
    "stablelm": {},
    "stablelm+parallel": {"use_parallel_residual": True},
    "gpt2": _GPT2,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt+post_norm": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "bloom": {"n_head": 4, "n_layer": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 128, "use_cache": True},
    "gemma3n_text": {"head_dim": 8, **_WINDOWS, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97,
                     "hidden_size_per_layer_input": 8, "activation_sparsity_pattern": None},
    "gemma4_text": {"head_dim": 8, **_WINDOWS, "global_head_dim": 8, "num_kv_shared_layers": 0,
                    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "jamba": {"num_experts": 1, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1,
              "mamba_d_state": 8, "mamba_dt_rank": 4},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": _MAMBA,
    "qwen3_next": {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _LINEAR,
    "nemotron_h": {"hybrid_override_pattern": "M-*-", "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8},
    "mamba": {"state_size": 8},
}  # fmt: skip


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal LM of a family: 4 layers of width 32, 97 tokens.

    Its weights are enlarged, because with small ones greedy decoding repeats one token. `changes` are fields of the
    configuration.
    """
    torch.manual_seed(seed)
    model_type = family.partition("+")[0]
    shape = dict(SHAPE)
    if model_type == "gpt2":
        shape = {k: v for k, v in shape.items() if k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(model_type, **{**shape, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.mul_(6)
    return model


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table; `note` says where the sublayers are, or why the model is not supported."""

    name: str
    architecture: str
    supported: bool
    note: str


def prove(family: str) -> Family:
    """Build the tiny model of a family and prove its sublayers, as `load_model` does with a real model."""
    model = tiny_model(family)
    try:
        found = find_sublayers(model)
    except UnsupportedModel as error:
        return Family(family, type(model).__name__, False, str(error))
    names = " / ".join("+".join(found.child[kind]) for kind in found.child)
    return Family(family, type(model).__name__, True, f"{found.path}: {names}")
