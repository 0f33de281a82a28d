"""Figures of a grammar study: generated strings, learning curves, divergence, robustness.

A model has the same colour and mark in every figure; hollow marks are the paper's numbers. Functions return None
if there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl

from nextstate.analysis.figures import WIDE, Style, layout, plain
from nextstate.analysis.grammar.paper import PERTURBATIONS, published_robustness
from nextstate.analysis.grammar.tables import Summary
from nextstate.analysis.page.formats import raised

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
MORE = ("#e69f00", "#117733", "#cc79a7", "#999933", "#7f7fbf")  # for further models of the same architecture
DASHES = ("solid", "dash", "dot", "dashdot")
MOST = 34  # most letters of a model's name on an axis
PREFIXES = ("nothing", "clean", "corrupted")


def styles(found: Summary) -> dict[str, Style]:
    """Return the style of each model in all figures, by architecture or kind of perturbation.

    Keys are names of models without and with seeds: all trainings of a model look the same.
    """
    out: dict[str, Style] = {}
    spare = [Style(colour, "solid", 2.4, mark) for colour, mark in product(MORE, ("circle", "square", "diamond"))]
    count = dict.fromkeys(KINDS, 0)
    for name, model in found.families.items():
        own = ARCHITECTURES[model["architecture"]]
        if model["untrained"]:
            out[name] = UNTRAINED
        elif model["perturbation"]:
            kind = model["perturbation"]
            out[name] = KINDS[kind]._replace(dash=DASHES[count[kind] % len(DASHES)])
            count[kind] += 1
        else:
            out[name] = own if own not in out.values() else spare.pop(0) if spare else own
    return out | {name: out[model["family"]] for name, model in found.models.items()}


def brief(name: str) -> str:
    """Return a name escaped for plotly and cut to `MOST` characters."""
    return plain(name if len(name) <= MOST else f"{name[: MOST - 1]}…")


def significant(value: float | None, digits: int = 5) -> float | None:
    """Return a value to `digits` significant digits; None if it is not finite."""
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
    """Return the layout of a plot with one row for each model."""
    up = {"tickvals": list(range(len(names))), "ticktext": [brief(n) for n in names], "showgrid": False, "ticks": "",
          "range": [len(names) - 0.4, -0.6]}  # fmt: skip
    return layout(title, pitch * len(names) + 90, x, yaxis=up, **more)


def generation(found: Summary, title: str) -> go.Figure | None:
    """Draw the share of generated strings that are in the grammar, from nothing and after a clean prefix, by model.

    Only models trained without perturbed strings are drawn, or all if there are none. A model has a mark for each of
    its trainings, one below another.
    """
    rows = {name: found.own("generation", name, nearest=True) for name in found.families}
    rows = {name: [r for r in own if r["prefix"] != "corrupted"] for name, own in rows.items()}
    names = [n for n in found.trained if rows[n]] or [n for n in rows if rows[n]]
    if not names:
        return None
    look, traces, ends = styles(found), list[Any](), [1.0]
    for at_name, row in [(k, row) for k, family in enumerate(names) for row in rows[family]]:
        name, style = plain(row["name"]), look[row["name"]]
        offset, symbol = (-0.17, "circle") if row["prefix"] == "nothing" else (0.17, "diamond")
        words, at = _after(row["given"]), at_name + offset + _shift(found, row["name"], 0.24)
        ends.append(row["low"])
        traces.append(
            go.Scatter(
                x=[row["accuracy"]], y=[at], mode="markers", name=f"{name}, {words}",
                marker={"symbol": symbol, "size": 9, "color": style.colour},
                error_x=_bars([row], "accuracy", "low", "high", style.colour),
                customdata=[[row["right"], row["strings"], name]],
                hovertemplate=f"%{{customdata[2]}}, {words}<br>%{{x:.2%}}: %{{customdata[0]:,}} of "
                "%{customdata[1]:,} strings<extra></extra>",
            )
        )  # fmt: skip
        if row["paper"] is not None and _first(found, row["name"]):
            ends.append(row["paper"])
            theirs = _after(50 if row["given"] else 0)
            traces.append(
                go.Scatter(
                    x=[row["paper"]], y=[at], mode="markers", marker=_hollow(style, symbol, 13),
                    name=f"{name}, {words}, paper", hovertemplate=f"paper, {theirs} %{{x:.2%}}<extra></extra>",
                )
            )  # fmt: skip
    low = min(ends)
    right = {"range": [max(-0.02, low - 0.12 * (1 - low) - 0.002), 1 + 0.04 * (1 - low) + 0.001], "tickformat": "~%"}
    return go.Figure(traces, _lines(title, "share of generated strings in the grammar", names, 40, xaxis=right))


def _shift(found: Summary, name: str, room: float) -> float:
    """Return by how much the mark of a training is shifted in its model's row, so that they do not overlap."""
    names = [n for n, model in found.models.items() if model["family"] == found.models[name]["family"]]
    return 0.0 if len(names) == 1 else room * (names.index(name) / (len(names) - 1) - 0.5)


