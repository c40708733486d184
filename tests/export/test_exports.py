"""Exports of drafts: every format is loaded back and has the draft view's logits, or is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SUPPORTED, assert_one_sentence, make_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from skipsearch import DraftPlan, SkipMask, draft_view
from skipsearch.cli import app
from skipsearch.errors import ExportError, MaskError, ResultsError
from skipsearch.export.checkpoint import old_rope, trimmed
from skipsearch.export.draft import Draft
from skipsearch.export.export import FORMATS, export_mask
from skipsearch.export.mergekit import FILE
from skipsearch.maskfile import MaskFile
from skipsearch.model.identity import model_card
from skipsearch.model.load import DEMO, Loaded
from skipsearch.model.weights import Weights
from skipsearch.policy import DraftPolicy

WHOLE = SkipMask(attention=[0, 2], mlp=[0, 2], num_layers=4)
DEMO_WHOLE = SkipMask(attention=[3, 4, 9], mlp=[3, 4, 9], num_layers=20)


def draft_of(model: PreTrainedModel, tokenizer: Any, plan: SkipMask | DraftPlan, **parts: Any) -> Draft:
    loaded = Loaded(name="tiny", model=model, tokenizer=tokenizer, preset=None)
    file = MaskFile.of(plan, model=model_card(loaded.target, "tiny"), **parts)
    return Draft(loaded=loaded, file=file, weights=Weights(source=str(DEMO)))


@pytest.mark.parametrize("family", SUPPORTED)
def test_checkpoints_of_every_family_are_the_draft(family: str, tiny: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Prevents layers of the wrong kind: sliding windows, experts or RoPE that the config gives to other layers."""
    data = export_mask(draft_of(tiny(family), tokenizer, WHOLE), "hf", tmp_path / "out")
    assert data["check"] == {"tokens": 16, "largest_difference": 0.0, "same_argmax": True}
    assert data["layers"] == 2 and "config.json" in data["files"]


def test_a_checkpoint_drafts_for_its_model(demo: Any, tmp_path: Path) -> None:
    """Prevents a checkpoint that `assistant_model` cannot use, one without a tokenizer, or a changed model."""
    before = demo.model.config.to_dict()
    export_mask(draft_of(demo.model, demo.tokenizer, DEMO_WHOLE), "hf", tmp_path / "out")
    assert demo.model.config.to_dict() == before
    assistant = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file() and assistant.config.num_hidden_layers == 17
    inputs = demo.tokenizer("def read(path):", return_tensors="pt")
    plain = demo.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assistant.generation_config.num_assistant_tokens = 4
    drafted = demo.model.generate(**inputs, max_new_tokens=16, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, drafted)


def test_every_field_of_single_layers_is_cut() -> None:
    """Prevents a list, table, list of numbers or count that still speaks of the layers before."""
    config = make_tiny("qwen3_moe", mlp_only_layers=[0, 3]).config
    config.per_layer_config, config.eos_token_id = {"1": {"skip": ["mlp"]}, "2": {"skip": ["mlp"]}}, [1, 2, 3, 4]
    config.first_k_dense_replace, config.no_rope_layers = 3, [1, 1, 1, 0]
    new = trimmed(config, [1, 3])
    assert new.num_hidden_layers == 2 and config.num_hidden_layers == 4
    assert new.mlp_only_layers == [1] and new.to_dict()["per_layer_config"] == {"0": {"skip": ["mlp"]}}
    assert new.first_k_dense_replace == 1 and new.no_rope_layers == [1, 0]
    assert new.eos_token_id == [1, 2, 3, 4]


