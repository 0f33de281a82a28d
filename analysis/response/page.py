"""The report page of a response run: windows, matrices, the induction signature, its heads, the bridge to games."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from nextstate.analysis.figures import SCALE
from nextstate.analysis.heads.config import MIN_EFFECT
from nextstate.analysis.page.page import FigureList, Page
from nextstate.analysis.response import figures
from nextstate.analysis.response.config import CONDITIONS, KINDS, RANDOM, ResponseConfig
from nextstate.analysis.run import Run

ROWS = 3000  # most rows of the table of heads on the page
ENDS = ("value", "low", "high", "band_low", "band_high")
Tables = dict[str, pl.DataFrame]


def page(run: Run[ResponseConfig]) -> Page:
    """Return the page, from the tables of `summary/`."""
    found, drawn, agent = run.summaries(), FigureList(), run.record["agents"][0]
    findings, table = headline(found), found["heads"]
    carried = findings["heads"] is not None
    shown = (table.sort("lost", descending=True) if carried else table).head(ROWS)
    context = {
        "config": run.config,
        "agent": agent,
        "headline": findings,
        "scales": _scales(found, drawn),
        "edges": _edges(found),
        "matrices": _matrices(found, run.config, drawn),
        "signatures": _signatures(found, run.config, drawn),
        "head_plot": [drawn.add(figures.heads(table, "Signature lost without each head"))] if carried else [],
        "heads": shown.rows(named=True),
        "left": len(table) - len(shown),
        "bridges": _bridges(found, drawn),
        "patched": _patched(found, drawn),
        "least": MIN_EFFECT,
        "control": found["signature"]["control"].max(),
        "roles": figures.ROLES,
        "ramp": ", ".join(colour for _, colour in SCALE),
    }
    title = f"{run.config.name}: response of {agent['name']} to weak pushes on single tokens"
    return Page(title, template="response/page.html.jinja", context=context, figures=drawn)


def headline(found: Tables) -> dict[str, Any]:
    """Return the numbers of the first paragraphs of the page."""
    windows = found["precisions"].filter(kind=RANDOM).rows(named=True)
    out: dict[str, Any] = {"windows": windows, "signature": None, "heads": None, "bridges": []}
    for row in found["signature"].filter(kind=RANDOM).iter_rows(named=True):
        where = {"kind": RANDOM, "layer": row["deepest"]}
        lines = found["lines"].filter(measure="response", **where)
        values = {c: dict(lines.filter(condition=c).select("at", "value").iter_rows()) for c in CONDITIONS}
        added = found["added"].filter(at="before", **where).row(0, named=True)
        elsewhere = found["added"].filter("significant", at="before", kind=RANDOM)["layer"].to_list()
        out["signature"] = row | {"lines": values, "added": added, "elsewhere": elsewhere}
        if row["emerges"] is not None and len(found["heads"]):  # otherwise heads have nothing to contribute to
            heads = found["heads"].filter(pl.col("significant") & (pl.col("lost") > 0)).sort("lost", descending=True)
            out["heads"] = {"of": len(found["heads"]), "rows": heads.rows(named=True)}
    for (game, pairs), rows in found["bridge"].group_by("game", "pairs", maintain_order=True):
        last = rows.filter("valid", layer=rows["layer"].max())
        roles = {row["role"]: row for row in last.iter_rows(named=True)}
        if "others" in roles:
            out["bridges"].append({"game": game, "pairs": pairs, "roles": roles, "n": last["transcripts"].max()})
    return out


def _scales(found: Tables, drawn: FigureList) -> list[dict[str, Any]]:
    out = []
    for kind in reversed(KINDS):
        rows, limits = found["windows"].filter(kind=kind), found["exact"].filter(kind=kind)
        limit = dict(limits.select("layer", "level").iter_rows())
        own = found["precisions"].filter(kind=kind).row(0, named=True)
        common = None if own["low"] is None else (own["low"], own["high"])
        words = "random directions" if kind == RANDOM else "along the vector itself"
        plots = [drawn.add(figures.scale(rows, limit, f"{title}, {words}", common, cosine))
                 for title, cosine in (("Response by strength", False), ("Cosine to next strength", True))]  # fmt: skip
        out.append({"kind": kind, "figures": plots, "common": common})
    return out


def _edges(found: Tables) -> list[dict[str, Any]]:
    """Return a row for each layer and kind of direction: its window in each precision, and the error of the limit."""
    out = []
    for kind in reversed(KINDS):
        strength = found["precisions"].filter(kind=kind)["strength"][0] or math.nan
        for (layer,), mine in found["windows"].filter(kind=kind).group_by("layer", maintain_order=True):
            ends = mine.group_by("dtype", maintain_order=True).agg(
                pl.col("low", "high").first(), first=pl.col("strength").first(), last=pl.col("strength").last()
            )
            edges = ends.rows(named=True)
            inside = edges[0]["low"] is not None and edges[0]["low"] <= strength <= edges[0]["high"]
            apart = found["exact"].filter(kind=kind, layer=layer)["apart"].to_list() if inside else []
            out.append({"kind": kind, "layer": layer, "edges": edges, "apart": apart[0] if apart else None})
    return out


def _matrices(found: Tables, config: ResponseConfig, drawn: FigureList) -> dict[str, Any] | None:
    titles = {"repeated": "Repeated blocks", "control": "Control without repetition"}
    tables = {c: rows for c in titles if len(rows := found["matrices"].filter(condition=c))}
    if not tables:
        return None
    block, first = config.block, next(iter(tables.values()))
    layers = first["layer"].unique(maintain_order=True).to_list()
    reach = figures.ends(list(tables.values()), layers)
    words = ["BOS"] * (first["position"].n_unique() - block * config.repeats)
    words += [f"block {1 + i // block}, token {1 + i % block}" for i in range(block * config.repeats)]
    shown = [drawn.add(figures.matrices(rows, layers, words, titles[c], reach)) for c, rows in tables.items()]
    return {"figures": shown, "low": 10 ** reach[0], "high": 10 ** reach[1]}


def _signatures(found: Tables, config: ResponseConfig, drawn: FigureList) -> list[dict[str, Any]]:
    out = []
    for kind in reversed(KINDS):
        if found["signature"].filter(kind=kind).is_empty():
            continue
        lines, added = found["lines"].filter(kind=kind), found["added"].filter(kind=kind)
        where = "" if kind == RANDOM else kind
        plots = [
            drawn.add(figures.depth(lines.filter(measure=measure), title, words), where)
            for measure, title, words in (
                ("response", "Response by offset", "response"),
                ("relative", "Response relative to the stream, by offset", "relative response"),
            )
        ]
        others = lines.filter(measure="response", condition="repeated", at="others").select("layer", others="value")
        columns = [
            added.filter(at=at).select(
                "layer", "valid", *(pl.col(end).alias(f"{at}_{end}") for end in (*ENDS, "significant"))
            )
            for at in ("before", "same")
        ]
        rows = columns[0].join(columns[1].drop("valid"), on="layer").join(others, on="layer").sort("layer")
        offsets = figures.stripes(found["offsets"].filter(kind=kind), config.block, "Increase by repetition, by offset")
        out.append({
            "kind": kind, "figures": plots, "rows": rows.rows(named=True), "stripes": drawn.add(offsets, where),
            "prompts": found["signature"].filter(kind=kind)["prompts"][0],
        })  # fmt: skip
    return out


def _bridges(found: Tables, drawn: FigureList) -> list[dict[str, Any]]:
    out = []
    for edges in found["edges"].iter_rows(named=True):
        game, pairs = edges["game"], edges["pairs"]
        rows, one = found["bridge"].filter(game=game, pairs=pairs), edges | {"figure": None, "dropped": []}
        if len(rows):
            title = f"{game}, {pairs} pairs (n = {max(rows['transcripts'])})"
            one["figure"] = drawn.add(figures.bridge(rows, title))
            one["dropped"] = rows.filter(~pl.col("valid"))["layer"].unique().sort().to_list()
        out.append(one)
    return out


def _patched(found: Tables, drawn: FigureList) -> dict[str, Any] | None:
    """Return the heads of a patching run with the share of the response that is lost without each of them."""
    table = found["bridge_heads"]
    if table.is_empty():
        return None
    plots, columns = [], table.select("layer", "head", "state", "action").unique(maintain_order=True)
    for kind in ("state", "action"):
        rows = table.filter(role=kind, pairs=kind)
        rows = rows.filter(game=rows["game"][0]) if len(rows) else rows
        if len(rows):
            rank = found["ranks"].filter(kind=kind)["spearman"][0]
            title = f"{kind.capitalize()}: Spearman {'–' if math.isnan(rank) else f'{rank:.2f}'}"
            plots.append(drawn.add(figures.side_by_side(rows, kind, title)))
        ends = rows.select("layer", "head", *(pl.col(end).alias(f"{kind}_{end}") for end in ("lost", "low", "high")))
        columns = columns.join(ends, on=["layer", "head"], how="left")
    return {"figures": plots, "rows": columns.rows(named=True)}
