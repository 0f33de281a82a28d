"""What the report pages share: templates, scripts allowed by hash, figures for the browser, text that stays text."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from nextstate.envs.files import path_error

ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def environment(**filters: Callable[..., Any]) -> jinja2.Environment:
    """Return where the templates are, with autoescape on and the filters all pages have."""
    out = jinja2.Environment(
        loader=jinja2.PackageLoader("nextstate.analysis", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    out.filters |= {"percent": percent, "embed": embed, "number": lambda n: f"{n:,}", "exponent": exponent, **filters}
    return out


def furniture(templates: jinja2.Environment, script: str) -> dict[str, Any]:
    """Return what every page is rendered with: its scripts, their hashes, and the style."""
    scripts = {"plotly": get_plotlyjs(), "page": templates.get_template(script).render()}
    return {
        "scripts": {name: Markup(text) for name, text in scripts.items()},
        "hashes": " ".join(f"'sha256-{sha256(text)}'" for text in scripts.values()),
        "style": Markup(templates.get_template("report.style.html.jinja").render()),
    }


def replace(path: Path, make: Callable[[Path], Any]) -> Path:
    """Let `make` write a file beside `path`, then rename it: a killed call leaves what was there.

    Raises:
        PathError: `path` cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            make(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise path_error(error, path) from error
    except pl.exceptions.ComputeError as error:  # what Polars makes of a full disk
        raise path_error(OSError(errno.ENOSPC, str(error)), path) from error
    return path


def embed(value: Any) -> Markup:
    """Return `value` as JSON that may stand inside a script element whatever text it holds; NaN becomes null."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(ESCAPES))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def sha256(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class Drawn:
    """The figures of the page, in the order in which they were added."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []
        self.slugs: Counter[str] = Counter()

    def add(self, figure: Any, where: str = "") -> dict[str, Any]:
        """Keep the figure; return its place in the list, its title (which the page sets as text) and its height.

        Args:
            figure: of Plotly, with a title.
            where: what it is a figure of, where its title does not say; it goes before the title in the file's name.
        """
        data = json.loads(figure.to_json())
        title = data["layout"].pop("title")["text"]
        data["slug"] = self._slug(f"{where} {Markup(title).unescape()}")
        data["layout"]["margin"]["t"] = 8
        data["layout"]["height"] -= 26
        for trace in data["data"]:
            if trace["type"] == "heatmap":
                trace["showscale"] = False  # the page draws one scale for all
        self.figures.append(data)
        return {"at": len(self.figures) - 1, "title": Markup(title).unescape(), "height": data["layout"]["height"]}

    def _slug(self, words: str) -> str:
        """Return the name that the figure's file gets where it is saved: its words, numbered where others have them."""
        slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:80] or "figure"
        self.slugs[slug] += 1
        return slug if self.slugs[slug] == 1 else f"{slug}-{self.slugs[slug]}"


def percent(value: float | None) -> str:
    """Return a share as a reader wants it: "87.3 %", "100 %"; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.1f}".removesuffix(".0") + "\u202f%"


def exponent(value: float) -> str:
    """Return a number with two digits, in scientific notation: "2.6e-04", and 0 as "0"."""
    return f"{value:.1e}" if value else "0"


def certificates(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was proved of how each model of a run was run, a row each, from `run.json`.

    `dtype` is that of a copy in another precision, and None for the model itself; `half` tells half precision.
    """
    out = []
    for agent in info["agents"]:
        rows = [{"model": agent["name"], "dtype": None, **found} for found in agent.get("certificates", [])]
        for row in sorted(rows, key=lambda r: r["dtype"] is not None):
            out.append(row | {"half": (row["dtype"] or agent["dtype"]) in ("bfloat16", "float16")})
    return out


def left_out(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a run left out: a row for each agent and reason, with all `settings` that it goes for."""
    out: dict[tuple[str, str], list[str]] = {}
    for x in info["left_out"]:
        out.setdefault((x["agent"], x["reason"]), []).append(x["setting"])
    return [{"agent": agent, "reason": reason, "settings": some} for (agent, reason), some in out.items()]
