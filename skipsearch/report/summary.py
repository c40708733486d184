"""The end of a run: what it found, in one sentence and in a table; both from `search.result.summary`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from skipsearch.report.tables import evidence_rows, megabytes, pairs, policy_line

ENOUGH = 2000  # scored tokens; with fewer the standard error is too large to tell good plans apart


def verdict_line(data: dict[str, Any]) -> str:
    """What a run found, in one sentence; `data` comes from `search.result.summary`."""
    arms = {name: _times(arm) for name, arm in data["measured"].items()}
    what = _what_drafts(arms)
    if data["serves"] == "n-grams" and data["evidence"]["verdict"] == "use":
        return (
            f"No {what} pays on this model ({arms[what]} over plain decoding), but n-grams do: {arms['n-grams']}. "
            f"The file serves n-grams and no {what}."
        )
    served = f"; as served, with n-grams: {arms['served']}" if "served" in arms else ""
    if data["evidence"]["verdict"] == "use":
        return f"The {what} pays: {arms[what]} over plain decoding{served}."
    found = f"the {what} {arms[what]} over plain decoding, n-grams {arms['n-grams']}"
    return f"Nothing is proven to pay on this model: {found}."


def _what_drafts(arms: Iterable[str]) -> str:
    """The arm that drafts without n-grams: "plan" if it quantises, else "mask"."""
    return "plan" if "plan" in arms else "mask"


def _times(arm: dict[str, Any]) -> str:
    low, high = arm["speedup_ci"]
    return f"{arm['speedup']:.2f}x ({low:.2f} to {high:.2f})"


def summary_table(data: dict[str, Any]) -> Table:
    """The end of a run; `data` comes from `search.result.summary`."""
    mask, predicted, seconds = data["mask"], data["predicted"], data["seconds"]
    few = f", fewer than {ENOUGH:,}: raise --num-prompts" if predicted["tokens"] < ENOUGH else ""
    what = _what_drafts(data["measured"])
    quantised = "".join(
        f", {form} {len(sets['attention'])} attention, {len(sets['mlp'])} MLP"
        for form, sets in ((form, data["plan"][form]) for form in ("int8", "int4")) if sets["attention"] or sets["mlp"]
    )  # fmt: skip
    rows: list[tuple[str, Any]] = [
        ("model", data["model"]),
        (
            f"best {what}", f"skips {len(mask['attention'])} attention, {len(mask['mlp'])} MLP of "
            f"{mask['num_layers']} layers{quantised}: {_times(data['measured'][what])}",
        ),
        ("the file serves", f"n-grams, without a {what}" if data["serves"] == "n-grams" else f"the {what}"),
        ("draft", policy_line(data["draft"])),
        *evidence_rows(data["evidence"]),
        (
            "predicted", f"{predicted['speedup']:.2f}x (standard error {predicted['standard_error']:.2f}), "
            f"{predicted['tokens_per_second']:.1f} tokens/s; scored on {predicted['tokens']:,} tokens{few}",
        ),
        (f"n-grams, no {what}", _times(data["measured"]["n-grams"])),
        ("trials", f"{data['trials']}, every plan of the space" if data["used_up"] else data["trials"]),
        ("seconds", f"{sum(seconds.values()):.0f}: {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())}"),
        ("mask file", data["files"]["mask.json"]),
    ]  # fmt: skip
    if data["quantised_bytes"]:
        rows.insert(2, ("quantised copies", megabytes(data["quantised_bytes"])))
    if data["cut_short"]:
        rows.insert(-1, ("cut short", f"{'; '.join(data['cut_short'])}: a longer --time-budget takes all"))
    return pairs("summary", rows)
