"""Figures of a run: heatmaps over size and step, curves, determined or not, where shortcuts fail.

Each agent keeps its colour in every figure. Where it is known which sizes and steps a model was trained on, a line
marks where they end: in a heatmap around the trained cells, in a curve at the largest trained value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, product
from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl

from nextstate.analysis.figures import DARK, LIGHT, SCALE, TURN, WIDE, Style, layout, plain, rgba
from nextstate.analysis.stats import FEWEST_EPISODES

Value = Literal["accuracy", "ceiling", "over_ceiling"]
VALUES: dict[Value, str] = {
    "accuracy": "Accuracy of {agent}",
    "ceiling": "Ceiling: accuracy of the ideal reader",
    "over_ceiling": "Accuracy over ceiling",
}
CELL = (
    "accuracy %{customdata[0]} (%{customdata[1]})<br>n %{customdata[2]}<br>ceiling %{customdata[3]}, over ceiling "
    "%{customdata[6]}<br>lookup reader %{customdata[4]}, chance %{customdata[5]}%{customdata[7]}"
)
# After Okabe and Ito (and Tol's muted set for the rest); mid tones, legible on white and on near-black.
MODELS = (
    Style("#0072b2"),
    Style("#d55e00", marker="square"),
    Style("#aa4499", marker="diamond"),
    Style("#56b4e9", marker="triangle-up"),
    Style("#b8860b", marker="cross"),
)
REFERENCES = {
    "ideal": Style("#009e73", "solid", 2.0, "line-ns-open"),
    "lookup": Style("#6aa84f", "longdash", 2.0, "line-ns-open"),
    "chance": Style("#8c8c8c", "dot", 2.0, "line-ns-open"),
    "shortcut:last_mention": Style("#e69f00", "dash", 1.4, "x-thin"),
    "shortcut:action_only": Style("#cc79a7", "dashdot", 1.4, "x-thin"),
    "shortcut:state_only": Style("#56b4e9", "longdash", 1.4, "x-thin"),
    "shortcut:most_frequent": Style("#999933", "longdashdot", 1.4, "x-thin"),
    "shortcut:stay": Style("#b0656b", "5px 2px", 1.4, "x-thin"),
    "shortcut:first_listed": Style("#7f7fbf", "2px 3px", 1.4, "x-thin"),
}
OTHER = Style("#a0a0a0", "3px 3px", 1.4, "x-thin")
READERS = {"ideal": "ideal reader (ceiling)", "lookup": "lookup reader"}
EXPECTED = {"ideal": "ceiling", "lookup": "lookup", "chance": "chance"}  # agents drawn at their expected accuracy
EDGE = {"color": "#d40078", "width": 2, "dash": "4px 3px"}  # of what a model was trained on

Trained = Mapping[int, int]  # largest trained step of each trained size


def styles(agents: pl.DataFrame) -> dict[str, Style]:
    """Return the style of each agent; `agents` is the table of the summary, whose order gives models their colours."""
    others = agents.filter(~pl.col("reference"))["agent"].to_list()
    taken = {name: MODELS[i % len(MODELS)] for i, name in enumerate(others)}
    return {agent: taken.get(agent) or REFERENCES.get(agent, OTHER) for agent in agents["agent"]}


def label(agent: str) -> str:
    """Return an agent's name for readers: "shortcut:last_mention" becomes "last mention"."""
    if agent in READERS:
        return READERS[agent]
    return agent.removeprefix("shortcut:").replace("_", " ") if agent.startswith("shortcut:") else agent


def place(game: str, variant: str) -> str:
    """Return the axis label of a game and its variant."""
    return f"{game} {variant.replace('density=', '')}".strip()


def trained_of(trained: pl.DataFrame, agent: str, game: str) -> Trained:
    """Return the largest trained step of each size of a game, from the table `trained`; empty where it is unknown."""
    mine = trained.filter(agent=agent, game=game)
    return dict(mine.select("size", "steps").iter_rows())


def beyond(trained: Trained, size: int, step: int) -> bool:
    """Return whether a cell is known to be outside what the model was trained on."""
    return bool(trained) and step > trained.get(size, 0)


def interval(low: float | None, high: float | None) -> str:
    """Return a 95 % interval in words, or why there is none."""
    if low is None or high is None:
        return f"no interval: fewer than {FEWEST_EPISODES} episodes"
    return f"95 % interval {_text(low)} to {_text(high)}"


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".removeprefix("0")


