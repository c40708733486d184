"""What a run found, in one sentence, and what to do next; from the data of `result.summary`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


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
        return f"The {what} pays: {arms[what]} over plain decoding{served}."
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


def next_step(verdict: str, model: str, mask: object, *, cut_short: bool = False, chat: bool = False) -> str:
    """The command that uses a mask file; or what to try, if the verdict is against it."""
    if verdict != "use":
        more = "a longer --time-budget" if cut_short else "more --trials"
        return f"try {more}, other --prompts, or a model that tolerates skipping"
    prompt = "What is a hash table?" if chat else "def read_config(path):"
    return f"skipsearch generate --model {model} --mask {mask} --prompt '{prompt}'"
