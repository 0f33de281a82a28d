"""Figures of a grammar study: written strings, learning, divergence, probes by level, attention, robustness.

As in `nextstate.analysis.figures`, backgrounds are transparent and nothing depends on the theme's colours but what the
page sets by `meta`. A model keeps its colour and mark in every figure; hollow marks are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from jaxtyping import Int

from nextstate.analysis.figures import DARK, SCALE, TURN, WIDE, Style, _layout, _plain
from nextstate.analysis.figures import LIGHT as PALE
from nextstate.analysis.grammar_tables import (
    PERTURBATIONS,
    PREFIXES,
    GrammarRun,
    published_robustness,
)
from nextstate.analysis.heads_figures import LIGHT

ARCHITECTURES = {
    "rotary": Style("#0072b2"),
    "absolute": Style("#d55e00", marker="square"),
    "relative": Style("#aa4499", marker="diamond"),
    "position": Style("#56b4e9", marker="triangle-up"),
    "uniform": Style("#b8860b", marker="cross"),
    "masked": Style("#009e73", marker="star"),
}
KINDS = {
    "token": Style("#cc6677", marker="square"),
    "symbol": Style("#88a03c", marker="diamond"),
    "permutation": Style("#8878c3", marker="triangle-up"),
}
UNTRAINED = Style("#8c8c8c", "dot", 1.6, "x")
MORE = ("#e69f00", "#117733", "#cc79a7", "#999933", "#7f7fbf")  # where an architecture was trained more than once
DASHES = ("solid", "dash", "dot", "dashdot")
MOST = 34  # letters of a model's name on an axis
DEEPEST = 0.5  # share of a diverging scale that is used, so that the page's ink can be read on all of it
FLOOR = 1e-4  # of attention: what is less has the colour of this


def styles(run: GrammarRun) -> dict[str, Style]:
    """Return how each model is drawn, everywhere: clean ones by architecture, perturbed ones by what was perturbed."""
    out: dict[str, Style] = {}
    spare = [Style(colour, "solid", 2.4, mark) for colour, mark in product(MORE, ("circle", "square", "diamond"))]
    count = dict.fromkeys(KINDS, 0)
    for name, model in run.models.items():
        own = ARCHITECTURES[model["architecture"]]
        if model["untrained"]:
            out[name] = UNTRAINED
        elif model["perturbation"]:
            kind = model["perturbation"]
            out[name] = KINDS[kind]._replace(dash=DASHES[count[kind] % len(DASHES)])
            count[kind] += 1
        else:
            out[name] = own if own not in out.values() else spare.pop(0) if spare else own
    return out


def _brief(name: str) -> str:
    return _plain(name if len(name) <= MOST else f"{name[: MOST - 1]}…")


def _round(value: float | None, digits: int = 5) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.{digits}g}")


def _bars(rows: Sequence[Mapping[str, Any]], value: str, low: str, high: str, colour: str) -> dict[str, Any]:
    up = [_gap(row[high], row[value]) for row in rows]
    down = [_gap(row[value], row[low]) for row in rows]
    return {"type": "data", "array": up, "arrayminus": down, "thickness": 1.2, "width": 3, "color": colour}


def _gap(high: float | None, low: float | None) -> float:
    return 0.0 if high is None or low is None else max(0.0, high - low)


def _hollow(style: Style, symbol: str, size: int = 11) -> dict[str, Any]:
    return {"symbol": f"{symbol}-open", "size": size, "color": style.colour, "line": {"width": 1.6}}


def _lines(title: str, x: str, names: Sequence[str], pitch: int, **more: Any) -> dict[str, Any]:
    """Return the layout of a plot with a row a model."""
    up = {"tickvals": list(range(len(names))), "ticktext": [_brief(n) for n in names], "showgrid": False, "ticks": "",
          "range": [len(names) - 0.4, -0.6]}  # fmt: skip
    return _layout(title, pitch * len(names) + 90, x, yaxis=up, **more)


def generation(run: GrammarRun, title: str) -> go.Figure | None:
    """Draw the share of written strings that are in the grammar, a row a trained model, from nothing and from a prefix.

    Intervals are Wilson's, 95 %. Hollow marks are the paper's of the same architecture.
    """
    rows, names = run.written, [n for n in run.trained if n in run.of("generation")] or run.of("generation")
    if rows is None or not len(rows.filter(pl.col("prefix") != "corrupted")):
        return None
    look, traces, ends = styles(run), list[Any](), [1.0]
    for prefix, offset, symbol in (("nothing", -0.17, "circle"), ("clean", 0.17, "diamond")):
        mine = {
            row["name"]: row for row in rows.filter(prefix=prefix).iter_rows(named=True) if row["accuracy"] is not None
        }
        words = (
            "from nothing"
            if prefix == "nothing"
            else f"after {max([r['given'] for r in mine.values()], default=0)} tokens"
        )
        for at, name in enumerate(names):
            style, found = look[name], mine.get(name)
            paper = None if run.paper is None else run.paper.accuracy[prefix].get(run.who(name))
            if found is not None:
                ends.append(found["accuracy"] if found["low"] is None else found["low"])
                traces.append(
                    go.Scatter(
                        x=[found["accuracy"]], y=[at + offset], mode="markers", name=f"{_plain(name)}, {words}",
                        marker={"symbol": symbol, "size": 9, "color": style.colour},
                        error_x=_bars([found], "accuracy", "low", "high", style.colour),
                        customdata=[[found["right"], found["strings"], _plain(name)]],
                        hovertemplate=f"%{{customdata[2]}}, {words}<br>%{{x:.2%}}: %{{customdata[0]:,}} of "
                        "%{customdata[1]:,} strings<extra></extra>",
                    )
                )  # fmt: skip
            if found is not None and paper is not None:
                ends.append(paper)
                traces.append(
                    go.Scatter(
                        x=[paper], y=[at + offset], mode="markers", marker=_hollow(style, symbol, 13),
                        name=f"{_plain(name)}, {words}, paper", hovertemplate="paper, "
                        f"{'from nothing' if prefix == 'nothing' else 'after 50 tokens'} %{{x:.2%}}<extra></extra>",
                    )
                )  # fmt: skip
    low = min(ends)
    right = {"range": [max(-0.02, low - 0.12 * (1 - low) - 0.002), 1 + 0.04 * (1 - low) + 0.001], "tickformat": "~%"}
    return go.Figure(traces, _lines(title, "share of written strings that are in the grammar", names, 40, xaxis=right))


def learners(run: GrammarRun) -> list[str]:
    """Return the models whose learning curves are drawn: clean ones, or all where there are none; never lone points."""
    names = [n for n in run.of("curve") if run.tables["curve"].filter(name=n)["tokens"].n_unique() > 1]
    return [n for n in names if n in run.plain] or names


def curve(run: GrammarRun, column: str, title: str, words: str) -> go.Figure | None:
    """Draw a column of the learning curves against the tokens trained on; only what was measured."""
    names = learners(run)
    if not names:
        return None
    rows = run.tables["curve"].drop_nulls(column).filter(pl.col("name").is_in(names)).sort("name", "tokens")
    if column == "kl":
        rows = rows.filter(pl.col(column) > 0)
    seen = rows.filter(pl.col("tokens") > 0)["tokens"]
    if not len(seen) or rows.group_by("name").len()["len"].max() == 1:
        return None
    wide = seen.max() > WIDE * seen.min()  # type: ignore[operator]
    if wide:
        rows = rows.filter(pl.col("tokens") > 0)
    look, traces = styles(run), []
    for name in names:
        mine, style = rows.filter(name=name), look[name]
        if len(mine):
            traces.append(
                go.Scatter(
                    x=mine["tokens"].to_list(), y=[_round(v) for v in mine[column]], name=_plain(name),
                    mode="lines+markers", line={"color": style.colour, "width": style.width, "dash": style.dash},
                    marker={"size": 6, "symbol": style.marker}, customdata=mine["step"].to_list(),
                    hovertemplate=f"{_plain(name)}<br>%{{x:,}} tokens, step %{{customdata:,}}: %{{y:.4~g}}"
                    "<extra></extra>",
                )
            )  # fmt: skip
    right: dict[str, Any] = {"showgrid": False, "tickformat": "~s"}
    right |= {"type": "log", "dtick": 1, "minor": {"dtick": "D1", "ticks": "outside", "ticklen": 2}} if wide else {}
    up: dict[str, Any] = {"accuracy": {"range": [-0.02, 1.03], "tickformat": ".0%"}, "loss": {}}.get(column, _decades(
        [v for v in rows[column] if v]))  # fmt: skip
    return go.Figure(traces, _layout(title, 310, "tokens trained on", words, xaxis=right, yaxis=up))


def _decades(values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis with a tick a decade, or three where there are few decades."""
    low, high = np.log10(min(values, default=1)), np.log10(max(values, default=1))
    middle, half = (low + high) / 2, max(0.35, (high - low) / 2 + 0.15)
    digits = (1,) if high - low > 2.5 else (1, 2, 5)
    ticks = [(d, power) for power in range(int(np.floor(low)) - 1, int(np.ceil(high)) + 1) for d in digits]
    words = [
        f"{10**power * d:g}" if -3 <= power < 3 else f"{'' if d == 1 else f'{d} × '}10{raised(power)}"
        for d, power in ticks
    ]
    return {"type": "log", "range": [float(middle - half), float(middle + half)], "ticktext": words,
            "tickvals": [float(f"{d}e{power}") for d, power in ticks]}  # fmt: skip


