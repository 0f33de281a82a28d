"""Figures as files: every plotly figure of a page as an SVG for papers, and its data as one CSV table.

The SVGs are drawn with matplotlib, without a browser. Equal figures give equal bytes. Names of games and models are
plain text: nothing in them is read as markup or mathematics.
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from nextstate.analysis.page.formats import raised

DPI = 96  # plotly's pixels an inch
POINT = 0.75  # points a pixel
INK, GREY, RULE = "#16181b", "#8c8c8c", "#e4e4e4"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9", "#b8860b")  # of traces that have none
MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "star": "*", "x": "X",
    "line-ns": "|", "x-thin": "x",
}  # fmt: skip
DASHES: dict[str, Any] = {
    "solid": "-", "dot": (0, (1, 1.6)), "dash": (0, (5, 2)), "longdash": (0, (8, 2.5)),
    "dashdot": (0, (5, 2, 1, 2)), "longdashdot": (0, (8, 2.5, 1, 2.5)),
}  # fmt: skip
CELLS = 2000  # heatmaps with more cells are embedded as an image, to keep files small
LEGEND = 18  # entries at most; figures with more name their rows on an axis
COLUMNS = ("series", "x", "x_low", "x_high", "y", "low", "high", "z", "text")


def files(figures: Mapping[str, go.Figure]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file: NAME.svg and NAME.csv for every figure."""
    for name, figure in figures.items():
        yield f"{name}.svg", svg(figure)
        yield f"{name}.csv", table(figure)


