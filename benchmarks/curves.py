"""Best-so-far curves of several searches, as an SVG: speed-up over seconds, and over evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

COLOURS = (
    "#1b6ca8", "#d1495b", "#66a182", "#edae49", "#6a4c93", "#2e4057", "#8d96a3", "#c05299", "#3bb273", "#a44a3f",
    "#00798c", "#b5838d", "#111111", "#9c6644",
)  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP, GAP, LEGEND = 360, 280, 56, 40, 70, 130


def best_so_far(steps: Sequence[dict[str, Any]], axis: str, grid: Sequence[float]) -> list[float]:
    """What a run had reached at each place of the grid: NaN before its first step."""
    out = []
    for place in grid:
        reached = [step["speedup"] for step in steps if step[axis] <= place]
        out.append(reached[-1] if reached else math.nan)
    return out


def curves_picture(runs: Sequence[dict[str, Any]], title: str) -> str:
    """Medians over seeds, a line an arm.

    Args:
        runs: {"arm", "seed", "steps": [{"seconds", "evaluations", "speedup"}, ..]} each.
    """
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    top = max(step["speedup"] for run in runs for step in run["steps"]) * 1.05
    width = LEFT + 2 * WIDTH + GAP + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{TOP + HEIGHT + 50}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="13">{escape(title)}: held-out speed-up of the best mask so far</text>',
    ]
    for panel, axis in enumerate(("seconds", "evaluations")):
        x0 = LEFT + panel * (WIDTH + GAP)
        ends = [run["steps"][-1][axis] for run in runs]
        low, high = math.log10(1), math.log10(max(10, *ends))

        def x(value: float, x0: float = x0, low: float = low, high: float = high) -> float:
            return float(x0 + (math.log10(max(1.0, value)) - low) / (high - low) * WIDTH)

        def y(value: float) -> float:
            return float(TOP + HEIGHT * (1 - value / top))

        for decade in range(int(high) + 1):
            parts.append(_line(x(10**decade), TOP, x(10**decade), TOP + HEIGHT, "#eee"))
            parts.append(_text(x(10**decade), TOP + HEIGHT + 16, str(10**decade), "middle"))
        for tick in np.arange(0, top, 0.5):
            parts.append(_line(x0, y(tick), x0 + WIDTH, y(tick), "#bbb" if tick == 1 else "#eee"))
            parts.append(_text(x0 - 6, y(tick) + 4, f"{tick:.1f}", "end"))
        parts.append(_text(x0 + WIDTH / 2, TOP + HEIGHT + 36, axis, "middle"))
        for number, arm in enumerate(arms):
            chosen = [run["steps"] for run in runs if run["arm"] == arm]
            end = max(steps[-1][axis] for steps in chosen)
            grid = [g for g in np.geomspace(1, 10**high, 160) if g <= end] + [end]
            values = np.array([best_so_far(steps, axis, grid) for steps in chosen])
            points = [
                (x(place), y(float(np.median(column))))
                for place, column in zip(grid, values.T, strict=True)
                if not np.isnan(column).any()
            ]
            colour = COLOURS[number % len(COLOURS)]
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            if points:
                parts.append(f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="3" fill="{colour}"/>')
    for number, arm in enumerate(arms):
        at = TOP + 14 + 18 * number
        parts.append(_line(width - LEGEND + 8, at - 4, width - LEGEND + 26, at - 4, COLOURS[number % len(COLOURS)], 3))
        parts.append(_text(width - LEGEND + 32, at, arm, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
