"""Pictures made from the files of a benchmark, for the notebooks; those of a search are in `search.board`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots


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
