"""One self-contained page about a patching run: which heads carry state, which carry action, and how sure that is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nextstate.analysis.heads import figures
from nextstate.analysis.heads.recovery import rank_agreement
from nextstate.analysis.heads.routing import LEAST, Routing, carriers, head_table
from nextstate.analysis.heads.tables import HeadsRun, load
from nextstate.analysis.log import proved
from nextstate.analysis.page import Drawn, certificates, environment, furniture, left_out, replace

FEW = 20  # pairs, under which intervals are too narrow to lean on
ROWS = 3000  # of the table of heads
EXAMPLES = 2  # pairs of a kind that are shown
ABLATIONS = ("zero", "mean", "resample")


def write(run: Path) -> Path:
    """Write `report.html` into the folder of a patching run. The page needs no network.

    Raises:
        RunError: the folder is none, or cannot be read.
    """
    loaded = load(Path(run))
    page = render(loaded)
    return replace(loaded.path / "report.html", lambda path: path.write_text(page, encoding="utf-8"))


def render(run: HeadsRun) -> str:
    """Return the page as text."""
    templates = environment(two=_two)
    drawn, routes = Drawn(), _routes(run)
    heads = pl.read_parquet(run.path / "heads.parquet") if (run.path / "heads.parquet").is_file() else None
    shown = None if heads is None else heads.sort(pl.max_horizontal("state", "action"), descending=True).head(ROWS)
    sections = {
        "maps": _maps(run, drawn),
        "layers": [drawn.add(f) for f in _layers(routes)],
        "positions": _positions(run, drawn),
        "against": []
        if heads is None
        else [drawn.add(figures.against(heads, "Recovery of each head, by kind of pair"))],
        "screens": _screens(run, drawn),
    }
    return templates.get_template("heads.html.jinja").render(
        run=run,
        info=run.info,
        certificates=certificates(run.info),
        left_out=left_out(run.info),
        agent=run.info["agents"][0],
        headline=headline(run, routes.get(("head", "denoise"))),
        counts=[{"design": d, "kind": k} | c for (d, k), c in run.counts.items()],
        failed=[{"design": d, "kind": k} | c for (d, k), c in run.counts.items() if not c["kept"]],
        by_layer=by_layer(run, _main(run)).filter(pl.col("site") != "resid_pre").rows(named=True),
        examples=_examples(run),
        attention=_attention(run),
        heads=[] if shown is None else shown.rows(named=True),
        left=0 if heads is None or shown is None else len(heads) - len(shown),
        few=FEW,
        least=LEAST,
        sweeps=len(run.sweeps),
        control=max([float(s["control"][0]) for s in run.sweeps.values() if s["exact"][0]], default=None),
        drawn=drawn.figures,
        **sections,
        **furniture(templates, "heads.script.html.jinja"),
    )


def _two(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _main(run: HeadsRun) -> str:
    """Return the design that the page tells first."""
    designs = [d for d, _ in run.counts]
    return "balanced" if "balanced" in designs else designs[0]


def _routes(run: HeadsRun) -> dict[tuple[str, str], Routing]:
    found = {
        (site, direction): run.routing(_main(run), site, direction)
        for site in ("head", "resid_pre", "attn_out", "mlp_out")
        for direction in ("denoise", "noise")
    }
    return {key: one for key, one in found.items() if one is not None}


def by_layer(run: HeadsRun, design: str) -> pl.DataFrame:
    """Return state against action for whole layers at the answering token: a row a site and layer."""
    found = []
    for site in ("resid_pre", "attn_out", "mlp_out"):
        one = run.routing(design, site)
        if one is not None:
            table = head_table(one, range(one.value.shape[0])).drop("head")
            found.append(table.select(pl.lit(site).alias("site"), pl.all()))
    return pl.concat(found) if found else pl.DataFrame(schema={"site": pl.String})


def headline(run: HeadsRun, found: Routing | None) -> dict[str, Any]:
    """Return what the page says first, as numbers: the heads that stand out by kind, and what all heads bring."""
    design = _main(run)
    out: dict[str, Any] = {"design": design, "kinds": {}, "routing": None}
    for kind in ("state", "action"):
        counts = run.counts.get((design, kind))
        if counts is None:
            continue
        told: dict[str, Any] = {"counts": counts, "heads": [], "total": None}
        sweep = run.get(design, kind, "head", "denoise", "last")
        if sweep is not None:
            best = sweep.filter(pl.col("carries") & (pl.col("recovery").abs() >= LEAST))
            best = best.sort("recovery", descending=True)
            told |= {"heads": best.rows(named=True), "of": len(sweep), "total": float(sweep["recovery"].sum())}
        out["kinds"][kind] = told
    if found is not None:
        order = np.maximum(found.state.value, found.action.value)[..., 0]
        out["routing"] = {}
        for label in ("state", "action", "both", "unclear"):
            slots = [(int(a), int(b)) for a, b in np.argwhere(found.labels[..., 0] == label)]
            out["routing"][label] = sorted(slots, key=lambda slot: -order[slot])
        sums = [float(np.maximum(one.value, 0).sum()) for one in (found.state, found.action)]
        out["share"] = sums[0] / sum(sums) if sum(sums) > 0 else None
    return out


def _maps(run: HeadsRun, drawn: Drawn) -> list[dict[str, Any]]:
    """Return the heatmaps over heads, by design: a row a kind, denoised and noised beside each other."""
    out = []
    for design in dict.fromkeys(d for d, _ in run.counts):
        kinds = [k for d, k in run.counts if d == design]
        rows = {
            (kind, direction): run.get(design, kind, "head", direction, "all" if direction in ABLATIONS else "last")
            for kind in kinds
            for direction in (*figures.DIRECTIONS, *ABLATIONS)
        }
        found = {key: one for key, one in rows.items() if one is not None}
        if not found:
            continue
        reach = {
            group: max([0.1, *(float(one["recovery"].abs().max()) for (_, d), one in found.items() if d in group)])
            for group in (tuple(figures.DIRECTIONS), ABLATIONS)
        }
        for group, bound in reach.items():
            maps = []
            for (kind, direction), one in found.items():
                if direction in group:
                    said = figures.DIRECTIONS.get(direction, f"{direction} ablation")
                    title = f"{kind.capitalize()} pairs, {said} (n = {one['pairs'][0]})"
                    maps.append(drawn.add(figures.head_map(one, title, bound)))
            if maps:
                out.append({"design": design, "maps": maps, "reach": bound, "ablated": group is ABLATIONS})
    return out


def _layers(routes: Mapping[tuple[str, str], Routing]) -> list[Any]:
    titles = {
        "resid_pre": "What has arrived before each layer",
        "attn_out": "What each layer's attention brings it",
        "mlp_out": "What each layer's MLP does there",
    }
    return [figures.arrival(routes[site, "denoise"], t) for site, t in titles.items() if (site, "denoise") in routes]


def _positions(run: HeadsRun, drawn: Drawn) -> list[dict[str, Any]]:
    out = []
    for (design, kind), _ in run.counts.items():
        rows = run.get(design, kind, "resid_pre", "denoise", "map")
        if rows is None:
            continue
        columns = rows["position"].unique(maintain_order=True).to_list()
        example = run.pairs.filter(design=design, kind=kind, kept=True).row(0, named=True)
        by_token = columns[0].isdigit()
        words = [_visible(example["pieces"][int(c)]) for c in columns] if by_token else columns
        reach = max(0.1, float(rows["recovery"].abs().max()))
        name = kind if design == "balanced" else f"{design} {kind}"
        title = f"{name.capitalize()} pairs, residual stream denoised (n = {rows['pairs'][0]})"
        out.append({"figure": drawn.add(figures.position_map(rows, words, title, reach)), "by_token": by_token})
    return out


def _visible(token: str) -> str:
    return token.strip() or {"\n": "↵", " ": "␣"}.get(token, "·")


def _screens(run: HeadsRun, drawn: Drawn) -> list[dict[str, Any]]:
    out = []
    for design, kind in run.counts:
        exact = run.sweep(design, kind, "head", "denoise", "last")
        estimate = run.sweep(design, kind, "head", "denoise", "last", False)
        if exact is None or estimate is None:
            continue
        agreement = rank_agreement(exact, estimate)
        name = kind if design == "balanced" else f"{design} {kind}"
        title = f"{name.capitalize()} pairs: Spearman {agreement:.2f}"
        figure = figures.screened(exact, estimate, title, figures.COLOURS.get(kind, figures.COLOURS["both"]))
        out.append({"kind": name, "agreement": agreement, "figure": drawn.add(figure)})
    return out


def _examples(run: HeadsRun) -> list[dict[str, Any]]:
    """Return a few pairs of each kind; the words in which the prompts differ are marked."""
    out = []
    for design, kind in run.counts:
        rows = run.pairs.filter(design=design, kind=kind).sort("kept", descending=True, maintain_order=True)
        for row in rows.head(EXAMPLES).iter_rows(named=True):
            sides = [row["clean"].split(" "), row["corrupted"].split(" ")]
            same = len(sides[0]) == len(sides[1])
            marked = [
                [(word, same and word != other) for word, other in zip(a, b, strict=False)]
                if same
                else [(row[s], False)]
                for a, b, s in ((sides[0], sides[1], "clean"), (sides[1], sides[0], "corrupted"))
            ]
            out.append(row | {"marked": marked})
    return out


def _attention(run: HeadsRun) -> list[dict[str, Any]]:
    """Return for each example the attention of the top heads from the answering token, as shades of its tokens."""
    path = run.path / "attention.parquet"
    if not path.is_file():
        return []
    out = []
    table, heads = pl.read_parquet(path), pl.read_parquet(run.path / "heads.parquet")
    for (kind,), rows in table.group_by("kind", maintain_order=True):
        shown = []
        for row in rows.iter_rows(named=True):
            numbers = heads.filter(layer=row["layer"], head=row["head"]).row(0, named=True)
            roles: dict[int, list[str]] = {}
            for name, at in json.loads(row["roles"]).items():
                roles.setdefault(at, []).append(name)
            top = sorted(range(len(row["weights"])), key=lambda i: -row["weights"][i])[:3]
            tokens = [
                {"text": token, "weight": weight, "role": ", ".join(roles.get(i, ()))}
                for i, (token, weight) in enumerate(zip(row["tokens"], row["weights"], strict=True))
            ]
            shown.append(numbers | {"tokens": tokens, "top": [(_visible(row["tokens"][i]), row["weights"][i],
                                    ", ".join(roles.get(i, ()))) for i in top]})  # fmt: skip
        out.append({"kind": kind, "answer": rows["answer"][0].strip(), "heads": shown})
    return out


def mirrored(run: HeadsRun) -> dict[str, Any]:
    """Return what W&B is given at the end: how the model was run, summary numbers and the figures."""
    out: dict[str, Any] = {**proved(run.info)}
    for (design, kind), counts in run.counts.items():
        out |= {f"summary/{design}/{kind}/{k}": counts[k] for k in ("drawn", "sound", "kept", "failed")}
        for direction in figures.DIRECTIONS:
            rows = run.get(design, kind, "head", direction, "last")
            if rows is not None:
                reach = max(0.1, float(rows["recovery"].abs().max()))
                out[f"figures/{design}-{kind}-{direction}"] = figures.head_map(rows, f"{kind}, {direction}", reach)
    found = _routes(run).get(("head", "denoise"))
    if found is not None:
        out["figures/state_against_action"] = figures.against(
            pl.read_parquet(run.path / "heads.parquet"), "State against action"
        )
        out["summary/heads_state"] = int(carriers(found.state).sum())
        out["summary/heads_action"] = int(carriers(found.action).sum())
    return out
