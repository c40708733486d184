"""The Nemotron-NAS format, read as engines read it: by a loader of our own that knows config.json and weights alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_one_sentence, make_tiny
from safetensors.torch import load_file
from test_exports import draft_of
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention, silu
from transformers import AutoConfig

from skipsearch import SkipMask, draft_view
from skipsearch.errors import ExportError
from skipsearch.export.export import export_mask
from skipsearch.export.nemotron_nas import width_of

MASK = SkipMask(attention=[1, 2], mlp=[0, 1, 3], num_layers=4)  # layer 1 whole


class Reader:
    """Takes each weight once, so that none is missing and none is left."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.used: set[str] = set()

    def weight(self, name: str) -> Tensor:
        self.used.add(name)
        return self.weights[f"{name}.weight"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return self.weight(name) * x * scale

    def rotate(self, x_HTD: Tensor) -> Tensor:
        half = x_HTD.shape[-1] // 2
        frequencies = self.config["rope_theta"] ** (-torch.arange(half) / half)
        if scaling := self.config["rope_scaling"]:
            assert scaling["rope_type"] == "linear"
            frequencies = frequencies / scaling["factor"]
        angles = torch.arange(x_HTD.shape[1])[:, None] * frequencies
        first, second = x_HTD[..., :half], x_HTD[..., half:]
        sin, cos = angles.sin(), angles.cos()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def attention(self, x_TC: Tensor, at: str, group: int) -> Tensor:
        heads = self.config["num_attention_heads"]

        def project(name: str, count: int) -> Tensor:
            return (x_TC @ self.weight(f"{at}.{name}").T).view(len(x_TC), count, -1).transpose(0, 1)

        q, k, v = (project(f"{n}_proj", c) for n, c in (("q", heads), ("k", heads // group), ("v", heads // group)))
        k, v = (t.repeat_interleave(group, dim=0) for t in (self.rotate(k), v))
        out = scaled_dot_product_attention(self.rotate(q)[None], k[None], v[None], is_causal=True)[0]
        return out.transpose(0, 1).reshape(len(x_TC), -1) @ self.weight(f"{at}.o_proj").T

    def mlp(self, x_TC: Tensor, at: str, ffn_mult: float) -> Tensor:
        gate, up, down = (self.weight(f"{at}.{name}_proj") for name in ("gate", "up", "down"))
        width = int(2 * ffn_mult * self.config["hidden_size"] / 3)
        assert gate.shape[0] == up.shape[0] == down.shape[1] == (width + 255) // 256 * 256
        return (silu(x_TC @ gate.T) * (x_TC @ up.T)) @ down.T

    def logits(self, ids: Tensor) -> Tensor:
        blocks = self.config["block_configs"]
        assert len(blocks) == self.config["num_hidden_layers"] and not blocks[0]["attention"]["no_op"]
        x = embedding(ids, self.weight("model.embed_tokens"))
        for i, block in enumerate(blocks):
            at, attention, ffn = f"model.layers.{i}", block["attention"], block["ffn"]
            assert attention.keys() == {"no_op", "replace_with_linear", "n_heads_in_group"}
            assert ffn.keys() == {"no_op", "replace_with_linear", "ffn_mult"}
            if not attention["no_op"]:
                normed = self.norm(x, f"{at}.input_layernorm")
                x = x + self.attention(normed, f"{at}.self_attn", attention["n_heads_in_group"])
            if not ffn["no_op"]:
                x = x + self.mlp(self.norm(x, f"{at}.post_attention_layernorm"), f"{at}.mlp", ffn["ffn_mult"])
        x = self.norm(x, "model.norm")
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        logits = x @ self.weight(head).T
        assert {f"{name}.weight" for name in self.used} == self.weights.keys()
        return logits


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 256},
        {"tie_word_embeddings": True},  # and a width of 48, which is filled up
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
)
def test_engines_read_the_draft(changes: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """Prevents weights, norms, widths, groups of heads or RoPE that a loader of the format reads otherwise."""
    model = make_tiny("llama", **changes)
    data = export_mask(draft_of(model, tokenizer, MASK), "nemotron-nas", tmp_path / "out")
    ids = torch.randint(3, 97, (12,), generator=torch.Generator().manual_seed(1))
    wanted = draft_view(model, MASK)(ids[None]).logits[0]
    got = Reader(tmp_path / "out").logits(ids)
    assert float((got - wanted).abs().max()) < 1e-4 * float(wanted.abs().max()) and data["check"]["same_argmax"]
    assert data["layers"] == 3


def test_the_config_class_has_attributes_and_is_json(tokenizer: Any, tmp_path: Path) -> None:
    """Prevents engines from failing at `block.attention.no_op`, `hasattr`, or where they log or copy the config."""
    export_mask(draft_of(make_tiny("llama"), tokenizer, MASK), "nemotron-nas", tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [block.attention.no_op for block in config.block_configs] == [False, True, False]
    assert [block.ffn.no_op for block in config.block_configs] == [True, False, True]
    assert not hasattr(config.block_configs[0].ffn, "intermediate_size") and config.rope_theta == 10000.0
    assert json.loads(config.to_json_string(use_diff=False))["block_configs"][0]["attention"]["n_heads_in_group"] == 2


@pytest.mark.parametrize("width", [48, 256, 512, 1536, 8192, 11008, 13824, 14336, 28672])
@pytest.mark.parametrize("hidden", [256, 576, 2048, 4096, 5120, 8192])
def test_widths_survive_the_rounding_of_loaders(width: int, hidden: int) -> None:
    """Prevents an `ffn_mult` whose six digits give another width."""
    wide = (width + 255) // 256 * 256
    assert width_of(round(3 * wide / (2 * hidden), 6), hidden) == wide


@pytest.mark.parametrize(
    ("family", "changes", "mask", "parts"),
    [
        ("qwen3", {}, MASK, ("Qwen3ForCausalLM is not like Llama",)),
        ("mistral", {}, MASK, ("sliding_window is 8",)),
        ("llama", {"attention_bias": True}, MASK, ("q_proj.bias",)),
        ("llama", {"mlp_bias": True}, MASK, ("gate_proj.bias",)),
        ("llama", {"hidden_act": "gelu"}, MASK, ("hidden_act is 'gelu'",)),
        ("llama", {"head_dim": 16}, MASK, ("head_dim is 16", "= 8")),
        ("llama", {}, SkipMask(attention=[0], num_layers=4), ("attention of layer 0 is skipped", "vLLM and SGLang")),
        ("llama", {}, SkipMask(attention=[0, 1], mlp=[0], num_layers=4), ("attention of layer 1 is skipped",)),
    ],
)
def test_what_loaders_cannot_express_is_refused(
    family: str, changes: dict[str, Any], mask: SkipMask, parts: tuple[str, ...], tokenizer: Any, tmp_path: Path
) -> None:  # fmt: skip
    """Prevents a checkpoint that loads and drafts something else."""
    with pytest.raises(ExportError) as error:
        export_mask(draft_of(make_tiny(family, **changes), tokenizer, mask), "nemotron-nas", tmp_path / "out")
    assert_one_sentence(error, *parts)
