"""Weights that are not whole, and folders that hold something else: one sentence that names the file and the mend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_one_sentence
from safetensors.torch import load_file, save_file

from skipsearch import self_speculative
from skipsearch.errors import DecodingError, ModelLoadError
from skipsearch.model.load import DEMO, load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(ModelLoadError) as error:
        load_model(str(folder))
    assert_one_sentence(error, *parts)


def test_a_cut_file(folder: Path) -> None:
    """Prevents a traceback for a download that broke off."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1_000_000])
    refused(folder, "model.safetensors is truncated or damaged", "download it again")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_in_place_of_a_file(folder: Path, name: str) -> None:
    """Prevents a clone without its large files from looking like a bug of ours."""
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    refused(folder, f"{name} is a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("text", ['{"model":{"type":"NEW"}}', "{"])
def test_a_tokenizer_that_cannot_be_read(folder: Path, text: str) -> None:
    """Prevents whatever the reader raises from reaching users."""
    (folder / "tokenizer.json").write_text(text)
    refused(folder, "cannot be loaded")


def changed(folder: Path, **edit: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, change in edit["tensors"].items():
        if change is None:
            del tensors[name]
        else:
            change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DOWN = "model.layers.7.mlp.down_proj.weight"


def test_missing_and_renamed_tensors(folder: Path) -> None:
    """Prevents random weights in place of lost ones from being searched, validated or served."""
    changed(folder, tensors={DOWN: None})
    refused(folder, "lacks 1 of its weights", DOWN)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder: Path, value: float) -> None:
    """Prevents a verdict on a model that says NaN."""
    changed(folder, tensors={DOWN: lambda w: w[3, 5].fill_(value)})
    refused(folder, "logits of", "NaN or infinit", DOWN)


def test_a_tokenizer_with_more_tokens_than_embeddings(folder: Path) -> None:
    """Prevents an index error in the middle of a prompt, and refusing models whose tokenizers have a few more."""
    loaded = load_model(str(folder))
    loaded.tokenizer.add_tokens([f"<{i}>" for i in range(5)])
    options: dict[str, Any] = {"max_new_tokens": 4, "custom_generate": self_speculative(None)}
    for text, fits in (("def f(x):", True), ("def <3>", False)):
        inputs = loaded.tokenizer(text, return_tensors="pt")
        if fits:
            loaded.model.generate(**inputs, **options)
        else:
            with pytest.raises(DecodingError) as error:
                loaded.model.generate(**inputs, **options)
            assert_one_sentence(error, "token 4099", "4096 embeddings")


def test_folders_of_another_kind(tmp_path: Path) -> None:
    """Prevents "no config.json" for what is an adapter, a GGUF file, or a search's results."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    refused(tmp_path, "is an adapter of some/base", "merge_and_unload")
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "mask.json").write_text("{}")
    refused(tmp_path, "results of a search", "--mask")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "give the file itself", "x.gguf")
    for number, (name, kind) in enumerate({"model_index.json": "diffusers", "a.onnx": "ONNX"}.items()):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / name).write_text("{}")
        refused(tmp_path / str(number), kind, "save_pretrained")


def test_layers_that_the_config_does_not_name(folder: Path) -> None:
    """Prevents half of a model from being decoded, searched and called "use"."""
    config_with(folder, num_hidden_layers=10)
    refused(folder, "layers 10 to 19", "num_hidden_layers")


def config_with(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_quantised_checkpoints_without_their_library(folder: Path) -> None:
    """Prevents "check its files" for a whole checkpoint that only lacks a package here."""
    config_with(folder, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"})
    refused(folder, "AWQ", "install", "not quantised")


def test_models_with_an_encoder_and_code_of_strangers(folder: Path) -> None:
    """Prevents a list of a hundred classes as an error, and code that is run without being asked for."""
    config_with(folder, model_type="t5", architectures=["T5ForConditionalGeneration"])
    refused(folder, "no causal language model")
    config_with(folder, model_type="other", auto_map={"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"})
    (folder / "x.py").write_text("raise SystemExit('this code was run')")
    refused(folder, "--trust-remote-code")


def test_finite_weights_pass(folder: Path) -> None:
    """Prevents the check from refusing a model that is whole."""
    assert torch.isfinite(load_model(str(folder)).model.lm_head.weight).all()