def raised(power: int) -> str:
    """Return an exponent in raised digits."""
    return str(power).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))


def divergence(run: GrammarRun, title: str) -> go.Figure | None:
    """Draw the divergence of each model from the exact next tokens, on a logarithmic axis."""
    if "diversity" not in run.tables:
        return None
    rows = run.tables["diversity"].filter(pl.col("kl") > 0)
    by_name = {row["name"]: row for row in rows.iter_rows(named=True)}
    names = [n for n in run.plain if n in by_name] or [n for n in run.models if n in by_name]
    if not names:
        return None
    look, traces, seen = styles(run), list[Any](), []
    for at, name in enumerate(names):
        row, style = by_name[name], look[name]
        low = row["kl_low"] if row["kl_low"] and row["kl_low"] > 0 else row["kl"]
        seen += [row["kl"], low, row["kl_high"] or row["kl"]]
        traces.append(
            go.Scatter(
                x=[_round(row["kl"])], y=[at], mode="markers", name=_plain(name),
                marker={"symbol": style.marker, "size": 10, "color": style.colour},
                error_x=_bars([row | {"kl_low": low}], "kl", "kl_low", "kl_high", style.colour),
                hovertemplate=f"{_plain(name)}<br>%{{x:.3~g}} nats a token<extra></extra>",
            )
        )  # fmt: skip
        paper = None if run.paper is None else run.paper.kl.get(run.who(name))
        if paper is not None:
            seen.append(paper)
            traces.append(
                go.Scatter(x=[paper], y=[at], mode="markers", marker=_hollow(style, style.marker, 13),
                           name=f"{_plain(name)}, paper", hovertemplate="paper, %{x:.3~g} nats a token<extra></extra>")
            )  # fmt: skip
    return go.Figure(traces, _lines(title, "divergence from the exact next tokens (nats a token)", names, 34,
                                    xaxis=_decades(seen)))  # fmt: skip


