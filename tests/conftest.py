"""Small models for every test: tiny random ones of each family, and the bundled one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

transformers.logging.set_verbosity_error()
torch.set_num_threads(2)

_SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {
        "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"sliding_window": None},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 128},
    "gpt_neox": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}  # fmt: skip


def make_tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of 4 layers, its weights enlarged so that greedy decoding does not settle on one token."""
    torch.manual_seed(seed)
    shape = dict(_SHAPE)
    if family == "gpt2":
        shape = {k: v for k, v in shape.items() if k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(family, **{**shape, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.mul_(6)
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Models by family, made once; tests must not change them."""
    made: dict[str, PreTrainedModel] = {}
    return lambda family: made.setdefault(family, made[family] if family in made else make_tiny(family))


@pytest.fixture(scope="session")
def demo() -> Any:
    from skipsearch import load_model

    return load_model("demo")


@pytest.fixture
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 97, (1, 11), generator=generator)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
