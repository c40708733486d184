"""Pictures made from the files of a search or a benchmark, for the notebooks."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots


def search_history(folder: Path) -> go.Figure:
    """Predicted speed-up of every trial, and the best so far; from trials.csv."""
    trials = pd.read_csv(folder / "trials.csv").sort_values("trial")
    plain = trials["tokens_per_second"] / trials["speedup_predicted"]
    speedup = trials["tokens_per_second"] / plain.dropna().iloc[0]
    figure = go.Figure()
    figure.add_scatter(x=trials["trial"], y=speedup, mode="markers", name="trial", text=trials["seed"])
    figure.add_scatter(x=trials["trial"], y=speedup.cummax(), mode="lines", line_shape="hv", name="best so far")
    figure.add_hline(y=1, line_dash="dot", annotation_text="plain decoding")
    return figure.update_layout(xaxis_title="trial", yaxis_title="predicted speed-up", template="simple_white")


def acceptance_against_cost(folder: Path) -> go.Figure:
    """Acceptance rate of each trial over its cost ratio c, from trials.csv; the colour is the predicted speed-up."""
    return px.scatter(
        pd.read_csv(folder / "trials.csv").dropna(subset=["cost_ratio"]), x="cost_ratio", y="acceptance_rate",
        color="speedup_predicted", color_continuous_scale="Viridis", hover_name="trial", template="simple_white",
        labels={"cost_ratio": "cost ratio c", "acceptance_rate": "acceptance rate", "speedup_predicted": "speed-up"},
    )  # fmt: skip


def signals_against_decoding(folder: Path) -> go.Figure:
    """Acceptance rate while decoding with each mask, over each cheap signal; from benchmarks/signals.py."""
    masks, table = pd.read_csv(folder / "masks.csv"), pd.read_csv(folder / "table.csv")
    names = list(table.sort_values("acceptance")["signal"])
    found = dict(zip(table["signal"], table["acceptance"], strict=True))
    titles = [f"{name}: Spearman {found[name]:.2f}" for name in names]
    figure = make_subplots(rows=2, cols=3, subplot_titles=titles, shared_yaxes=True)
    for number, name in enumerate(names):
        figure.add_scatter(
            x=masks[name], y=masks["decoded acceptance"], mode="markers", showlegend=False, text=masks["skipped"],
            marker={"size": 4, "color": masks["speedup"], "colorscale": "Viridis", "showscale": number == 0},
            row=number // 3 + 1, col=number % 3 + 1,
        )  # fmt: skip
    return figure.update_layout(template="simple_white", height=600, yaxis_title="decoded acceptance")


def stream_over_time(folder: Path, window: int = 20) -> go.Figure:
    """Speed-up of each arm over plain decoding, over the last `window` prompts; from benchmarks/on_the_fly.py."""
    rows = pd.read_csv(folder / "prompts.csv")
    sums = rows.pivot(index="prompt", columns="arm", values=["tokens", "seconds"]).rolling(window).sum()
    rates = sums["tokens"] / sums["seconds"]
    figure = go.Figure()
    for arm in rows["arm"].unique():
        figure.add_scatter(x=rates.index, y=rates[arm] / rates["plain"], mode="lines", name=arm)
    domains = rows.drop_duplicates("prompt").set_index("prompt")["domain"]
    for place in domains.index[domains.ne(domains.shift())]:
        figure.add_vline(x=place, line_dash="dot", annotation_text=domains[place])
    title = f"tokens/s over plain, last {window} prompts"
    return figure.update_layout(xaxis_title="prompt", yaxis_title=title, template="simple_white")


def perplexity_against_speed(folder: Path) -> go.Figure:
    """Joint decoding: perplexity under the target over tokens per second; from benchmarks/joint_decoding.py."""
    return px.scatter(
        pd.read_csv(folder / "table.csv"), x="tokens_per_second", y="perplexity", color="method",
        hover_name="setting", template="simple_white",
        labels={"tokens_per_second": "tokens/s", "perplexity": "perplexity under the target"},
    )  # fmt: skip