def test_configs_speak_of_rope_in_old_words_too(demo: Any, tmp_path: Path) -> None:
    """Prevents engines that know no `rope_parameters` from rotating by their default, without a word."""
    export_mask(draft_of(demo.model, demo.tokenizer, DEMO_WHOLE), "hf", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] and written["rope_scaling"] is None
    scaled = {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}
    assert old_rope(scaled) == {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert old_rope({"sliding_attention": scaled}) == {}


def test_slices_name_the_layers_that_stay(demo: Any, tmp_path: Path) -> None:
    """Prevents ranges that hold their ends, or a run of layers that is left out."""
    data = export_mask(draft_of(demo.model, demo.tokenizer, DEMO_WHOLE), "mergekit", tmp_path / "out")
    ranges = [line.rpartition("range: ")[2] for line in (tmp_path / "out" / FILE).read_text().splitlines()[3:]]
    assert ranges == ["[0, 3]}]", "[5, 9]}]", "[10, 20]}]"] and data["check"]["largest_difference"] == 0


def test_gguf_blocks_are_copied(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents blocks under their old number, a count of layers that is not theirs, or types that are not kept."""
    from gguf import GGUFReader, GGUFWriter

    import skipsearch.export.gguf as module

    source = tmp_path / "full.gguf"
    writer = GGUFWriter(source, "llama")
    writer.add_block_count(4)
    writer.add_array("llama.feed_forward_length", [5, 6, 7, 8])
    writer.add_token_list(["a", "b", "c", "d"])
    for name in ("token_embd.weight", *(f"blk.{i}.attn_q.weight" for i in range(4)), "output_norm.weight"):
        data = torch.full((2, 32), float(name[4]) if name.startswith("blk") else 9.0)
        writer.add_tensor(name, data.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    draft = draft_of(make_tiny("llama"), tokenizer, WHOLE)
    weights = Weights(source=str(tmp_path), gguf_file=source.name)
    draft = Draft(loaded=draft.loaded, file=draft.file, weights=weights)
    view = draft_view(draft.model, draft.mask)
    monkeypatch.setattr(module, "load_back", lambda draft, folder: view)  # the file is too small to be a model
    export_mask(draft, "gguf", tmp_path / "out")
    reader = GGUFReader(tmp_path / "out" / "draft.gguf")
    assert reader.fields["llama.block_count"].contents() == 2
    assert reader.fields["llama.feed_forward_length"].contents() == [6, 8]
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "c", "d"]
    found = {tensor.name: (float(tensor.data[0, 0]), tensor.tensor_type.name) for tensor in reader.tensors}
    assert found == {
        "token_embd.weight": (9.0, "F16"), "blk.0.attn_q.weight": (1.0, "F16"), "blk.1.attn_q.weight": (3.0, "F16"),
        "output_norm.weight": (9.0, "F16"),
    }  # fmt: skip


NO_MASK = SkipMask(num_layers=4)
INT8 = DraftPlan.from_forms(["run", "int8", "run", "run", "skip", "run", "run", "int4"])
REFUSED: list[tuple[str, SkipMask | DraftPlan, tuple[str, ...]]] = [
    ("other", WHOLE, ("format is 'other'", "nemotron-nas")),
    ("hf", NO_MASK, ("skips nothing",)),
    ("custom-generate", NO_MASK, ("skips nothing",)),
    ("hf", SkipMask.from_bits([1] * 8), ("all layers are skipped",)),
    ("hf", SkipMask(attention=[1, 3], mlp=[2, 3], num_layers=4), ("attention of layer 1 is skipped alone",)),
    ("mergekit", SkipMask(mlp=[2], num_layers=4), ("mlp of layer 2 is skipped alone", "nemotron-nas")),
    *((to, INT8, ("attention of layer 1 drafts in int8", to)) for to in FORMATS if to != "custom-generate"),
    ("hf", DraftPlan(WHOLE, head="int8"), ("a head of its own",)),
    ("gguf", WHOLE, ("is no GGUF file",)),
]


@pytest.mark.parametrize(("to", "plan", "parts"), REFUSED)
def test_what_does_not_fit_is_refused(
    to: str, plan: Any, parts: tuple[str, ...], tiny: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Prevents a folder that drafts otherwise than the mask says, or a refusal that does not name the sublayer."""
    with pytest.raises(ExportError) as error:
        export_mask(draft_of(tiny("llama"), tokenizer, plan), to, tmp_path / "out")
    assert_one_sentence(error, *parts)
    assert not list(tmp_path.iterdir())


def test_files_that_serve_n_grams_have_no_draft(tiny: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Prevents the whole model from being written as its own draft."""
    with pytest.raises(ExportError, match="n-grams without a mask"):
        export_mask(draft_of(tiny("llama"), tokenizer, NO_MASK, draft=DraftPolicy(ngram=4)), "hf", tmp_path / "out")


def test_folders_and_models_of_others_are_left_alone(tiny: Any, demo: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Prevents files from being overwritten, and a mask of another model from being exported."""
    (tmp_path / "mine.txt").write_text("mine")
    draft = draft_of(tiny("llama"), tokenizer, WHOLE)
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ResultsError, match="not empty"):
            export_mask(draft, "hf", out)
    other = Draft(loaded=demo, file=draft.file, weights=draft.weights)
    with pytest.raises(MaskError, match="num_layers of the mask is 4"):
        export_mask(other, "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_fails_its_check_is_removed(
    tiny: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Prevents a wrong checkpoint from staying, here one whose layers are in another order."""
    draft = draft_of(tiny("llama"), tokenizer, WHOLE)
    monkeypatch.setattr(Draft, "kept", property(lambda self: [3, 1]))
    with pytest.raises(ExportError) as error:
        export_mask(draft, "hf", tmp_path / "out")
    assert_one_sentence(error, "loads back as another draft")
    assert not list(tmp_path.iterdir())


def test_the_command_prints_its_comparison(demo: Any, tmp_path: Path) -> None:
    """Prevents an export whose check is not shown, or output that is not one object."""
    draft_of(demo.model, demo.tokenizer, DEMO_WHOLE).file.save(tmp_path / "mask.json")
    arguments = ["export", str(tmp_path / "mask.json"), "--model", "demo", "--to", "mergekit"]
    shown = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "a")])
    assert shown.exit_code == 0 and "differ by 0 from the draft view" in shown.stdout
    assert "17 of 20 layers, 6 of 40 sublayers skipped" in shown.stdout
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "b"), "--json"])
    data = json.loads(done.stdout)
    assert data["check"]["same_argmax"] and data["folder"] == str(tmp_path / "b") and FILE in data["files"]
    assert CliRunner().invoke(app, [*arguments[:-1], "other", "--out", str(tmp_path / "c")]).exit_code == 2
