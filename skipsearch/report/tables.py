"""Tables for the terminal, made from plain data."""

from __future__ import annotations

from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from skipsearch.mask import KINDS, SkipMask
from skipsearch.maskfile import MaskFile

FEW = ": few, the interval is rough; --num-held-out takes more"
ENOUGH = 2000  # scored tokens, for a standard error that tells good masks apart


def _pairs(title: str, rows: list[tuple[str, Any]]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="cyan")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    return table


def _verdict(proof: dict[str, Any]) -> Text:
    if proof["verdict"] == "use":
        return Text("use", style="bold green")
    return Text("do not use: not proven faster than plain decoding", style="bold red")


def _evidence_rows(proof: dict[str, Any]) -> list[tuple[str, Any]]:
    low, high = proof["speedup_ci"]
    bound = 1 / proof["cost_ratio"] if proof["cost_ratio"] else float("nan")
    rows = [
        ("speed-up, measured", f"{proof['speedup']:.2f}x  (95 % interval {low:.2f} to {high:.2f})"),
        ("against", proof["baseline"]),
        (
            "tokens/s",
            f"{proof['tokens_per_second']:.1f} with the mask, {proof['baseline_tokens_per_second']:.1f} without",
        ),
        ("acceptance rate, tau", f"{proof['acceptance_rate']:.3f}, {proof['tau']:.2f} tokens a verify"),
        ("cost ratio c, bound 1/c", f"{proof['cost_ratio']:.3f}, {bound:.2f}x"),
        *_served_rows(proof),
        ("same tokens as plain", _equal(proof)),
        ("held-out", f"{proof['prompts']} prompts, {proof['tokens']} tokens" + FEW * (proof["prompts"] < 10)),
        ("on", f"{proof['device']}, {proof['dtype']}, {proof['backend']}"),
        ("verdict", _verdict(proof)),
    ]
    if proof["cost_ratio"] and proof["speedup"] > bound:
        rows.append(("warning", Text("faster than the bound 1/c: the baseline was slowed down", style="yellow")))
    return rows


def _served_rows(proof: dict[str, Any]) -> list[tuple[str, Any]]:
    if proof.get("served_speedup") is None:
        return []
    low, high = proof["served_speedup_ci"]
    return [("as served", f"{proof['served_speedup']:.2f}x  ({low:.2f} to {high:.2f}) with the whole draft policy")]


def draw_mask(mask: SkipMask) -> Text:
    """A row of cells for each kind of sublayer, with layer numbers every five layers."""
    text = Text()
    ruler = "".join(f"{i:<5}" for i in range(0, mask.num_layers, 5))[: mask.num_layers + 4]
    text.append(f"{'layer':<10}{ruler}\n", style="dim")
    for kind in KINDS:
        text.append(f"{kind:<10}")
        for i in range(mask.num_layers):
            skipped = mask.skips(kind, i)
            text.append("·" if skipped else "█", style="red" if skipped else "green")
        skipped_count = len(mask.attention if kind == "attention" else mask.mlp)
        text.append(f"  {skipped_count} of {mask.num_layers} skipped\n")
    text.append("█ runs while drafting   · skipped", style="dim")
    return text


def policy_line(draft: dict[str, Any]) -> str:
    """A draft policy in words."""
    parts = [f"K = {draft['max_length']}"]
    if draft.get("exit_threshold") is not None:
        parts.append(
            f"exit below confidence {draft['exit_threshold']:g}" + (", adaptive" * bool(draft.get("adaptive")))
        )
    if draft.get("curve"):
        parts.append("calibrated exit")
    if draft.get("ngram"):
        parts.append(f"n-grams of up to {draft['ngram']} tokens")
    if draft.get("never_slower"):
        parts.append("plain steps where drafting does not pay")
    return ", ".join(parts)


def _equal(proof: dict[str, Any]) -> str:
    if proof["greedy_equal"] is None:
        return f"same distribution; measured at temperature {proof['temperature']:g}"
    return "yes, on every prompt" if proof["greedy_equal"] else "no"


def mask_table(file: MaskFile) -> Panel:
    """One mask file: picture, policy, evidence."""
    rows: list[tuple[str, Any]] = [("draft", policy_line(file.draft.model_dump()))]
    if file.evidence is None:
        rows.append(("evidence", "none yet; measure it with `skipsearch validate`"))
    else:
        rows += _evidence_rows(file.evidence.model_dump())
    grid = Table.grid(padding=(1, 0))
    grid.add_row(draw_mask(file.mask))
    grid.add_row(_pairs("", rows))
    return Panel(grid, title=Text(f"{file.model.id}, {file.model.num_layers} layers"), title_align="left", expand=False)


