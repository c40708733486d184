"""Pictures of a search; optuna-dashboard shows them and a note with the study, under fixed names."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from skipsearch.mask import KINDS
from skipsearch.plan import DraftPlan
from skipsearch.search.result import SearchResult, summary
from skipsearch.search.storage import EXPERIMENTAL
from skipsearch.search.study import Study
from skipsearch.search.verdict import times, verdict_line

if TYPE_CHECKING:
    import plotly.graph_objects as go

GOOD = 5  # the least of trials that a picture of good ones needs; it takes the best quarter
DOES = {"skipped": ("skip",), "quantised": ("int8", "int4")}
KEPT = "\n\n---\n*skipsearch writes what is above this line at the end of a run, and keeps what is below.*"
BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by all eyes


def show_in_dashboard(study: Study, result: SearchResult) -> None:
    """Save the pictures and the note with the study; those of an earlier run are replaced, what a user wrote is not."""
    from optuna_dashboard import get_note, save_note, save_plotly_graph_object

    pictures = {
        "best-plan": plan_picture(study, result.plan), "speedup-against-trials": search_history(result.folder),
        "acceptance-against-cost": acceptance_against_cost(result.folder),
    }  # fmt: skip
    with warnings.catch_warnings(action="ignore", category=EXPERIMENTAL):
        for name, picture in pictures.items():
            picture.update_layout(template="none", title_font_size=15)  # a template would be most of what is stored
            save_plotly_graph_object(study.study, picture, graph_object_id=name)
        before, found, users = get_note(study.study).partition(KEPT)
        save_note(study.study, f"{note(result)}{KEPT}\n\n{(users if found else before).strip()}")


def note(result: SearchResult) -> str:
    """Verdict, intervals and the next command, as Markdown."""
    data = summary(result)
    verdict, then = data["evidence"]["verdict"], data["next"]
    return "\n".join([
        f"**{verdict}**: {verdict_line(data)}", "",
        f"Speed-up over plain decoding on {result.measured.prompts} held-out prompts, with 95 % intervals:", "",
        *(f"- {name}: {times(arm)}" for name, arm in data["measured"].items()),
        f"- predicted: {result.predicted.speedup:.2f}x (standard error {result.standard_error:.2f})", "",
        f"Next: `{then}`" if verdict == "use" else f"Next: {then}",
    ])  # fmt: skip


def plan_picture(study: Study, best: DraftPlan) -> go.Figure:
    """How often good trials skip or quantise each sublayer, and marks where the best plan does."""
    import plotly.graph_objects as go

    plans = [plan for plan, _ in study.best(len(study.finished()))]
    good = plans[: max(GOOD, len(plans) // 4)]
    layers = list(range(best.num_layers))
    rows = [(kind, does) for kind in KINDS for does in DOES]
    names = {row: " ".join(row) for row in rows}
    shares = [[sum(plan.form(k, i) in DOES[does] for plan in good) / len(good) for i in layers] for k, does in rows]
    title = f"the best plan over the {len(good)} best of {len(plans)} plans"
    figure = go.Figure(layout={"title": title, "xaxis_title": "layer", "legend": {"orientation": "h", "y": -0.3}})
    figure.add_heatmap(
        x=layers, y=list(names.values()), z=shares, zmin=0, zmax=1, xgap=1, ygap=1, colorscale="Blues",
        colorbar={"tickformat": ".0%", "title": "of plans"},
    )  # fmt: skip
    for does, symbol in zip(DOES, ("x", "circle-open"), strict=True):
        at = [(i, names[k, does]) for k in KINDS for i in layers if best.form(k, i) in DOES[does]]
        figure.add_scatter(
            x=[i for i, _ in at], y=[name for _, name in at], mode="markers", name=f"{does} in the best plan",
            marker={"symbol": symbol, "color": ORANGE, "size": 9, "line": {"width": 2}},
        )  # fmt: skip
    return figure.update_yaxes(autorange="reversed", automargin=True)


def search_history(folder: Path) -> go.Figure:
    """Predicted speed-up of every trial, and the best so far; from trials.csv."""
    import plotly.graph_objects as go

    trials = pd.read_csv(folder / "trials.csv").sort_values("trial")
    plain = trials["tokens_per_second"] / trials["speedup_predicted"]
    speedup = trials["tokens_per_second"] / plain.dropna().iloc[0]
    figure = go.Figure(layout={"title": "predicted speed-up against trials"})
    figure.add_scatter(
        x=trials["trial"], y=speedup, mode="markers", name="trial", text=trials["seed"], marker_color=BLUE
    )
    figure.add_scatter(
        x=trials["trial"], y=speedup.cummax(), mode="lines", line={"shape": "hv", "color": ORANGE}, name="best so far"
    )
    figure.add_hline(y=1, line_dash="dot", annotation_text="plain decoding")
    return figure.update_layout(xaxis_title="trial", yaxis_title="predicted speed-up", template="simple_white")


def acceptance_against_cost(folder: Path) -> go.Figure:
    """Acceptance rate of each trial over its cost ratio c, and their front; from trials.csv."""
    import plotly.express as px

    trials = pd.read_csv(folder / "trials.csv").dropna(subset=["cost_ratio"])
    figure = px.scatter(
        trials, x="cost_ratio", y="acceptance_rate", color="speedup_predicted", color_continuous_scale="Viridis",
        hover_name="trial", template="simple_white", title="acceptance against cost, with the front",
        labels={"cost_ratio": "cost ratio c", "acceptance_rate": "acceptance rate", "speedup_predicted": "speed-up"},
    )  # fmt: skip
    front = trials[trials["on_front"]].sort_values("cost_ratio")
    return figure.add_scatter(
        x=front["cost_ratio"], y=front["acceptance_rate"], mode="lines", line={"shape": "hv", "color": ORANGE},
        showlegend=False,
    )  # fmt: skip
