"""Prompt files as people save them: what is skipped is counted, what is refused names file, row and mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_one_sentence
from prompt_files import LINES, TEXTS, Load, everything, ids

from skipsearch.bench.groups import prompt_groups
from skipsearch.errors import PromptError, PromptWarning


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


ROWS = [{"prompt": text} for text in TEXTS]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.csv"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
def test_marks_and_line_ends(
    name: str, ends: str, mark: str, tmp_path: Path, load: Load, tokenizer: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """Prevents a byte-order mark or a carriage return from becoming part of a prompt, or of a column's name."""
    rows = [{"prompt": f"{line} # \u2028 é"} for line in LINES]
    texts = {
        "p.txt": "\n".join(row["prompt"] for row in rows),
        "p.jsonl": jsonl(rows),
        "p.json": json.dumps(rows, indent=1),
        "p.csv": "prompt\n" + "\n".join(row["prompt"] for row in rows) + "\n",
    }
    path = tmp_path / name
    path.write_bytes(texts[name].replace("\n", ends).encode(mark))
    assert everything(load(path)) == ids(tokenizer, [row["prompt"] for row in rows])
    assert not list(recwarn)
    if name == "p.jsonl":
        options: dict[str, Any] = {"per_group": 4, "room": 300, "seed": 0, "vocabulary": 4096}
        categories = [{"category": "qa", "turns": [row["prompt"]]} for row in rows]
        path.write_bytes(jsonl(categories).replace("\n", ends).encode(mark))
        assert len(prompt_groups([str(path)], tokenizer, **options)["qa"]) == 4


@pytest.mark.parametrize(("encoding", "why"), [("latin-1", "byte"), ("utf-16", "UTF-16")])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_other_encodings_are_refused(encoding: str, why: str, name: str, tmp_path: Path, load: Load) -> None:
    """Prevents a traceback, and text that was guessed wrongly."""
    path = tmp_path / name
    path.write_bytes(jsonl([{"prompt": f"{text} # naïve"} for text in TEXTS]).encode(encoding))
    with pytest.raises(PromptError) as error:
        load(path)
    assert_one_sentence(error, str(path), why, "save it as UTF-8")


@pytest.mark.parametrize("bad", [{"prompt": None}, {"prompt": 7}, {"other": "x"}, {"prompt": []}, {"prompt": {"a": 1}}])
def test_rows_without_text_are_counted(bad: Any, tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents one null from refusing a file of thousands, and from being left out without a word."""
    path = tmp_path / "p.jsonl"
    path.write_text(jsonl([*ROWS[:3], bad, *ROWS[3:]]))
    with pytest.warns(PromptWarning, match=r"1 are left out \(row 4 of .*p.jsonl"):
        assert everything(load(path, held_out=8)) == ids(tokenizer, TEXTS)


def test_an_empty_cell(tmp_path: Path, load: Load, tokenizer: Any) -> None:
    """Prevents an empty cell from becoming the prompt "nan"."""
    path = tmp_path / "p.csv"
    path.write_text("id,prompt\n" + "".join(f"{i},{line if i != 3 else ''}\n" for i, line in enumerate(LINES)))
    assert everything(load(path)) == ids(tokenizer, [*LINES[:3], *LINES[4:]])


def test_a_broken_line_is_named(tmp_path: Path, load: Load) -> None:
    """Prevents a search for the bad line in a large file."""
    path = tmp_path / "p.jsonl"
    path.write_text(jsonl(ROWS[:5]) + '{"prompt": "cut\n' + jsonl(ROWS[5:]))
    with pytest.raises(PromptError) as error:
        load(path)
    assert_one_sentence(error, "line 6 of prompt file", "mend the line")
    path.write_text(jsonl([["no object"]] * 5))
    with pytest.raises(PromptError, match=r"row 1 of prompt file .* must be an object"):
        load(path)


def test_a_long_row_that_is_not_chosen(tmp_path: Path, load: Load) -> None:
    """Prevents one long row among many from refusing a file, and every row from being tokenised for eight."""
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"short row {i}"} for i in range(3000)]
    rows[2900] = {"prompt": "x = 1; " * 500}
    path.write_text(jsonl(rows))
    assert len(everything(load(path))) == 8


def test_conversations_that_end_with_an_answer(tmp_path: Path, load: Load, chatty: Any) -> None:
    """Prevents a second, empty answer behind the one that the row holds."""
    talks = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "yes"}]} for t in TEXTS]
    path = tmp_path / "p.jsonl"
    path.write_text(jsonl([*talks, {"messages": []}, {"messages": [{"role": "assistant", "content": "hello"}]}]))
    with pytest.warns(PromptWarning, match="9 end with an answer, which is left off"):
        found = everything(load(path, tokenizer=chatty, held_out=12))
    assert found == ids(chatty, [f"<user>{t}</><bot>" for t in TEXTS])


def test_text_that_was_templated_before(tmp_path: Path, load: Load, chatty: Any) -> None:
    """Prevents two headers around one question."""
    wrapped = [f"<user>{t}</><bot>" for t in TEXTS]
    path = tmp_path / "p.jsonl"
    path.write_text(jsonl([{"text": text} for text in wrapped]))
    with pytest.warns(PromptWarning, match="8 hold the chat template's text already"):
        assert everything(load(path, tokenizer=chatty)) == ids(chatty, wrapped)


def test_masks_and_spaces_with_a_mark(tmp_path: Path) -> None:
    """Prevents files saved by an editor that writes a mark from being called broken."""
    from skipsearch import SkipMask, load_mask
    from skipsearch.maskfile import MaskFile, ModelCard
    from skipsearch.model.preset import read_space

    path = tmp_path / "mask.json"
    MaskFile.of(SkipMask(mlp=[1], num_layers=4), model=ModelCard(id="x", architecture="y", num_layers=4)).save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_mask(path).mask == SkipMask(mlp=[1], num_layers=4)
    (tmp_path / "space.toml").write_bytes(b"\xef\xbb\xbf[space]\nforms = ['skip']\n")
    assert read_space(tmp_path / "space.toml", 4).forms == ("skip",)
