"""Figures of a response run: windows, response matrices with a slider over layers, signature, heads, bridge.

As in `nextstate.analysis.figures`, backgrounds are transparent, and the page sets the colours of its theme. Except for
the figures of the windows themselves, a layer is drawn only where the strength is within its window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from jaxtyping import Float
from plotly.colors import sample_colorscale

from nextstate.analysis.figures import SCALE, layout, plain, rgba, rounded
from nextstate.analysis.heads.figures import LIGHT

DEEP = 6  # most layers in a figure of windows
BARS = 8  # most layers in a figure of the bridge
RAMP = [[0.0, "#56b4e9"], [0.5, "#7b6fb8"], [1.0, "#b3412f"]]  # from the first layer to the last
LINES = {  # condition and offset: name, colour, dash
    ("repeated", "before"): ("B − 1, repeated", "#0072b2", "solid"),
    ("repeated", "same"): ("B, repeated", "#d55e00", "solid"),
    ("repeated", "others"): ("other offsets, repeated", "#8c8c8c", "solid"),
    ("control", "before"): ("B − 1, control", "#0072b2", "dot"),
    ("control", "same"): ("B, control", "#d55e00", "dot"),
}
ROLES = {
    "state": "#0072b2",
    "action": "#d55e00",
    "match": "#009e73",
    "distractor": "#aa4499",
    "others": "#8c8c8c",
}


def _spread(layers: Sequence[int], most: int) -> list[int]:
    """Return at most `most` places among the layers, evenly spread, with both ends."""
    return sorted({round(x) for x in np.linspace(0, len(layers) - 1, min(most, len(layers)))})


def _colours(n: int) -> list[str]:
    return list(sample_colorscale(RAMP, [k / max(1, n - 1) for k in range(n)]))


def _log(strengths: Sequence[float]) -> dict[str, Any]:
    ends = [10 ** np.floor(np.log10(strengths[0])), 10 ** np.ceil(np.log10(strengths[-1]))]
    ticks = [float(10.0**k) for k in range(round(np.log10(ends[0])), round(np.log10(ends[1])) + 1)]
    reach = [float(np.log10(strengths[0])) - 0.2, float(np.log10(strengths[-1])) + 0.2]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks], "showgrid": False, "range": reach}


def scale(
    rows: pl.DataFrame,
    limit: Mapping[int, float | None],
    title: str,
    common: tuple[float, float] | None = None,
    cosine: bool = False,
) -> go.Figure:
    """Draw the response divided by its limit at strength 0, or the cosine to the next strength, against strength.

    Args:
        rows: rows of the table `windows` for one kind of direction; the first precision is drawn solid.
        limit: norm of the exact Jacobian-vector product, by layer.
        title: title of the figure.
        common: ends of the window of the first precision, drawn shaded.
        cosine: whether to draw the cosine instead of the response.
    """
    layers = [layer for layer in rows["layer"].unique(maintain_order=True) if limit.get(layer)]
    layers = [layers[k] for k in _spread(layers, DEEP)] if layers else []
    colours, traces, dashes = _colours(len(layers)), list[Any](), ("solid", "dash", "dot")
    for (dtype, dash), (colour, layer) in product(
        zip(rows["dtype"].unique(maintain_order=True), dashes, strict=False), zip(colours, layers, strict=True)
    ):
        mine = rows.filter(dtype=dtype, layer=layer)
        x, y = mine["strength"].to_numpy(), mine["level"].to_numpy() / (limit[layer] or 1.0)
        if cosine:
            x, y = np.sqrt(x[:-1] * x[1:]), mine["cosine"].cast(pl.Float64).to_numpy()[:-1]
        name = f"after layer {layer}, {dtype}"
        traces.append(
            go.Scatter(
                x=x.tolist(), y=rounded(y), name=name, mode="lines+markers", marker={"size": 4},
                line={"color": colour, "width": 1.8, "dash": dash},
                hovertemplate=f"{name}<br>strength %{{x:.2g}}: %{{y:.4f}}<extra></extra>",
            )
        )  # fmt: skip
    upright: dict[str, Any] = {"range": [0, 1.04]} if cosine else {"range": [0, _top(traces)]}
    words = "cosine to next strength" if cosine else "response / limit"
    axis = _log(rows.filter(dtype=rows["dtype"][0])["strength"].unique(maintain_order=True).to_list())
    figure = go.Figure(traces, layout(title, 300, "strength", words, xaxis=axis, yaxis=upright))
    if common is not None:
        figure.add_vrect(x0=common[0], x1=common[1], fillcolor="rgba(0,158,115,0.13)", line_width=0, layer="below")
    return figure


def _top(traces: Sequence[Any]) -> float:
    """Return the upper end of a y axis; noise far above it is cut off."""
    values = [y for trace in traces for y in trace.y if y is not None]
    return float(min(3.0, max(1.6, 1.05 * max(values, default=1.0))))


def ends(tables: Sequence[pl.DataFrame], layers: Sequence[int]) -> tuple[float, float]:
    """Return the common ends of the colour scale of response matrices, as powers of ten."""
    every = np.concatenate([_grid(rows, layer).ravel() for rows in tables for layer in layers])
    low, high = np.quantile(every[np.isfinite(every) & (every > 0)], (0.02, 0.995))
    return float(np.log10(low)), float(np.log10(high))


def _grid(rows: pl.DataFrame, layer: int) -> Float[np.ndarray, "target position"]:
    lines = rows.filter(layer=layer)["response"].to_list()
    return np.array([[np.nan if x is None else x for x in line] for line in lines]).T


def matrices(
    rows: pl.DataFrame, layers: Sequence[int], words: Sequence[str], title: str, reach: tuple[float, float]
) -> go.Figure:
    """Draw the response of each token (y) to a push on each token (x); a slider selects the layer.

    Args:
        rows: as `nextstate.analysis.response.tables.matrix_rows` returns them.
        layers: layers to draw.
        words: label of each position.
        title: title of the figure.
        reach: powers of ten at the ends of the colours, from `ends`.
    """
    grids = {layer: _grid(rows, layer) for layer in layers}
    with np.errstate(divide="ignore"):
        shown = {layer: [rounded(line) for line in np.log10(grid)] for layer, grid in grids.items()}
    labels = [f"{i}: {plain(word)}" for i, word in enumerate(words)]
    trace = go.Heatmap(
        x=labels, y=labels, z=shown[layers[-1]], zmin=reach[0], zmax=reach[1], colorscale=SCALE, hoverongaps=False,
        colorbar={"title": {"text": "log₁₀"}},
        hovertemplate="push on %{x}<br>response at %{y}<br>10 to the %{z:.2f}<extra></extra>",
    )  # fmt: skip
    steps = [{"label": str(layer), "method": "restyle", "args": [{"z": [shown[layer]]}]} for layer in layers]
    slider = {
        "active": len(layers) - 1, "steps": steps, "currentvalue": {"prefix": "after layer "}, "pad": {"t": 34},
        "x": 0, "len": 1, "bgcolor": "rgba(128,128,128,0.35)", "activebgcolor": "#0072b2", "borderwidth": 0,
        "ticklen": 3, "tickcolor": "#8c8c8c",
    }  # fmt: skip
    ticks = list(range(0, len(words), max(1, len(words) // 12)))
    axis = {"showgrid": False, "tickvals": [labels[i] for i in ticks], "ticktext": [str(i) for i in ticks]}
    base = layout(title, 560, "pushed token", "responding token", xaxis=axis,
                  yaxis=axis | {"autorange": "reversed"})  # fmt: skip
    return go.Figure([trace], base | {"margin": base["margin"] | {"b": 110}, "sliders": [slider]})


def _band(x: Sequence[float], low: Sequence[float | None], high: Sequence[float | None], colour: str) -> go.Scatter:
    edge = [*high, *list(low)[::-1]]
    return go.Scatter(x=[*x, *list(x)[::-1]], y=edge, mode="lines", fill="toself", fillcolor=rgba(colour, 0.18),
                      line={"width": 0}, hoverinfo="skip")  # fmt: skip


def depth(lines: pl.DataFrame, title: str, words: str = "response") -> go.Figure:
    """Draw the response at offsets B - 1, B and all others against layer, with 95 % intervals over prompts.

    Args:
        lines: rows of the table `lines` for one kind of direction and one measure.
        title: title of the figure.
        words: label of the y axis.
    """
    traces: list[Any] = []
    layers = lines["layer"].unique(maintain_order=True).to_list()
    for (condition, at), (name, colour, dash) in LINES.items():
        mine = lines.filter("valid", condition=condition, at=at)
        x, (value, low, high) = mine["layer"].to_list(), (rounded(mine[end]) for end in ("value", "low", "high"))
        if condition == "repeated":
            traces.append(_band(x, low, high, colour))
        traces.append(
            go.Scatter(
                x=x, y=value, name=name, mode="lines+markers", marker={"size": 6 if dash == "solid" else 4},
                line={"color": colour, "dash": dash, "width": 2.2 if dash == "solid" else 1.6},
                customdata=list(zip(low, high, strict=True)),
                hovertemplate=f"offset {name}, after layer %{{x}}<br>%{{y:.3f}} (95 % interval "
                "%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>",
            )
        )  # fmt: skip
    ticks: dict[str, Any] = {"dtick": 1 if len(layers) <= 16 else 4, "showgrid": False}
    ticks["range"] = [layers[0] - 0.3, layers[-1] + 0.3]
    return go.Figure(traces, layout(title, 310, "after layer", words, xaxis=ticks, yaxis={"rangemode": "tozero"}))


def stripes(offsets: pl.DataFrame, block: int, title: str) -> go.Figure:
    """Draw a heat map of the increase of the response by repetition, for each layer (y) and offset (x).

    Args:
        offsets: rows of the table `offsets` for one kind of direction.
        block: number of tokens in a block.
        title: title of the figure.
    """
    rows = [
        [value if ok else None for value, ok in zip(rounded(mine["added"]), mine["valid"], strict=True)]
        for mine in offsets.partition_by("layer", maintain_order=True)
    ]
    shown = offsets.filter("valid")["added"].abs().to_numpy()
    reach = float(np.quantile(shown, 0.99)) if shown.size and shown.max() > 0 else 1.0
    x = [str(o) for o in range(1, 2 * block)]
    trace = go.Heatmap(
        x=x, y=offsets["layer"].unique(maintain_order=True).to_list(), z=rows, zmin=-reach, zmax=reach,
        colorscale=LIGHT, meta="diverging", hoverongaps=False, xgap=1 if len(x) <= 60 else 0,
        ygap=1 if len(rows) <= 30 else 0,
        hovertemplate="offset %{x}, after layer %{y}<br>repeated minus control %{z:.3f}<extra></extra>",
    )  # fmt: skip
    marks = [str(block - 1), str(block)]
    axis = {"type": "category", "showgrid": False, "tickvals": ["1", *marks, x[-1]],
            "ticktext": ["1", "B−1", "", str(2 * block - 1)]}  # fmt: skip
    pitch = 26 if len(rows) <= 12 else 14 if len(rows) <= 26 else 9
    up = {"dtick": 1 if len(rows) <= 16 else 4, "showgrid": False}
    return go.Figure([trace], layout(title, pitch * len(rows) + 110, "offset", "after layer", xaxis=axis, yaxis=up))


def heads(table: pl.DataFrame, title: str) -> go.Figure:
    """Draw the share of the signature lost without each head (y) against its prefix-matching score (x)."""
    traces = []
    for significant, colour in ((False, "#8c8c8c"), (True, "#0072b2")):
        rows = table.filter(pl.col("significant") == significant)
        names = [f"{a}.{b}" for a, b in rows.select("layer", "head").iter_rows()]
        about = [
            [name, *(round(r[k], 3) for k in ("low", "high", "copying"))]
            for name, r in zip(names, rows.iter_rows(named=True), strict=True)
        ]
        named = [n if significant and abs(v) >= 0.05 else "" for n, v in zip(names, rows["lost"], strict=True)]
        bars = {"type": "data", "array": rounded((rows["high"] - rows["lost"]).clip(0, None)), "thickness": 1,
                "arrayminus": rounded((rows["lost"] - rows["low"]).clip(0, None)), "width": 0, "visible": significant,
                "color": rgba(colour, 0.5)}  # fmt: skip
        traces.append(
            go.Scatter(
                x=rounded(rows["prefix"]), y=rounded(rows["lost"]), customdata=about, text=named,
                mode="markers+text" if significant else "markers", textposition="top center", textfont={"size": 11},
                marker={"color": colour, "size": 9 if significant else 6}, error_y=bars,
                hovertemplate="head %{customdata[0]}<br>lost %{y:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f})"
                "<br>prefix matching %{x:.3f}, copying %{customdata[3]:.3f}<extra></extra>",
            )
        )  # fmt: skip
    axes = {"zeroline": True}
    return go.Figure(traces, layout(title, 400, "prefix-matching score", "share of the signature lost", xaxis=axes,
                                     yaxis=axes))  # fmt: skip


def bridge(rows: pl.DataFrame, title: str) -> go.Figure:
    """Draw the response of the answering token to pushes on each role as grouped bars by layer, with 95 % intervals."""
    layers = rows["layer"].unique(maintain_order=True).to_list()
    chosen = [layers[k] for k in _spread(layers, BARS)]
    part = rows.filter(pl.col("layer").is_in(chosen) & pl.col("valid"))
    traces = []
    for role, colour in ROLES.items():
        mine = part.filter(role=role)
        if not len(mine):
            continue
        bars = {"type": "data", "array": rounded((mine["high"] - mine["response"]).clip(0, None)), "thickness": 1.2,
                "arrayminus": rounded((mine["response"] - mine["low"]).clip(0, None)), "width": 2,
                "color": "#8c8c8c"}  # fmt: skip
        traces.append(
            go.Bar(
                x=[str(layer) for layer in mine["layer"]], y=rounded(mine["response"]), name=role, error_y=bars,
                marker={"color": colour}, customdata=[[n] for n in mine["transcripts"]],
                hovertemplate=f"{role}, after layer %{{x}}: %{{y:.3f}}<br>n %{{customdata[0]}}<extra></extra>",
            )
        )  # fmt: skip
    axis = {"type": "category", "categoryorder": "array", "categoryarray": [str(layer) for layer in chosen],
            "showgrid": False}  # fmt: skip
    more = {"barmode": "group", "bargap": 0.25, "yaxis": {"rangemode": "tozero"}}
    return go.Figure(traces, layout(title, 300, "after layer", "response", xaxis=axis, **more))


def side_by_side(rows: pl.DataFrame, kind: str, title: str) -> go.Figure:
    """Draw the share of the response lost without each head (y) against the head's recovery by patching (x).

    Args:
        rows: rows of the table `bridge_heads`, one for each head.
        kind: "state" or "action".
        title: title of the figure.
    """
    points = go.Scatter(
        x=rounded(rows[kind]), y=rounded(rows["lost"]), mode="markers+text", textposition="top center",
        text=[f"{a}.{b}" for a, b in rows.select("layer", "head").iter_rows()], textfont={"size": 11},
        marker={"color": ROLES[kind], "size": 8},
        hovertemplate="head %{text}<br>recovery %{x:.3f}, response lost %{y:.3f}<extra></extra>",
    )  # fmt: skip
    axes = {"zeroline": True}
    return go.Figure([points], layout(title, 340, "recovery by patching", "response lost", xaxis=axes, yaxis=axes))
