"""Loading by preset, hub id and folder, and whether a mask belongs to a model. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny

from skipsearch import SkipMask, self_speculative
from skipsearch.errors import MaskError, ModelLoadError, UnsupportedModel
from skipsearch.maskfile import MaskFile
from skipsearch.model import load
from skipsearch.model.identity import check_mask_belongs, model_card
from skipsearch.model.load import load_model
from skipsearch.model.target import Target

TOKENIZER = load.DEMO


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama with the bundled tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    make_tiny("llama", vocab_size=len(tokenizer)).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_demo_loads_offline_in_full_precision(offline: None, demo: Any) -> None:
    """Prevents the bundled model from needing a network, or from decoding in half precision on a CPU."""
    assert demo.name == "demo" and demo.preset is not None
    assert demo.model.dtype == torch.float32 and not demo.model.training
    assert not any(p.requires_grad for p in demo.model.parameters())


def test_a_folder_is_a_model(folder: Path) -> None:
    """Prevents a local folder from being looked up on the hub, and its name from becoming a path."""
    loaded = load_model(str(folder))
    assert loaded.name == folder.name and loaded.preset is None
    assert loaded.model.dtype == torch.float32
    assert load_model(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama-2-13b", "meta-llama/Llama-2-13b-hf"])
def test_without_a_network_the_error_says_so(name: str, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a traceback for the first thing that goes wrong for most people."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match=r"Llama-2-13b-hf.*cannot be reached; connect to the network, or pass"):
        load_model(name)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("You are trying to access a gated repo.\nMake sure to have access to it", "is gated: ask for access at"),
        ("401 Client Error: Unauthorized", "is gated: ask for access at"),
        ("We couldn't connect to 'https://huggingface.co' to load the files", "cannot be reached"),
        ("some/model is not a local folder and is not a valid model identifier", "neither a preset, a folder nor"),
        ("Unrecognized model\nin that folder", "cannot be loaded: Unrecognized model; check its files"),
    ],
)
def test_library_errors_become_one_sentence(message: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the library's many-line messages from reaching users. The messages are those of its source."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(message)

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelLoadError, match=said) as error:
        load_model("some/model")
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents most of a minute of retries before the sentence that says what to do."""
    asked: list[Any] = []

    def fail(_source: str, **options: Any) -> None:
        asked.append(options["local_files_only"])
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", fail)
    monkeypatch.setattr(load.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(load.urllib.request, "getproxies", dict)
    with pytest.raises(ModelLoadError, match="cannot be reached"):
        load_model("some/model")
    assert asked == [True] and not load.hub_reachable()


def test_paths_without_a_model_are_refused(tmp_path: Path) -> None:
    """Prevents a typing slip in a path from being explained as a wrong hub id."""
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    for wrong in (str(tmp_path / "none"), "./none"):
        with pytest.raises(ModelLoadError, match=r"model folder .*none does not exist; check the path"):
            load_model(wrong)


def test_a_folder_of_no_causal_model(folder: Path) -> None:
    """Prevents a damaged config and an encoder from looking like our own fault."""
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_model(str(folder))


def test_recurrent_models_are_refused_at_load(folder: Path) -> None:
    """Prevents a model whose state cannot be rolled back from being decoded wrongly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="recurrent state"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "int3"}, "dtype is 'int3', must be auto, float32"),
        ({"device": "nonsense"}, "cannot be put on device 'nonsense'"),
    ],
)
def test_wrong_settings(settings: dict[str, str], said: str) -> None:
    """Prevents a wrong dtype or device from surfacing in the middle of a search."""
    with pytest.raises(ModelLoadError, match=said):
        load_model("demo", **settings)


def test_a_mask_of_another_model_is_refused(tiny: Any, ids: torch.Tensor) -> None:
    """Prevents a mask from being used on weights it was not searched for; a new dtype is still the same model."""
    llama, other = tiny("llama"), tiny("qwen3")
    mask = SkipMask(attention=[1], num_layers=4)
    file = MaskFile.of(mask, model=model_card(Target.of(llama), "some/llama"))
    check_mask_belongs(file, Target.of(llama))
    check_mask_belongs(file, Target.of(make_tiny("llama").to(torch.bfloat16)))
    with pytest.raises(MaskError, match=r"config_sha256 of the mask is .* \(made for some/llama\)"):
        check_mask_belongs(file, Target.of(other))
    with pytest.raises(MaskError, match="num_layers of the mask is 4, this model has 2"):
        check_mask_belongs(file, Target.of(make_tiny("llama", num_hidden_layers=2)))
    with pytest.raises(MaskError, match="config_sha256"):
        other.generate(ids, max_new_tokens=4, custom_generate=self_speculative(file))


def test_a_mistyped_preset_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a typing error from being reported as an unreachable network."""
    monkeypatch.setattr("skipsearch.model.load.hub_reachable", lambda: False)
    with pytest.raises(ModelLoadError, match="did you mean demo"):
        load_model("demoo")
