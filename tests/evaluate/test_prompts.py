"""Prompts: whatever holds them, the same token ids come out, in two parts that share nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from prompt_files import LINES, TEXTS, Load, everything, ids, write
from transformers import PreTrainedTokenizerBase

from skipsearch.demo.corpus import modules
from skipsearch.errors import PromptError
from skipsearch.evaluate import builtin
from skipsearch.evaluate.builtin import CODE_TOKENS
from skipsearch.evaluate.prompts import COLUMNS, FORMATS, fingerprint

# Built in


def test_built_in_counts_lengths_and_split(load: Load) -> None:
    """Prevents a held-out prompt that the search has seen, and sets of another size than asked for."""
    prompts = load(calibration=24, held_out=20)
    assert (len(prompts.calibration), len(prompts.held_out)) == (24, 20)
    assert len(everything(prompts)) == 44
    assert {len(p) for p in everything(prompts)} == {CODE_TOKENS} == {64}


def test_built_in_prompts_follow_the_seed(load: Load) -> None:
    """Prevents a study that cannot be resumed, or seeds that all give one prompt set."""
    assert load(seed=3) == load(seed=3)
    assert not everything(load(seed=3)) & everything(load(seed=4))


def test_built_in_prompts_come_from_held_out_modules(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prevents acceptance measured on code that the bundled model was trained on."""
    held_out = [text for _, text in modules(held_out=True)]
    for prompt in everything(load()):
        text = tokenizer.decode(prompt[:-1])  # the last token may be cut inside a character
        assert any(text in module for module in held_out), text


def test_training_and_prompting_share_no_module() -> None:
    """Prevents a module on both sides of the split."""
    assert not {name for name, _ in modules(held_out=True)} & {name for name, _ in modules(held_out=False)}


def test_built_in_prompts_can_be_cut(load: Load) -> None:
    """Prevents --prompt-tokens from being ignored for the built-in prompts."""
    assert {len(p) for p in everything(load(max_tokens=16))} == {16}


def test_chat_models_get_instructions(load: Load, chatty: Any) -> None:
    """Prevents a chat model from being searched on bare code, and code from being asked as a user's question."""
    assert load(tokenizer=chatty) == load("builtin:chat", tokenizer=chatty)
    for prompt in everything(load(tokenizer=chatty)):
        text = chatty.decode(prompt)
        assert text.startswith("<user>") and text.endswith("</><bot>"), text
    assert load("builtin:code", tokenizer=chatty) == load(tokenizer=chatty, chat=False) == load()
    with pytest.raises(PromptError, match="builtin:code and builtin:chat"):
        load("builtin:poems")


def test_the_instructions_are_whole_and_of_all_kinds(load: Load, chatty: Any) -> None:
    """Prevents lost kinds of instructions, turns in a wrong order, and prompts that are cut or too long for a model."""
    rows = [json.loads(line) for line in builtin._INSTRUCTIONS.read_text(encoding="utf-8").splitlines()]
    assert Counter(row["category"] for row in rows).most_common()[-1][1] >= 15 and len(rows) >= 120
    talks = list(builtin.built_in_rows(builtin.CHAT, seed=0))
    assert all(m["role"] == ("user", "assistant")[i % 2] for talk in talks for i, m in enumerate(talk))
    assert {len(talk) for talk in talks} == {1, 3} and len({talk[0]["content"] for talk in talks}) == len(rows)
    whole = everything(load("builtin:chat", tokenizer=chatty, calibration=80, held_out=40, room=4000))
    assert len(whole) == len(rows)
    fitting = everything(load("builtin:chat", tokenizer=chatty, calibration=80, held_out=40, room=200))
    assert fitting == {prompt for prompt in whole if len(prompt) <= 200} != whole


