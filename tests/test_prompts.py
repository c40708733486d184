"""Prompts: whatever holds them, the same token ids come out, in two parts that share nothing."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from skipsearch.demo.corpus import modules
from skipsearch.errors import PromptError
from skipsearch.evaluate.prompts import (
    BUILT_IN_TOKENS,
    COLUMNS,
    FORMATS,
    Prompts,
    PromptSource,
    fingerprint,
    load_prompts,
)
from skipsearch.model.load import DEMO

TEXTS = [f"def function_{i}(value):\n    return value * {i}" for i in range(8)]
LINES = [f"def function_{i}(value): return value * {i}" for i in range(8)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
Load = Callable[..., Prompts]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that the data set library makes of our files go where the files are."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerBase) -> Load:
    def call(name: Any = "builtin", tokenizer: Any = tokenizer, **changes: Any) -> Prompts:
        limits = {"calibration": 4, "held_out": 4, "max_tokens": None, "room": 400, "seed": 0}
        limits |= {k: changes.pop(k) for k in list(changes) if k in limits}
        return load_prompts(PromptSource(name=str(name), **changes), tokenizer, **limits)

    return call


def everything(prompts: Prompts) -> set[tuple[int, ...]]:
    return {*prompts.calibration, *prompts.held_out}


def ids(tokenizer: Any, texts: list[str]) -> set[tuple[int, ...]]:
    return {tuple(tokenizer(text)["input_ids"]) for text in texts}


def write(path: Path, rows: dict[str, list[Any]]) -> Path:
    """A table by column, in the format of the suffix."""
    frame = pd.DataFrame(rows)
    match path.suffix:
        case ".txt":
            path.write_text("\n".join(next(iter(rows.values()))) + "\n")
        case ".json" | ".jsonl":
            lines = [json.dumps(dict(zip(rows, values, strict=True))) for values in zip(*rows.values(), strict=True)]
            path.write_text("\n".join(lines) + "\n")
        case ".csv":
            frame.to_csv(path, index=False)
        case ".parquet":
            frame.to_parquet(path)
    return path


def assert_one_sentence(error: pytest.ExceptionInfo[Any], *parts: str) -> None:
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert part in message, message


# Built in


def test_built_in_counts_lengths_and_split(load: Load) -> None:
    """Prevents a held-out prompt that the search has seen, and sets of another size than asked for."""
    prompts = load(calibration=24, held_out=20)
    assert (len(prompts.calibration), len(prompts.held_out)) == (24, 20)
    assert len(everything(prompts)) == 44
    assert {len(p) for p in everything(prompts)} == {BUILT_IN_TOKENS} == {64}


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


def test_built_in_prompts_stay_code_for_chat_models(load: Load, chatty: Any) -> None:
    """Prevents code that is cut in the middle from being asked as a user's question."""
    assert load(tokenizer=chatty) == load()


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


# Chat


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TEMPLATE
    return changed


def test_text_is_wrapped_in_the_chat_template(tmp_path: Path, load: Load, chatty: Any) -> None:
    """Prevents a chat model from being searched on prompts of a form that it never gets."""
    path = write(tmp_path / "p.csv", {"prompt": TEXTS})
    assert everything(load(path, tokenizer=chatty)) == ids(chatty, [f"<user>{t}</><bot>" for t in TEXTS])


def test_chat_can_be_turned_off(tmp_path: Path, load: Load, chatty: Any) -> None:
    """Prevents --no-chat from being ignored."""
    path = write(tmp_path / "p.csv", {"prompt": TEXTS})
    assert everything(load(path, tokenizer=chatty, chat=False)) == ids(chatty, TEXTS)


def test_messages_keep_their_roles(tmp_path: Path, load: Load, chatty: Any) -> None:
    """Prevents a conversation from losing all but its last question, or being wrapped twice."""
    talks = [[{"role": "system", "content": "short"}, {"role": "user", "content": text}] for text in TEXTS]
    path = write(tmp_path / "p.jsonl", {"messages": talks})
    expected = [f"<system>short</><user>{t}</><bot>" for t in TEXTS]
    assert everything(load(path, tokenizer=chatty)) == ids(chatty, expected)
    joined = [f"short\n{t}" for t in TEXTS]
    assert everything(load(path)) == everything(load(path, tokenizer=chatty, chat=False)) == ids(chatty, joined)


@pytest.mark.parametrize("message", [{"from": "human", "value": "hello"}, {"role": "user", "content": ["hello"]}])
def test_messages_of_another_dialect_are_refused(message: Any, tmp_path: Path, load: Load) -> None:
    """Prevents a KeyError from deep inside for ShareGPT rows and for messages made of parts."""
    path = write(tmp_path / "p.jsonl", {"messages": [[message]] * 4})
    with pytest.raises(PromptError) as error:
        load(path)
    assert_one_sentence(error, "'content'", "hello", "--prompt-column")


def test_a_template_that_refuses_is_reported(tmp_path: Path, load: Load, chatty: Any) -> None:
    """Prevents a Jinja traceback for templates that forbid a role."""
    chatty.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(PromptError) as error:
        load(write(tmp_path / "p.csv", {"prompt": TEXTS}), tokenizer=chatty)
    assert_one_sentence(error, "no system role", "--no-chat")


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


# Refusals


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
    assert_one_sentence(error, "must be text", "got 0", "column")


def test_a_file_of_another_content_says_why(tmp_path: Path, load: Load) -> None:
    """Prevents the reason of a failed read from being swallowed."""
    path = tmp_path / "p.jsonl"
    path.write_text("this is no JSON\n")
    with pytest.raises(PromptError) as error:
        load(path)
    assert_one_sentence(error, str(path), "JSON parse error", ".jsonl")


def test_a_prompt_longer_than_the_context(tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents a search that dies hours later at the one prompt that does not fit, or cuts it in silence."""
    long = "x = 1; " * 50
    size = len(tokenizer(long)["input_ids"])
    path = write(tmp_path / "p.txt", {"text": [*LINES[:5], long, *LINES[5:]]})
    with pytest.raises(PromptError) as error:
        load(path, room=size - 1)
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
