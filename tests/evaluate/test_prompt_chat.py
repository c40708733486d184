"""Prompts for chat models: templates and messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import assert_one_sentence
from prompt_files import LINES, TEXTS, Load, everything, ids, write

from skipsearch.errors import PromptError


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


def test_a_template_with_a_clock_says_the_same_every_day(tmp_path: Path, load: Load, chatty: Any) -> None:
    """Prevents: tomorrow the prompts are others, and the study of today is refused."""
    chatty.chat_template = "{{ strftime_now('%d %b %Y') }}|" + chatty.chat_template
    found = everything(load(write(tmp_path / "p.csv", {"prompt": TEXTS}), tokenizer=chatty))
    assert found == ids(chatty, [f"01 Jan 2025|<user>{t}</><bot>" for t in TEXTS])


def test_a_template_that_refuses_is_reported(tmp_path: Path, load: Load, chatty: Any) -> None:
    """Prevents a Jinja traceback for templates that forbid a role."""
    chatty.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(PromptError) as error:
        load(write(tmp_path / "p.csv", {"prompt": TEXTS}), tokenizer=chatty)
    assert_one_sentence(error, "no system role", "--no-chat")


def test_a_cut_prompt_keeps_the_end_of_the_template(load: Load, chatty: Any, tmp_path: Path) -> None:
    """Prevents --prompt-tokens from cutting off what asks for the answer, or all of the text: equal prompts."""
    path = write(tmp_path / "p.jsonl", {"prompt": [f"{line} {'again ' * 40}" for line in LINES]})
    cut = everything(load(path, tokenizer=chatty, max_tokens=30))
    assert len(cut) == len(LINES) and {len(prompt) for prompt in cut} == {30}
    for prompt in cut:
        text = chatty.decode(prompt)
        assert text.startswith("<user>") and text.endswith("><bot>") and "again" in text, text
    with pytest.raises(PromptError) as error:
        load(path, tokenizer=chatty, max_tokens=4)
    assert_one_sentence(error, "may have 4 tokens", "stand around its last text", "--prompt-tokens", "--no-chat")


def test_a_cut_conversation_loses_the_end_of_its_last_turn(load: Load, chatty: Any, tmp_path: Path) -> None:
    """Prevents a cut in an earlier turn, and a template that insists on its system message from refusing the cut."""
    chatty.chat_template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        chatty.chat_template
    )
    before = [{"role": "system", "content": "short"}, {"role": "user", "content": "a"}]
    talks = [[*before, {"role": "user", "content": f"{text} {'again ' * 40}"}] for text in TEXTS]
    cut = everything(load(write(tmp_path / "p.jsonl", {"messages": talks}), tokenizer=chatty, max_tokens=50))
    assert len(cut) == len(TEXTS) and {len(prompt) for prompt in cut} == {50}
    for prompt in cut:
        text = chatty.decode(prompt)
        assert text.startswith("<system>short</><user>a</><user>") and text.endswith("><bot>"), text
    with pytest.raises(PromptError, match="stand around its last text"):
        load(write(tmp_path / "p.jsonl", {"messages": talks}), tokenizer=chatty, max_tokens=12)
