"""What a run leaves for those who look at it: the texts of its validation, and pictures in the study's dashboard."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from skipsearch.errors import SkipsearchWarning, first_line
from skipsearch.evaluate.prompt_row import Ids
from skipsearch.evaluate.validate import NGRAMS, SERVED, arm_of
from skipsearch.files import read_checked, write_checked, write_json
from skipsearch.maskfile import MaskFile
from skipsearch.search.board import show_in_dashboard
from skipsearch.search.result import SearchResult, summary
from skipsearch.search.study import Study

TEXTS = "texts.json"  # in the results folder
CONTEXT = 16  # tokens before one that decide how it is written


def publish(result: SearchResult, study: Study, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[Ids]) -> None:
    """Write summary.json and texts.json, and refresh the dashboard.

    What fails behind summary.json is a warning: the run itself is kept by then.
    """
    write_json(result.folder / "summary.json", summary(result))
    tasks: dict[str, Callable[[], None]] = {
        f"{TEXTS} was not written": partial(write_texts, result.folder, result.file, tokenizer, held_out),
        "the dashboard's pictures were not saved": partial(show_in_dashboard, study, result),
    }
    for failed, task in tasks.items():
        try:
            task()
        except Exception as error:  # a full disk, a database that is gone, another version of the dashboard
            warnings.warn(f"{failed} ({first_line(error)}); the results are whole", SkipsearchWarning, stacklevel=2)


def write_texts(folder: Path, file: MaskFile, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[Ids]) -> None:
    """Write what the arm that `file` serves decoded from each prompt, as pieces of text.

    texts.json: "arm", and for each prompt its text, "marks" (see `Trail`) and "pieces", one for each mark; nothing for
    a prompt that was not decoded, or by an earlier version.
    """
    measured = read_checked(folder / "validation.json", lambda data: data["measured"]) or {}
    arm = NGRAMS if file.drafting_plan is None else arm_of(file.plan)
    arm = SERVED if file.draft.ngram and SERVED in measured and arm != NGRAMS else arm
    found: list[dict[str, Any]] = []
    for prompt, runs in zip(held_out, measured.get(arm, ()), strict=False):
        if not runs or not runs[-1].get("marks"):
            found.append({})
        else:
            pieces = list(_pieces(tokenizer, prompt, runs[-1]))
            text = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
            found.append({"prompt": text, "marks": runs[-1]["marks"], "pieces": pieces})
    write_checked(folder / TEXTS, {"arm": arm, "prompts": found})


def _pieces(tokenizer: PreTrainedTokenizerBase, prompt: Ids, run: dict[str, Any]) -> Iterator[str]:
    """The text of each mark's token, as it stands behind those before it."""
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    known, ids, rejected, wrong = list(prompt), iter(run["ids"]), iter(run["rejected"]), list[int]()
    for mark in run["marks"]:
        token = next(rejected if mark.isupper() else ids)
        before = [*known[-CONTEXT:], *(wrong if mark.isupper() else ())]
        # A character may take several tokens: it is the text of the last one, the others end with a replacement.
        yield decode([*before, token]).removeprefix(decode(before).rstrip("\ufffd")).strip("\ufffd")
        if mark.isupper():
            wrong.append(token)
        else:
            known, wrong = [*known[-CONTEXT:], token], []