def summary_table(data: dict[str, Any]) -> Table:
    """The end of a run, from `search.run.summary`."""
    draft, mask = data["draft"], data["mask"]
    rows: list[tuple[str, Any]] = [
        ("model", data["model"]),
        ("skipped", f"{len(mask['attention'])} attention, {len(mask['mlp'])} MLP of {mask['num_layers']} layers"),
        ("draft", policy_line(draft)),
        *_evidence_rows(data["evidence"]),
        (
            "predicted", f"{data['predicted']['speedup']:.2f}x (standard error "
            f"{data['predicted']['standard_error']:.2f}), {data['predicted']['tokens_per_second']:.1f} tokens/s; "
            f"scored on {data['predicted']['tokens']:,} tokens"
            + (f", fewer than {ENOUGH:,}: raise --num-prompts" if data["predicted"]["tokens"] < ENOUGH else ""),
        ),
        ("trials", f"{data['trials']} ({', '.join(f'{k} {v:.0f} s' for k, v in data['seconds'].items())})"),
        ("mask file", data["files"]["mask.json"]),
    ]  # fmt: skip
    return _pairs("summary", rows)


def front_table(front: list[dict[str, Any]], exported: int | None = None) -> Table:
    """Trials that none other beats in both acceptance rate and cost ratio; the one whose mask is exported is marked."""
    table = Table("trial", "skipped", "cost ratio c", "acceptance", "tau", "predicted", title_justify="left",
                  title="front of acceptance against draft cost")  # fmt: skip
    for row in front:
        table.add_row(
            f"{row['trial']}{' (exported)' * (row['trial'] == exported)}", str(row["skipped"]),
            f"{row['cost_ratio']:.3f}", f"{row['acceptance_rate']:.3f}", f"{row['tau']:.2f}",
            f"{row['speedup_predicted']:.2f}x",
        )  # fmt: skip
    return table


def generation_line(result: dict[str, Any]) -> str:
    """One line under a generated text."""
    line = f"[{len(result['tokens'])} tokens, {result['tokens_per_second']:.1f} tokens/s"
    if result["drafted"]:
        line += f", {result['accepted']} of {result['drafted']} drafted tokens accepted, tau {result['tau']:.2f}"
        if set(result["accepted_from"]) - {"mask"}:
            line += "; accepted from " + ", ".join(f"{k}: {n}" for k, n in sorted(result["accepted_from"].items()))
    if result["lossy"]:
        line += "; LOSSY: joint decoding, not the model's own output"
    return line.replace("[", r"\[", 1) + "]"


def found_line(search: dict[str, Any]) -> str:
    """What was searched while a text was generated."""
    found = [what for _, _, what in search["events"]]
    return (
        f"\\[on the fly: {search['passes']} masks scored in {100 * search['share']:.1f} % of decoding's seconds, "
        f"{len(found)} changes{': ' + ', '.join(found) if found else ''}]"
    )


def preset_table(data: dict[str, Any]) -> Table:
    table = Table("preset", title="presets", title_justify="left")
    table.add_column("hub id", overflow="fold")
    table.add_column("layers")
    table.add_column("published masks")
    for name, preset in data.items():
        table.add_row(name, preset["id"], str(preset["num_layers"]), ", ".join(preset["masks"]) or "-")
    return table


def family_table(data: dict[str, Any]) -> Table:
    table = Table("family", "", "layers: attention / MLP, or why not", title="families", title_justify="left")
    for row in data["families"]:
        note = row["note"].partition(" is not supported: ")[2].partition("; see ")[0] or row["note"]
        mark = Text("proven", style="green") if row["supported"] else Text("refused", style="red")
        table.add_row(row["name"], mark, note)
    return table


def audit_table(data: dict[str, Any]) -> Table:
    title = (
        f"audit: {data['prompts']} prompts, {data['tokens']} tokens, {len(data['divergences'])} differ from plain "
        f"decoding, {'all explained by rounding' if data['passed'] else 'NOT all explained by rounding'}"
    )
    table = Table("prompt", "new token", "plain", "drafted", "fp32 margin", "rounding", "", title=title)
    for d in data["divergences"]:
        mark = Text("near-tie", style="green") if d["explained"] else Text("fault", style="red")
        table.add_row(str(d["prompt"]), str(d["position"]), str(d["plain"]), str(d["drafted"]),
                      f"{d['margin']:.4g}", f"{d['rounding']:.4g}", mark)  # fmt: skip
    return table


def doctor_table(data: dict[str, Any]) -> Table:
    rows: list[tuple[str, Any]] = [(k, v) for k, v in data.items() if k not in ("missing", "versions")]
    rows[0:0] = list(data["versions"].items())
    rows.append(("missing", Text("; ".join(data["missing"]), style="red") if data["missing"] else "nothing"))
    return _pairs("doctor", rows)


def calibration_table(found: dict[str, Any]) -> Table:
    """Predicted against measured tokens per second at one context length."""
    low, high = found["spearman_ci"]
    title = (
        f"context {found['context']}: Spearman {found['spearman']:.3f} ({low:.3f} to {high:.3f}), median error "
        f"{found['median_error']:.1%}, of the speed-up {found['median_error_of_speedup']:.1%}"
    )
    table = Table("attention", "mlp", "draft", "predicted", "measured", title=title, title_justify="left")
    for row in sorted(found["rows"], key=lambda row: float(row["measured"])):
        table.add_row(
            str(row["attention"]), str(row["mlp"]), row["policy"], f"{row['predicted']:.1f}", f"{row['measured']:.1f}"
        )
    return table