def _first(found: Summary, name: str) -> bool:
    """Return whether this is the first training of its model."""
    return bool(found.families[found.models[name]["family"]]["name"] == name)


def _after(tokens: int) -> str:
    return f"after {tokens} tokens" if tokens else "from nothing"


def learners(found: Summary) -> list[str]:
    """Return the models whose learning curves are drawn: those without perturbed strings, or all if there are none.

    Models with only one point are omitted.
    """
    names = [n for n in found.of("curve") if found.tables["curve"].filter(name=n)["tokens"].n_unique() > 1]
    return [n for n in names if found.models[n]["family"] in found.plain] or names


def curve(found: Summary, column: str, title: str, words: str) -> go.Figure | None:
    """Draw a column of the learning curves against the number of training tokens."""
    names = learners(found)
    if not names:
        return None
    rows = found.tables["curve"].drop_nulls(column).filter(pl.col("name").is_in(names)).sort("name", "tokens")
    if column == "kl":
        rows = rows.filter(pl.col(column) > 0)
    seen = rows.filter(pl.col("tokens") > 0)["tokens"]
    if not len(seen) or rows.group_by("name").len()["len"].max() == 1:
        return None
    wide = seen.max() > WIDE * seen.min()  # type: ignore[operator]
    if wide:
        rows = rows.filter(pl.col("tokens") > 0)
    look, traces = styles(found), []
    for name in names:
        mine, style = rows.filter(name=name), look[name]
        if len(mine):
            traces.append(
                go.Scatter(
                    x=mine["tokens"].to_list(), y=[significant(v) for v in mine[column]], name=plain(name),
                    mode="lines+markers", line={"color": style.colour, "width": style.width, "dash": style.dash},
                    marker={"size": 6, "symbol": style.marker}, customdata=mine["step"].to_list(),
                    hovertemplate=f"{plain(name)}<br>%{{x:,}} tokens, step %{{customdata:,}}: %{{y:.4~g}}"
                    "<extra></extra>",
                )
            )  # fmt: skip
    right: dict[str, Any] = {"showgrid": False, "tickformat": "~s"}
    right |= {"type": "log", "dtick": 1, "minor": {"dtick": "D1", "ticks": "outside", "ticklen": 2}} if wide else {}
    up: dict[str, Any] = {"accuracy": {"range": [-0.02, 1.03], "tickformat": ".0%"}, "loss": {}}.get(column, _decades(
        [v for v in rows[column] if v]))  # fmt: skip
    return go.Figure(traces, layout(title, 310, "training tokens", words, xaxis=right, yaxis=up))