def svg(figure: go.Figure) -> bytes:
    """Return a figure as SVG with text as text, its title on top and a legend of its named traces below.

    Raises:
        ValueError: the figure has a trace other than scatter, bar and heatmap.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    data = figure.to_plotly_json()
    traces, layout = [dict(t) for t in data["data"]], data["layout"]
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "nextstate", "text.parse_math": False, "font.size": 8.5,
        "font.family": ["DejaVu Sans"], "axes.linewidth": 0.6, "axes.edgecolor": GREY, "text.color": INK,
        "axes.labelcolor": INK, "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "axes.unicode_minus": True, "hatch.linewidth": 0.6,
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's own font has them
        canvas = Figure(figsize=_size(traces, layout), dpi=DPI)
        FigureCanvasSVG(canvas)
        axes = canvas.add_axes((0.13, 0.16, 0.84, 0.74))
        _Drawing(axes, traces, layout).draw()
        # Found here and not by bbox_inches="tight", which draws the whole figure once more.
        bounds = canvas.get_tightbbox().padded(0.06)
        out = io.BytesIO()
        canvas.savefig(
            out, format="svg", bbox_inches=bounds, transparent=True, metadata={"Date": None, "Creator": None}
        )
    return out.getvalue()


def table(figure: go.Figure) -> bytes:
    """Return a figure's data as CSV in UTF-8, a row a point or cell, with those of `COLUMNS` that have values."""
    rows = list(_rows(figure.to_plotly_json()))
    columns = [c for c in COLUMNS if any(row.get(c) not in (None, "") for row in rows)]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _rows(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    layout = data["layout"]
    band: dict[Any, tuple[Any, Any]] = {}  # of the next line: its ends by x
    x_names, y_names = (_named(layout.get(axis, {})) for axis in ("xaxis", "yaxis"))
    steps = _steps(layout)
    maps = any(trace["type"] == "heatmap" for trace in data["data"])
    for trace in data["data"]:
        if trace["type"] == "heatmap":
            for series, z in steps or [(_text(trace.get("name")), trace["z"])]:
                for y, line in zip(trace["y"], z, strict=True):
                    for k, value in enumerate(line):
                        yield {"series": series, "x": x_names(_column(trace["x"], k)), "y": y_names(y), "z": value}
            continue
        if trace.get("mode") == "text" and maps:
            continue  # the numbers in a heatmap's cells
        x, y = list(trace["x"]), list(trace["y"])
        if trace.get("fill") == "toself":
            half = len(x) // 2
            band |= dict(zip(x[:half], zip(y[half:][::-1], y[:half], strict=True), strict=True))
            continue
        ends: dict[str, Sequence[Any]] = dict(zip(("x_low", "x_high"), _interval(trace, "x", x), strict=True))
        ends |= dict(zip(("low", "high"), _interval(trace, "y", y), strict=True))
        if band and band.keys() <= set(x):
            ends |= {end: [band.get(place, (None, None))[k] for place in x] for k, end in enumerate(("low", "high"))}
        band = {}
        text = trace.get("text")
        for k, (a, b) in enumerate(zip(x, y, strict=True)):
            row = {"series": _text(trace.get("name")), "x": x_names(a), "y": y_names(b)}
            row |= {end: values[k] for end, values in ends.items()}
            yield row | ({"text": _text(text[k])} if isinstance(text, list | tuple) else {})


def _column(x: Sequence[Any], k: int) -> Any:
    """Return the k-th name of an axis; those of an axis with two levels are joined."""
    return ", ".join(str(part[k]) for part in x) if isinstance(x[0], list | tuple) else x[k]


def _named(axis: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return what replaces the places on an axis that names each of its places, such as one row for each model."""
    places, names = list(axis.get("tickvals") or ()), list(axis.get("ticktext") or ())
    known = {str(place): _text(name) for place, name in zip(places, names, strict=False)}
    if not names or axis.get("type") == "log" or [str(p) for p in places] != [str(k) for k in range(len(places))]:
        return lambda value: _text(value) if isinstance(value, str) else value
    return lambda value: known.get(value if isinstance(value, str) else str(round(value)), value)


def _steps(layout: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the label and the cells of each step of a slider."""
    if not layout.get("sliders"):
        return []
    slider = layout["sliders"][0]
    prefix = slider.get("currentvalue", {}).get("prefix", "")
    return [(f"{prefix}{step['label']}", step["args"][0]["z"][0]) for step in slider["steps"]]


def _interval(trace: Mapping[str, Any], axis: str, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    bars = trace.get(f"error_{axis}") or {}
    if not bars.get("array") or bars.get("visible") is False:
        return [None] * len(values), [None] * len(values)
    low = [None if v is None or d is None else v - d for v, d in zip(values, bars["arrayminus"], strict=True)]
    high = [None if v is None or d is None else v + d for v, d in zip(values, bars["array"], strict=True)]
    return low, high


def _text(value: Any) -> str:
    """Return text of plotly as plain text on one line, without characters that XML forbids."""
    text = html.unescape(re.sub(r"<br\s*/?>", " ", str(value or "")))
    return re.sub(r"[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]+", " ", text)


def _size(traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> tuple[float, float]:
    """Return width and height in inches."""
    height, width = layout.get("height") or 360, 440.0
    for trace in traces:
        if trace["type"] == "heatmap":
            columns = len(trace["z"][0])
            letters = max([len(_text(t)) for n in traces if n.get("mode") == "text" for t in n["text"]], default=0)
            width = min(900.0, max(320.0, 110 + columns * max(9 if columns <= 60 else 5, 7 * letters + 4)))
    if layout.get("sliders"):
        height, width = height - 80, width + 20
    if layout.get("yaxis", {}).get("ticktext") and layout["yaxis"].get("ticks") == "" and width == 440:
        width = 560.0
    return width / DPI, height / DPI


def _colour(value: Any) -> Any:
    """Return a colour as matplotlib reads it."""
    numbers = re.fullmatch(r"rgba?\((.*)\)", value.strip()) if isinstance(value, str) else None
    if not numbers:
        return value
    red, green, blue, *alpha = (float(x) for x in numbers[1].split(","))
    return (red / 255, green / 255, blue / 255, alpha[0] if alpha else 1.0)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


class _Scale:
    """An axis of a plotly figure: where its values stand, and its ticks."""

    def __init__(self, axis: Mapping[str, Any], values: Sequence[Any]) -> None:
        self.axis = axis
        self.log = axis.get("type") == "log"
        words = axis.get("type") in ("category", "multicategory") or any(isinstance(v, str) for v in values)
        self.names = list(dict.fromkeys([*axis.get("categoryarray", ()), *values])) if words and not self.log else None
        self._places = {name: float(k) for k, name in enumerate(self.names or ())}

    def at(self, values: Sequence[Any]) -> list[float]:
        return [_number(v) if self.names is None else self._places[v] for v in values]

    def ticks(self, room: float) -> tuple[list[float], list[str]] | None:
        """Return places and labels of the ticks, as many as have room; None leaves them to matplotlib."""
        places, words = self.axis.get("tickvals"), self.axis.get("ticktext")
        if places is not None:
            places = list(places)
            kept = [k for k, p in enumerate(places) if (self._inside(p) if self.names is None else p in self._places)]
            labels = [_text(w) for w in words] if words is not None else [self.label(p) for p in places]
            return self.at([places[k] for k in kept]), [labels[k] for k in kept]
        if self.names is None:
            return None
        labels = [_text(n[-1] if isinstance(n, tuple) else n) for n in self.names]
        step = max(1, math.ceil(len(labels) * room))
        return [float(k) for k in range(0, len(labels), step)], labels[::step]

    def _inside(self, place: float) -> bool:
        ends = self.axis.get("range")
        return ends is None or min(ends) <= (math.log10(place) if self.log else place) <= max(ends)

    def label(self, value: float) -> str:
        form = str(self.axis.get("tickformat", ""))
        if "%" in form:
            return f"{100 * value:.4g} %"
        if form.endswith("s"):
            for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
                if abs(value) >= size:
                    return f"{value / size:.4g}{unit}"
        if self.log and value and not 1e-3 <= abs(value) < 1e4:
            digits, power = f"{value:.0e}".split("e")
            return ("" if digits == "1" else f"{digits} × ") + f"10{raised(int(power))}"
        return f"{value:.6g}".replace("-", "−")


class _Drawing:
    """One plotly figure on the axes of matplotlib."""

    def __init__(self, axes: Any, traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> None:
        self.axes, self.layout = axes, layout
        self.maps = [t for t in traces if t["type"] == "heatmap"]
        known = {"scatter": self._scatter, "bar": self._bar, "heatmap": self._heatmap}
        for trace in traces:
            if trace["type"] not in known:
                raise ValueError(
                    f"a trace of type {trace['type']!r} cannot be drawn: expected one of {', '.join(known)}"
                )
        self.traces = [(trace, known[trace["type"]]) for trace in traces]
        self.x, self.y = (
            _Scale(layout.get(f"{name}axis", {}), [v for t in traces for v in _values(t, name)]) for name in "xy"
        )
        self.bars = [t for t in traces if t["type"] == "bar"]
        self.legend: dict[str, Any] = {}
        self._box = axes.get_position()
        self._below = 0.52  # inches from the axes to the legend

    def draw(self) -> None:
        for scale, set_scale in ((self.x, self.axes.set_xscale), (self.y, self.axes.set_yscale)):
            if scale.log:
                set_scale("log")
        for k, (trace, put) in enumerate(self.traces):
            put(trace, COLOURS[k % len(COLOURS)])
        self._shapes()
        self._axes()
        title = _text((self.layout.get("title") or {}).get("text"))
        for slider in self.layout.get("sliders") or ():
            steps = _steps(self.layout)
            title += f", {steps[slider.get('active', 0)][0]}" if steps else ""
        self.axes.set_title(title, loc="left", fontsize=10, pad=7)
        self._legend()

    def _keep(self, trace: Mapping[str, Any], artist: Any) -> None:
        name = _text(trace.get("name"))
        if name and trace.get("showlegend") is not False:
            self.legend.setdefault(name, artist)

    def _scatter(self, trace: Mapping[str, Any], spare: str) -> None:
        from matplotlib.lines import Line2D

        x, y = self.x.at(_values(trace, "x")), self.y.at(_values(trace, "y"))
        line, marker = trace.get("line") or {}, trace.get("marker") or {}
        mode = trace.get("mode") or "lines+markers"
        colour = _colour(marker.get("color") if "lines" not in mode else line.get("color")) or spare
        if trace.get("fill") == "toself":
            kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a + b)]
            if kept:
                self.axes.fill(*zip(*kept, strict=True), color=_colour(trace.get("fillcolor", spare)), linewidth=0)
            return
        if mode == "text":
            self._words(trace, x, y)
            return
        symbol = str(marker.get("symbol") or "circle")
        hollow, size = symbol.endswith("-open"), (marker.get("size") or 6) * POINT
        edge = marker.get("line") or {}
        face = _colour(marker.get("color")) or colour
        style: dict[str, Any] = {"color": colour, "linestyle": "none", "linewidth": (line.get("width") or 2) * POINT}
        if "lines" in mode:
            style["linestyle"] = DASHES.get(line.get("dash") or "solid") or _dash(line["dash"])
        if "markers" in mode:
            style |= {
                "marker": MARKERS.get(symbol.removesuffix("-open"), "o"), "markersize": size,
                "markerfacecolor": "none" if hollow else face,
                "markeredgecolor": _colour(edge.get("color")) or face,
                "markeredgewidth": (edge.get("width") or (1.6 if hollow else 0)) * POINT,
                "alpha": marker.get("opacity"),
            }  # fmt: skip
            if symbol == "x-thin":
                style["markeredgewidth"] = 1.0
        (drawn,) = self.axes.plot(x, y, zorder=3, **style)
        self._errors(trace, x, y, colour)
        if "text" in mode:
            self._words(trace, x, y, 0.6 * size + 2)
        self._keep(trace, Line2D([], [], **style) if drawn is None else drawn)

    def _words(self, trace: Mapping[str, Any], x: Sequence[float], y: Sequence[float], lift: float = 0) -> None:
        from matplotlib.transforms import ScaledTranslation

        font = trace.get("textfont") or {}
        colours = font.get("color") or INK
        place = self.axes.transData + ScaledTranslation(0, lift / 72, self.axes.figure.dpi_scale_trans)
        size = (font.get("size") or 11) * 0.68
        if self.maps:  # no wider than a cell
            letters = max([len(_text(words)) for words in trace.get("text") or ()], default=1)
            cell = 72 * self.axes.figure.get_figwidth() * self._box.width / len(self.maps[0]["z"][0])
            size = min(size, 1.5 * cell / letters)
        style = {"ha": "center", "va": "baseline" if lift else "center_baseline", "transform": place, "zorder": 4,
                 "fontsize": size}  # fmt: skip
        for k, (a, b, words) in enumerate(zip(x, y, trace.get("text") or (), strict=False)):
            if words and math.isfinite(a + b):
                colour = colours[k] if isinstance(colours, list | tuple) else colours
                text = self.axes.text(a, b, _text(words), color=_colour(colour), **style)
                text.set_in_layout(not self.maps)  # inside the cells; measuring each would be slow

    def _errors(self, trace: Mapping[str, Any], x: Sequence[float], y: Sequence[float], colour: Any) -> None:
        for axis in "xy":
            bars = trace.get(f"error_{axis}") or {}
            if bars.get("array") and bars.get("visible") is not False:
                ends = [[_number(v) for v in bars[side]] for side in ("arrayminus", "array")]
                self.axes.errorbar(
                    x, y, **{f"{axis}err": ends}, fmt="none", ecolor=_colour(bars.get("color")) or colour, zorder=3,
                    elinewidth=(bars.get("thickness") or 2) * POINT, capsize=(bars.get("width") or 0) * POINT * 0.7,
                    capthick=(bars.get("thickness") or 2) * POINT,
                )  # fmt: skip

    def _bar(self, trace: Mapping[str, Any], spare: str) -> None:
        x, y = self.x.at(_values(trace, "x")), self.y.at(_values(trace, "y"))
        colour = _colour((trace.get("marker") or {}).get("color")) or spare
        across = trace.get("orientation") == "h"
        width = trace.get("width")
        if width is None:  # bars of one place stand side by side
            width = (1 - (self.layout.get("bargap") or 0.2)) / len(self.bars)
            shift = width * (self.bars.index(trace) - (len(self.bars) - 1) / 2)
            x, y = (x, [v + shift for v in y]) if across else ([v + shift for v in x], y)
        drawn = self.axes.barh(y, x, width, color=colour) if across else self.axes.bar(x, y, width, color=colour)
        self._errors(trace, x, y, colour)
        self._keep(trace, drawn)

    def _heatmap(self, trace: Mapping[str, Any], spare: str) -> None:
        import numpy as np
        from matplotlib.colors import LinearSegmentedColormap

        z = np.array([[_number(v) for v in line] for line in trace["z"]])
        x, y = self.x.at(_values(trace, "x")), self.y.at(_values(trace, "y"))
        stops = [(float(at), _colour(colour)) for at, colour in trace["colorscale"]]
        scale = LinearSegmentedColormap.from_list("", stops, N=256)
        low, high = trace.get("zmin"), trace.get("zmax")
        style = {"cmap": scale, "vmin": np.nanmin(z) if low is None else low,
                 "vmax": np.nanmax(z) if high is None else high}  # fmt: skip
        if z.size > CELLS:
            step = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5, (y[1] - y[0]) / 2 if len(y) > 1 else 0.5
            reach = (x[0] - step[0], x[-1] + step[0], y[0] - step[1], y[-1] + step[1])
            self.axes.imshow(z, origin="lower", extent=reach, interpolation="none", aspect="auto", zorder=1, **style)
        else:
            gap = {"edgecolor": "white", "linewidth": 0.6} if trace.get("xgap") else {}
            self.axes.pcolormesh(_edges(x), _edges(y), np.ma.masked_invalid(z), zorder=1, **gap, **style)
        title = (trace.get("colorbar") or {}).get("title") or {}
        self._colour_bar(style, _text(title.get("text")))
        self.axes.set_xlim(_edges(x)[0], _edges(x)[-1])
        self.axes.set_ylim(_edges(y)[0], _edges(y)[-1])

    def _colour_bar(self, style: Mapping[str, Any], title: str) -> None:
        """Draw the colour scale next to the axes, with three labels; a colour bar with its own axes would be slower."""
        import numpy as np

        start, end = (1 + inches / (self.axes.figure.get_figwidth() * self._box.width) for inches in (0.14, 0.24))
        values = np.linspace(style["vmin"], style["vmax"], 65)
        self.axes.pcolormesh([start, end], np.linspace(0, 1, 65), (values[:-1, None] + values[1:, None]) / 2,
                             transform=self.axes.transAxes, clip_on=False, **style)  # fmt: skip
        for share, up in ((0.0, "bottom"), (0.5, "center"), (1.0, "top")):
            value = style["vmin"] + share * (style["vmax"] - style["vmin"])
            words = f"{value:.2g}".replace("-", "−")
            self.axes.text(end + 0.4 * (end - start), share, words, va=up, fontsize=7, transform=self.axes.transAxes)
        if title:
            self.axes.text(start, 1.02, title, fontsize=7, transform=self.axes.transAxes, va="bottom")

    def _shapes(self) -> None:
        for shape in self.layout.get("shapes") or ():
            style = {"color": _colour(shape.get("fillcolor") or GREY), "linewidth": 0, "zorder": 0}
            tall, across = ("domain" in str(shape.get(ref)) or shape.get(ref) == "paper" for ref in ("yref", "xref"))
            if shape.get("type") == "rect" and tall:
                self.axes.axvspan(shape["x0"], shape["x1"], **style)
            elif shape.get("type") == "rect" and across:
                self.axes.axhspan(shape["y0"], shape["y1"], **style)
            elif shape.get("type") == "line":
                line = shape.get("line") or {}
                colour, width = _colour(line.get("color") or GREY), (line.get("width") or 1) * POINT
                ends = ([shape["x0"], shape["x1"]], [shape["y0"], shape["y1"]])
                where = self.axes.get_xaxis_transform() if tall else self.axes.get_yaxis_transform() if across else None
                dash = line.get("dash") or "solid"
                style = {"color": colour, "linewidth": width, "linestyle": DASHES.get(dash) or _dash(dash), "zorder": 2}
                self.axes.plot(*ends, **style, **({"transform": where} if where else {}))
        for note in self.layout.get("annotations") or ():
            where = "axes fraction" if note.get("xref") == "paper" else "data"
            self.axes.annotate(
                _text(note.get("text")), (note.get("x", 0), note.get("y", 0)), xycoords=where, fontsize=8
            )

    def _axes(self) -> None:
        from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter

        width, height = self.axes.figure.get_size_inches()
        inches = {"x": width * self._box.width, "y": height * self._box.height}
        self.axes.set_axisbelow(True)
        for side in ("top", "right"):
            self.axes.spines[side].set_visible(False)
        for name, scale in (("x", self.x), ("y", self.y)):
            plain, axis = scale.axis, getattr(self.axes, f"{name}axis")
            label = _text((plain.get("title") or {}).get("text"))
            getattr(self.axes, f"set_{name}label")(label, labelpad=4)
            ends = plain.get("range")
            reach = getattr(self.axes, f"set_{name}lim")
            if ends is not None:
                reach(*(10 ** float(e) if scale.log else float(e) for e in ends))
            elif plain.get("rangemode") == "tozero":
                low, high = getattr(self.axes, f"get_{name}lim")()
                reach(min(0.0, low), max(0.0, high))
            if plain.get("autorange") == "reversed":
                reach(*reversed(getattr(self.axes, f"get_{name}lim")()))
            letters = max([len(_text(n[-1] if isinstance(n, tuple) else n)) for n in scale.names or ()], default=1)
            room = (letters * 0.075 + 0.06 if name == "x" else 0.13) / inches[name]
            ticks = scale.ticks(room)
            if ticks is not None:
                places, labels = ticks
                axis.set_ticks(places, labels)
                gap = min((abs(b - a) for a, b in pairwise(places)), default=1)
                gap *= inches["x"] / len(scale.names) if scale.names else inches["x"] / max(len(places), 1) / gap
                widest = max(map(len, labels), default=0) * 0.075
                if name == "x" and widest > gap:
                    axis.set_tick_params(rotation=90)
                    self._below += widest
                if scale.log:
                    axis.set_minor_formatter(NullFormatter())
            else:
                axis.set_major_formatter(FuncFormatter(lambda v, _, scale=scale: scale.label(v)))
                axis.set_minor_formatter(NullFormatter())
                if not scale.log:
                    low, high = sorted(getattr(self.axes, f"get_{name}lim")())
                    step = plain.get("dtick")
                    some = step and (high - low) / step <= inches[name] / 0.2
                    axis.set_major_locator(
                        MultipleLocator(float(step or 1)) if some else _locator(max(3, int(inches[name] / 0.55)))
                    )
            if not self.maps and plain.get("showgrid") is not False:
                axis.grid(True, color=RULE, linewidth=0.6)
            axis.set_tick_params(which="both", length=0 if plain.get("ticks") == "" else 2.5, width=0.6, labelsize=8)
            if plain.get("zeroline") and not scale.log:
                (self.axes.axvline if name == "x" else self.axes.axhline)(0, color=GREY, linewidth=0.6, zorder=1)
        if self.maps:
            for spine in self.axes.spines.values():
                spine.set_visible(False)
        if self.x.axis.get("type") == "multicategory":
            self._groups()

    def _groups(self) -> None:
        """Name the outer level of an axis with two levels, below the inner one."""
        places: dict[Any, list[int]] = {}
        for k, name in enumerate(self.x.names or ()):
            places.setdefault(name[0], []).append(k)
        across = self.axes.get_xaxis_transform()
        for name, inside in places.items():
            middle = sum(inside) / len(inside)
            self.axes.annotate(_text(name), (middle, 0), (0, -17), across, "offset points", ha="center", va="top",
                               fontsize=8, annotation_clip=False)  # fmt: skip
            if inside[0]:
                self.axes.axvline(inside[0] - 0.5, color=GREY, linewidth=0.8)
        self.axes.xaxis.labelpad = 16

    def _legend(self) -> None:
        if not 1 < len(self.legend) <= LEGEND:
            return
        width = 0.42 + 0.075 * max(map(len, self.legend))
        columns = max(1, min(len(self.legend), int(self.axes.figure.get_figwidth() / width)))
        below = -self._below / (self.axes.figure.get_figheight() * self.axes.get_position().height)
        self.axes.legend(
            self.legend.values(), self.legend.keys(), loc="upper left", bbox_to_anchor=(0, below), ncols=columns,
            frameon=False, fontsize=8, handlelength=2.4, borderpad=0, borderaxespad=0, columnspacing=1.4,
        )  # fmt: skip


def _values(trace: Mapping[str, Any], axis: str) -> list[Any]:
    """Return the places of a trace on an axis; of two levels as pairs."""
    found = trace.get(axis)
    if found is None:  # plotly counts
        rows = trace["z"] if "z" in trace else [trace["y" if axis == "x" else "x"]]
        return list(range(len(rows) if axis == "y" and "z" in trace else len(rows[0])))
    values = list(found)
    return list(zip(*values, strict=True)) if values and isinstance(values[0], list | tuple) else values


def _edges(centres: Sequence[float]) -> list[float]:
    """Return the edges of cells, half way between their centres."""
    middle = [(a + b) / 2 for a, b in pairwise(centres)]
    first = centres[0] - (middle[0] - centres[0] if middle else 0.5)
    return [first, *middle, centres[-1] + (centres[-1] - middle[-1] if middle else 0.5)]


def _locator(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])


def _dash(dash: str) -> Any:
    """Return a dash given in pixels, such as "5px 2px"."""
    return (0, tuple(float(x) / 1.5 for x in re.findall(r"[\d.]+", dash)))
