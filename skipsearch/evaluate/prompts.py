"""Prompts to search and validate with: built in, from a file, or from a data set; split in two, disjoint."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from skipsearch.errors import PromptError, shown
from skipsearch.evaluate.builtin import BUILT_IN, CODE, CODE_TOKENS, built_in, built_in_rows
from skipsearch.evaluate.prompt_file import FORMATS, check_file, read_rows
from skipsearch.evaluate.prompt_row import Ids, RowReader
from skipsearch.model.load import hub_reachable

COLUMNS = ("prompt", "text", "question", "turns", "messages", "article", "instruction")


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
    texts: tuple[Any, ...] = ()


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
        max_tokens: cut prompts to so many tokens, the end of a chat template included; None leaves them whole.
        room: the longest prompt that still fits the model's context with what will be generated.

    Raises:
        PromptError: missing or empty source, missing column, a prompt that does not fit.
    """
    chat = source.chat and bool(tokenizer.chat_template)
    ours = None if source.texts else built_in(source.name, chat)
    rows = list(source.texts or (_rows(source) if ours is None else built_in_rows(ours, seed)))
    numbers = list(range(1, len(rows) + 1))  # as the source counts them
    if not ours:  # blank rows and doubles must not change the order
        known: dict[str, int] = {}
        for number, row in zip(numbers, rows, strict=True):
            if not (isinstance(row, str) and not row.strip()):
                known.setdefault(_key(row), number)
        numbers = list(known.values())
        rows = [rows[number - 1] for number in numbers]
    reader = RowReader(source.name, tokenizer, chat and ours != CODE)
    limit = CODE_TOKENS if ours == CODE and max_tokens is None else max_tokens
    wanted, order = calibration + held_out, list(range(len(rows)))
    if not ours:
        random.Random(seed).shuffle(order)
    unique: dict[Ids, None] = {}
    for number in order:
        ids = reader.tokens(numbers[number], rows[number], limit)
        if not ids or (ours and len(ids) > room):
            continue
        if len(ids) > room:
            raise PromptError(
                f"prompt {numbers[number]} of {source.name} has {len(ids)} tokens, at most {room} fit the model's "
                f"context; cut prompts with --prompt-tokens {room}, or leave it out"
            )
        unique.setdefault(ids)
        if len(unique) == wanted:
            break
    reader.say(len(rows), enough=len(unique) >= 4)
    if len(unique) < 4:
        raise PromptError(
            f"prompt source {source.name} holds {len(unique)} different prompts, at least 4 are needed "
            f"(two to search with, two held out); add prompts" + ", or raise --prompt-tokens" * bool(max_tokens)
        )
    chosen = list(unique)
    if ours:
        random.Random(seed).shuffle(chosen)
    cut = min(max(2, round(len(chosen) * calibration / wanted)), len(chosen) - 2)
    return Prompts(calibration=tuple(chosen[:cut]), held_out=tuple(chosen[cut:]))


def check_source(name: str) -> None:
    """Raise PromptError for a source that is missing, as far as that can be told before a model is loaded."""
    built_in(name, chat=False)
    path = Path(name).expanduser()
    if path.suffix.lower() in FORMATS or (name.startswith((".", "/", "~")) and not path.exists()):
        check_file(path)
    elif path.is_file():
        raise PromptError(f"prompt file {name} must end in one of {', '.join(FORMATS)}; rename or convert it")


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


def _rows(source: PromptSource) -> list[Any]:
    path = Path(source.name).expanduser()
    if path.suffix.lower() in FORMATS:
        rows = read_rows(path)
        names = list(dict.fromkeys(name for row in rows for name in row))
        column = _column(source, names)
        return [row.get(column) for row in rows]
    import datasets  # slow to import

    datasets.disable_progress_bars()
    try:
        if not hub_reachable():
            datasets.config.HF_HUB_OFFLINE = True  # cached data sets still load, others fail at once
        table = datasets.load_dataset(source.name, source.config, split=source.split)
    except Exception as error:  # the library raises many kinds; the first line of the text says which
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise PromptError(
            f"prompt source {source.name} cannot be read ({reason}); give a .txt, .jsonl, .csv or .parquet file, "
            f"or a data set id with --prompt-config and --prompt-split"
        ) from error
    return list(table[_column(source, table.column_names)])


def _key(row: Any) -> str:
    try:
        return repr(row)
    except RecursionError:
        raise PromptError("a prompt's lists are nested too deep; give text, turns or chat messages") from None


def _column(source: PromptSource, names: Sequence[str]) -> str:
    column = source.column or next((c for c in COLUMNS if c in names), None)
    if column is None or column not in names:
        raise PromptError(
            f"prompt column {column or '/'.join(COLUMNS[:4])} is not in {source.name}, which has "
            f"{shown(', '.join(map(str, names)), 400)[1:-1]}; choose one with --prompt-column"
        )
    return column