def _decades(values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis with one tick per decade, or three if there are few decades."""
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


def divergence(found: Summary, title: str) -> go.Figure | None:
    """Draw the divergence of each model from the exact next-token distribution, on a logarithmic axis."""
    rows = {name: [r for r in found.own("diversity", name) if (r["kl"] or 0) > 0] for name in found.families}
    names = [n for n in found.plain if rows[n]] or [n for n in rows if rows[n]]
    if not names:
        return None
    look, traces, seen = styles(found), list[Any](), []
    for at_name, row in [(k, row) for k, name in enumerate(names) for row in rows[name]]:
        name = row["name"]
        style, at = look[name], at_name + _shift(found, name, 0.5)
        low = row["kl_low"] if row["kl_low"] and row["kl_low"] > 0 else row["kl"]
        seen += [row["kl"], low, row["kl_high"] or row["kl"]]
        traces.append(
            go.Scatter(
                x=[significant(row["kl"])], y=[at], mode="markers", name=plain(name),
                marker={"symbol": style.marker, "size": 10, "color": style.colour},
                error_x=_bars([row | {"kl_low": low}], "kl", "kl_low", "kl_high", style.colour),
                hovertemplate=f"{plain(name)}<br>%{{x:.3~g}} nats per token<extra></extra>",
            )
        )  # fmt: skip
        if (paper := row["paper_kl"]) is not None and _first(found, name):
            seen.append(paper)
            traces.append(
                go.Scatter(x=[paper], y=[at], mode="markers", marker=_hollow(style, style.marker, 13),
                           name=f"{plain(name)}, paper", hovertemplate="paper, %{x:.3~g} nats per token<extra></extra>")
            )  # fmt: skip
    return go.Figure(traces, _lines(title, "divergence from the exact distribution (nats per token)", names, 34,
                                    xaxis=_decades(seen)))  # fmt: skip


def robustness(found: Summary, prefix: str, temperature: float, title: str) -> go.Figure:
    """Draw accuracy against the share of perturbed training strings, one line for each kind; clean models dotted."""
    about = {row["name"]: row for row in found.rows("written", prefix=prefix, temperature=temperature)}
    mean = {name: about[name]["accuracy"] for name in found.families if name in about}
    perturbed = {name: found.families[name] for name in mean if found.families[name]["perturbation"]}
    kinds = {model["architecture"] for model in perturbed.values()}
    clean = [name for name in found.trained if name in mean and found.families[name]["architecture"] in kinds]
    traces: list[Any] = []
    look = styles(found)
    for name in clean:
        traces.append(
            go.Scatter(x=[0, 1], y=[mean[name]] * 2, mode="lines", name=plain(name),
                       line={"color": look[name].colour, "width": 1.8, "dash": "dot"},
                       hovertemplate=f"{plain(name)}, clean strings only: %{{y:.1%}}<extra></extra>")
        )  # fmt: skip
    groups: dict[tuple[str, str, float], list[str]] = {}
    for name, model in sorted(perturbed.items(), key=lambda item: item[1]["fraction"]):
        groups.setdefault((model["perturbation"], model["architecture"], model["rate"]), []).append(name)
    used = dict.fromkeys(PERTURBATIONS, 0)
    for (kind, architecture, rate), names in sorted(groups.items(), key=lambda g: (PERTURBATIONS.index(g[0][0]), g[0])):
        style, dash = KINDS[kind], DASHES[used[kind] % len(DASHES)]
        used[kind] += 1
        title_of = f"{architecture}, {kind} at {rate:g}"
        traces.append(
            go.Scatter(
                x=[perturbed[name]["fraction"] for name in names], y=[mean[name] for name in names],
                mode="lines+markers", name=title_of,
                line={"color": style.colour, "width": 2.2, "dash": dash}, marker={"size": 7, "symbol": style.marker},
                error_y=_bars([about[name] for name in names], "accuracy", "low", "high", style.colour),
                hovertemplate=f"{title_of}<br>%{{x:.0%}} of the strings perturbed: %{{y:.1%}}<extra></extra>",
            )
        )  # fmt: skip
    for kind, values in published_robustness(str(found.grammar["name"]), prefix, temperature).items():
        style = KINDS[kind] if kind else next((look[name] for name in clean), ARCHITECTURES["rotary"])
        traces.append(
            go.Scatter(x=list(values), y=list(values.values()), mode="markers", name=f"{kind or 'clean'}, paper",
                       marker=_hollow(style, style.marker, 12),
                       hovertemplate=f"paper, {kind or 'clean'}: %{{y:.1%}}<extra></extra>")
        )  # fmt: skip
    right = {"range": [-0.04, 1.05], "tickformat": ".0%", "showgrid": False}
    up = {"range": [-0.04, 1.06], "tickformat": ".0%", "tickvals": [0, 0.25, 0.5, 0.75, 1]}
    return go.Figure(
        traces, layout(title, 270, "perturbed strings in training", "in the grammar", xaxis=right, yaxis=up)
    )


def reaches(found: Summary, title: str) -> go.Figure | None:
    """Draw the mean distance that each head attends to, one row for each model (its first training), by layer."""
    names = [n for n in found.of("heads") if _first(found, n)]
    if not names:
        return None
    look, traces, far = styles(found), list[Any](), list[float]()
    for at, name in enumerate(names):
        rows = found.rows("heads", name=name)
        layers = max(row["layer"] for row in rows)
        ys = [at + (0.0 if not layers else 0.56 * (row["layer"] / layers - 0.5)) for row in rows]
        far += [row["reach"] for row in rows]
        traces.append(
            go.Scatter(
                x=[significant(row["reach"]) for row in rows], y=ys, mode="markers", name=plain(name),
                marker={"symbol": "circle", "size": 7, "color": look[name].colour, "opacity": 0.8},
                error_x=_bars(rows, "reach", "low", "high", look[name].colour),
                customdata=[f"{row['layer']}.{row['head']}" for row in rows],
                hovertemplate=f"{plain(name)}, head %{{customdata}}<br>%{{x:.3~g}} tokens<extra></extra>",
            )
        )  # fmt: skip
    return go.Figure(traces, _lines(title, "mean distance of a head's attention (tokens)", names, 44,
                                    xaxis=_decades([x for x in far if x > 0])))  # fmt: skip


def learning(found: Summary, level: int, title: str) -> go.Figure | None:
    """Draw the accuracy of the full probe for ancestors of a level against its training steps, by model."""
    traces, look = list[Any](), styles(found)
    for name in found.of("learning"):
        rows = [r for r in found.rows("learning", name=name, level=level, reach="full", where="all", deepest=True,
                                      shuffled=False) if r["accuracy"] is not None]  # fmt: skip
        style = look[name]
        if rows and found.models[name]["family"] in found.plain:
            traces.append(
                go.Scatter(
                    x=[r["step"] for r in rows], y=[significant(r["accuracy"]) for r in rows], name=plain(name),
                    mode="lines+markers", line={"color": style.colour, "width": style.width, "dash": style.dash},
                    marker={"size": 6, "symbol": style.marker},
                    error_y=_bars(rows, "accuracy", "low", "high", style.colour),
                    hovertemplate=f"{plain(name)}<br>%{{x:,}} steps: %{{y:.1%}}<extra></extra>",
                )
            )  # fmt: skip
    steps = sorted({x for trace in traces for x in trace.x})
    if len(steps) < 2:
        return None
    right = {"type": "log", "showgrid": False, "tickvals": steps, "ticktext": [f"{x:,}" for x in steps]}
    return go.Figure(traces, layout(title, 270, "training steps of the probe", "accuracy", xaxis=right,
                                    yaxis={"tickformat": ".0%"}))  # fmt: skip


def panels(found: Summary) -> list[tuple[str, float]]:
    """Return for which prefixes and temperatures perturbed models were measured, in the order of the page."""
    rows = [r for r in found.rows("generation") if found.models[r["name"]]["perturbation"]]
    return sorted({(r["prefix"], r["temperature"]) for r in rows}, key=lambda key: (PREFIXES.index(key[0]), key[1]))
