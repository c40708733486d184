"""Prompts to search and validate with: built in, from a file, or from a data set; split in two, disjoint."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from skipsearch.errors import PromptError
from skipsearch.evaluate.builtin import BUILT_IN, CODE, CODE_TOKENS, built_in, built_in_rows
from skipsearch.model.load import hub_reachable

COLUMNS = ("prompt", "text", "question", "turns", "messages", "article", "instruction")
FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """Where prompts come from.

    Attributes:
        name: "builtin:code", "builtin:chat", "builtin" (instructions where `chat` applies, else code), a
            .txt/.json/.jsonl/.csv/.parquet file, or a `datasets` id.
        column: which column holds them; by default the first of `COLUMNS` that exists.
        config, split: of a `datasets` id.
        chat: whether to wrap prompts in the tokenizer's chat template where it has one.
        texts: the prompts themselves; the name is then only a name.
    """

    name: str = BUILT_IN
    column: str | None = None
    config: str | None = None
    split: str = "test"
    chat: bool = True
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Token ids of calibration and held-out prompts; no prompt is in both."""

    calibration: tuple[Ids, ...]
    held_out: tuple[Ids, ...]


def fingerprint(prompts: Iterable[Ids]) -> str:
    """SHA-256 over the token ids of prompts, in order."""
    return hashlib.sha256(repr(list(prompts)).encode()).hexdigest()


def load_prompts(
    source: PromptSource, tokenizer: PreTrainedTokenizerBase, *, calibration: int, held_out: int,
    max_tokens: int | None, room: int, seed: int,
) -> Prompts:  # fmt: skip
    """Read, tokenise, deduplicate, shuffle with the seed, and split.

    Args:
        calibration, held_out: how many of each; a smaller source is shared out in this proportion.
        max_tokens: cut prompts to their first so many tokens; None leaves them whole.
        room: the longest prompt that still fits the model's context with what will be generated.

    Raises:
        PromptError: missing or empty source, missing column, a prompt that does not fit.
    """
    chat = source.chat and bool(tokenizer.chat_template)
    ours = None if source.texts else built_in(source.name, chat)
    texts: Iterable[Any] = source.texts or (_rows(source) if ours is None else built_in_rows(ours, seed))
    limit = CODE_TOKENS if ours == CODE and max_tokens is None else max_tokens
    wanted = calibration + held_out
    unique: dict[Ids, None] = {}
    for number, row in enumerate(texts, 1):
        ids = _tokens(row, tokenizer, chat and ours != CODE)[:limit]
        if not ids or (ours and len(ids) > room):
            continue
        if len(ids) > room:
            raise PromptError(
                f"prompt {number} of {source.name} has {len(ids)} tokens, at most {room} fit the model's context; "
                f"cut prompts with --prompt-tokens {room}, or leave it out"
            )
        unique.setdefault(ids)
        if ours and len(unique) == wanted:
            break
    if len(unique) < 4:
        raise PromptError(
            f"prompt source {source.name} holds {len(unique)} different prompts, at least 4 are needed "
            f"(two to search with, two held out); add prompts"
        )
    chosen = list(unique)
    random.Random(seed).shuffle(chosen)
    chosen = chosen[:wanted]
    cut = min(max(2, round(len(chosen) * calibration / wanted)), len(chosen) - 2)
    return Prompts(calibration=tuple(chosen[:cut]), held_out=tuple(chosen[cut:]))


def lengthened(prompts: Sequence[Ids], contexts: Sequence[int], new_tokens: int, room: int) -> tuple[Ids, ...]:
    """Prompts with other prompts in front of them, so that decoding happens at these context lengths in turn.

    Args:
        new_tokens: that will be decoded; the middle one stands at the context length.
        room: the longest prompt that fits; a prompt that is long enough stays as it is.
    """
    longer = []
    for i, prompt in enumerate(prompts):
        missing = min(room, contexts[i % len(contexts)] - new_tokens // 2) - len(prompt)
        others = itertools.chain.from_iterable(itertools.cycle([*prompts[i + 1 :], *prompts[:i]]))
        longer.append((*itertools.islice(others, max(0, missing)), *prompt))
    return tuple(longer)


def _rows(source: PromptSource) -> Iterator[Any]:
    import datasets  # slow to import, and not needed for the built-in prompts

    datasets.disable_progress_bars()
    path = Path(source.name).expanduser()
    try:
        if path.suffix in FORMATS:
            if not path.is_file():
                raise PromptError(f"prompt file {path} does not exist; check --prompts")
            if not path.stat().st_size:
                raise PromptError(f"prompt file {path} is empty; add at least 4 prompts")
            table = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
        else:
            if not hub_reachable():
                datasets.config.HF_HUB_OFFLINE = True  # cached data sets still load, others fail at once
            table = datasets.load_dataset(source.name, source.config, split=source.split)
    except PromptError:
        raise
    except Exception as error:  # the library raises many kinds; the first line of the text says which
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise PromptError(
            f"prompt source {source.name} cannot be read ({reason}); give a .txt, .jsonl, .csv or .parquet file, "
            f"or a data set id with --prompt-config and --prompt-split"
        ) from error
    column = source.column or next((c for c in COLUMNS if c in table.column_names), None)
    if column not in table.column_names:
        raise PromptError(
            f"prompt column {column or '/'.join(COLUMNS[:4])} is not in {source.name}, which has "
            f"{', '.join(table.column_names)}; choose one with --prompt-column"
        )
    yield from table[column]


def _tokens(row: Any, tokenizer: PreTrainedTokenizerBase, chat: bool) -> Ids:
    """Token ids of a row: text, a list of turns (the first one counts), or a list of chat messages."""
    if isinstance(row, list) and row and isinstance(row[0], dict):
        messages = row
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
            raise PromptError(
                f"chat messages must hold text under 'content', got {messages[0]!r}; convert them, "
                f"or choose another column with --prompt-column"
            )
    else:
        text = row[0] if isinstance(row, list) and row else row
        if not isinstance(text, str):
            raise PromptError(
                f"a prompt must be text, a list of turns or chat messages, got {text!r}; check the column"
            )
        if not text.strip():
            return ()
        messages = [{"role": "user", "content": text}]
    if chat:
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        except TemplateError as error:
            raise PromptError(f"the chat template refuses {messages!r} ({error}); pass --no-chat") from error
    else:
        ids = tokenizer("\n".join(m["content"] for m in messages))["input_ids"]
    return tuple(ids)