def _edge(trained: Trained, sizes: Sequence[int], steps: Sequence[int]) -> list[dict[str, Any]]:
    """Return lines around the trained cells of a heatmap, on the sides where there are others."""

    def inside(row: int, column: int) -> bool:
        there = 0 <= row < len(sizes) and 0 <= column < len(steps)
        return there and not beyond(trained, sizes[row], steps[column])

    lines = []
    for row, column in product(range(len(sizes)), range(len(steps))):
        here = inside(row, column)
        if column + 1 < len(steps) and here != inside(row, column + 1):
            lines.append((column + 0.5, row - 0.5, column + 0.5, row + 0.5))
        if row + 1 < len(sizes) and here != inside(row + 1, column):
            lines.append((column - 0.5, row + 0.5, column + 0.5, row + 0.5))
    return [{"type": "line", "x0": a, "y0": b, "x1": c, "y1": d, "line": EDGE} for a, b, c, d in lines]


def heatmap(
    cells: pl.DataFrame,
    game: str,
    variant: str,
    agent: str,
    value: Value,
    size_name: str = "size",
    trained: Trained | None = None,
) -> go.Figure:
    """Draw `value` of `agent` (all questions) over size (y) and step (x), from the table of `statistics.cells`.

    A dashed line separates the cells of `trained`, if given, from those beyond. The colour scale runs from 0 to 1 in
    every heatmap. Cells without questions are empty.
    """
    here = (
        (pl.col("game") == game)
        & (pl.col("variant") == variant)
        & (pl.col("agent") == agent)
        & (pl.col("subset") == "all")
    )
    part = cells.filter(here)
    by_cell = {(row["size"], row["step"]): row for row in part.iter_rows(named=True)}
    sizes, steps = sorted(part["size"].unique()), sorted(part["step"].unique())
    grid = [[by_cell.get((size, step)) for step in steps] for size in sizes]
    trained = trained or {}
    hover = [[_hover(row, trained) if row else None for row in line] for line in grid]
    trace = go.Heatmap(
        z=[[row[value] if row else None for row in line] for line in grid],
        x=[str(s) for s in steps],
        y=[str(s) for s in sizes],
        customdata=hover,
        zmin=0,
        zmax=1,
        colorscale=SCALE,
        xgap=1,
        ygap=1,
        hoverongaps=False,
        colorbar={"thickness": 10, "outlinewidth": 0, "tickvals": [0, 0.25, 0.5, 0.75, 1]},
        hovertemplate=f"{size_name} %{{y}}, step %{{x}}<br>{CELL}<extra></extra>",
    )
    filled = [row for line in grid for row in line if row and row[value] is not None]
    numbers = go.Scatter(
        x=[str(row["step"]) for row in filled],
        y=[str(row["size"]) for row in filled],
        text=[_text(row[value]) for row in filled],
        mode="text",
        textfont={"size": 11, "color": [LIGHT if row[value] >= TURN else DARK for row in filled]},
        hoverinfo="skip",
        showlegend=False,
    )
    # Fixed ranges, since the texts would widen the axes beyond the cells.
    across, up = (
        {"type": "category", "showgrid": False, "ticks": "", "range": [-0.5, len(ticks) - 0.5]}
        for ticks in (steps, sizes)
    )
    height = 27 * max(len(sizes), 3) + 74
    title = VALUES[value].format(agent=plain(agent))
    edge = _edge(trained, sizes, steps) if trained and value != "ceiling" else []
    drawn = layout(title, height, "step", size_name, xaxis=across, yaxis=up, shapes=edge)
    return go.Figure([trace, numbers], drawn)


def _hover(row: Mapping[str, Any], trained: Trained) -> list[Any]:
    numbers = {c: row[c] if row[c] is None else round(row[c], 3) for c in ("accuracy", "n", "ceiling", "lookup",
                                                                          "chance", "over_ceiling")}  # fmt: skip
    accuracy, *rest = numbers.values()
    note = "<br>beyond training" if beyond(trained, row["size"], row["step"]) else ""
    return [accuracy, interval(row["accuracy_low"], row["accuracy_high"]), *rest, note]


