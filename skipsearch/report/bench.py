"""The rows of a benchmark as tables, a CSV file and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pandas as pd
from rich.table import Column, Table

from skipsearch.files import write_json, write_text

BAR, GAP, LEFT, WIDTH, RIGHT = 16, 6, 190, 420, 190  # pixels of the picture


def _total(data: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each arm, over the prompts of all groups."""
    return [row for row in data["rows"] if row["group"] == "all"]


def _table(title: str, names: list[str]) -> Table:
    """An empty table: a column of names, then columns of figures."""
    figures = [Column(name, justify="right") for name in names]
    return Table(
        Column("arm", style="cyan", no_wrap=True), *figures, title=title, title_justify="left", title_style="bold"
    )


def bench_title(data: dict[str, Any]) -> str:
    """What was measured, and on which machine."""
    settings, machine = data["settings"], data["machine"]
    return (
        f"all: {_total(data)[0]['prompts']} prompts, up to {settings['new_tokens']} tokens each; "
        f"{settings['parameters'] / 1e6:.1f} M parameters, {settings['dtype']}, backend {settings['backend']}\n"
        f"decoding: {settings['decoding']}\n"
        f"{machine['device']}; copies {machine['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"reads {machine['read_bytes_per_second'] / 1e9:.0f} GB/s"
    )


def _speedup(row: dict[str, Any], baseline: str) -> str:
    """Speed-up over "hf" or "plain" with its 95 % interval; empty if it was not measured."""
    if f"speedup_{baseline}" not in row:
        return ""
    low, high = row[f"speedup_{baseline}_ci"]
    return f"{row[f'speedup_{baseline}']:.2f} ({low:.2f} to {high:.2f})"


def speed_table(data: dict[str, Any]) -> Table:
    """Tokens per second of each arm, and speed-ups over two baselines with 95 % intervals."""
    table = _table("", ["tokens/s", "x HF eager", "x plain", "equal"])
    for row in _total(data):
        equal = "samples" if row["greedy_equal"] is None else f"{row['greedy_equal']}/{row['prompts']}"
        speed = f"{row['tokens_per_second']:.1f}"
        table.add_row(row["arm"], speed, _speedup(row, "hf"), _speedup(row, "plain"), equal)
    return table


def counts_table(data: dict[str, Any]) -> Table:
    """Acceptance, bounds, bytes moved, memory and energy of each arm; columns without a value are left out.

    Below it stands why energy is not known, where it is not.
    """
    rows = _total(data)
    columns = [
        (title, name, scale, form)
        for title, name, scale, form in (
            ("accept", "acceptance_rate", 1, ".2f"), ("tau", "tau", 1, ".2f"), ("c", "cost_ratio", 1, ".2f"),
            ("1/c", "bound", 1, ".1f"), ("bound", "own_bound", 1, ".2f"), ("share", "share_of_own_bound", 1, ".0%"),
            ("GB/s", "bytes_per_second", 1e-9, ".1f"), ("% copy", "of_copy_bandwidth", 1, ".0%"),
            ("MB", "peak_memory_bytes", 1e-6, ".0f"), ("J/token", "joules_per_token", 1, ".3g"),
        ) if any(row.get(name) is not None for row in rows)
    ]  # fmt: skip
    table = _table("", [title for title, *_ in columns])
    unknown = {row["energy_reason"] for row in rows if row.get("energy_reason")}
    if unknown:
        table.caption, table.caption_justify = f"J/token n/a: {'; '.join(sorted(unknown))}", "left"
    for row in rows:
        found = ((row.get(name), scale, form) for _, name, scale, form in columns)
        table.add_row(row["arm"], *("" if v is None else f"{v * scale:{form}}" for v, scale, form in found))
    return table


def groups_table(data: dict[str, Any]) -> Table:
    """Speed-up over plain decoding: one row per arm, one column per group of prompts."""
    speedups = pd.DataFrame(data["rows"]).pivot_table("speedup_plain", "arm", "group", sort=False)
    table = _table("times plain decoding in the same runtime", list(speedups.columns))
    for arm, found in speedups.iterrows():
        table.add_row(str(arm), *(f"{value:.2f}" for value in found))
    return table


def bench_picture(data: dict[str, Any]) -> str:
    """An SVG: bars of speed-up over plain decoding with 95 % intervals, and a mark at each arm's own bound."""
    rows, settings = _total(data), data["settings"]
    top: float = max(max(row["speedup_plain_ci"][1], row.get("own_bound", 0)) for row in rows) * 1.05
    height = 40 + len(rows) * (BAR + GAP) + 24

    def x(value: float) -> float:
        return LEFT + value / top * WIDTH

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-weight="bold">times plain decoding in the same runtime: all, '
        f"{settings['parameters'] / 1e6:.0f} M parameters, {settings['dtype']}</text>",
    ]
    for number, row in enumerate(rows):
        y = 36 + number * (BAR + GAP)
        low, high = row["speedup_plain_ci"]
        middle = y + BAR / 2
        colour = "#b0b0b0" if row["arm"].startswith("HF") else "#4878a8"
        parts += [
            f'<text x="{LEFT - 6}" y="{y + 12}" text-anchor="end">{escape(row["arm"])}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{x(row["speedup_plain"]) - LEFT:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<path d="M{x(low):.1f} {middle}H{x(high):.1f}M{x(low):.1f} {y + 4}v8M{x(high):.1f} {y + 4}v8" '
            'stroke="black"/>',
            f'<text x="{LEFT + WIDTH + 8}" y="{y + 12}">{row["speedup_plain"]:.2f}, '
            f"{row['tokens_per_second']:.0f} tokens/s</text>",
        ]
        if "own_bound" in row:
            at = x(row["own_bound"])
            parts.append(f'<path d="M{at:.1f} {y - 2}v{BAR + 4}" stroke="#c03030" stroke-width="3"/>')
    parts += [
        f'<path d="M{x(1):.1f} 30V{height - 22}" stroke="black" stroke-dasharray="3 3"/>',
        f'<text x="{LEFT}" y="{height - 6}">dashed: plain; red: the bound at its own acceptance and cost ratio</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def save_bench(data: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write bench.json, bench.csv and bench.svg into `folder`; returns their paths by name.

    Raises:
        ResultsError: the folder cannot be written to.
    """
    write_json(folder / "bench.json", data)
    write_text(folder / "bench.csv", pd.json_normalize(data["rows"]).to_csv(index=False))
    write_text(folder / "bench.svg", bench_picture(data))
    return {name: str(folder / name) for name in ("bench.json", "bench.csv", "bench.svg")}
