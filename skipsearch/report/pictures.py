"""Pictures of a search, from the files it left: for notebooks and for reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go


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


def benchmark_rows(path: Path) -> pd.DataFrame:
    """Measured rows (one JSON object a line) as a table."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return pd.json_normalize(rows)