def _cells(
    title: str, z: Sequence[Sequence[float | None]], text: Sequence[Sequence[str]], hover: Sequence[Sequence[str]],
    x: Any, y: Any, across: str, up: str, pitch: int = 27, reach: float | None = None, **more: Any,
) -> go.Figure:  # fmt: skip
    """Draw numbers in coloured cells: shares from 0 to 1, or from -reach to reach, 0 in the colour of the page."""
    scale: dict[str, Any] = {"zmin": 0, "zmax": 1, "colorscale": SCALE}
    if reach is not None:
        scale = {"zmin": -reach / DEEPEST, "zmax": reach / DEEPEST, "colorscale": LIGHT, "meta": "diverging"}
    trace = go.Heatmap(
        x=x, y=y, z=[[_round(v) for v in line] for line in z], hoverongaps=False, customdata=hover,
        hovertemplate="%{customdata}<extra></extra>", xgap=1, ygap=1, showscale=False, **scale,
    )  # fmt: skip
    wide, nested = len(z[0]), isinstance(x[0], list)
    filled = [(i, k) for i, line in enumerate(text) for k in range(wide) if line[k]]
    ink = {} if reach is not None else {"color": [PALE if (z[i][k] or 0) >= TURN else DARK for i, k in filled]}
    numbers = go.Scatter(
        x=[[part[k] for _, k in filled] for part in x] if nested else [x[k] for _, k in filled],
        y=[y[i] for i, _ in filled], text=[text[i][k] for i, k in filled], mode="text", hoverinfo="skip",
        textfont={"size": 11} | ink, showlegend=False,
    )  # fmt: skip
    # The numbers would widen the axes beyond the cells.
    axes = {"type": "category", "showgrid": False, "ticks": ""}
    right = axes | {"range": [-0.5, wide - 0.5]} | more.pop("xaxis", {})
    down = axes | {"range": [len(z) - 0.5, -0.5]} | more.pop("yaxis", {})
    return go.Figure([trace, numbers], _layout(title, pitch * len(z) + 84, across, up, xaxis=right, yaxis=down))


