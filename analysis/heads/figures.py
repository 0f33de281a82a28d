"""Figures of a patching run: recovery by head, by layer and by position, and estimated against exact effects.

As in `nextstate.analysis.figures`, backgrounds are transparent. The middle of a diverging colour scale is the colour of
the page, so the page's script sets it (see `meta`); elsewhere the colours of the light theme are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from nextstate.analysis.figures import SCALE, layout, plain, rgba, rounded

COLOURS = {"state": "#0072b2", "action": "#d55e00", "both": "#aa4499", "": "#8c8c8c"}
LIGHT = [[0.0, "#8f3f8a"], [0.5, "#f3f0e8"], [1.0, "#00755a"]]  # purple, paper, green: safe for colour-blind readers
MIN_LABELLED = 0.05  # least absolute recovery of a head whose point is labelled
DIRECTIONS = {"denoise": "denoised", "noise": "noised"}
CELL = (
    "recovery %{customdata[0]:.3f} (95 % interval %{customdata[1]:.3f} to %{customdata[2]:.3f})<br>"
    "simultaneous 95 % band %{customdata[3]:.3f} to %{customdata[4]:.3f}"
    "%{customdata[5]}%{customdata[6]}<extra></extra>"
)


def _hover(rows: pl.DataFrame) -> list[list[Any]]:
    tests = ["" if p is None else f"<br>p = {p:.4f}{', carries' if c else ''}" for p, c in rows["p", "carries"].rows()]
    numbers = rows.select("recovery", "low", "high", "band_low", "band_high").rows()
    flips = [
        "" if f is None else f"<br>changes the greedy answer in {100 * f:.0f} % of the pairs" for f in rows["flips"]
    ]
    words = zip(tests, flips, strict=True)
    return [[*(round(x, 4) for x in row), *text] for row, text in zip(numbers, words, strict=True)]


def head_map(rows: pl.DataFrame, title: str, reach: float) -> go.Figure:
    """Draw a heat map of recovery, with heads on the x axis and layers on the y axis.

    Args:
        rows: of a sweep with one column, as `nextstate.analysis.heads.tables.sweep_rows` returns them.
        title: title of the figure.
        reach: the colours run from -reach to reach. Circles mark heads that carry what the prompts differ in.
    """
    layers, heads = rows["layer"].n_unique(), rows["head"].n_unique()
    marks = rows.filter("carries")
    size = 7 if heads <= 16 else 4
    traces = [
        _map(rows, "head", [str(h) for h in range(heads)], "layer %{y}, head %{x}<br>" + CELL, reach),
        go.Scatter(
            x=[str(h) for h in marks["head"]], y=marks["layer"].to_list(), mode="markers", hoverinfo="skip",
            marker={"size": size, "color": "rgba(0,0,0,0)", "line": {"width": 1.6, "color": "#16181b"}}, meta="mark",
        ),
    ]  # fmt: skip
    pitch = 26 if layers <= 12 else 16 if layers <= 26 else 11
    return go.Figure(traces, _grid(title, layers, pitch, "head"))


def position_map(rows: pl.DataFrame, words: Sequence[str], title: str, reach: float) -> go.Figure:
    """Draw a heat map of recovery: positions or roles, labelled with `words`, on the x axis; layers on the y axis."""
    layers, columns = rows["layer"].n_unique(), rows["position"].unique(maintain_order=True).to_list()
    labels = [f"{plain(word)}" for word in words]
    trace = _map(rows, "position", columns, "layer %{y}, position %{x}<br>" + CELL, reach)
    pitch = 26 if layers <= 12 else 14 if layers <= 26 else 9
    ticks = _labelled(rows, len(columns))
    axis = {"tickvals": [columns[i] for i in ticks], "ticktext": [labels[i] for i in ticks], "tickangle": -90}
    axis |= {"tickfont": {"size": 11, "family": "monospace"}}
    figure = go.Figure([trace], _grid(title, layers, pitch, "", xaxis=axis))
    return figure.update_layout(height=pitch * layers + 150)


def _labelled(rows: pl.DataFrame, columns: int) -> list[int]:
    """Return the columns to label: all if there is room, else the last and those with the largest recoveries."""
    spacing = -(-columns // 40)
    most = rows["recovery"].abs().to_numpy().reshape(-1, columns).max(0)
    most[-1] = np.inf
    chosen: list[int] = []
    for i in np.argsort(-most).tolist():
        if all(abs(i - k) >= spacing for k in chosen):
            chosen.append(i)
    return sorted(chosen[: columns if spacing == 1 else 16])


def _map(rows: pl.DataFrame, column: str, x: Sequence[str], hover: str, reach: float) -> go.Heatmap:
    layers = rows["layer"].unique(maintain_order=True).to_list()
    shape = (len(layers), len(x))
    hover_data = _hover(rows)
    width = shape[1]
    return go.Heatmap(
        x=list(x), y=layers, z=rows["recovery"].round(4).to_numpy().reshape(shape).tolist(),
        customdata=[hover_data[i * width : (i + 1) * width] for i in range(shape[0])],
        zmin=-reach, zmax=reach, colorscale=LIGHT, showscale=False, hovertemplate=hover, meta="diverging",
        xgap=1 if width <= 30 else 0, ygap=1 if len(layers) <= 30 else 0,
    )  # fmt: skip


def _grid(title: str, layers: int, pitch: int, x: str, xaxis: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the layout of a heat map with a categorical x axis."""
    down = {"dtick": 1 if layers <= 16 else 4, "showgrid": False}
    right = {"type": "category", "showgrid": False} | dict(xaxis or {})
    return layout(title, max(120, pitch * layers + 84), x, "layer", xaxis=right, yaxis=down)


