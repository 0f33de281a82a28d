"""Colours, the colour scale of heatmaps and the layout shared by the figures of all studies.

Backgrounds are transparent and nothing depends on the theme's colours, so that the page can set ink and grid lines for
light and dark. The colours are safe for colour-blind readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

# Light to dark in even steps of lightness (after ColorBrewer's YlGnBu): safe for colour-blind readers and in print.
SCALE: list[tuple[float, str]] = [
    (0.0, "#fbf7d5"), (0.125, "#e6f2bd"), (0.25, "#c1e4b8"), (0.375, "#8dcfba"), (0.5, "#58b9c0"),
    (0.625, "#359cc0"), (0.75, "#2a79b3"), (0.875, "#2a569f"), (1.0, "#28378a"),
]  # fmt: skip
WIDE = 20  # ratio of largest to smallest size from which on axes are logarithmic
DARK, LIGHT, TURN = "#16181b", "#ffffff", 0.75  # ink on a cell, from which value on it is light: contrast over 4.5


class Style(NamedTuple):
    """The style of an agent in all figures."""

    colour: str
    dash: str = "solid"
    width: float = 2.4
    marker: str = "circle"


def plain(text: str) -> str:
    """Return a text escaped for plotly, which reads a few HTML tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def rounded(values: Iterable[float | None]) -> list[float | None]:
    """Return numbers to four places for a figure, with None for those that are missing or not finite."""
    return [None if value is None or not math.isfinite(value) else round(float(value), 4) for value in values]


def layout(title: str, height: int, x: str, y: str = "", **more: Any) -> dict[str, Any]:
    """Return the common layout of all figures, with axis titles; `more` overrides or adds to it."""
    clear = "rgba(0,0,0,0)"
    axis = {"zeroline": False, "automargin": True, "fixedrange": True, "ticks": "outside", "ticklen": 3}
    base = {
        "title": {"text": title, "font": {"size": 14}, "x": 0, "xref": "paper"},
        "height": height,
        "margin": {"l": 44, "r": 12, "t": 34, "b": 40},
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "font": {"size": 12},
        "template": {},
        "xaxis": axis | {"title": {"text": x, "standoff": 6}} | more.pop("xaxis", {}),
        "yaxis": axis | {"title": {"text": y, "standoff": 6}} | more.pop("yaxis", {}),
        "legend": {"orientation": "h", "y": -0.3},
    }
    return base | more


def rgba(colour: str, alpha: float) -> str:
    """Return a colour such as "#0072b2" with an opacity from 0 to 1."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"