def levels(lines: Sequence[Mapping[str, Any]], deepest: int, title: str) -> go.Figure:
    """Draw what a probe reads, a row a model or control, a column a level from the root to the terminals.

    Args:
        lines: each with `label`, `told` (for the hover) and `values`, a mapping from the level to the share or null.
        deepest: the last level that has constituents.
        title: of the figure.
    """
    every = range(2, deepest + 1)
    z = [[line["values"].get(level) for level in every] for line in lines]
    text = [["" if v is None else "100" if v == 1 else f"{100 * v:.1f}" for v in line] for line in z]
    hover = [
        [f"{_plain(line['label'])}, level {level}<br>{_plain(line['told'].get(level, ''))}" for level in every]
        for line in lines
    ]
    labels = [_brief(line["label"]) for line in lines]
    places = [str(k) for k in range(len(lines))]  # two names may be cut to the same letters
    ticks = {"tickvals": places, "ticktext": labels}
    return _cells(title, z, text, hover, [str(level) for level in every], places,
                  "level (2 next to the root)", "", yaxis=ticks)  # fmt: skip


def _edges(longest: int) -> list[int]:
    """Return where the bins of distances begin: one by one at first, then two to the octave."""
    return sorted({0, 1, 2, 3, *(round(2 ** (k / 2)) for k in range(4, 64))} & set(range(longest + 1)))


