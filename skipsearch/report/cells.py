"""Masks and sensitivity as rows of cells, one cell a sublayer."""

from __future__ import annotations

from rich.text import Text

from skipsearch.mask import KINDS, SkipMask

BARS = "▁▂▃▄▅▆▇█"


def draw_mask(mask: SkipMask) -> Text:
    """One row of cells for each kind of sublayer, below a ruler that numbers every fifth layer."""
    text = Text()
    ruler = "".join(f"{i:<5}" for i in range(0, mask.num_layers, 5))[: mask.num_layers + 4]
    text.append(f"{'layer':<10}{ruler}\n", style="dim")
    for kind in KINDS:
        text.append(f"{kind:<10}")
        skipped = [mask.skips(kind, i) for i in range(mask.num_layers)]
        for cell in skipped:
            text.append("·" if cell else "█", style="red" if cell else "green")
        text.append(f"  {sum(skipped)} of {mask.num_layers} skipped\n")
    text.append("█ runs while drafting   · skipped", style="dim")
    return text


def draw_sensitivity(loss: dict[str, dict[str, float]], num_layers: int) -> Text:
    """The share of tokens that change when a sublayer alone is skipped, a bar for each; free sublayers alone have one.

    Args:
        loss: by kind and layer, as in sensitivity.json.
    """
    most = max((value for of_kind in loss.values() for value in of_kind.values()), default=0.0) or 1.0
    text = Text()
    for kind in KINDS:
        text.append(f"{kind:<10}")
        for i in range(num_layers):
            value = loss[kind].get(str(i))
            text.append(" " if value is None else BARS[round(value / most * (len(BARS) - 1))], style="cyan")
        text.append("\n")
    text.append(f"tokens that change when it alone is skipped: {BARS[0]} none   {BARS[-1]} {most:.0%}", style="dim")
    return text
