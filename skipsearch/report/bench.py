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


def bench_table(data: dict[str, Any], group: str = "all") -> Table:
    """One group's arms: speeds with 95 % intervals, counts, bound and bandwidth."""
    settings, machine = data["settings"], data["machine"]
    rows = [row for row in data["rows"] if row["group"] == group]
    title = (
        f"{group}: {rows[0]['prompts']} prompts, {rows[0]['tokens']} tokens; {settings['parameters'] / 1e6:.1f} M "
        f"parameters, {settings['dtype']}, {settings['backend']}; {machine['device']}, "
        f"copies {machine['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("arm", style="cyan", no_wrap=True)
    names = (
        "tokens/s",
        "x HF eager",
        "x plain",
        "accepted",
        "tau",
        "c",
        "of own bound",
        "GB/s",
        "% copy",
        "peak MB",
        "J/token",
        "equal",
    )
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        moved, share, c = row.get("bytes_per_second"), row.get("share_of_own_bound"), row.get("cost_ratio")
        peak, joules = row.get("peak_memory_bytes"), row.get("joules_per_token")
        table.add_row(
            row["arm"], f"{row['tokens_per_second']:.1f}", _interval(row.get("speedup_hf"), row.get("speedup_hf_ci")),
            _interval(row["speedup_plain"], row["speedup_plain_ci"]),
            f"{row['acceptance_rate']:.2f}" if row.get("acceptance_rate") else "",
            f"{row['tau']:.2f}" if row.get("tau") else "", f"{c:.2f}" if c else "", f"{share:.0%}" if share else "",
            f"{moved / 1e9:.1f}" if moved else "", f"{row['of_copy_bandwidth']:.0%}" if moved else "",
            f"{peak / 1e6:.0f}" if peak else "", f"{joules:.2f}" if joules else "n/a",
            f"{row['greedy_equal']}/{row['prompts']}",
        )  # fmt: skip
    return table


def groups_table(data: dict[str, Any]) -> Table:
    """Speed-up over plain decoding: a row a group, a column an arm."""
    arms = list(dict.fromkeys(row["arm"] for row in data["rows"]))
    table = Table(title="times plain decoding in the same runtime, by group", title_justify="left", title_style="bold")
    table.add_column("group", style="cyan")
    for arm in arms:
        table.add_column(arm, justify="right")
    for group in dict.fromkeys(row["group"] for row in data["rows"]):
        found = {row["arm"]: row["speedup_plain"] for row in data["rows"] if row["group"] == group}
        table.add_row(group, *(f"{found[arm]:.2f}" for arm in arms))
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
