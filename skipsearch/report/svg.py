"""Inline SVG by hand: plans, bars, intervals and scatter plots. Classes get their colours in page.css.

Each picture is `W` units wide and says in words what it shows. ValueError for figures that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from skipsearch.mask import KINDS, Sublayer

W = 360
LEFT, TOP, BOTTOM = 58, 14, 36  # room for labels
A_ROW = 24  # the most layers side by side
CELL = 22
Point = tuple[float, float, str]  # x, y, and what it is
Cell = tuple[float, str, str]  # the share that is filled, its class, and what it is


def _svg(height: float, title: str, what: str, body: list[str]) -> str:
    label = escape(f"{title}: {what}")
    head = f'<svg viewBox="0 0 {W} {height:.0f}" role="img" aria-label="{label}"><title>{escape(title)}</title>'
    return head + f"<desc>{escape(what)}</desc>" + "".join(body) + "</svg>"


def _text(x: float, y: float, words: str, css: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{escape(words)}</text>'


def _rect(x: float, y: float, width: float, height: float, css: str, words: str = "") -> str:
    said = f"<title>{escape(words)}</title>" if words else ""
    size = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return f'<rect {size} class="{css}">{said}</rect>'


def _circle(x: float, y: float, radius: float, css: str, words: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{css}"><title>{escape(words)}</title></circle>'


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("a figure is not finite")
    return value


class _Axis:
    """Maps values to places; `ticks` are round values within."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False) -> None:
        low, high = min(map(_finite, values)), max(values)
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        self.low, self.high = (low / 1.15, high * 1.15) if log else (low - pad, high + pad)
        self.start, self.end, self.log = start, end, log

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        value = min(max(value, low), high)
        share = math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        if self.log:
            for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
                yield from (m * 10.0**power for m in (1, 2, 5) if self.low <= m * 10.0**power <= self.high)
            return
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
        first = math.ceil(self.low / step)
        yield from (n * step for n in range(first, math.floor(self.high / step) + 1))


def layers_svg(title: str, what: str, num_layers: int, cells: dict[Sublayer, Cell]) -> str:
    """Two rows of cells, attention and MLP, a cell for each layer that has one, filled to its share from below.

    Many layers are shown in several rows of about one length.
    """
    body, y, rows = list[str](), 0.0, -(-num_layers // A_ROW)
    width = -(-num_layers // rows)
    cell = (W - LEFT) / width
    for first in range(0, num_layers, width):
        band, y = range(first, min(first + width, num_layers)), y + TOP
        body += [_text(LEFT + (i - first + 0.5) * cell, y, str(i), "mid") for i in band if i % 5 == 0]
        for kind in KINDS:
            body.append(_text(0, y + 21, kind))
            for i, (share, css, said) in ((i, cells[kind, i]) for i in band if (kind, i) in cells):
                x, high = LEFT + (i - first) * cell + 1, CELL * _finite(share)
                body += [_rect(x, y + 5, cell - 2, CELL, "cell", said)]
                body += [_rect(x, y + 5 + CELL - high, cell - 2, high, css, said)]
            y += CELL + 4
        y += 8
    return _svg(y, title, what, body)


def scatter_svg(
    title: str, what: str, groups: Mapping[str, Sequence[Point]], labels: tuple[str, str], *,
    line: Sequence[Point] = (), level: float | None = None,
) -> str:  # fmt: skip
    """Points of several groups, whose names are CSS classes; a line in steps; a dashed level."""
    every = [point for points in groups.values() for point in points] + list(line)
    ys = [point[1] for point in every] + ([] if level is None else [level])
    height = 230
    x_axis = _Axis([point[0] for point in every], LEFT - 20, W - 6)
    y_axis = _Axis(ys, height - BOTTOM, TOP)
    body = list[str]()
    for value in x_axis.ticks():
        body += [_rect(x_axis.at(value), TOP, 0.5, height - BOTTOM - TOP, "grid")]
        body += [_text(x_axis.at(value), height - 22, f"{value:.4g}", "mid")]
    for value in y_axis.ticks():
        body += [_rect(LEFT - 20, y_axis.at(value), W - LEFT + 14, 0.5, "grid")]
        body += [_text(LEFT - 24, y_axis.at(value) + 4, f"{value:.4g}", "end")]
    if level is not None:
        body.append(f'<path d="M{LEFT - 20} {y_axis.at(level):.1f}H{W - 6}" class="level"/>')
    if line:
        x, y, _ = line[0]
        steps = "".join(f"H{x_axis.at(x):.1f}V{y_axis.at(y):.1f}" for x, y, _ in line[1:])
        body.append(f'<path d="M{x_axis.at(x):.1f} {y_axis.at(y):.1f}{steps}" class="line"/>')
    for css, points in groups.items():
        for x, y, said in points:
            size = 6 if css == "best" else 3
            body.append(_circle(x_axis.at(x), y_axis.at(y), size, css, said))
    body += [_text(W - 6, height - 6, labels[0], "end"), _text(0, 10, labels[1])]
    return _svg(height, title, what, body)


def intervals_svg(title: str, what: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """A mark with its interval for each row (name, value, low, high), on a logarithmic axis; dashed at 1."""
    axis = _Axis([max(value, 0.05) for row in rows for value in row[1:]] + [0.8, 1.25], 106, W - 8, log=True)
    height, body = 30 * len(rows) + 34, list[str]()
    for value in axis.ticks():
        body += [_rect(axis.at(value), 4, 0.5, height - 28, "grid")]
        body += [_text(axis.at(value), height - 8, f"{value:g}x", "mid")]
    body.append(f'<path d="M{axis.at(1):.1f} 4V{height - 24}" class="level"/>')
    for number, (name, value, low, high) in enumerate(rows):
        y, said = 30 * number + 20, f"{name}: {value:.2f}x ({low:.2f} to {high:.2f})"
        body.append(_text(0, y + 4, f"{name} {value:.2f}x"))
        body.append(f'<path d="M{axis.at(low):.1f} {y}H{axis.at(high):.1f}" class="interval"/>')
        css = "point best" if name == "predicted" else "point"
        body.append(_circle(axis.at(value), y, 5, css, said))
    return _svg(height, title, what, body)