def profile(rows: pl.DataFrame, title: str) -> go.Figure:
    """Draw the mean attention of each head at each distance, on a logarithmic scale; a row a head.

    Args:
        rows: of one model. Distances are binned; below 0 a token looks ahead.
        title: of the figure. Within a layer heads are in the order of how far they look.
    """
    rows = rows.drop_nulls("weight")
    distance = rows["distance"].to_numpy()
    edges: Int[np.ndarray, " bin"] = np.array(_edges(int(np.abs(distance).max())))
    bins = np.sign(distance) * edges[np.searchsorted(edges, np.abs(distance), side="right") - 1]
    rows = rows.with_columns(bin=pl.Series(bins, dtype=pl.Int64))
    far = (pl.col("weight") * pl.col("distance").abs()).sum() / pl.col("weight").sum()
    heads = rows.group_by("layer", "head").agg(far=far).sort("layer", "far", "head").rows()
    mean = rows.group_by("layer", "head", "bin").agg(pl.col("weight").mean())
    weight = {(a, b, c): w for a, b, c, w in mean.iter_rows()}
    at = sorted(set(bins.tolist()))
    grid = [[weight.get((layer, head, b)) for b in at] for layer, head, _ in heads]
    names = [f"{layer}.{head}" for layer, head, _ in heads]
    last = {edge: int(after) - 1 for edge, after in zip(edges.tolist(), [*edges[1:], edges[-1] + 1], strict=True)}
    spans = [f"{b}" if last[abs(b)] == abs(b) else f"{b} to {int(np.sign(b)) * last[abs(b)]}" for b in at]
    hover = [
        [
            f"head {name}, distance {span}<br>attention {0 if w is None else w:.2g}"
            for w, span in zip(line, spans, strict=True)
        ]
        for name, line in zip(names, grid, strict=True)
    ]
    pitch = max(4, min(20, 460 // len(heads)))
    trace = go.Heatmap(
        x=[str(b).replace("-", "−") for b in at], y=names, customdata=hover, hoverongaps=False,
        z=[[None if w is None else _round(np.log10(max(w, FLOOR)), 4) for w in line] for line in grid],
        zmin=float(np.log10(FLOOR)), zmax=0, colorscale=SCALE, showscale=False, xgap=1 if pitch > 8 else 0,
        ygap=1 if pitch > 8 else 0, hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    first: dict[int, str] = {}
    for name, (layer, _, _) in zip(names, heads, strict=True):
        first.setdefault(layer, name)
    ticks = {"tickvals": list(first.values()), "ticktext": [str(layer) for layer in first]} if pitch < 14 else {}
    axis = {"type": "category", "showgrid": False}
    return go.Figure([trace], _layout(title, pitch * len(heads) + 84, "distance (tokens back)",
                                      "layer, its heads upwards" if ticks else "layer.head",
                                      xaxis=axis | {"tickfont": {"size": 11}}, yaxis=axis | ticks))  # fmt: skip


def _thousandths(value: float | None) -> str:
    return "" if value is None else f"{round(1000 * value, 1) + 0.0:.1f}".replace("-", "−")


def _residual(value: float | None, told: str) -> str:
    return told if value is None else f"{told}<br>{_thousandths(value)} thousandths"


def _signed(delta: int) -> str:
    return f"{delta:+d}".replace("-", "−") if delta else "0"


def ends(rows: pl.DataFrame, title: str, reach: float) -> go.Figure:
    """Draw the mean residual attention to tokens of which the one δ further on ends a constituent; a row a level.

    Args:
        rows: `level`, `delta`, `residual` of one model, as `GrammarRun.averaged` makes them.
        title: of the figure.
        reach: the colours run from -reach to reach.
    """
    deltas, every = (sorted(set(rows[column].to_list())) for column in ("delta", "level"))
    found = {(row["level"], row["delta"]): row["residual"] for row in rows.iter_rows(named=True)}
    z = [[found.get((level, delta)) for delta in deltas] for level in every]
    text = [[_thousandths(v) for v in line] for line in z]
    hover = [[_residual(v, f"level {level}, δ = {_signed(delta)}") for v, delta in zip(line, deltas, strict=True)]
             for line, level in zip(z, every, strict=True)]  # fmt: skip
    x = [_signed(delta) for delta in deltas]
    return _cells(title, z, text, hover, x, [str(level) for level in every], "tokens on to the end, δ", "level",
                  reach=reach)  # fmt: skip


def depth(rows: pl.DataFrame, title: str, reach: float) -> go.Figure:
    """Draw the residual attention to ends, the mean over heads; a row a layer, a column a level."""
    layers, every = (sorted(set(rows[column].to_list())) for column in ("layer", "level"))
    found = {(row["layer"], row["level"]): row["residual"] for row in rows.iter_rows(named=True)}
    z = [[found.get((layer, level)) for level in every] for layer in layers]
    text = [[_thousandths(v) for v in line] for line in z]
    hover = [[_residual(v, f"layer {layer}, level {level}") for v, level in zip(line, every, strict=True)]
             for line, layer in zip(z, layers, strict=True)]  # fmt: skip
    return _cells(title, z, text, hover, [str(level) for level in every], [str(layer) for layer in layers],
                  "level", "layer", pitch=22, reach=reach, yaxis={"range": [-0.5, len(layers) - 0.5]})  # fmt: skip


def pairs(rows: pl.DataFrame, title: str, reach: float) -> go.Figure:
    """Draw the mean residual attention from beside one end to beside another of the same level: 3 x 3 cells a level."""
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
    return _cells(title, z, text, hover, x, y, "δ of the token attended to", "δ of the other", pitch=34, reach=reach,
                  xaxis=axis)  # fmt: skip


def adjacent(rows: pl.DataFrame, title: str, reach: float) -> go.Figure:
    """Draw the mean residual attention between ends of two levels, by how many constituents lie between them.

    Args:
        rows: of one model; `level_from` attends to `level_to`, which is `distance` constituents of its level back.
        title: of the figure.
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
    return _cells(title, z, text, hover, x, y, "constituents back r", "from → to level", pitch=20,
                  reach=reach)  # fmt: skip


def _value(row: Mapping[str, Any] | None) -> float | None:
    return None if row is None else row["residual"]


def _between(row: Mapping[str, Any] | None, told: str) -> str:
    said = _residual(_value(row), told)
    if row is None or row["low"] is None or row["high"] is None:
        return said
    return f"{said} (95 %: {_thousandths(row['low'])} to {_thousandths(row['high'])})<br>n {row['pairs']:,}"


def robustness(run: GrammarRun, prefix: str, temperature: float, title: str) -> go.Figure | None:
    """Draw accuracy against the share of perturbed strings in training, a line a kind; dotted, the clean model."""
    rows = run.at_length
    rows = None if rows is None else rows.filter(prefix=prefix, temperature=temperature)
    if rows is None or not len(rows):
        return None
    kept = pl.col("name").is_in([n for n, m in run.models.items() if not m["untrained"]])
    table = rows.filter(kept).join(
        run.tables["models"].select("name", "architecture", "perturbation", "fraction", "rate"), on="name"
    )
    perturbed = table.filter((pl.col("perturbation") != "") & pl.col("fraction").is_not_null())
    clean = table.filter(
        (pl.col("perturbation") == "") & pl.col("architecture").is_in(perturbed["architecture"].unique().to_list())
    )
    traces: list[Any] = []
    look = styles(run)
    for row in clean.iter_rows(named=True):
        style = look[row["name"]]
        traces.append(
            go.Scatter(x=[0, 1], y=[row["accuracy"]] * 2, mode="lines", name=_plain(row["name"]),
                       line={"color": style.colour, "width": 1.8, "dash": "dot"},
                       hovertemplate=f"{_plain(row['name'])}, clean strings only: %{{y:.1%}}<extra></extra>")
        )  # fmt: skip
    groups = perturbed.sort("fraction").group_by("architecture", "perturbation", "rate", maintain_order=True)
    used = dict.fromkeys(PERTURBATIONS, 0)
    for (architecture, kind, rate), mine in sorted(
        groups, key=lambda g: (PERTURBATIONS.index(str(g[0][1])), str(g[0]))
    ):
        style, dash = KINDS[str(kind)], DASHES[used[str(kind)] % len(DASHES)]
        used[str(kind)] += 1
        found = mine.drop_nulls("accuracy").rows(named=True)
        name = f"{architecture}, {kind}" + ("" if rate is None else f" at {rate:g}")
        traces.append(
            go.Scatter(
                x=[r["fraction"] for r in found], y=[r["accuracy"] for r in found], mode="lines+markers", name=name,
                line={"color": style.colour, "width": 2.2, "dash": dash}, marker={"size": 7, "symbol": style.marker},
                error_y=_bars(found, "accuracy", "low", "high", style.colour),
                hovertemplate=f"{name}<br>%{{x:.0%}} of the strings perturbed: %{{y:.1%}}<extra></extra>",
            )
        )  # fmt: skip
    for kind, values in published_robustness(str(run.grammar["name"]), prefix, temperature).items():
        style = KINDS[kind] if kind else next((look[name] for name in clean["name"]), ARCHITECTURES["rotary"])
        traces.append(
            go.Scatter(x=list(values), y=list(values.values()), mode="markers", name=f"{kind or 'clean'}, paper",
                       marker=_hollow(style, style.marker, 12),
                       hovertemplate=f"paper, {kind or 'clean'}: %{{y:.1%}}<extra></extra>")
        )  # fmt: skip
    right = {"range": [-0.04, 1.05], "tickformat": ".0%", "showgrid": False}
    up = {"range": [-0.04, 1.06], "tickformat": ".0%", "tickvals": [0, 0.25, 0.5, 0.75, 1]}
    return go.Figure(
        traces, _layout(title, 270, "perturbed strings in training", "in the grammar", xaxis=right, yaxis=up)
    )


def panels(run: GrammarRun) -> list[tuple[str, float]]:
    """Return for which prefixes and temperatures perturbed models were measured, in the order of the page."""
    rows = run.at_length
    perturbed = [n for n, m in run.models.items() if m["perturbation"]]
    if rows is None or not perturbed:
        return []
    seen = set(rows.filter(pl.col("name").is_in(perturbed)).select("prefix", "temperature").rows())
    return sorted(seen, key=lambda key: (PREFIXES.index(key[0]), key[1]))