def curve(
    curves: pl.DataFrame,
    game: str,
    variant: str,
    axis: Literal["size", "step", "states"],
    look: Mapping[str, Style],
    axis_name: str = "",
    trained: Mapping[str, Trained] | None = None,
) -> go.Figure:
    """Draw accuracy against `axis` for every agent, from `statistics.curves` or `states.curves`.

    Bands are 95 % intervals over episodes, for models, where there are enough episodes. Readers and chance are drawn at
    their expected accuracy. A dashed line stands at the largest size or step of each model in `trained`.
    """
    here = (
        (pl.col("game") == game)
        & (pl.col("variant") == variant)
        & (pl.col("axis") == axis)
        & (pl.col("subset") == "all")
    )
    part = curves.filter(here).sort("at")
    traces: list[Any] = []
    agents = set(part["agent"])
    name = axis_name or axis
    for agent in sorted(
        (a for a in look if a in agents), key=lambda a: (a in REFERENCES) - 2 * a.startswith("shortcut:")
    ):
        rows, style = part.filter(pl.col("agent") == agent), look[agent]
        x = rows["at"].to_list()
        y = rows[EXPECTED.get(agent, "accuracy")].to_list()
        low, high = rows["accuracy_low"].to_list(), rows["accuracy_high"].to_list()
        model = style in MODELS
        for part_x, part_low, part_high in _runs(x, low, high) if model else ():
            traces.append(
                go.Scatter(
                    x=part_x + part_x[::-1], y=part_high + part_low[::-1], fill="toself",
                    fillcolor=rgba(style.colour, 0.2), mode="lines", line={"width": 0}, hoverinfo="skip",
                    showlegend=False, legendgroup=agent,
                )
            )  # fmt: skip
        mode = "lines+markers" if model or len(x) == 1 else "lines"
        bounds = [[interval(a, b), n] for a, b, n in zip(low, high, rows["n"], strict=True)] if model else None
        traces.append(
            go.Scatter(
                x=x, y=y, name=plain(label(agent)), legendgroup=agent, mode=mode,
                line={"color": style.colour, "dash": style.dash, "width": style.width},
                marker={"size": 5, "symbol": style.marker if model else "circle", "color": style.colour},
                customdata=bounds,
                hovertemplate=f"{plain(label(agent))}<br>{name} %{{x}}: %{{y:.3f}}"
                + ("<br>%{customdata[0]}, n %{customdata[1]}" if model else "")
                + "<extra></extra>",
            )
        )  # fmt: skip
    at = sorted(part["at"].unique())
    ticks: dict[str, Any] = {"showgrid": False}
    if axis == "states":
        ticks |= {"type": "log", "dtick": 1, "minor": {"dtick": "D1", "ticks": "outside", "ticklen": 2}}
    elif axis == "size" and 0 < len(at) <= 12:
        wide = at[-1] >= WIDE * max(at[0], 1)
        ticks |= {"tickvals": at} | ({"type": "log", "ticktext": [f"{n:,}" for n in at]} if wide else {})
    elif at:
        ticks |= {"range": [at[0] - 0.5, at[-1] + 0.5]} | ({"dtick": 1} if at[-1] <= 12 else {})
    upright = {"range": [-0.02, 1.03], "tickvals": [0, 0.25, 0.5, 0.75, 1]}
    over = {"size": "all steps", "step": "all sizes", "states": "number of states, all steps"}[axis]
    title = f"Accuracy against {name} ({over})"
    ends = {_end(mine, axis) for mine in (trained or {}).values() if mine} if axis != "states" else set()
    marks = [_mark(end) for end in sorted(ends) if at and at[0] <= end < at[-1]]
    if marks:  # lines of the layout have no place in the legend
        traces.append(go.Scatter(x=[marks[0]["x0"]], y=[None], mode="lines", line=EDGE, name="end of training"))
    return go.Figure(traces, layout(title, 300, name, "accuracy", xaxis=ticks, yaxis=upright, shapes=marks))


def _end(trained: Trained, axis: str) -> int:
    return max(trained) if axis == "size" else max(trained.values())


def _mark(at: float) -> dict[str, Any]:
    return {"type": "line", "x0": at, "x1": at, "y0": -0.02, "y1": 1.03, "line": EDGE}


def _runs(
    x: Sequence[int], low: Sequence[float | None], high: Sequence[float | None]
) -> Iterator[tuple[list[int], list[float], list[float]]]:
    """Yield the stretches of a curve that have intervals."""
    for known, part in groupby(zip(x, low, high, strict=True), key=lambda row: None not in row):
        if known:
            a, b, c = zip(*part, strict=True)
            yield list(a), list(b), list(c)


def _bars(rows: pl.DataFrame) -> dict[str, Any]:
    """Return plotly's asymmetric error bars to the 95 % interval of the accuracy."""
    up = (rows["accuracy_high"] - rows["accuracy"]).clip(0, None)
    down = (rows["accuracy"] - rows["accuracy_low"]).clip(0, None)
    return {"type": "data", "array": up.to_list(), "arrayminus": down.to_list(), "thickness": 1.2, "width": 3}


def _rows_layout(title: str, x: str, labels: Sequence[str], pitch: int) -> dict[str, Any]:
    ticks = list(range(len(labels)))
    yaxis = {
        "tickvals": ticks,
        "ticktext": [plain(text) for text in labels],
        "range": [len(labels) - 0.4, -0.6],
        "showgrid": False,
        "ticks": "",
    }
    xaxis = {"range": [0, 1.02], "tickvals": [0, 0.25, 0.5, 0.75, 1]}
    return layout(title, pitch * len(labels) + 84, x, xaxis=xaxis, yaxis=yaxis)


