"""The picture at the top of README.md: a block, a plan as cells, and speed-ups as bars, from committed rows.

    python docs/picture.py          # writes docs/picture-light.svg and docs/picture-dark.svg

The block on top is the one that docs/how-it-works.md works out, and a test decodes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
PLANS = HERE.parent / "results/measured/plans"
MODELS = (
    ("SmolLM2-135M-Instruct", "a public model, fp32", "smollm2-fp32.json"),
    ("The bundled model", "trained to be skippable, fp32", "demo-fp32.json"),
)
ARMS = (
    ("plain", "plain decoding"), ("mask", "only skipping"), ("n-grams", "n-grams alone"),
    ("best_all_int8", "all in int8"), ("plan", "the plan found"), ("plan, served", "plan and n-grams"),
)  # fmt: skip
FORMS = ("runs in full", "int8", "int4", "skipped")
DRAFT = ((" the", True), (" current", True), (" file", False), (" .", False), (" ⏎", False))
COLOURS = {
    "light": {
        "text": "#1f2328", "dim": "#59636e", "line": "#d1d9e0", "bar": "#a9b4c0", "best": "#1a7f37", "bad": "#cf222e",
        "forms": ("#0969da", "#54aeff", "#b6e3ff", "none"), "ground": "#ffffff",
    },
    "dark": {
        "text": "#f0f6fc", "dim": "#9198a1", "line": "#3d444d", "bar": "#656c76", "best": "#3fb950", "bad": "#f85149",
        "forms": ("#1f6feb", "#58a6ff", "#a5d6ff", "none"), "ground": "#0d1117",
    },
}  # fmt: skip
WIDTH, LEFT, MIDDLE, END = 880, 24, 452, 858  # pixels
CELL, TALL, BAR, PANEL = 13, 22, 22, 186
LONGEST = 4.0  # speed-up at the right end


class Drawing:
    """Shapes of one theme, as SVG."""

    def __init__(self, theme: str) -> None:
        self.colours: dict[str, Any] = COLOURS[theme]
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, colour: str = "text", **style: str) -> None:
        given = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        self.parts.append(f'<text x="{x:g}" y="{y:g}" fill="{self.colours[colour]}"{given}>{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, fill: str, line: str = "none") -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{line}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0) -> None:
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{self.colours[colour]}" '
            f'stroke-width="{width:g}"/>'
        )

    def form(self, x: float, y: float, form: int, width: float = CELL - 2, height: float = CELL - 2) -> None:
        self.box(x, y, width, height, self.colours["forms"][form], self.colours["line" if form == 3 else "ground"])


def draw_block(to: Drawing) -> float:
    """One block, left to right: guessed cheaply, checked in one pass, what is kept. Returns where it ends."""
    bold = {"font_weight": "600"}
    to.text(LEFT, 30, "1  Guess five tokens with the model's own cheap layers", **bold)
    to.text(MIDDLE, 30, "2  The full model checks all in one pass", **bold)
    for i, (word, right) in enumerate(DRAFT):
        for start, checked in ((LEFT, False), (MIDDLE, True)):
            x, width = start + i * 80, 74
            colour = "dim" if not checked else "best" if right else "bad"
            to.box(x, 44, width, 26, "none", to.colours[colour])
            to.text(x + width / 2, 62, f"{word.strip()} {'✓' if right else '✗'}" if checked else word.strip(),
                    colour, text_anchor="middle")  # fmt: skip
    to.text(LEFT, 96, "3  Keep what it agrees with, and its own next token", **bold)
    to.text(MIDDLE, 96, "the current", "best", **bold)
    to.text(MIDDLE + 88, 96, "config", **bold)
    to.text(MIDDLE + 146, 96, "three tokens in one pass, same text", "dim")
    return 118.0


def draw_cells(to: Drawing, top: float, plan: dict[str, Any]) -> None:
    forms = [int(digit) for digit in plan["plan"]]
    layers = len(forms) // 2
    for row, kind in enumerate(("attention", "MLP")):
        y = top + row * (TALL + 5)
        to.text(LEFT, y + TALL / 2 + 4, kind, "dim", font_size="11")
        for layer in range(layers):
            to.form(LEFT + 60 + layer * (CELL - 2), y, forms[row * layers + layer], CELL - 3, TALL)
    to.text(LEFT + 60, top + 2 * TALL + 24, f"{layers} layers; output head in {plan['head']}", "dim", font_size="11")


def draw_bars(to: Drawing, top: float, data: dict[str, Any]) -> None:
    zero = MIDDLE + 126
    scale = (END - zero - 40) / LONGEST
    rows = {row["arm"]: row for row in data["rows"]}
    for i, (arm, label) in enumerate(ARMS):
        row, y = rows[data.get(arm, arm)], top + i * BAR
        best = arm.startswith("plan")
        to.text(zero - 8, y + 13, label, "text" if best else "dim", text_anchor="end",
                font_weight="600" if best else "400")  # fmt: skip
        to.box(zero, y + 2, row["speedup"] * scale, BAR - 7, to.colours["best" if best else "bar"])
        low, high = row["speedup_ci"]
        if high > low:
            to.line(zero + low * scale, y + 9.5, zero + high * scale, y + 9.5, "text")
        to.text(zero + max(high, row["speedup"]) * scale + 6, y + 13, f"{row['speedup']:.2f}×",
                font_weight="600" if best else "400")  # fmt: skip
    to.line(zero + scale, top - 2, zero + scale, top + len(ARMS) * BAR - 2, "dim")


def draw(theme: str) -> str:
    """The picture in one theme."""
    to = Drawing(theme)
    top = draw_block(to)
    to.line(LEFT, top, END, top, "line")
    for name, what, file in MODELS:
        data = json.loads((PLANS / file).read_text())
        plan = next(row["plan"] for row in data["rows"] if row["arm"] == "plan")
        to.text(LEFT, top + 26, name, font_weight="600", font_size="15")
        to.text(LEFT, top + 44, what, "dim")
        to.text(LEFT, top + 72, "What each layer does while guessing:", "dim")
        draw_cells(to, top + 84, plan)
        to.text(MIDDLE, top + 26, "Times as fast as plain decoding, same text", "dim")
        draw_bars(to, top + 36, data)
        top += PANEL
    x = float(LEFT)
    for form, word in enumerate(FORMS):
        to.form(x, top + 4, form)
        to.text(x + 18, top + 14, word, "dim", font_size="11")
        x += 34 + 6.5 * len(word)
    to.text(END, top + 14, "two CPU cores; lines: 95 % intervals", "dim", font_size="11", text_anchor="end")
    height = top + 30
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
        f'height="{height:g}" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" '
        'font-size="13">'
    )
    ground = f'<rect width="{WIDTH}" height="{height:g}" fill="{to.colours["ground"]}"/>'
    return "\n".join([head, ground, *to.parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    for theme in COLOURS:
        (HERE / f"picture-{theme}.svg").write_text(draw(theme), encoding="utf-8")
