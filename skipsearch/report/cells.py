"""Plans and sensitivity as rows of cells, one cell a sublayer."""

from __future__ import annotations

from rich.text import Text

from skipsearch.mask import KINDS
from skipsearch.plan import CELLS, FORMS, DraftPlan, Form

BARS = "▁▂▃▄▅▆▇█"
STYLES: dict[Form, str] = {"run": "green", "int8": "cyan", "int4": "yellow", "skip": "red"}
WORDS: dict[Form, str] = {"run": "runs while drafting", "int8": "int8", "int4": "int4", "skip": "skipped"}


def draw_plan(plan: DraftPlan) -> Text:
    """One row of cells for each kind of sublayer, below a ruler that numbers every fifth layer; then the head."""
    text = Text()
    ruler = "".join(f"{i:<5}" for i in range(0, plan.num_layers, 5))[: plan.num_layers + 4]
    text.append(f"{'layer':<10}{ruler}\n", style="dim")
    for kind in KINDS:
        text.append(f"{kind:<10}")
        forms = [plan.form(kind, i) for i in range(plan.num_layers)]
        for form in forms:
            text.append(CELLS[form], style=STYLES[form])
        counts = [f"{forms.count(form)} {form}" for form in ("int8", "int4") if form in forms]
        text.append("  " + ", ".join([*counts, f"{forms.count('skip')} of {plan.num_layers} skipped"]) + "\n")
    if not plan.only_skips:
        tokens = "" if plan.head_ids is None else f", over {len(plan.head_ids):,} tokens"
        text.append(f"{'head':<10}{plan.head}{tokens}\n")
    every = plan.forms()
    shown = [form for form in FORMS if form in every or form in ("run", "skip")]
    text.append("   ".join(f"{CELLS[form]} {WORDS[form]}" for form in shown), style="dim")
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
