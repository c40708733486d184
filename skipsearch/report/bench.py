"""A benchmark's rows as a table, a CSV file and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pandas as pd
from rich.table import Table

from skipsearch.files import write_json, write_text

BAR, GAP, LEFT, WIDTH, RIGHT = 16, 6, 190, 420, 190  # pixels of the picture


def _interval(value: float | None, ci: Any) -> str:
    return "" if value is None else f"{value:.2f} ({ci[0]:.2f} to {ci[1]:.2f})"


def bench_title(data: dict[str, Any], group: str = "all") -> str:
    """What was measured, and where."""
    settings, machine = data["settings"], data["machine"]
    first = next(row for row in data["rows"] if row["group"] == group)
    return (
        f"{group}: {first['prompts']} prompts, up to {settings['new_tokens']} tokens each; "
        f"{settings['parameters'] / 1e6:.1f} M parameters, {settings['dtype']}, backend {settings['backend']}\n"
        f"{machine['device']}; copies {machine['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"reads {machine['read_bytes_per_second'] / 1e9:.0f} GB/s"
    )


def _table(title: str, names: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in names:
        table.add_column(
            name,
            style="cyan" if name == names[0] else None,
            justify="left" if name == names[0] else "right",
            no_wrap=name == names[0],
        )
    return table


def speed_table(data: dict[str, Any], group: str = "all") -> Table:
    """One group's arms: tokens per second, and times two baselines with 95 % intervals."""
    table = _table("", ("arm", "tokens/s", "x HF eager", "x plain", "equal"))
    for row in (row for row in data["rows"] if row["group"] == group):
        table.add_row(
            row["arm"], f"{row['tokens_per_second']:.1f}", _interval(row.get("speedup_hf"), row.get("speedup_hf_ci")),
            _interval(row["speedup_plain"], row["speedup_plain_ci"]), f"{row['greedy_equal']}/{row['prompts']}",
        )  # fmt: skip
    return table


def counts_table(data: dict[str, Any], group: str = "all") -> Table:
    """One group's arms: acceptance, bound and its share, bytes moved, memory, energy."""
    rows = [row for row in data["rows"] if row["group"] == group]
    columns = [
        (title, [row.get(name) for row in rows], scale, form)
        for title, name, scale, form in (
            ("accept", "acceptance_rate", 1, ".2f"), ("tau", "tau", 1, ".2f"), ("c", "cost_ratio", 1, ".2f"),
            ("1/c", "bound", 1, ".1f"), ("bound", "own_bound", 1, ".2f"), ("share", "share_of_own_bound", 1, ".0%"),
            ("GB/s", "bytes_per_second", 1e-9, ".1f"), ("% copy", "of_copy_bandwidth", 1, ".0%"),
            ("MB", "peak_memory_bytes", 1e-6, ".0f"), ("J/token", "joules_per_token", 1, ".2f"),
        )
    ]  # fmt: skip
    columns = [column for column in columns if any(value is not None for value in column[1])]
    table = _table("", ("arm", *(title for title, *_ in columns)))
    for i, row in enumerate(rows):
        values = [(found[i], scale, form) for _, found, scale, form in columns]
        table.add_row(row["arm"], *("" if v is None else f"{v * scale:{form}}" for v, scale, form in values))
    return table


def groups_table(data: dict[str, Any]) -> Table:
    """Speed-up over plain decoding: a row an arm, a column a group."""
    groups = tuple(dict.fromkeys(row["group"] for row in data["rows"]))
    table = _table("times plain decoding in the same runtime", ("arm", *groups))
    for arm in dict.fromkeys(row["arm"] for row in data["rows"]):
        found = {row["group"]: row["speedup_plain"] for row in data["rows"] if row["arm"] == arm}
        table.add_row(arm, *(f"{found[group]:.2f}" for group in groups))
    return table


def bench_picture(data: dict[str, Any], group: str = "all") -> str:
    """Bars of speed-up over plain decoding with their intervals, and marks where an arm's own bound lies (SVG)."""
    rows = [row for row in data["rows"] if row["group"] == group]
    top: float = max(max(row["speedup_plain_ci"][1], row.get("own_bound", 0)) for row in rows) * 1.05
    height = 40 + len(rows) * (BAR + GAP) + 24

    def x(value: float) -> float:
        return LEFT + value / top * WIDTH

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-weight="bold">times plain decoding in the same runtime: {escape(group)}, '
        f"{data['settings']['parameters'] / 1e6:.0f} M parameters, {data['settings']['dtype']}</text>",
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
    """Write bench.json, bench.csv and bench.svg; returns their paths."""
    write_json(folder / "bench.json", data)
    write_text(folder / "bench.csv", pd.json_normalize(data["rows"]).to_csv(index=False))
    write_text(folder / "bench.svg", bench_picture(data))
    return {name: str(folder / name) for name in ("bench.json", "bench.csv", "bench.svg")}


def read_bench(folder: Path) -> dict[str, Any]:
    """What `save_bench` wrote."""
    found: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    return found
