"""Report pages: their content, rendering as HTML, and the files of their figures.

A page is one HTML file that works offline. Its scripts are allowed by their hashes, and all text is escaped.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import importlib.resources
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import plotly.graph_objects as go
import polars as pl
from markupsafe import Markup

from nextstate.analysis.page.formats import FILTERS
from nextstate.envs.files import write_atomic, write_text


class Plot(NamedTuple):
    """A figure on the page: its name in `FigureList`, its title as plain text, its height in pixels."""

    name: str
    title: str
    height: int


class FigureList:
    """The figures of one page by name, in the order in which they were added; a name is also that of its files."""

    def __init__(self) -> None:
        self.figures: dict[str, go.Figure] = {}
        self._legends: set[str] = set()
        self._slugs: Counter[str] = Counter()

    def add(self, figure: go.Figure, where: str = "", legend: bool = False) -> Plot:
        """Add a figure and return what the template macro `plot` needs.

        Args:
            figure: of scatter, bar and heatmap traces. Its title becomes its caption.
            where: put before the title in the figure's name, if the title alone does not identify it.
            legend: show plotly's legend on the page. The study templates have legends of their own.
        """
        title = Markup(figure.layout.title.text or where or "Figure").unescape()
        slug = re.sub(r"[^a-z0-9]+", "-", f"{where} {title}".lower()).strip("-")[:80] or "figure"
        self._slugs[slug] += 1
        name = slug if self._slugs[slug] == 1 else f"{slug}-{self._slugs[slug]}"
        self.figures[name] = figure
        if legend:
            self._legends.add(name)
        return Plot(name, title, int(figure.layout.height or 360) - 26)

    def for_browser(self) -> dict[str, Any]:
        """Return all figures as JSON for plotly.js, without titles and colours, which the page sets."""
        return {name: self._for_browser(name, figure) for name, figure in self.figures.items()}

    def _for_browser(self, name: str, figure: go.Figure) -> dict[str, Any]:
        out: dict[str, Any] = json.loads(figure.to_json())
        layout = out["layout"]
        layout.pop("title", None)
        margin = {"l": 44, "r": 12, "b": 40} | layout.get("margin", {}) | {"t": 8}
        clear = dict.fromkeys(("paper_bgcolor", "plot_bgcolor"), "rgba(0,0,0,0)")
        height = int(figure.layout.height or 360) - 26  # the title is outside
        out["layout"] = layout | clear | {"template": {}, "margin": margin, "height": height}
        out["layout"]["showlegend"] = name in self._legends
        for trace in out["data"]:
            if trace["type"] == "heatmap" and name not in self._legends:
                trace["showscale"] = False  # the study templates draw one scale for several maps
            if name in self._legends and not trace.get("name"):
                trace["showlegend"] = False
        return out


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        title: its heading, also in the navigation.
        text: plain text; a blank line separates paragraphs.
        figures: plotly figures of scatter, bar and heatmap traces.
        table: shown as a table that the reader can sort.
    """

    title: str
    text: str = ""
    figures: Sequence[go.Figure] = ()
    table: pl.DataFrame | None = None


@dataclass
class Page:
    """A report page of a run.

    Attributes:
        title: the main heading.
        lead: the main findings, a plain sentence or two each.
        sections: in the order of the page.
        words: definitions of the terms that the page uses.
        template: template of the study, which extends `page/base.html.jinja`; by default only the sections are shown.
        context: variables of the template.
        figures: the figures that `context` refers to, to which those of `sections` are added.
    """

    title: str
    lead: Sequence[str] = ()
    sections: Sequence[Section] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    template: str = "page/base.html.jinja"
    context: Mapping[str, Any] = field(default_factory=dict)
    figures: FigureList = field(default_factory=FigureList)

    def __post_init__(self) -> None:
        self.plots = [[self.figures.add(f, s.title, legend=True) for f in s.figures] for s in self.sections]


def render(page: Page, record: Mapping[str, Any]) -> str:
    """Return the page as HTML.

    Args:
        page: what to show.
        record: the run's `run.json`, for the section with run details.
    """
    templates = environment()
    bundle = importlib.resources.files("nextstate.analysis.page").joinpath("plotly-cartesian.min.js")
    scripts = {
        "plotly": bundle.read_text(encoding="utf-8"),
        "page": templates.get_template("page/script.html.jinja").render(),
    }
    return templates.get_template(page.template).render(
        page=page,
        info=record,
        certificates=certificates(record),
        left_out=left_out(record),
        contents=[],  # filled by the macro `section`
        drawn=page.figures.for_browser(),
        scripts={name: Markup(text) for name, text in scripts.items()},
        hashes=" ".join(f"'sha256-{sha256(text)}'" for text in scripts.values()),
        **page.context,
    )


def write(page: Page, record: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` into the folder of a run, and each figure as SVG and CSV into `figures/`.

    Raises:
        PathError: a file cannot be written.
    """
    from nextstate.analysis.page import vector

    names = set()
    for name, data in vector.files(page.figures.figures):
        names.add(name)
        write_atomic(folder / "figures" / name, functools.partial(Path.write_bytes, data=data))
    for old in (folder / "figures").glob("*.*"):
        if old.name not in names:
            old.unlink()  # of an earlier state of this run
    return write_text(folder / "report.html", render(page, record))


def environment() -> jinja2.Environment:
    """Return the template environment of all pages, with autoescape and the number formats as filters."""
    out = jinja2.Environment(
        loader=jinja2.PackageLoader("nextstate.analysis", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    out.filters |= {"pack": pack, **FILTERS}
    return out


def pack(value: Any) -> str:
    """Return `value` as JSON, compressed with gzip and written in base64; NaN and infinities become null."""
    form: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    try:
        text = json.dumps(value, **form)
    except ValueError:
        text = json.dumps(_finite(value), **form)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def sha256(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def certificates(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the certificates of the models of a run, one row each.

    `dtype` is that of a copy in another precision, and None for the model itself; `half` is True in half precision.
    """
    out = []
    for agent in record.get("agents", ()):
        rows = [{"model": agent["name"], "dtype": None, **found} for found in agent.get("certificates", [])]
        for row in sorted(rows, key=lambda r: r["dtype"] is not None):
            out.append(row | {"half": (row["dtype"] or agent["dtype"]) in ("bfloat16", "float16")})
    return out


def left_out(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a run left out: one row for each agent and reason, with all affected `settings`."""
    out: dict[tuple[str, str], list[str]] = {}
    for x in record.get("left_out", ()):
        out.setdefault((x["agent"], x["reason"]), []).append(x["what"])
    return [{"agent": agent, "reason": reason, "settings": some} for (agent, reason), some in out.items()]
