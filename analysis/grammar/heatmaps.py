"""Heat maps of a grammar study: accuracy of probes by level, attention of heads by distance and around ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from nextstate.analysis.figures import DARK, SCALE, TURN, layout, plain
from nextstate.analysis.figures import LIGHT as PALE
from nextstate.analysis.grammar.figures import brief, significant
from nextstate.analysis.heads.figures import LIGHT
from nextstate.analysis.page.formats import thousandths

DEEPEST = 0.5  # share of the diverging scale that is used, so that numbers are legible on all of its colours
FLOOR = 1e-4  # smaller attention weights have the colour of this value


def _cells(
    title: str, z: Sequence[Sequence[float | None]], text: Sequence[Sequence[str]], hover: Sequence[Sequence[str]],
    x: Any, y: Any, across: str, up: str, pitch: int = 27, reach: float | None = None, **more: Any,
) -> go.Figure:  # fmt: skip
    """Draw numbers in coloured cells: shares from 0 to 1, or from -reach to reach, 0 in the colour of the page."""
    scale: dict[str, Any] = {"zmin": 0, "zmax": 1, "colorscale": SCALE}
    if reach is not None:
        scale = {"zmin": -reach / DEEPEST, "zmax": reach / DEEPEST, "colorscale": LIGHT, "meta": "diverging"}
    trace = go.Heatmap(
        x=x, y=y, z=[[significant(v) for v in line] for line in z], hoverongaps=False, customdata=hover,
        hovertemplate="%{customdata}<extra></extra>", xgap=1, ygap=1, showscale=False, **scale,
    )  # fmt: skip
    columns, nested = len(z[0]), isinstance(x[0], list)
    filled = [(i, k) for i, line in enumerate(text) for k in range(columns) if line[k]]
    ink = {} if reach is not None else {"color": [PALE if (z[i][k] or 0) >= TURN else DARK for i, k in filled]}
    numbers = go.Scatter(
        x=[[part[k] for _, k in filled] for part in x] if nested else [x[k] for _, k in filled],
        y=[y[i] for i, _ in filled], text=[text[i][k] for i, k in filled], mode="text", hoverinfo="skip",
        textfont={"size": 11} | ink, showlegend=False,
    )  # fmt: skip
    # Fixed ranges, since the texts would widen the axes beyond the cells.
    axes = {"type": "category", "showgrid": False, "ticks": ""}
    right = axes | {"range": [-0.5, columns - 0.5]} | more.pop("xaxis", {})
    down = axes | {"range": [len(z) - 0.5, -0.5]} | more.pop("yaxis", {})
    return go.Figure([trace, numbers], layout(title, pitch * len(z) + 84, across, up, xaxis=right, yaxis=down))


def levels(lines: Sequence[Mapping[str, Any]], deepest: int, title: str) -> go.Figure:
    """Draw the accuracy of probes: one row for each model or control, one column for each level.

    Args:
        lines: each with `label`, `hover` (text by level) and `values`, a mapping from the level to the share or null.
        deepest: the last level that has constituents.
        title: title of the figure.
    """
    every = range(2, deepest + 1)
    z = [[line["values"].get(level) for level in every] for line in lines]
    text = [["" if v is None else "100" if v == 1 else f"{100 * v:.1f}" for v in line] for line in z]
    hover = [
        [f"{plain(line['label'])}, level {level}<br>{plain(line['hover'].get(level, ''))}" for level in every]
        for line in lines
    ]
    labels = [brief(line["label"]) for line in lines]
    places = [str(k) for k in range(len(lines))]  # shortened names may be equal
    ticks = {"tickvals": places, "ticktext": labels}
    return _cells(title, z, text, hover, [str(level) for level in every], places,
                  "level (2 next to the root)", "", yaxis=ticks)  # fmt: skip


def profile(rows: pl.DataFrame, title: str) -> go.Figure:
    """Draw the mean attention of each head at each distance, on a logarithmic scale; one row for each head.

    Args:
        rows: rows of one model, from `nextstate.analysis.grammar.tables.binned`.
        title: title of the figure.
    """
    heads = rows.select("layer", "head").unique(maintain_order=True).rows()
    cells = {(r["layer"], r["head"], r["first"]): r["weight"] for r in rows.iter_rows(named=True)}
    bins = rows.select("first", "last").unique().sort("first").rows()
    at = [first for first, _ in bins]
    grid = [[cells.get((layer, head, b)) for b in at] for layer, head in heads]
    names = [f"{layer}.{head}" for layer, head in heads]
    spans = [f"{first}" if first == last else f"{first} to {last}" for first, last in bins]
    hover = [
        [f"head {name}, distance {span}<br>attention {0 if w is None else w:.2g}"
         for w, span in zip(line, spans, strict=True)]
        for name, line in zip(names, grid, strict=True)
    ]  # fmt: skip
    pitch = max(4, min(20, 460 // len(heads)))
    trace = go.Heatmap(
        x=[str(b).replace("-", "−") for b in at], y=names, customdata=hover, hoverongaps=False,
        z=[[None if w is None else significant(np.log10(max(w, FLOOR)), 4) for w in line] for line in grid],
        zmin=float(np.log10(FLOOR)), zmax=0, colorscale=SCALE, showscale=False, xgap=1 if pitch > 8 else 0,
        colorbar={"title": {"text": "log₁₀"}},
        ygap=1 if pitch > 8 else 0, hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    first: dict[int, str] = {}
    for name, (layer, _) in zip(names, heads, strict=True):
        first.setdefault(layer, name)
    ticks = {"tickvals": list(first.values()), "ticktext": [str(layer) for layer in first]} if pitch < 14 else {}
    axis = {"type": "category", "showgrid": False}
    return go.Figure([trace], layout(title, pitch * len(heads) + 84, "distance (tokens back)",
                                      "layer, its heads upwards" if ticks else "layer.head",
                                      xaxis=axis | {"tickfont": {"size": 11}}, yaxis=axis | ticks))  # fmt: skip


def _thousandths(value: float | None) -> str:
    return "" if value is None else thousandths(value)


def _residual(value: float | None, where: str) -> str:
    return where if value is None else f"{where}<br>{_thousandths(value)} thousandths"


def _signed(delta: int) -> str:
    return f"{delta:+d}".replace("-", "−") if delta else "0"


def ends(rows: pl.DataFrame, title: str, reach: float) -> go.Figure:
    """Draw the mean residual attention to tokens at offset δ before the end of a constituent, by level.

    Args:
        rows: `level`, `delta`, `residual` of one model, as `tables.averaged` returns them.
        title: title of the figure.
        reach: the colours run from -reach to reach.
    """
    deltas, every = (sorted(set(rows[column].to_list())) for column in ("delta", "level"))
    found = {(row["level"], row["delta"]): row["residual"] for row in rows.iter_rows(named=True)}
    z = [[found.get((level, delta)) for delta in deltas] for level in every]
    text = [[_thousandths(v) for v in line] for line in z]
    hover = [[_residual(v, f"level {level}, δ = {_signed(delta)}") for v, delta in zip(line, deltas, strict=True)]
             for line, level in zip(z, every, strict=True)]  # fmt: skip
    x = [_signed(delta) for delta in deltas]
    return _cells(title, z, text, hover, x, [str(level) for level in every], "tokens before the end, δ", "level",
                  reach=reach)  # fmt: skip


def depth(rows: pl.DataFrame, title: str, reach: float) -> go.Figure:
    """Draw the residual attention to ends, averaged over heads, by layer (rows) and level (columns)."""
    layers, every = (sorted(set(rows[column].to_list())) for column in ("layer", "level"))
    found = {(row["layer"], row["level"]): row["residual"] for row in rows.iter_rows(named=True)}
    z = [[found.get((layer, level)) for level in every] for layer in layers]
    text = [[_thousandths(v) for v in line] for line in z]
    hover = [[_residual(v, f"layer {layer}, level {level}") for v, level in zip(line, every, strict=True)]
             for line, layer in zip(z, layers, strict=True)]  # fmt: skip
    return _cells(title, z, text, hover, [str(level) for level in every], [str(layer) for layer in layers],
                  "level", "layer", pitch=22, reach=reach, yaxis={"range": [-0.5, len(layers) - 0.5]})  # fmt: skip


def pairs(rows: pl.DataFrame, title: str, reach: float) -> go.Figure:
    """Draw the mean residual attention around pairs of ends of the same level: 3 x 3 offsets for each level."""
    every, query, key = (sorted(set(rows[column].to_list())) for column in ("level", "delta_query", "delta_key"))
    found = {(r["level"], r["delta_query"], r["delta_key"]): r["residual"] for r in rows.iter_rows(named=True)}
    columns = [(level, k) for level in every for k in key]
    z = [[found.get((level, q, k)) for level, k in columns] for q in query]
    text = [[_thousandths(v) for v in line] for line in z]
    hover = [
        [_residual(found.get((level, q, k)), f"level {level}, δ = {_signed(q)} and {_signed(k)}")
         for level, k in columns] for q in query
    ]  # fmt: skip
    x = [[f"level {level}" for level, _ in columns], [_signed(k) for _, k in columns]]
    y = [_signed(q) for q in query]
    axis = {"type": "multicategory", "dividercolor": "#8c8c8c", "dividerwidth": 1}
    return _cells(title, z, text, hover, x, y, "δ of the attended token", "δ, attending token", pitch=34, reach=reach,
                  xaxis=axis)  # fmt: skip


def adjacent(rows: pl.DataFrame, title: str, reach: float) -> go.Figure:
    """Draw the mean residual attention between ends of two levels, by their distance in constituents.

    Args:
        rows: rows of one model; `level_from` attends to `level_to`, which is `distance` constituents of its level back.
        title: title of the figure.
        reach: the colours run from -reach to reach.
    """
    both = sorted(set(rows.select("level_from", "level_to").rows()))
    steps = sorted(set(rows["distance"].to_list()))
    found = {(r["level_from"], r["level_to"], r["distance"]): r for r in rows.iter_rows(named=True)}
    z = [[_value(found.get((*pair, step))) for step in steps] for pair in both]
    text = [[_thousandths(v) for v in line] for line in z]
    hover = [
        [_between(found.get((*pair, step)), f"from level {pair[0]} to level {pair[1]}, {step} back") for step in steps]
        for pair in both
    ]
    x, y = [f"{step}".replace("-", "−") for step in steps], [f"{a} → {b}" for a, b in both]
    return _cells(title, z, text, hover, x, y, "distance r (constituents back)", "from → to level", pitch=20,
                  reach=reach)  # fmt: skip


def _value(row: Mapping[str, Any] | None) -> float | None:
    return None if row is None else row["residual"]


def _between(row: Mapping[str, Any] | None, where: str) -> str:
    mean = _residual(_value(row), where)
    if row is None or row["low"] is None or row["high"] is None:
        return mean
    if row["trainings"] > 1:
        mean = f"{mean}, mean of {row['trainings']} trainings"
    return f"{mean} (95 % interval {_thousandths(row['low'])} to {_thousandths(row['high'])})<br>n {row['pairs']:,}"


def similarity(rows: pl.DataFrame, title: str, reach: float) -> go.Figure:
    """Draw the mean cosine of the embeddings of tokens, by the bags that the two tokens are in.

    Args:
        rows: `one`, `two`, `cosine` of one model.
        title: title of the figure.
        reach: the colours run from -reach to reach.
    """
    names = rows["one"].unique(maintain_order=True).to_list()
    found = {(row["one"], row["two"]): row for row in rows.iter_rows(named=True)}
    z = [[found[one, two]["cosine"] for two in names] for one in names]
    text = [["" if v is None else f"{v:.2f}".replace("-", "−") for v in line] for line in z]
    hover = [
        [f"bags {plain(one)} and {plain(two)}<br>{found[one, two]['pairs']:,} pairs" for two in names] for one in names
    ]
    labels = [brief(name) for name in names]
    places = [str(k) for k in range(len(names))]
    ticks = {"tickvals": places, "ticktext": labels}
    return _cells(title, z, text, hover, places, places, "bags of a token", "", reach=reach, xaxis=ticks,
                  yaxis=ticks)  # fmt: skip
