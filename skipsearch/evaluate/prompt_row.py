"""Prompt rows: text, turns or chat messages as token ids, with what is left out or taken differently counted."""

from __future__ import annotations

import datetime
import itertools
import re
import warnings
from collections import Counter
from typing import Any

from transformers import PreTrainedTokenizerBase

from skipsearch.errors import PromptError, PromptWarning, first_line, shown

Ids = tuple[int, ...]
# Some templates write today's date; prompts must be the same every day.
TODAY, CLOCK = datetime.datetime(2025, 1, 1), re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_TEXT = "a text that no template holds"
MOST = 1 << 22  # characters of a prompt; no context holds more
ANSWERED = "end with an answer, which is left off"
TEMPLATED = "hold the chat template's text already, and are taken as they are"


class RowReader:
    """Token ids of the rows of one source.

    Args:
        chat: whether to wrap rows in the tokenizer's chat template.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
        self.name, self.tokenizer, self.chat = name, tokenizer, chat
        template = tokenizer.get_chat_template() if chat else ""
        self._template = CLOCK.sub(lambda found: repr(TODAY.strftime(found[2])), template)
        self._mark: str | None = None  # found when the first row needs it
        self._counts: Counter[str] = Counter()
        self._refused: list[PromptError] = []

    def tokens(self, number: int, row: Any, limit: int | None = None) -> Ids:
        """Of a row: text, a list of turns (the first one counts), or chat messages; nothing for one without text.

        Args:
            limit: most tokens; a longer row loses the end of its last text, not that of the chat template.
        """
        try:
            return self._tokens(row, limit)
        except PromptError as error:
            self._refused.append(PromptError(f"row {number} of {self.name}: {error}"))
            return ()

    def say(self, rows: int, enough: bool) -> None:
        """Count what was left out or taken differently, in one note.

        Raises:
            PromptError: rows were refused, and too few are left.
        """
        if self._refused and not enough:
            raise self._refused[0]
        said = [f"{count} {what}" for what, count in self._counts.items()]
        if self._refused:
            said.append(f"{len(self._refused)} are left out ({self._refused[0]})")
        if said:
            warnings.warn(f"of the rows read from {self.name}, {'; '.join(said)}", PromptWarning, stacklevel=3)

    def _tokens(self, row: Any, limit: int | None) -> Ids:
        if isinstance(row, list) and row and isinstance(row[0], dict):
            return self._of_messages(row, limit)
        text = row[0] if isinstance(row, list) and row else row
        if not isinstance(text, str):
            raise PromptError(
                f"a prompt must be text, a list of turns or chat messages, got {shown(text)}; check the column"
            )
        if not text.strip():
            return ()
        _check_text(text)
        if self.chat and self._templated(text):
            self._counts[TEMPLATED] += 1
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"][:limit])
        return self._of_messages([{"role": "user", "content": text}], limit)

    def _of_messages(self, messages: list[Any], limit: int | None) -> Ids:
        wrong = [m for m in messages if not (isinstance(m, dict) and isinstance(m.get("content"), str))]
        if wrong:
            raise PromptError(
                f"chat messages must hold text under 'content', got {shown(wrong[0])}; convert them, "
                f"or choose another column with --prompt-column"
            )
        for message in messages:
            _check_text(message["content"])
        asked = list(messages)
        while asked and asked[-1].get("role") == "assistant":
            asked.pop()
        self._counts[ANSWERED] += len(asked) < len(messages)
        self._counts = +self._counts
        if not any(m["content"].strip() for m in asked):
            return ()
        if not self.chat:
            return tuple(self.tokenizer("\n".join(m["content"] for m in asked))["input_ids"][:limit])
        ids = self._in_template(asked)
        return ids if limit is None or len(ids) <= limit else self._cut(ids, asked, limit)

    def _in_template(self, messages: list[Any]) -> Ids:
        try:
            return tuple(
                self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=True, chat_template=self._template
                )["input_ids"]
            )
        except Exception as error:  # a template raises whatever its expressions do
            raise PromptError(
                f"the chat template refuses {shown(messages)} ({first_line(error)}); pass --no-chat"
            ) from error

    def _cut(self, ids: Ids, messages: list[Any], limit: int) -> Ids:
        """The ids without the end of the last message's text: what stands around it is common to any two texts."""
        one, two = (self._in_template([*messages[:-1], {**messages[-1], "content": text}]) for text in ("one", "Two!"))
        head, tail = _common(one, two), _common(one[::-1], two[::-1])[::-1]
        if len(head) + len(tail) >= limit:
            raise PromptError(
                f"a prompt may have {limit} tokens, {len(head) + len(tail)} stand around its last text already "
                f"(chat template, earlier turns); raise --prompt-tokens, or pass --no-chat"
            )
        tail = _common(ids[::-1], tail[::-1])[::-1]  # a text's end may make other tokens of it
        return ids[: limit - len(tail)] + tail

    def _templated(self, text: str) -> bool:
        """Whether a text holds the template's special token, or where it has none begins with what it writes."""
        mark = self._mark_of_template()
        if any(token in mark for token in self.tokenizer.all_special_tokens):
            return mark in text
        return text.lstrip().removeprefix(str(self.tokenizer.bos_token or "")).lstrip().startswith(mark)

    def _mark_of_template(self) -> str:
        """What the template writes before a user's text: from its last special token on, if it holds one."""
        if self._mark is None:
            try:
                whole = str(
                    self.tokenizer.apply_chat_template(
                        [{"role": "user", "content": _TEXT}], tokenize=False, chat_template=self._template
                    )
                )
            except Exception:  # a template raises whatever its expressions do
                whole = ""
            head = whole.partition(_TEXT)[0].removeprefix(str(self.tokenizer.bos_token or "")).strip()
            at = max((head.rfind(token) for token in self.tokenizer.all_special_tokens), default=-1)
            self._mark = head[max(at, 0) :] or _TEXT
        return self._mark


def _common(one: Ids, two: Ids) -> Ids:
    """The beginning that two rows share."""
    return tuple(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def _check_text(text: str) -> None:
    if len(text) > MOST:
        raise PromptError(f"a prompt has {len(text):,} characters, at most {MOST:,} are read; cut it")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise PromptError("a prompt holds one half of a surrogate pair, which is no text; remove it")