# Files


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_prompts(suffix: str, tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents a format that loses, doubles, strips or retokenises prompts."""
    name = "text" if suffix == ".txt" else "prompt"
    prompts = load(write(tmp_path / f"prompts{suffix}", {name: LINES}))
    assert everything(prompts) == ids(tokenizer, LINES)
    assert (len(prompts.calibration), len(prompts.held_out)) == (4, 4)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_prompts_of_many_lines(suffix: str, tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents a prompt from being torn at its line breaks."""
    assert everything(load(write(tmp_path / f"p{suffix}", {"prompt": TEXTS}))) == ids(tokenizer, TEXTS)


def test_blank_lines_are_skipped(tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents empty prompts, which no model can continue."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n" + "\n   \n".join(LINES) + "\n\n")
    assert everything(load(path)) == ids(tokenizer, LINES)


@pytest.mark.parametrize("column", COLUMNS)
def test_known_columns_are_found(column: str, tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents a common data set from needing --prompt-column, or another column from being taken."""
    path = write(tmp_path / "p.jsonl", {"id": [f"row {i}" for i in range(8)], column: TEXTS})
    assert everything(load(path)) == ids(tokenizer, TEXTS)


def test_the_first_known_column_wins(tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents the order of columns in a file from deciding."""
    path = write(tmp_path / "p.csv", {"article": LINES, "prompt": TEXTS})
    assert everything(load(path)) == ids(tokenizer, TEXTS)


def test_the_column_can_be_chosen(tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents --prompt-column from being ignored where a known column exists."""
    path = write(tmp_path / "p.parquet", {"prompt": TEXTS, "code": LINES})
    assert everything(load(path, column="code")) == ids(tokenizer, LINES)


def test_turns_give_their_first(tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents later turns of MT-bench style rows from being glued to the first."""
    path = write(tmp_path / "p.jsonl", {"turns": [[text, "and now faster"] for text in TEXTS]})
    assert everything(load(path)) == ids(tokenizer, TEXTS)


def test_the_data_set_gets_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    """Prevents --prompt-config and --prompt-split from being dropped on the way."""
    seen: list[Any] = []

    def fake(*args: Any, **options: Any) -> datasets.Dataset:
        seen.append((args, options))
        return datasets.Dataset.from_dict({"question": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert len(everything(load("openai/gsm8k", config="main", split="train[:8]"))) == 8
    assert seen == [(("openai/gsm8k", "main"), {"split": "train[:8]"})]


def test_known_formats_are_the_documented_ones() -> None:
    """Prevents a format that the errors offer but nobody reads."""
    offered = re.findall(r"\.\w+", "a .txt, .jsonl, .csv or .parquet file")
    assert set(offered) <= set(FORMATS)


# Splitting


def test_doubles_are_dropped(tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents one prompt from landing in both parts under two rows."""
    prompts = load(write(tmp_path / "p.csv", {"prompt": TEXTS * 5}))
    assert sorted([*prompts.calibration, *prompts.held_out]) == sorted(ids(tokenizer, TEXTS))


def test_prompts_that_become_equal_when_cut_are_doubles(tmp_path: Path, load: Load) -> None:
    """Prevents prompts that share their first tokens from being held out from themselves."""
    same = [f"{LINES[0]} + {i}" for i in range(8)]
    with pytest.raises(PromptError, match="holds 1 different prompts"):
        load(write(tmp_path / "p.csv", {"prompt": same}), max_tokens=5)


def test_a_small_source_is_shared_out(tmp_path: Path, load: Load) -> None:
    """Prevents an empty part: both get at least two, in the proportion asked for."""
    path = write(tmp_path / "p.csv", {"prompt": TEXTS})
    sizes = [(len(p.calibration), len(p.held_out)) for p in (
        load(path, calibration=30, held_out=10), load(path, calibration=1000, held_out=2),
        load(path, calibration=2, held_out=1000), load(path, calibration=2, held_out=3),
    )]  # fmt: skip
    assert sizes == [(6, 2), (6, 2), (2, 6), (2, 3)]


def test_files_are_shuffled_by_the_seed(tmp_path: Path, load: Load) -> None:
    """Prevents sorted files from giving easy prompts to one part, and a split that a restart changes."""
    path = write(tmp_path / "p.csv", {"prompt": TEXTS})
    assert load(path, seed=1) == load(path, seed=1)
    assert len({load(path, seed=seed).calibration for seed in range(6)}) > 1
    assert fingerprint(load(path, seed=1).calibration) != fingerprint(load(path, seed=2).calibration)


def test_texts_can_be_handed_over(load: Load, tokenizer: Any) -> None:
    """Prevents the library form from reading a file, or the built-in prompts, instead of the caller's."""
    assert everything(load("builtin", texts=tuple(TEXTS))) == ids(tokenizer, TEXTS)