def determined(totals: pl.DataFrame, agent: str, style: Style) -> go.Figure:
    """Draw `agent`'s accuracy on determined and on undetermined questions, one row for each game and variant.

    `totals` is `statistics.pooled(rows, ("agent", "game", "variant"))`. Ticks: ceiling (green), lookup reader (light
    green), chance (grey).
    """
    mine = totals.filter(pl.col("agent") == agent).sort("game", "variant")
    names = [place(g, v) for g, v in mine.select("game", "variant").unique(maintain_order=True).iter_rows()]
    traces: list[Any] = []
    for subset, offset, symbol in (("determined", -0.17, "circle"), ("undetermined", 0.17, "diamond-open")):
        rows = mine.filter(pl.col("subset") == subset)
        y = [names.index(place(g, v)) + offset for g, v in rows.select("game", "variant").iter_rows()]
        for reader, column in EXPECTED.items():
            tick = {"symbol": "line-ns-open", "size": 13, "color": REFERENCES[reader].colour, "line": {"width": 2.5}}
            hover = f"{label(reader)} %{{x:.3f}} ({subset})<extra></extra>"
            first = subset == "determined"
            traces.append(
                go.Scatter(
                    x=rows[column].to_list(),
                    y=y,
                    mode="markers",
                    marker=tick,
                    name=label(reader),
                    showlegend=first,
                    hovertemplate=hover,
                )
            )
        hover = "%{customdata[1]}, " + subset + ": %{x:.3f}<br>n %{customdata[0]}<extra></extra>"
        data = [[n, place(g, v)] for n, g, v in rows.select("n", "game", "variant").iter_rows()]
        marker = {"symbol": symbol, "size": 9, "color": style.colour, "line": {"width": 2, "color": style.colour}}
        traces.append(
            go.Scatter(
                x=rows["accuracy"].to_list(), y=y, mode="markers", marker=marker, name=subset,
                error_x=_bars(rows) | {"color": style.colour}, customdata=data, hovertemplate=hover,
            )
        )  # fmt: skip
    return go.Figure(
        traces, _rows_layout(f"Determined and undetermined questions, {plain(agent)}", "accuracy", names, 46)
    )


def hard(table: pl.DataFrame, totals: pl.DataFrame, agent: str, style: Style) -> go.Figure:
    """Draw `agent`'s accuracy on the determined questions that each shortcut gets wrong.

    `table` comes from `statistics.on_hard`, `totals` from `statistics.pooled` by agent, game and variant. Small
    circles mark the accuracy on all determined questions: bars far to their left indicate reliance on the shortcut.
    Grey ticks: chance.
    """
    rows = table.filter((pl.col("agent") == agent) & (pl.col("n") > 0)).sort("game", "variant", "shortcut")
    known = totals.filter((pl.col("agent") == agent) & (pl.col("subset") == "determined"))
    rows = rows.join(
        known.select("game", "variant", whole="accuracy"), on=["game", "variant"], how="left", maintain_order="left"
    )
    names = [f"{place(g, v)}: {label(s)}" for g, v, s in rows.select("game", "variant", "shortcut").iter_rows()]
    y = list(range(len(names)))
    hover = "%{customdata[0]} is wrong: accuracy %{x:.3f}<br>n %{customdata[1]}, %{customdata[2]:.0%} of the determined"
    bar = go.Bar(
        x=rows["accuracy"].to_list(), y=y, orientation="h", width=0.62, name="where the shortcut fails",
        marker={"color": rgba(style.colour, 0.45)}, error_x=_bars(rows) | {"color": style.colour},
        customdata=list(zip(names, rows["n"], rows["share"], strict=True)), hovertemplate=hover + "<extra></extra>",
    )  # fmt: skip
    ring = {"symbol": "circle-open", "size": 9, "color": style.colour, "line": {"width": 2}}
    tick = {"symbol": "line-ns-open", "size": 13, "color": REFERENCES["chance"].colour, "line": {"width": 2.5}}
    all_ = go.Scatter(
        x=rows["whole"].to_list(), y=y, mode="markers", marker=ring, name="on all determined questions",
        hovertemplate="on all determined questions %{x:.3f}<extra></extra>",
    )  # fmt: skip
    chance = go.Scatter(
        x=rows["chance"].to_list(),
        y=y,
        mode="markers",
        marker=tick,
        name="chance",
        hovertemplate="chance %{x:.3f}<extra></extra>",
    )
    title = f"Where the shortcut fails, {plain(agent)}"
    return go.Figure([bar, all_, chance], _rows_layout(title, "accuracy", names, 27))
