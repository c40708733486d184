"""Sources of prompts that cannot be read or do not suffice are refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import assert_one_sentence
from prompt_files import LINES, TEXTS, Load, everything, write

from skipsearch.errors import PromptError
from skipsearch.evaluate.prompts import FORMATS


def test_too_few_prompts(tmp_path: Path, load: Load) -> None:
    """Prevents a verdict from one prompt."""
    with pytest.raises(PromptError) as error:
        load(write(tmp_path / "p.txt", {"text": LINES[:3]}))
    assert_one_sentence(error, "holds 3 different prompts", "at least 4", "p.txt")
    assert len(everything(load(write(tmp_path / "q.txt", {"text": LINES[:4]})))) == 4


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_empty_file(suffix: str, tmp_path: Path, load: Load) -> None:
    """Prevents the data set library's own words for a file without a byte."""
    path = tmp_path / f"prompts{suffix}"
    path.touch()
    with pytest.raises(PromptError) as error:
        load(path)
    assert_one_sentence(error, str(path), "is empty", "add at least 4")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_missing_file(suffix: str, tmp_path: Path, load: Load) -> None:
    """Prevents a misspelt path from being looked up on the hub."""
    path = tmp_path / f"nowhere{suffix}"
    with pytest.raises(PromptError) as error:
        load(path)
    assert_one_sentence(error, str(path), "does not exist", "--prompts")


@pytest.mark.parametrize(("column", "named"), [(None, "prompt"), ("code", "code")])
def test_a_missing_column(column: str | None, named: str, tmp_path: Path, load: Load) -> None:
    """Prevents guessing: the error names what was looked for and what there is."""
    path = write(tmp_path / "p.csv", {"title": LINES, "body": TEXTS})
    with pytest.raises(PromptError) as error:
        load(path, column=column)
    assert_one_sentence(error, f"prompt column {named}", str(path), "title, body", "--prompt-column")


def test_a_column_without_text(tmp_path: Path, load: Load) -> None:
    """Prevents numbers from being tokenised as if they were prompts."""
    with pytest.raises(PromptError) as error:
        load(write(tmp_path / "p.csv", {"prompt": list(range(8))}))
    assert_one_sentence(error, "row ", "must be text", "got ", "column")


def test_a_file_of_another_content_says_why(tmp_path: Path, load: Load) -> None:
    """Prevents the reason of a failed read from being swallowed."""
    path = tmp_path / "p.jsonl"
    path.write_text("this is no JSON\n")
    with pytest.raises(PromptError) as error:
        load(path)
    assert_one_sentence(error, "line 1 of prompt file", str(path), "is not JSON")


def test_a_prompt_longer_than_the_context(tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents a search that dies hours later at the one prompt that does not fit, or cuts it in silence."""
    long = "x = 1; " * 50
    size = len(tokenizer(long)["input_ids"])
    path = write(tmp_path / "p.txt", {"text": [*LINES[:5], long, *LINES[5:]]})
    with pytest.raises(PromptError) as error:
        load(path, held_out=5, room=size - 1)
    assert_one_sentence(
        error, "prompt 6 of", f"has {size} tokens", f"at most {size - 1} fit", f"--prompt-tokens {size - 1}"
    )
    assert max(map(len, everything(load(path, room=size)))) <= size
    assert max(map(len, everything(load(path, room=30, max_tokens=30)))) == 30


def test_a_data_set_without_network(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents pages of connection errors for a data set that is not in the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(PromptError) as error:
        load("nobody/has-this-data-set", split="train")
    assert_one_sentence(error, "nobody/has-this-data-set", "--prompt-split")
