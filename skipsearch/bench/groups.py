"""Groups of prompts to measure on: held-out code, random tokens, files, and the task groups of a file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from skipsearch.evaluate.builtin import CHAT, CODE, CODE_TOKENS, built_in
from skipsearch.evaluate.prompt_file import read_rows
from skipsearch.evaluate.prompt_row import Ids
from skipsearch.evaluate.prompts import PromptSource, load_prompts

RANDOM = "random"
RANDOM_TOKENS = 64
# Spec-Bench (Xia et al., arXiv 2401.07851) counts the eight categories of MT-bench as one task group.
MT_BENCH = frozenset(("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"))


def prompt_groups(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, per_group: int, room: int, seed: int,
    vocabulary: int,
) -> dict[str, tuple[Ids, ...]]:  # fmt: skip
    """Token ids of prompts by name of the group.

    Args:
        sources: "random", or what `PromptSource.name` may be. A JSON-lines file whose rows have a "category" gives one
            group per category.
        per_group: prompts of each group.
        room: cut each prompt to its first `room` tokens.
        vocabulary: number of tokens, for random prompts.

    Raises:
        PromptError: a source is missing or too small.
    """
    groups: dict[str, tuple[Ids, ...]] = {}
    for name in sources:
        if name == RANDOM:
            rng = random.Random(seed)
            groups["random tokens"] = tuple(
                tuple(rng.randrange(vocabulary) for _ in range(min(room, RANDOM_TOKENS))) for _ in range(per_group)
            )
            continue
        name = built_in(name, bool(tokenizer.chat_template)) or name
        for group, source in _split(name):
            cut = None if name == CHAT else min(room, CODE_TOKENS) if name == CODE else room
            found = load_prompts(
                source, tokenizer, calibration=2, held_out=max(2, per_group), max_tokens=cut, room=room, seed=seed
            )  # fmt: skip
            groups[group] = found.held_out[: max(2, per_group)]
    return groups


def _split(name: str) -> list[tuple[str, PromptSource]]:
    """The groups of a source: name and prompts of each."""
    path = Path(name).expanduser()
    if name in (CODE, CHAT):
        return [("held-out code" if name == CODE else "instructions", PromptSource(name=name))]
    if path.suffix == ".jsonl" and path.is_file():
        by_category: dict[str, list[Any]] = {}
        for row in read_rows(path):
            if "category" in row and "turns" in row:
                category = "mt_bench" if row["category"] in MT_BENCH else str(row["category"])
                by_category.setdefault(category, []).append(row["turns"])
        if by_category:
            return [(c, PromptSource(name=f"{path.name}: {c}", texts=tuple(texts))) for c, texts in by_category.items()]
    return [(path.stem or name, PromptSource(name=name))]
