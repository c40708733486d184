"""Plotly figures of scatter traces as static SVG; enough for `skipsearch.report.pictures`, and without a browser."""

from __future__ import annotations

import math
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 420, 60, 250, 46, 50  # pixels


class Axes:
    """Where the points of a figure lie, in pixels."""

    def __init__(self, figure: go.Figure, height: int) -> None:
        self.layout, self.height = figure.layout, height
        self.ranges: dict[str, tuple[float, float]] = {}
        for trace in figure.data:
            for which in "xy":
                name = self.shared(getattr(trace, f"{which}axis") or which)
                values = np.asarray(getattr(trace, which), float)
                values = values[np.isfinite(values)]
                low, high = self.ranges.get(name, (math.inf, -math.inf))
                self.ranges[name] = min(low, values.min()), max(high, values.max())
        self.ranges = {k: (a - 0.05 * (b - a), b + 0.05 * (b - a)) for k, (a, b) in self.ranges.items()}

    def axis(self, name: str) -> Any:
        return self.layout[f"{name[0]}axis{name[1:]}"]

    def shared(self, name: str) -> str:
        return str(self.axis(name).matches or name)

    def place(self, name: str, value: float) -> float:
        """Pixel of a value on an axis ("x2"), a fraction of its length ("x2 domain"), or of the figure ("paper x")."""
        if name.startswith("paper"):
            part = value
        else:
            axis, *domain = name.split()
            low, high = (0.0, 1.0) if domain else self.ranges[self.shared(axis)]
            begin, end = self.axis(axis).domain or (0.0, 1.0)
            part = begin + (value - low) / (high - low) * (end - begin)
        if name.replace("paper ", "")[0] == "x":
            return LEFT + part * (WIDTH - LEFT - RIGHT)
        return TOP + (1 - part) * (self.height - TOP - BOTTOM)


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next((m for m in (5, 2) if (high - low) / (step * m) >= 3), 1)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(x: float, y: float, text: str, **style: str) -> str:
    given = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{given}>{escape(text)}</text>'


def _frame(axes: Axes, x: str, y: str) -> list[str]:
    """One subplot's lines, ticks and titles."""
    left, right, bottom, top = (axes.place(f"{n} domain", v) for n in (x, y) for v in (0, 1))
    parts = [f'<path d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}" stroke="black" fill="none"/>']
    for value in _ticks(*axes.ranges[axes.shared(x)]):
        at = axes.place(x, value)
        parts.append(f'<path d="M{at:.1f} {bottom:.1f}v4" stroke="black"/>')
        parts.append(_text(at, bottom + 16, f"{value:g}", text_anchor="middle"))
    for value in _ticks(*axes.ranges[axes.shared(y)]) if axes.axis(y).showticklabels is not False else ():
        at = axes.place(y, value)
        parts.append(f'<path d="M{left:.1f} {at:.1f}h-4" stroke="black"/>')
        parts.append(_text(left - 6, at + 4, f"{value:g}", text_anchor="end"))
    if axes.axis(x).title.text:
        parts.append(_text((left + right) / 2, bottom + 34, axes.axis(x).title.text, text_anchor="middle"))
    if axes.axis(y).title.text:
        parts.append(_text(left - 44, top - 26, axes.axis(y).title.text))
    return parts


def _trace(trace: Any, axes: Axes, colour: str) -> list[str]:
    """Points and lines of one trace."""
    xs, ys = np.asarray(trace.x, float), np.asarray(trace.y, float)
    at = [
        (axes.place(trace.xaxis or "x", x), axes.place(trace.yaxis or "y", y))
        for x, y in zip(xs, ys, strict=True) if np.isfinite([x, y]).all()
    ]  # fmt: skip
    if "lines" in trace.mode:
        steps = "".join(f"H{x:.1f}V{y:.1f}" if trace.line.shape == "hv" else f"L{x:.1f} {y:.1f}" for x, y in at[1:])
        return [f'<path d="M{at[0][0]:.1f} {at[0][1]:.1f}{steps}" stroke="{colour}" fill="none" stroke-width="1.5"/>']
    colours = [colour] * len(at)
    if trace.marker.color is not None and not isinstance(trace.marker.color, str):
        values = np.asarray(trace.marker.color, float)[np.isfinite(xs) & np.isfinite(ys)]
        low, high = np.nanmin(values), np.nanmax(values)
        colours = sample_colorscale("Viridis", np.nan_to_num((values - low) / (high - low)).tolist(), colortype="rgb")
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{c}"/>' for (x, y), c in zip(at, colours, strict=True)]


def svg(figure: go.Figure) -> str:
    """The picture. What a colour scale means is left to the words beside it."""
    height = figure.layout.height or HEIGHT
    axes, ways = Axes(figure, height), figure.layout.template.layout.colorway
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="11">', '<rect width="100%" height="100%" fill="white"/>',
    ]  # fmt: skip
    for pair in dict.fromkeys((trace.xaxis or "x", trace.yaxis or "y") for trace in figure.data):
        parts += _frame(axes, *pair)
    for number, trace in enumerate(figure.data):
        given = [trace.marker.color, trace.line.color]
        colour = next((c for c in given if isinstance(c, str)), ways[number % len(ways)])
        parts += _trace(trace, axes, colour)
        if trace.name and trace.showlegend is not False and len(figure.data) > 1:
            y = TOP + 18 * number
            parts.append(f'<rect x="{WIDTH - RIGHT + 16}" y="{y}" width="10" height="10" fill="{colour}"/>')
            parts.append(_text(WIDTH - RIGHT + 32, y + 9, trace.name))
    for line in figure.layout.shapes:
        points = [
            f"{axes.place(line.xref, x):.1f} {axes.place(line.yref, y):.1f}"
            for x, y in ((line.x0, line.y0), (line.x1, line.y1))
        ]
        parts.append(f'<path d="M{points[0]}L{points[1]}" stroke="black" stroke-dasharray="2 3"/>')
    for note in figure.layout.annotations:
        names = [f"paper {which}" if ref == "paper" else ref for which, ref in (("x", note.xref), ("y", note.yref))]
        anchor = {"right": "end", "left": "start"}.get(note.xanchor, "middle")
        parts.append(
            _text(axes.place(names[0], note.x), axes.place(names[1], note.y) - 4, note.text, text_anchor=anchor)
        )
    return "\n".join([*parts, "</svg>"])
