"""What a run found, in one sentence, and what to do next; from the data of `result.summary`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skipsearch.maskfile import MaskFile
from skipsearch.model.preset import name_of

FEW_PROMPTS = 10  # of a validation: with fewer its interval is rough


def verdict_line(data: dict[str, Any]) -> str:
    """What a run found, in one sentence."""
    arms = {name: times(arm) for name, arm in data["measured"].items()}
    what = what_drafts(arms)
    if data["serves"] == "n-grams" and data["evidence"]["verdict"] == "use":
        return (
            f"No {what} pays on this model ({arms[what]} over plain decoding), but n-grams do: {arms['n-grams']}. "
            f"The file serves n-grams and no {what}."
        )
    served = f"; as served, with n-grams: {arms['served']}" if "served" in arms else ""
    if data["evidence"]["verdict"] == "use":
        prompts = data["evidence"]["prompts"]
        rough = f" The intervals are rough: they rest on {prompts} prompts." if prompts < FEW_PROMPTS else ""
        return f"The {what} pays: {arms[what]} over plain decoding{served}; n-grams alone: {arms['n-grams']}.{rough}"
    found = f"the {what} {arms[what]} over plain decoding, n-grams {arms['n-grams']}"
    low, high = data["measured"][what]["speedup_ci"]
    if data.get("cut_short") and low <= 1 <= high:
        return f"Not decided within the time budget: {found}."
    return f"Nothing is proven to pay on this model: {found}."


def what_drafts(arms: Iterable[str]) -> str:
    """The arm that drafts without n-grams: "plan" if it quantises, else "mask"."""
    return "plan" if "plan" in arms else "mask"


def times(arm: dict[str, Any]) -> str:
    """A speed-up with its interval."""
    low, high = arm["speedup_ci"]
    return f"{arm['speedup']:.2f}x ({low:.2f} to {high:.2f})"


def next_of(file: MaskFile, path: Path, summary: Any) -> str:
    """The next command for a mask file: what its run said, which knows how the model was named, if it still holds.

    Args:
        summary: of the run, as read from summary.json; anything else is left aside.
    """
    model, proof = name_of(file.model.id) or "MODEL", file.evidence
    if proof is None:
        return f"skipsearch validate {shlex.quote(str(path))} --model {model} --write"
    told = summary if isinstance(summary, dict) and summary.get("evidence") == proof.model_dump(mode="json") else {}
    then = str(told.get("next") or next_step(proof.verdict, model, path))
    return "".join(c for c in then if c.isprintable())


def next_step(verdict: str, model: str, mask: object, *, cut_short: bool = False, chat: bool = False) -> str:
    """The command that uses a mask file; or what to try, if the verdict is against it."""
    if verdict != "use":
        more = "a longer --time-budget" if cut_short else "more --trials"
        return f"try {more}, other --prompts, or a model that tolerates skipping"
    prompt = "What is a hash table?" if chat else "def read_config(path):"
    return shlex.join(
        ["skipsearch", "generate", "--model", model, "--mask", str(mask), "--compare", "--prompt", prompt]
    )
