"""Pictures of a search, from the files it left: for notebooks and for reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots


def search_history(folder: Path) -> go.Figure:
    """Predicted speed-up of every trial, and the best so far, from trials.csv."""
    trials = pd.read_csv(folder / "trials.csv").sort_values("trial")
    plain = trials["tokens_per_second"] / trials["speedup_predicted"]
    speedup = trials["tokens_per_second"] / plain.dropna().iloc[0]
    figure = go.Figure()
    figure.add_scatter(x=trials["trial"], y=speedup, mode="markers", name="trial", text=trials["seed"])
    figure.add_scatter(x=trials["trial"], y=speedup.cummax(), mode="lines", line_shape="hv", name="best so far")
    figure.add_hline(y=1, line_dash="dot", annotation_text="plain decoding")
    figure.update_layout(xaxis_title="trial", yaxis_title="predicted speed-up", template="simple_white")
    return figure


def acceptance_against_cost(folder: Path) -> go.Figure:
    """Each trial's acceptance rate over its cost ratio c, coloured by predicted speed-up."""
    trials = pd.read_csv(folder / "trials.csv").dropna(subset=["cost_ratio"])
    figure = go.Figure()
    figure.add_scatter(
        x=trials["cost_ratio"], y=trials["acceptance_rate"], mode="markers", text=trials["trial"],
        marker={"color": trials["speedup_predicted"], "colorbar": {"title": "speed-up"}, "colorscale": "Viridis"},
    )  # fmt: skip
    figure.update_layout(xaxis_title="cost ratio c", yaxis_title="acceptance rate", template="simple_white")
    return figure


def signals_against_decoding(folder: Path) -> go.Figure:
    """What cheap signals say of each mask over what decoding with it accepted; from benchmarks/signals.py."""
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
    figure.update_layout(template="simple_white", height=600, yaxis_title="decoded acceptance")
    return figure


def stream_over_time(folder: Path, window: int = 20) -> go.Figure:
    """Speed-up over plain decoding of each arm, over the last prompts of a stream; from benchmarks/on_the_fly.py."""
    rows = pd.read_csv(folder / "prompts.csv")
    figure = go.Figure()
    tokens = rows.pivot(index="prompt", columns="arm", values="tokens").rolling(window).sum()
    seconds = rows.pivot(index="prompt", columns="arm", values="seconds").rolling(window).sum()
    rates = tokens / seconds
    for arm in rows["arm"].unique():
        figure.add_scatter(x=rates.index, y=rates[arm] / rates["plain"], mode="lines", name=arm)
    domains = rows.drop_duplicates("prompt").set_index("prompt")["domain"]
    for place in domains.index[domains.ne(domains.shift())]:
        figure.add_vline(x=place, line_dash="dot", annotation_text=domains[place])
    figure.update_layout(
        xaxis_title="prompt", yaxis_title=f"tokens/s over plain, last {window} prompts", template="simple_white"
    )
    return figure


def perplexity_against_speed(folder: Path) -> go.Figure:
    """Joint decoding: perplexity under the target over tokens/s; from benchmarks/joint_decoding.py."""
    table = pd.read_csv(folder / "table.csv")
    figure = go.Figure()
    for name, rows in table.groupby("method", sort=False):
        figure.add_scatter(
            x=rows["tokens_per_second"], y=rows["perplexity"], mode="markers", name=str(name), text=rows["setting"]
        )
    figure.update_layout(xaxis_title="tokens/s", yaxis_title="perplexity under the target", template="simple_white")
    return figure


def benchmark_rows(path: Path) -> pd.DataFrame:
    """Measured rows (one JSON object a line) as a table."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return pd.json_normalize(rows)
