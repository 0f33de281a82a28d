"""One self-contained page about a response run: windows, matrices, the induction signature, its heads, the bridge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl

from nextstate.analysis import response_figures as figures
from nextstate.analysis.figures import SCALE
from nextstate.analysis.log import proved
from nextstate.analysis.page import page as pages
from nextstate.analysis.page.page import FigureList, Page
from nextstate.analysis.response_tables import LAST, ResponseRun, Signature, agreement, load
from nextstate.analysis.response_window import KINDS, Window

ROWS = 3000  # of the table of heads
PRECISIONS = ("float32", "bfloat16")


def write(run: Path) -> Path:
    """Write `report.html` and `figures/` into the folder of a response run.

    Raises:
        RunError: the folder is none, or cannot be read.
    """
    loaded = load(Path(run))
    return pages.write(make_page(loaded), loaded.info, loaded.path)


def make_page(run: ResponseRun) -> Page:
    """Return the page of a run."""
    drawn, table, told = FigureList(), run.heads, headline(run)
    carried = table is not None and told["heads"] is not None
    shown = None if table is None else (table.sort("lost", descending=True) if carried else table).head(ROWS)
    title = "Each head, left out by itself"
    sections = {
        "scales": _scales(run, drawn),
        "edges": _edges(run),
        "matrices": _matrices(run, drawn),
        "signatures": _signatures(run, drawn),
        "head_plot": [drawn.add(figures.heads(table, title))] if table is not None and carried else [],
        "bridges": _bridges(run, drawn),
        "patched": _patched(run, drawn),
    }
    context = {
        "run": run,
        "agent": run.info["agents"][0],
        "headline": told,
        "heads": [] if shown is None else shown.rows(named=True),
        "left": 0 if table is None or shown is None else len(table) - len(shown),
        "roles": figures.ROLES,
        "ramp": ", ".join(colour for _, colour in SCALE),
        **sections,
    }
    title = f"{run.info['name']}: what a weak push on one token does to the rest of {run.info['agents'][0]['name']}"
    return Page(title, template="response.html.jinja", context=context, figures=drawn)


def headline(run: ResponseRun) -> dict[str, Any]:
    """Return what the page says first, as numbers."""
    out: dict[str, Any] = {"windows": [], "signature": None, "heads": None, "bridges": []}
    for dtype in dict.fromkeys([run.dtype, *PRECISIONS]):
        if (dtype, LAST) in run.windows:
            edges = run.windows[dtype, LAST]
            n = 0 if edges.middle is None else len(edges.holds(edges.middle))
            ends = (edges.common[0], edges.common[-1]) if edges.common else (None, None)
            out["windows"].append({
                "dtype": dtype, "low": ends[0], "high": ends[1], "layers": n, "of": len(edges.layers),
                "strength": edges.middle, "open": (ends[0] == edges.strengths[0], ends[1] == edges.strengths[-1]),
            })  # fmt: skip
    found = run.signature()
    if found is not None and any(found.valid):
        out["signature"] = _told(found)
    if run.heads is not None and found is not None and found.emerges() is not None:  # else there is nothing to carry
        rows = run.heads.filter(pl.col("carries") & (pl.col("lost") > 0)).sort("lost", descending=True)
        out["heads"] = {"of": len(run.heads), "rows": rows.rows(named=True)}
    for name, rows in run.bridge.items():
        last = rows.filter(pl.col("valid") & (pl.col("layer") == rows["layer"].max()))
        values = {r["role"]: r for r in last.iter_rows(named=True)}
        if "others" in values:
            out["bridges"].append({"name": name, "roles": values, "n": int(last["transcripts"].max())})  # type: ignore[arg-type]
    return out


def _told(found: Signature) -> dict[str, Any]:
    deepest = max(k for k, ok in enumerate(found.valid) if ok)
    lines = {c: [float(x) for x in found.lines[c].value[deepest, 0]] for c in found.lines}
    added = found.added
    ends = {k: float(getattr(added, k)[deepest, 0, 0]) for k in ("value", "low", "high", "band_low")}
    return {"emerges": found.emerges(), "deepest": found.layers[deepest], "lines": lines, "added": ends,
            "prompts": added.pairs, "block": found.block}  # fmt: skip


def _limits(run: ResponseRun, kind: str) -> dict[int, float | None]:
    table = run.tables.get("exact")
    if table is None:
        return {}
    rows = table.filter(kind=kind)
    return dict(zip(rows["layer"].to_list(), rows["level"].to_list(), strict=True))


def _scales(run: ResponseRun, drawn: FigureList) -> list[dict[str, Any]]:
    out = []
    for kind in reversed(KINDS):
        shown = {d: w for (d, k), w in run.windows.items() if k == kind}
        limit = _limits(run, kind)
        words = "random directions" if kind == "random" else "along the vector itself"
        plots = [drawn.add(figures.scale(shown, limit, f"{title}, {words}", cosine))
                 for title, cosine in (("Response against strength", False), ("Direction kept", True))]  # fmt: skip
        out.append({"kind": kind, "figures": plots, "common": next(iter(shown.values())).common})
    return out


def _edges(run: ResponseRun) -> list[dict[str, Any]]:
    """Return a row a layer and kind of direction: both edges in each precision, and how far the limit is."""
    out = []
    exact = run.tables.get("exact")
    by_kind: dict[str, dict[str, Window]] = {}
    for (dtype, kind), edges in run.windows.items():
        by_kind.setdefault(kind, {})[dtype] = edges
    for kind, windows in by_kind.items():
        first = next(iter(windows.values()))
        for k, layer in enumerate(first.layers):
            row: dict[str, Any] = {"kind": kind, "layer": layer, "apart": None, "edges": []}
            for dtype, edges in windows.items():
                ends = (float(edges.low[k]), float(edges.high[k]))
                open_ends = (ends[0] == edges.strengths[0], ends[1] == edges.strengths[-1])
                row["edges"].append({"dtype": dtype, "low": ends[0], "high": ends[1], "none": math.isnan(ends[0]),
                                     "open": open_ends})  # fmt: skip
            if exact is not None and layer in run.holds(kind):
                row["apart"] = exact.filter(kind=kind, layer=layer)["apart"][0]
            out.append(row)
    return out


def _matrices(run: ResponseRun, drawn: FigureList) -> dict[str, Any] | None:
    layers, block, repeats = list(run.holds(LAST)), run.config["block"], run.config["repeats"]
    titles = {"repeated": "A block, repeated", "control": "Control: nothing is repeated"}
    tables = {c: t for c in titles if (t := run.tables.get(f"matrix-{c}-{LAST}")) is not None}
    if not tables or not layers:
        return None
    reach = figures.ends(list(tables.values()), layers)
    words = ["BOS"] * (tables["repeated"]["position"].n_unique() - block * repeats)
    words += [f"block {1 + i // block}, token {1 + i % block}" for i in range(block * repeats)]
    shown = [drawn.add(figures.matrices(t, layers, words, titles[c], reach)) for c, t in tables.items()]
    return {"figures": shown, "low": 10 ** reach[0], "high": 10 ** reach[1]}


def _signatures(run: ResponseRun, drawn: FigureList) -> list[dict[str, Any]]:
    out = []
    for kind in reversed(KINDS):
        found = run.signature(kind)
        if found is None or not any(found.valid):
            continue
        share = run.signature(kind, relative=True)
        assert share is not None
        plots = [drawn.add(figures.depth(found, "Response by offset")),
                 drawn.add(figures.depth(share, "As a share of the stream there", "share"))]  # fmt: skip
        rows = []
        for k, layer in enumerate(found.layers):
            one = found.added
            numbers = {
                f"{name}_{end}": float(getattr(one, end)[k, 0, c]) if found.valid[k] else None
                for c, name in enumerate(("before", "same"))
                for end in ("value", "low", "high", "band_low", "band_high")
            }  # fmt: skip
            rows.append({"layer": layer, "others": float(found.lines["repeated"].value[k, 0, 2])
                         if found.valid[k] else None} | numbers)  # fmt: skip
        out.append({"kind": kind, "figures": plots, "rows": rows, "prompts": found.added.pairs,
                    "stripes": drawn.add(figures.stripes(found, "What repetition adds, by offset"))})  # fmt: skip
    return out


def _bridges(run: ResponseRun, drawn: FigureList) -> list[dict[str, Any]]:
    out = []
    for name, edges in run.edges.items():
        game, kind = name.split("-")
        one: dict[str, Any] = {"game": game, "kind": kind, "figure": None, "dropped": [], "strength": edges.middle,
                               "common": edges.common}  # fmt: skip
        rows = run.bridge.get(name)
        if rows is not None:
            n = int(rows["transcripts"].max())  # type: ignore[arg-type]
            one["figure"] = drawn.add(figures.bridge(rows, f"{game}, {kind} pairs (n = {n})"))
            one["dropped"] = rows.filter(~pl.col("valid"))["layer"].unique().sort().to_list()
        out.append(one)
    return out


def _patched(run: ResponseRun, drawn: FigureList) -> dict[str, Any] | None:
    """Return the heads of a patching run beside what their absence does to the response, a figure a kind."""
    found, table = run.bridge_heads, run.tables.get("patching")
    if not found or table is None:
        return None
    plots, columns = [], table
    for kind in ("state", "action"):
        rows = next((t.filter(role=kind) for name, t in found.items() if name.endswith(f"-{kind}")), None)
        if rows is None or not len(rows):
            continue
        both = table.join(rows.select("layer", "head", "lost", "low", "high"), on=["layer", "head"], how="inner")
        names = [f"{a}.{b}" for a, b in both.select("layer", "head").iter_rows()]
        rank = agreement(both[kind].to_list(), both["lost"].to_list())
        title = f"{kind.capitalize()}: Spearman {'–' if rank is None else f'{rank:.2f}'}"
        plots.append(drawn.add(figures.side_by_side(both[kind].to_list(), both["lost"].to_list(), names, title,
                                                    figures.ROLES[kind])))  # fmt: skip
        ends = rows.select("layer", "head", *(pl.col(c).alias(f"{kind}_{c}") for c in ("lost", "low", "high")))
        columns = columns.join(ends, on=["layer", "head"], how="left")
    names = [f"{k}_{c}" for k in ("state", "action") for c in ("lost", "low", "high")]
    absent = [pl.lit(None, dtype=pl.Float64).alias(name) for name in names if name not in columns.columns]
    columns = columns.with_columns(*absent)
    return {"figures": plots, "rows": columns.rows(named=True), "path": run.config["patching"]}


def mirrored(run: ResponseRun) -> dict[str, Any]:
    """Return what W&B is given at the end: how the model was run, summary numbers and the figures."""
    told, out = headline(run), dict[str, Any](proved(run.info))
    for x in told["windows"]:
        out |= {f"summary/window/{x['dtype']}/{k}": x[k] for k in ("low", "high", "layers") if x[k] is not None}
    for kind in KINDS:
        shown = {d: w for (d, k), w in run.windows.items() if k == kind}
        out[f"figures/window_{kind}"] = figures.scale(shown, _limits(run, kind), f"Response against strength, {kind}")
        found = run.signature(kind)
        if found is not None and any(found.valid):
            out[f"figures/signature_{kind}"] = figures.depth(found, f"Response by offset, {kind}")
            out[f"figures/offsets_{kind}"] = figures.stripes(found, f"What repetition adds, {kind}")
    if told["signature"] is not None:
        out["summary/signature"] = told["signature"]["added"]["value"]
        if told["signature"]["emerges"] is not None:
            out["summary/signature_emerges"] = told["signature"]["emerges"]
    rows, layers = run.tables.get(f"matrix-repeated-{LAST}"), list(run.holds(LAST))
    if rows is not None and layers:
        words = [""] * rows["position"].n_unique()
        reach = figures.ends([rows], layers)
        out["figures/matrices"] = figures.matrices(rows, layers, words, "A block, repeated", reach)
    if run.heads is not None and told["heads"] is not None:
        out["figures/heads"] = figures.heads(run.heads, "Each head, left out by itself")
        out["summary/heads"] = len(told["heads"]["rows"])
    for name, rows in run.bridge.items():
        out[f"figures/bridge_{name}"] = figures.bridge(rows, name)
    return out
