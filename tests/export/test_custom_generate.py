"""Folders for the Hub's custom_generate: anybody decodes with the plan, and gets the tokens of plain decoding."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exports import DEMO_WHOLE, draft_of
from transformers import TextStreamer
from transformers.dynamic_module_utils import get_cached_module_file

from skipsearch import DraftPlan
from skipsearch.export.draft import Draft
from skipsearch.export.export import export_mask
from skipsearch.policy import DraftPolicy


@pytest.mark.parametrize("plan", [DEMO_WHOLE, DraftPlan.everywhere("int8", 20)], ids=["mask", "int8"])
def test_a_folder_decodes_as_plain_decoding(plan: Any, demo: Any, tmp_path: Path, capsys: Any) -> None:
    """Prevents a folder that needs its mask.json (the library takes generate.py alone), or drops the streamer."""
    data = export_mask(draft_of(demo.model, demo.tokenizer, plan), "custom-generate", tmp_path / "made")
    assert data["check"] == {"tokens": 12, "same_tokens": True} and "mask.json" in data["files"]
    (tmp_path / "made" / "mask.json").unlink()
    inputs = demo.tokenizer("def read(path):", return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    plain = demo.model.generate(**inputs, **options)
    options |= {"custom_generate": str(tmp_path / "made"), "trust_remote_code": True, "backend": "eager"}
    drafted = demo.model.generate(**inputs, **options, streamer=TextStreamer(demo.tokenizer))
    assert torch.equal(plain, drafted)
    assert capsys.readouterr().out.strip() == demo.tokenizer.decode(plain[0]).strip()


def test_what_the_hub_gives_is_enough(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a repository that works as a folder alone; from the Hub's cache comes the code without its folder."""
    import huggingface_hub.constants as constants

    export_mask(draft_of(demo.model, demo.tokenizer, DEMO_WHOLE), "custom-generate", tmp_path / "made")
    repository = tmp_path / "hub" / "models--someone--drafts"
    commit = "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tmp_path / "made" / "custom_generate", repository / "snapshots" / commit / "custom_generate")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    where = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    assert get_cached_module_file("someone/drafts", "custom_generate/generate.py", **where)
    method = demo.model.load_custom_generate("someone/drafts", trust_remote_code=True, **where)
    ids = torch.tensor([[5, 6, 7]])
    plain = demo.model.generate(inputs=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(method(model=demo.model, inputs=ids, max_new_tokens=8, do_sample=False, backend="eager"), plain)


def test_the_card_tells_what_was_measured(demo: Any, tmp_path: Path) -> None:
    """Prevents a card without its tag, and requirements without the package; n-grams alone are held too."""
    from skipsearch import load_mask

    published = load_mask(Path(__file__).parents[2] / "results" / "measured" / "demo.mask.json")
    draft = draft_of(demo.model, demo.tokenizer, published.plan, draft=published.draft, evidence=published.evidence)
    export_mask(draft, "custom-generate", tmp_path / "made")
    card = (tmp_path / "made" / "README.md").read_text()
    assert "- custom_generate\n" in card and "1.62 times (1.47 to 1.79)" in card and "Verdict: use" in card
    assert (tmp_path / "made" / "custom_generate" / "requirements.txt").read_text().startswith("skipsearch>=")
    ngrams = draft_of(demo.model, demo.tokenizer, published.plan.skip - published.plan.skip, draft=DraftPolicy(ngram=4))
    assert export_mask(ngrams, "custom-generate", tmp_path / "n-grams")["check"]["same_tokens"]


def test_words_of_strangers_stay_words(demo: Any, tmp_path: Path) -> None:
    """Prevents a model id of a mask file from becoming code, or another field of the card."""
    draft = draft_of(demo.model, demo.tokenizer, DEMO_WHOLE)
    name = 'a"""\nraise SystemExit(1)\n"""\\'
    file = draft.file.model_copy(update={"model": draft.file.model.model_copy(update={"id": name})})
    export_mask(Draft(loaded=demo, file=file, weights=draft.weights), "custom-generate", tmp_path / "made")
    code = (tmp_path / "made" / "custom_generate" / "generate.py").read_text()
    held = next(node.value.value for node in ast.parse(code).body if isinstance(node, ast.Assign))
    assert json.loads(held)["model"]["id"] == name
    assert "\nraise" not in (tmp_path / "made" / "README.md").read_text()
