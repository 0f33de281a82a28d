"""The report page of a patching run: which heads carry state, which carry action, with intervals."""

from __future__ import annotations

import json
from typing import Any

import polars as pl

from nextstate.analysis.heads import figures
from nextstate.analysis.heads.config import ADVISED_PAIRS, MIN_EFFECT, PatchConfig, main_first
from nextstate.analysis.heads.published import summed
from nextstate.analysis.heads.recovery import too_few
from nextstate.analysis.page.page import FigureList, Page, Plot
from nextstate.analysis.run import Run

ROWS = 3000  # most rows of the table of heads on the page
ABLATIONS = ("zero", "mean", "resample")
LAYERS = {
    "resid_pre": "Residual stream before each layer: recovery",
    "attn_out": "Attention output of each layer: recovery",
    "mlp_out": "MLP output of each layer: recovery",
}


def page(run: Run[PatchConfig]) -> Page:
    """Return the page, from the tables of `summary/`."""
    found, drawn = run.summaries(), FigureList()
    heads, sweeps = found["heads"], found["sweeps"]
    counts = [row | {"left_out": _reasons(found["excluded"], row)} for row in found["counts"].rows(named=True)]
    shown = heads.sort(pl.max_horizontal("state", "action"), descending=True).head(ROWS)
    context = {
        "agent": run.record["agents"][0],
        "headline": headline(run, counts, sweeps, heads),
        "counts": counts,
        "failed": [c for c in counts if not c["kept"]],
        "maps": _maps(counts, sweeps, drawn),
        "layers": _layers(found["layers"], drawn),
        "by_layer": found["layers"].filter(pl.col("site") != "resid_pre").rows(named=True),
        "positions": _positions(found, drawn),
        "against": [drawn.add(figures.against(heads, "Recovery of each head, by kind of pair"))] if len(heads) else [],
        "published": _published(found, drawn),
        "screens": _screens(found, drawn),
        "examples": _examples(found["examples"]),
        "attention": _attention(found["attention"], heads),
        "heads": shown.rows(named=True),
        "left": len(heads) - len(shown),
        "least": MIN_EFFECT,
        "enough": 2 * ADVISED_PAIRS,
        "sweeps": sweeps.select("design", "kind", "site", "direction", "where", "exact").n_unique(),
        "control": sweeps.filter("exact")["control"].drop_nans().max(),
    }
    title = f"{run.config.name}: {run.config.agent} in {run.config.game}"
    return Page(title, template="heads/page.html.jinja", context=context, figures=drawn)


def _reasons(excluded: pl.DataFrame, row: dict[str, Any]) -> list[tuple[str, int]]:
    return excluded.filter(design=row["design"], kind=row["kind"]).select("reason", "pairs").rows()


def headline(
    run: Run[PatchConfig], counts: list[dict[str, Any]], sweeps: pl.DataFrame, heads: pl.DataFrame
) -> dict[str, Any]:
    """Return the numbers of the first paragraphs: the heads that carry each kind, and the summed recoveries."""
    design = main_first(list(dict.fromkeys(c["design"] for c in counts)))[0]
    out: dict[str, Any] = {"design": design, "kinds": {}, "routing": None, "share": None}
    for row in (c for c in counts if c["design"] == design and c["kind"] in ("state", "action")):
        own = sweeps.filter(design=design, kind=row["kind"], site="head", direction="denoise", where="last", exact=True)
        best, tested = (
            own.filter("carries").sort("recovery", descending=True),
            int(own["tested"].sum()) // max(1, len(own)),
        )
        out["kinds"][row["kind"]] = {
            "counts": row, "heads": best.rows(named=True), "of": len(own), "tested": tested,
            "known": own["carries"].null_count() < len(own), "few": too_few(tested),
            "total": float(own["recovery"].sum()) if len(own) else None,
        }  # fmt: skip
    if len(heads):
        out["known"] = all(heads[f"{kind}_p"].null_count() < len(heads) for kind in ("state", "action"))
        order = heads.sort(pl.max_horizontal("state", "action"), descending=True, maintain_order=True)
        out["routing"] = {
            label: order.filter(carries=label).select("layer", "head").rows() for label in ("state", "action", "both")
        }
        sums = [float(heads[kind].clip(0, None).sum()) for kind in ("state", "action")]
        out["share"] = sums[0] / sum(sums) if sum(sums) > 0 else None
    return out


def _maps(counts: list[dict[str, Any]], sweeps: pl.DataFrame, drawn: FigureList) -> list[dict[str, Any]]:
    """Return the heat maps over heads, grouped by design: for each kind one map for each direction."""
    out = []
    for design in dict.fromkeys(c["design"] for c in counts):
        for group, where in ((tuple(figures.DIRECTIONS), "last"), (ABLATIONS, "all")):
            own = sweeps.filter(pl.col("direction").is_in(group), design=design, site="head", where=where, exact=True)
            reach = max(0.1, float(own["recovery"].abs().max() or 0))  # type: ignore[arg-type]
            maps = []
            for kind in (c["kind"] for c in counts if c["design"] == design):
                for direction in group:
                    one = own.filter(kind=kind, direction=direction)
                    if len(one):
                        words = figures.DIRECTIONS.get(direction, f"{direction} ablation")
                        title = f"{kind.capitalize()} pairs, {words} (n = {one['pairs'][0]})"
                        where_ = "" if design == "balanced" else design
                        maps.append(drawn.add(figures.head_map(one, title, reach), where_))
            if maps:
                out.append({"design": design, "maps": maps, "reach": reach, "ablated": group is ABLATIONS})
    return out


