"""Prompts that come with the package: Python code, right for the bundled model, and instructions for chat models."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skipsearch.demo.corpus import modules
from skipsearch.errors import PromptError

BUILT_IN = "builtin"
CODE, CHAT = "builtin:code", "builtin:chat"
CODE_TOKENS = 64  # to which code is cut; instructions are whole
_INSTRUCTIONS = Path(__file__).parent / "instructions.jsonl"


def built_in(name: str, chat: bool) -> str | None:
    """The set that a name stands for: "builtin" is CHAT for chat models, else CODE; None for other sources.

    Raises:
        PromptError: there is no such set.
    """
    if name == BUILT_IN:
        return CHAT if chat else CODE
    if name.startswith(f"{BUILT_IN}:") and name not in (CODE, CHAT):
        raise PromptError(f"prompt source is {name!r}, the built-in ones are {CODE} and {CHAT}; choose one of them")
    return name if name in (CODE, CHAT) else None


def built_in_rows(name: str, seed: int) -> Iterator[Any]:
    """The prompts of CODE or CHAT, in seeded order."""
    rows = list(_code() if name == CODE else _instructions())
    random.Random(seed).shuffle(rows)
    yield from rows


def _code() -> Iterator[str]:
    """Definitions of standard-library modules that the bundled model was not trained on."""
    for _, text in modules(held_out=True):
        starts = [m.start() for m in re.finditer(r"^(?:class|def|    def) ", text, re.MULTILINE)]
        yield from (text[start : start + 1200] for start in starts if len(text) - start > 400)


def _instructions() -> Iterator[list[dict[str, str]]]:
    """Chats that end with a user's turn, of eight kinds, some of them with a turn and an answer before it."""
    for line in _INSTRUCTIONS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        spoken = [row["turns"][0], row["answer"], row["turns"][1]] if "answer" in row else row["turns"]
        yield [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(spoken)]
