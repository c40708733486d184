"""The end of a run as a table; from `search.result.summary`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from skipsearch.report.tables import FEW, evidence_rows, megabytes, pairs, policy_line
from skipsearch.search.verdict import times, what_drafts

ENOUGH = 2000  # scored tokens; with fewer the standard error is too large to tell good plans apart


def summary_table(data: dict[str, Any]) -> Table:
    """The end of a run; `data` comes from `search.result.summary`."""
    mask, predicted, seconds = data["mask"], data["predicted"], data["seconds"]
    cut, proof = bool(data["cut_short"]), evidence_rows(data["evidence"])  # of a run cut short, time is the mend
    few = f", fewer than {ENOUGH:,}: raise --num-prompts" if predicted["tokens"] < ENOUGH and not cut else ""
    what = what_drafts(data["measured"])
    quantised = "".join(
        f", {form} {len(sets['attention'])} attention, {len(sets['mlp'])} MLP"
        for form, sets in ((form, data["plan"][form]) for form in ("int8", "int4")) if sets["attention"] or sets["mlp"]
    )  # fmt: skip
    rows: list[tuple[str, Any]] = [
        ("model", data["model"]),
        (
            f"best {what}", f"skips {len(mask['attention'])} attention, {len(mask['mlp'])} MLP of "
            f"{mask['num_layers']} layers{quantised}: {times(data['measured'][what])}",
        ),
        ("the file serves", f"n-grams, without a {what}" if data["serves"] == "n-grams" else f"the {what}"),
        ("draft", policy_line(data["draft"])),
        *((name, str(value).replace(FEW, FEW.partition(";")[0]) if cut else value) for name, value in proof),
        (
            "predicted", f"{predicted['speedup']:.2f}x (standard error {predicted['standard_error']:.2f}), "
            f"{predicted['tokens_per_second']:.1f} tokens/s; scored on {predicted['tokens']:,} tokens{few}",
        ),
        *([("found as", data["origin"])] if data.get("origin") else []),
        (f"n-grams, no {what}", times(data["measured"]["n-grams"])),
        ("trials", f"{data['trials']}, every plan of the space" if data["used_up"] else data["trials"]),
        ("seconds", f"{sum(seconds.values()):.0f}: {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())}"),
        ("mask file", data["files"]["mask.json"]),
    ]  # fmt: skip
    if data["quantised_bytes"]:
        rows.insert(2, ("quantised copies", megabytes(data["quantised_bytes"])))
    if data["cut_short"]:
        rows.insert(-1, ("cut short", f"{'; '.join(data['cut_short'])}; a longer --time-budget goes on from here"))
    return pairs("summary", rows)
