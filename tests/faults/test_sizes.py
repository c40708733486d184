"""Sizes: what a file of a stranger claims takes no memory; it is refused, or costs no more than its length."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_one_sentence
from documents import DOCUMENT, edited
from strangers import little_memory, saved_llama

from skipsearch import MaskFile, load_mask, self_speculative
from skipsearch.errors import MaskError, ModelLoadError, PromptError, SkipsearchError
from skipsearch.evaluate.prompt_file import read_rows
from skipsearch.evaluate.prompts import PromptSource, load_prompts
from skipsearch.maskfile import parse_mask
from skipsearch.maskimport import import_mask
from skipsearch.model import preset
from skipsearch.model.load import load_model
from skipsearch.model.preset import read_space


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_llama(tmp_path / "model")


HUGE = 10**9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.num_layers", HUGE), ("model.num_layers", 10**400), ("skip.attention", list(range(100_000))),
        ("skip.attention", [0] * 100_000), ("skip.mlp", [10**4000]), ("skip", list(range(100_000))),
        ("draft.curve", [0.5] * 100_000), ("draft.costs", [-1.0] * 100_000),
    ],
)  # fmt: skip
def test_a_mask_of_any_size_is_small(field: str, value: Any, tmp_path: Path) -> None:
    """Prevents a cell for each of a billion layers, and messages of megabytes."""
    (tmp_path / "mask.json").write_text(json.dumps(edited(field, value)))
    with little_memory(), pytest.raises(MaskError) as error:
        load_mask(tmp_path / "mask.json")
    assert_one_sentence(error)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("ids", ["0-16777215", "0-1048575 " * 1000, "0-999999999999999", "5-4", "1048576"])
def test_ids_of_a_head_are_bounded(ids: str) -> None:
    """Prevents a line of text from becoming billions of numbers."""
    with little_memory(), pytest.raises(MaskError) as error:
        parse_mask({**DOCUMENT, "version": 2, "head": {"form": "int8", "ids": ids}})
    assert_one_sentence(error, "head.ids")


def test_a_policy_of_any_length_decodes(tiny: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """Prevents buffers for a billion drafted tokens."""
    path, model = tmp_path / "mask.json", tiny("llama")
    file = {k: DOCUMENT[k] for k in ("format", "version", "model", "skip")}
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    for draft in ({"max_length": HUGE}, {"max_length": HUGE, "ngram": HUGE, "never_slower": True}):
        path.write_text(json.dumps({**file, "model": {"num_layers": 4}, "draft": draft}))
        with little_memory():
            method = self_speculative(path)
            assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, custom_generate=method), plain)
    assert isinstance(load_mask(path), MaskFile)


@pytest.mark.parametrize(
    "text",
    [
        f'structure = "spans"\nspans = {HUGE}', f"fixed_attention = [{HUGE}]", f"max_skipped = -{HUGE}",
        f"fixed_mlp = [0x{'f' * 5000}]", "fixed_mlp = " + "[" * 100_000, "only = " + "{a=" * 5000,
        f"max_skipped = {'9' * 5000}",
    ],
)  # fmt: skip
def test_a_space_of_any_size_is_small(text: str, tmp_path: Path) -> None:
    """Prevents a parameter for each of a billion layers or runs."""
    path = tmp_path / "space.toml"
    path.write_text(f"[space]\n{text}\n")
    with little_memory(), pytest.raises(ModelLoadError) as error:
        read_space(path, 4)
    assert_one_sentence(error, "space.toml")


def test_layers_are_bounded_everywhere(tmp_path: Path) -> None:
    """Prevents another door for a number of layers."""
    path = tmp_path / "x.toml"
    path.write_text(f'[model]\nid = "a/b"\nnum_layers = {HUGE}\n[space]\nonly = "mlp"\n')
    sets = tmp_path / "sets.json"
    sets.write_text('{"attention": [1], "mlp": []}')
    reads: list[Callable[[], Any]] = [
        lambda: preset._read_preset(path), lambda: read_space(path, HUGE), lambda: import_mask(sets, num_layers=HUGE)
    ]  # fmt: skip
    for read in reads:
        with little_memory(), pytest.raises(SkipsearchError) as error:
            read()
        assert_one_sentence(error, str(HUGE))


def test_prompts_of_any_size(tmp_path: Path, tokenizer: Any) -> None:
    """Prevents a tokenizer from being given 100 MB, and nesting from ending in a traceback."""
    path = tmp_path / "long.txt"
    path.write_text("x" * 100_000_000)
    with pytest.raises(PromptError) as error:
        load_prompts(
            PromptSource(name=str(path)), tokenizer, calibration=2, held_out=2, max_tokens=None, room=9, seed=0
        )
    assert_one_sentence(error, "100,000,000 characters")
    path.unlink()
    for name in ("deep.json", "deep.jsonl"):
        (tmp_path / name).write_text("[" * 100_000)
        with pytest.raises(PromptError) as error:
            read_rows(tmp_path / name)
        assert_one_sentence(error, name)


def test_json_nested_deep(folder: Path, tmp_path: Path) -> None:
    """Prevents a RecursionError for a model's, a mask's or an adapter's JSON."""
    deep = "[" * 100_000
    (tmp_path / "sets.json").write_text('{"a":' * 900 + "1" + "}" * 900)
    with pytest.raises(MaskError) as refused:
        import_mask(tmp_path / "sets.json", num_layers=4)
    assert_one_sentence(refused)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        model = Path(shutil.copytree(folder, tmp_path / name.partition(".")[0]))
        (model / name).write_text(deep)
        with pytest.raises(ModelLoadError) as error:
            load_model(str(model))
        assert_one_sentence(error)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for text in (deep, "[]", '{"base_model_name_or_path": "a\\nb"}'):
        (adapter / "adapter_config.json").write_text(text)
        with pytest.raises(ModelLoadError) as error:
            load_model(str(adapter))
        assert_one_sentence(error, "is an adapter of")


@pytest.mark.parametrize("change", [{"num_hidden_layers": HUGE}, {"text_config": {"n_layer": 10**30}}])
def test_a_config_of_any_number_of_layers(change: dict[str, Any], folder: Path) -> None:
    """Prevents the library from making a billion layers before it looks at the weights."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelLoadError) as error:
        load_model(str(folder))
    assert_one_sentence(error, "no model has more than 16384")


@pytest.mark.parametrize("length", [2**60, 2**63 - 1, 2**64 - 1, 99_999_999])
def test_the_header_of_safetensors_is_not_believed(length: int, folder: Path) -> None:
    """Prevents memory for what a header claims."""
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with little_memory(), pytest.raises(ModelLoadError) as error:
        load_model(str(folder))
    assert_one_sentence(error, "model.safetensors is truncated or damaged")