def _layers(layers: pl.DataFrame, drawn: FigureList) -> list[Plot]:
    parts = ((layers.filter(site=site), title) for site, title in LAYERS.items())
    return [drawn.add(figures.by_layer(rows, title)) for rows, title in parts if len(rows)]


def _positions(found: dict[str, pl.DataFrame], drawn: FigureList) -> list[dict[str, Any]]:
    out = []
    for design, kind in found["counts"].select("design", "kind").iter_rows():
        rows = found["sweeps"].filter(design=design, kind=kind, site="resid_pre", direction="denoise", where="map")
        if rows.is_empty():
            continue
        columns = rows["position"].unique(maintain_order=True).to_list()
        example = found["examples"].filter(design=design, kind=kind, kept=True).row(0, named=True)
        by_token = columns[0].isdigit()
        words = [_visible(example["pieces"][int(c)]) for c in columns] if by_token else columns
        reach = max(0.1, float(rows["recovery"].abs().max()))  # type: ignore[arg-type]
        title = f"{_named(design, kind)} pairs, residual stream denoised (n = {rows['pairs'][0]})"
        out.append({"figure": drawn.add(figures.position_map(rows, words, title, reach)), "by_token": by_token})
    return out


def _published(found: dict[str, pl.DataFrame], drawn: FigureList) -> list[dict[str, Any]]:
    """Return for each kind the published head map with ours of the same design, and the published position maps."""
    out = []
    for (kind,), rows in found["published"].group_by("kind", maintain_order=True):
        patched = rows.unique(["size", "trial"], maintain_order=True, keep="first")
        heads, word = summed(rows), "steps" if kind == "state" else "distance"
        maps = []
        if len(heads):
            title = f"{kind.capitalize()} pairs, sum over {heads['trials'][0]} trials, as published"
            maps.append(drawn.add(figures.published_heads(heads, title), "sum"))
            ours = found["sweeps"].filter(
                design="paper", kind=kind, site="head", direction="denoise", where="last", exact=True
            )
            if len(ours):
                reach = max(0.1, float(ours["recovery"].abs().max()))  # type: ignore[arg-type]
                title = f"{kind.capitalize()} pairs, our ratio of means (n = {ours['pairs'][0]})"
                maps.append(drawn.add(figures.head_map(ours, title, reach), "mean"))
        streams = [
            drawn.add(figures.published_positions(mine, f"{kind.capitalize()} pairs, {word} = {size}, resid_pre"))
            for (size,), mine in rows.filter(site="resid_pre").group_by("size", maintain_order=True)
        ]
        trials = [row | {"word": word, "zero": row["score"] is not None} for row in patched.rows(named=True)]
        out.append({"kind": kind, "maps": maps, "streams": streams, "trials": trials})
    return out


def _named(design: str, kind: str) -> str:
    return (kind if design == "balanced" else f"{design} {kind}").capitalize()


def _visible(token: str) -> str:
    return token.strip() or {"\n": "↵", " ": "␣"}.get(token, "·")


def _screens(found: dict[str, pl.DataFrame], drawn: FigureList) -> list[dict[str, Any]]:
    out = []
    for design, kind, agreement in found["screens"].iter_rows():
        rows = found["effects"].filter(design=design, kind=kind)
        title = f"{_named(design, kind)} pairs: Spearman {agreement:.2f}"
        figure = figures.screened(rows, title, figures.COLOURS.get(kind, figures.COLOURS["both"]))
        out.append({"kind": _named(design, kind), "agreement": agreement, "figure": drawn.add(figure)})
    return out


def _examples(examples: pl.DataFrame) -> list[dict[str, Any]]:
    """Return the example pairs, with the words marked in which their prompts differ."""
    out = []
    for row in examples.iter_rows(named=True):
        sides = [row["clean"].split(" "), row["corrupted"].split(" ")]
        same = len(sides[0]) == len(sides[1])
        marked = [
            [(word, word != other) for word, other in zip(a, b, strict=True)] if same else [(row[side], False)]
            for a, b, side in ((sides[0], sides[1], "clean"), (sides[1], sides[0], "corrupted"))
        ]
        out.append(row | {"marked": marked})
    return out


def _attention(table: pl.DataFrame, heads: pl.DataFrame) -> list[dict[str, Any]]:
    """Return, for each example, the attention weights of the top heads from the answering token to each token."""
    out = []
    for (kind,), rows in table.group_by("kind", maintain_order=True):
        shown = []
        for row in rows.iter_rows(named=True):
            numbers = heads.filter(layer=row["layer"], head=row["head"]).row(0, named=True)
            roles: dict[int, list[str]] = {}
            for name, at in json.loads(row["roles"]).items():
                roles.setdefault(at, []).append(name)
            tokens = [
                {"text": token, "weight": weight, "role": ", ".join(roles.get(i, ()))}
                for i, (token, weight) in enumerate(zip(row["tokens"], row["weights"], strict=True))
            ]
            top = sorted(tokens, key=lambda t: -t["weight"])[:3]
            most = [(_visible(t["text"]), t["weight"], t["role"]) for t in top]
            shown.append(numbers | {"tokens": tokens, "top": most})
        out.append({"kind": kind, "answer": rows["answer"][0].strip(), "heads": shown})
    return out
