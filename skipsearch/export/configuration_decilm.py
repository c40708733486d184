"""The config class of `nemotron-nas` folders; engines load it from there with their switch for remote code.

Blocks are dictionaries whose keys are attributes too: engines read `config.block_configs[i].attention.no_op`.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A block, or its attention or ffn."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama whose layers may lack attention or ffn."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [Block({part: Block(keys) for part, keys in block.items()}) for block in block_configs]
        for name in ("rope_theta", "rope_scaling"):  # newer versions of the library keep them elsewhere
            if not hasattr(self, name):
                setattr(self, name, kwargs.get(name))