def published_heads(rows: pl.DataFrame, title: str) -> go.Figure:
    """Draw summed scores, with heads on the x axis and layers on the y axis; colours from 0 to 1, as published."""
    hover = "layer %{y}, head %{x}<br>sum of scores %{z:.3f}<extra></extra>"
    return _scores(rows, rows["head"].n_unique(), [str(h) for h in range(rows["head"].n_unique())], title, hover)


def published_positions(rows: pl.DataFrame, title: str) -> go.Figure:
    """Draw the scores of one trial, with positions on the x axis and layers on the y axis; colours from 0 to 1."""
    first = rows.filter(layer=rows["layer"].min())
    names = [f"{at}: {plain(token)}" for at, token in first.select("position", "token").iter_rows()]
    figure = _scores(rows, len(names), names, title, "layer %{y}, position %{x}<br>score %{z:.3f}<extra></extra>")
    shown = list(range(len(names) - 1, -1, -max(1, len(names) // 24)))[::-1]
    axis = {"tickvals": [names[i] for i in shown], "ticktext": [names[i].partition(": ")[2] for i in shown]}
    return figure.update_layout(xaxis=axis | {"tickangle": -90, "tickfont": {"size": 11, "family": "monospace"}})


def _scores(rows: pl.DataFrame, width: int, x: Sequence[str], title: str, hover: str) -> go.Figure:
    layers = rows["layer"].unique(maintain_order=True).to_list()
    trace = go.Heatmap(
        x=list(x), y=layers, z=rows["score"].round(4).to_numpy().reshape(-1, width).tolist(), zmin=0, zmax=1,
        colorscale=SCALE, showscale=False, hovertemplate=hover, xgap=1 if width <= 30 else 0,
        ygap=1 if len(layers) <= 30 else 0,
    )  # fmt: skip
    pitch = 26 if len(layers) <= 12 else 16 if len(layers) <= 26 else 11
    return go.Figure([trace], _grid(title, len(layers), pitch, "head" if x[0] == "0" else ""))


def by_layer(table: pl.DataFrame, title: str) -> go.Figure:
    """Draw the recovery by state pairs and by action pairs against the layer, with simultaneous bands.

    Args:
        table: one row for each layer, as `nextstate.analysis.heads.routing.head_table` returns it.
        title: title of the figure.
    """
    traces: list[Any] = []
    layers = table["layer"].to_list()
    for name in ("state", "action"):
        value, low, high, below, above = (
            rounded(table[f"{name}{end}"]) for end in ("", "_low", "_high", "_band_low", "_band_high")
        )
        colour = COLOURS[name]
        traces.append(
            go.Scatter(
                x=[*layers, *layers[::-1]], y=[*above, *below[::-1]], mode="lines", fill="toself",
                fillcolor=rgba(colour, 0.18), line={"width": 0}, hoverinfo="skip",
            )
        )  # fmt: skip
        traces.append(
            go.Scatter(
                x=layers, y=value, name=name, line={"color": colour, "width": 2.2}, mode="lines+markers",
                marker={"symbol": "circle" if name == "state" else "square", "size": 7},
                customdata=list(zip(low, high, strict=True)),
                hovertemplate=f"{name}, layer %{{x}}<br>%{{y:.3f}} (95 % interval %{{customdata[0]:.3f}} to "
                "%{customdata[1]:.3f})<extra></extra>",
            )
        )  # fmt: skip
    ticks = {"dtick": 1 if len(layers) <= 16 else 4, "showgrid": False}
    return go.Figure(traces, layout(title, 290, "layer", "recovery", xaxis=ticks))


def against(table: pl.DataFrame, title: str, name: bool = True) -> go.Figure:
    """Draw recovery on action pairs (y) against recovery on state pairs (x), one point for each head, with intervals.

    Args:
        table: as `nextstate.analysis.heads.routing.head_table` returns it.
        title: title of the figure.
        name: whether to label heads that carry something with their layer and number.
    """
    ends = [*table["state"], *table["action"], 0.0]
    low, high = min(ends), max(*ends, 0.1)
    pad = 0.08 * (high - low)
    reach = [low - pad, high + pad]
    traces: list[Any] = [_diagonal(reach)]
    for label, symbol in (
        ("", "circle"),
        ("state", "circle"),
        ("action", "square"),
        ("both", "diamond"),
    ):
        rows = table.filter(pl.col("carries") == label)
        hover_data = [
            [f"{r['layer']}.{r['head']}", *(round(r[k], 3) for k in ("state_low", "state_high", "action_low",
             "action_high", "routing", "routing_low", "routing_high"))] for r in rows.iter_rows(named=True)
        ]  # fmt: skip
        large = rows.select(pl.max_horizontal(pl.col("state", "action").abs()) >= MIN_LABELLED).to_series()
        names = [t[0] if shown else "" for t, shown in zip(hover_data, large, strict=True)]
        traces.append(
            go.Scatter(
                x=rounded(rows["state"]), y=rounded(rows["action"]), name=label or "neither", customdata=hover_data,
                mode="markers+text" if label and name else "markers", text=names,
                textposition="top center", textfont={"size": 11},
                error_x=_bars(rows, "state", label), error_y=_bars(rows, "action", label),
                marker={"color": COLOURS[label], "symbol": symbol, "size": 9 if label else 5,
                        "opacity": 1 if label else 0.6},
                hovertemplate="head %{customdata[0]}<br>state %{x:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f})"
                "<br>action %{y:.3f} (%{customdata[3]:.3f} to %{customdata[4]:.3f})<br>routing %{customdata[5]:.3f} "
                "(%{customdata[6]:.3f} to %{customdata[7]:.3f})<extra></extra>",
            )
        )  # fmt: skip
    axes = {"range": reach, "zeroline": True}
    return go.Figure(
        traces, layout(title, 420, "recovery on state pairs", "recovery on action pairs", xaxis=axes, yaxis=axes)
    )


def _diagonal(ends: Sequence[float]) -> go.Scatter:
    line = {"color": "#8c8c8c", "width": 1, "dash": "dot"}
    return go.Scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip")


def _bars(rows: pl.DataFrame, name: str, label: str) -> dict[str, Any]:
    up = (rows[f"{name}_high"] - rows[name]).clip(0, None)
    down = (rows[name] - rows[f"{name}_low"]).clip(0, None)
    return {"type": "data", "array": rounded(up), "arrayminus": rounded(down), "thickness": 1, "width": 0,
            "color": rgba(COLOURS[label], 0.55), "visible": bool(label)}  # fmt: skip


def screened(effects: pl.DataFrame, title: str, colour: str) -> go.Figure:
    """Draw the gradient's estimate (y) against the exact mean effect (x), in logits, one point for each head.

    Args:
        effects: one row for each head, as `nextstate.analysis.heads.tables.effect_rows` returns it.
        title: title of the figure.
        colour: colour of the points.
    """
    names = [f"{layer}.{head}" for layer, head in effects.select("layer", "head").iter_rows()]
    right, up = effects["exact"], effects["estimate"]
    both = np.concatenate([right.to_numpy(), up.to_numpy()])
    ends = [float(both.min()), float(both.max())]
    traces = [
        _diagonal(ends),
        go.Scatter(
            x=rounded(right), y=rounded(up), mode="markers", text=names, marker={"color": colour, "size": 6},
            hovertemplate="head %{text}<br>exact %{x:.3f}, estimate %{y:.3f}<extra></extra>",
        ),
    ]  # fmt: skip
    return go.Figure(traces, layout(title, 320, "exact effect (logits)", "estimated effect (logits)"))
