"""The report page of a grammar study: written strings, divergence, probes, attention, robustness."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import plotly.graph_objects as go
import polars as pl

from nextstate.analysis.figures import SCALE, Style, plain
from nextstate.analysis.grammar import figures, heatmaps
from nextstate.analysis.grammar.claims import AGREES, CONTRADICTS, OPEN
from nextstate.analysis.grammar.config import REACHES, GrammarConfig
from nextstate.analysis.grammar.paper import PERTURBATIONS, SOURCE
from nextstate.analysis.grammar.tables import HEADLINE, Summary, kind_of
from nextstate.analysis.page.formats import percents
from nextstate.analysis.page.page import FigureList, Page, Plot
from nextstate.analysis.run import Run

MOST_BAGS = 40  # memberships whose cosines are drawn
MEASURES = {
    "from_nothing": "in the grammar, from nothing", "after_clean": "in the grammar, after a clean prefix",
    "after_corrupted": "right, after a corrupted prefix", "kl": "divergence (nats per token)",
    "bits": "entropy of strings (bits)", "ancestors": "ancestors decoded, mean over levels",
}  # fmt: skip
LONG = 20  # most rules shown unfolded
WORDS = {  # by target of a probe and tokens that it is evaluated on
    ("ancestor", "all"): ("Ancestors, at all tokens", "Target: the symbol of each level that a token comes from."),
    ("ancestor", "ends"): ("Ancestors, at the ends of constituents",
                           "The same target, evaluated only on tokens that end a constituent of the level."),
    ("boundary", "all"): ("Boundaries", "Target: whether a token ends a constituent of the level."),
}  # fmt: skip
SEEN = {
    "full": "the whole string",
    "tridiagonal": "the token and its neighbours",
    "diagonal": "the token alone",
}
CURVES = {"accuracy": ("Accuracy from nothing", "share in the grammar"), "kl": ("Divergence",
          "nats per token"), "loss": ("Loss", "nats per token")}  # fmt: skip
PREFIX = {"nothing": "From nothing", "clean": "After a clean prefix", "corrupted": "After a corrupted prefix"}
DASH = {"solid": "", "dash": "6 3", "dot": "2 3", "dashdot": "6 3 2 3"}
MARKS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "cross": "✚", "star": "★", "x": "✖"}


def page(run: Run[GrammarConfig]) -> Page:
    """Return the page, from the tables of `summary/`."""
    found, drawn = Summary(run.summaries()), FigureList()
    rules = [line for line in found.grammar["rules"].splitlines() if line.strip()]
    context = {
        "models": list(found.models.values()),
        "grammar": found.grammar,
        "headline": headline(found),
        "rules": rules,
        "long": LONG,
        "seeds": found.seeds,
        "trainings": found.rows("trainings") if found.seeds > 1 else [],
        "threads": sorted({m["threads"] for m in found.models.values() if m.get("threads")}),
        "measures": MEASURES,
        "claims": found.rows("claims"),
        "legend": [_key(name, style) for name, style in figures.styles(found).items() if name in found.families],
        "learners": {found.models[name]["family"] for name in figures.learners(found)},
        "kinds": [_key(kind, figures.KINDS[kind]) for kind in PERTURBATIONS
                  if any(m["perturbation"] == kind for m in found.models.values())],
        "seen": SEEN,
        "source": SOURCE,
        "paper": found.paper is not None,
        "ramp": ", ".join(colour for _, colour in SCALE),
        "generation": _generation(found, drawn),
        "symbols": _symbols(found),
        "probes": _probes(found, drawn),
        "embeddings": _embeddings(found, drawn),
        "attention": _attention(found, drawn),
        "robustness": _robustness(found, drawn),
    }  # fmt: skip
    which = "a drawn grammar" if found.grammar["name"] == "drawn" else f"the grammar {found.grammar['name']}"
    title = f"{run.config.name}: language models trained on {which}"
    return Page(title, template="grammar/page.html.jinja", context=context, figures=drawn)


def _key(name: str, style: Style) -> dict[str, str]:
    return {"name": name, "colour": style.colour, "dash": DASH[style.dash], "mark": MARKS[style.marker]}


def headline(found: Summary) -> dict[str, Any]:
    """Return the rows for the first paragraphs of the page; models with perturbed strings have their own paragraph.

    Numbers are means over trainings. Probes are those that read the whole string; attention is the mean over layers
    and heads.
    """
    at_ends = sorted(found.rows("at_ends"), key=lambda row: (row["untrained"], row["beside"] - row["at"]))
    known = [r for r in found.rows("trainings", measure="kl") if r["name"] in found.trained]
    kl = sorted(known, key=lambda row: row["value"])
    return {"written": _written(found), "kl": kl, "probes": _ancestors(found), "ends": at_ends,
            "perturbed": _perturbed(found), "verdicts": _verdicts(found)}  # fmt: skip


def _written(found: Summary) -> list[dict[str, Any]]:
    """Return for each trained family its share of right strings, from nothing if it was measured, and by prefix."""
    out = []
    for name in found.trained:
        shares = {row["measure"]: row for row in found.rows("trainings", name=name)}
        rows = {prefix: shares[HEADLINE[prefix]] for prefix in HEADLINE if HEADLINE[prefix] in shares}
        prefix = next((prefix for prefix in ("nothing", "clean") if prefix in rows), None)
        if prefix is not None:
            given = found.own("generation", name, nearest=True)
            tokens = {row["prefix"]: row["given"] for row in given}
            strings = sum(row["strings"] for row in given if row["prefix"] == prefix)
            out.append(rows[prefix] | {"prefix": prefix, "prefixes": rows, "given": tokens, "strings": strings})
    return sorted(out, key=lambda row: -row["value"])


def _verdicts(found: Summary) -> dict[str, list[dict[str, Any]]]:
    """Return the statements of the paper that are contradicted, and how many there are of each verdict."""
    rows = found.rows("claims")
    return {key: [row for row in rows if row["verdict"] == key] for key in (AGREES, CONTRADICTS, OPEN)}


def _ancestors(found: Summary) -> dict[str, Any] | None:
    """Return the model from whose states ancestors are decoded best, and the controls."""
    rows = [row for row in found.rows("ancestors") if row["name"] in found.plain]
    models = [row for row in rows if not row["untrained"] and not row["shuffled"]]
    best = max(models, key=lambda row: row["mean"], default=None)
    random = next((row for row in rows if row["untrained"] and not row["shuffled"]), None)
    shuffled = next((row for row in rows if row["shuffled"] and not row["untrained"]), None)
    if best is None and random is None:
        return None
    there = [] if best is None or random is None else found.rows(
        "probed", deepest=True, name=random["name"], shuffled=False, reach="full", target="ancestor", where="all",
        level=best["hardest"],
    )  # fmt: skip
    at_hardest = there[0]["accuracy"] if there else None
    return {"best": best, "random": random, "shuffled": shuffled, "random_at_hardest": at_hardest}


def _perturbed(found: Summary) -> dict[str, Any] | None:
    """Return the best perturbed model and the clean one after corrupted prefixes, at the lowest temperature."""
    rows = found.rows("written", prefix="corrupted")
    lowest = min((row["temperature"] for row in rows), default=None)
    means = sorted((row for row in rows if row["temperature"] == lowest), key=lambda row: -row["accuracy"])
    best = next((row for row in means if row["name"] not in found.plain), None)
    if best is None:
        return None
    own = found.families[best["name"]]["architecture"]
    same = [name for name in found.trained if found.families[name]["architecture"] == own]
    return {"best": best, "clean": next((row for row in means if row["name"] in same), None)}


def _plots(drawn: FigureList, where: str, *made: go.Figure | None) -> list[Plot]:
    return [drawn.add(figure, where) for figure in made if figure is not None]


def _generation(found: Summary, drawn: FigureList) -> dict[str, Any] | None:
    if not {"generation", "curve", "diversity"} & found.tables.keys():
        return None
    curves = [figures.curve(found, column, *words) for column, words in CURVES.items()]
    names, prefixes = list(found.models), list(PREFIX)
    rows = found.rows("generation")
    rows.sort(key=lambda r: (names.index(r["name"]), prefixes.index(r["prefix"]), r["temperature"]))
    return {
        "accuracy": _plots(drawn, "", figures.generation(found, "Generated strings that are in the grammar")),
        "divergence": _plots(drawn, "", figures.divergence(found, "Divergence from the exact next-token distribution")),
        "curves": _plots(drawn, "", *curves),
        "rows": rows,
        "diversity": found.rows("diversity"),
    }


def _lines(found: Summary, reach: str, target: str, where: str) -> list[dict[str, Any]]:
    """Return the rows of a figure of probes: models with the paper's numbers below, shuffled labels, chance."""
    probe = {"reach": reach, "target": target, "where": where}
    rows = found.rows("probed", deepest=True, **probe)
    out: list[dict[str, Any]] = []
    paper = {} if found.paper is None or target != "ancestor" else found.paper.probes.get((reach, where), {})
    for shuffled in (False, True):
        for name, model in found.families.items():
            mine = [row for row in rows if (row["name"], row["shuffled"]) == (name, shuffled)]
            if not mine:
                continue
            out.append({"label": f"{name}, shuffled" if shuffled else name,
                        "values": {r["level"]: r["accuracy"] for r in mine},
                        "hover": {r["level"]: _interval(r) for r in mine}})  # fmt: skip
            theirs = {} if shuffled or model["perturbation"] else paper.get(kind_of(model), {})
            if theirs:
                label = f"{kind_of(model)}, paper"
                out.append({"label": label, "values": theirs, "hover": dict.fromkeys(theirs, SOURCE)})
    if out:
        chance = {row["level"]: row["chance"] for row in found.rows("chance", **probe)}
        out.append({"label": "chance", "values": chance, "hover": dict.fromkeys(chance, "the most frequent symbol")})
    return out


def _interval(row: dict[str, Any]) -> str:
    layer = "last layer" if row["layer"] == -1 else f"layer {row['layer']}"
    over = "" if row["trainings"] < 2 else f"{row['trainings']} trainings, "
    return (
        f"{percents(row['accuracy'])} ({percents(row['low'])} to {percents(row['high'])}), {over}"
        f"{layer}, n {row['tokens']:,} tokens of {row['strings']:,} strings"
    )


def _probes(found: Summary, drawn: FigureList) -> dict[str, Any] | None:
    if not {"probes", "learning"} & found.tables.keys():
        return None
    parts = []
    for (target, where), (title, words) in WORDS.items():
        lines = {reach: _lines(found, reach, target, where) for reach in REACHES}
        deepest = len(found.grammar["levels"]) - 1
        made = [heatmaps.levels(x, deepest, f"From {SEEN[reach]} (%)") for reach, x in lines.items() if x]
        parts.append({"title": title, "words": words, "figures": _plots(drawn, title, *made)})
    whose = pl.col("name").cast(pl.Enum(list(found.models)))
    reach = pl.col("reach").cast(pl.Enum(list(REACHES)))
    order = (whose, "shuffled", "target", "where", reach, "layer", "level")
    rows = found.tables["probes"].sort(*order).rows(named=True) if "probes" in found.tables else []
    learning = [figures.learning(found, level, f"Level {level}") for level in range(2, len(found.grammar["levels"]))]
    unfinished = _unfinished(found)
    return {"parts": [part for part in parts if part["figures"]], "rows": rows,
            "learning": _plots(drawn, "learning of probes", *learning), "unfinished": unfinished}  # fmt: skip


def _unfinished(found: Summary) -> list[dict[str, Any]]:
    """Return the full probes of trained models that still improved in the last half of their training."""
    rows = found.rows("learning", reach="full", where="all", shuffled=False, deepest=True)
    last = max((row["step"] for row in rows), default=0)
    own = [r for r in rows if r["step"] == last and found.models[r["name"]]["family"] in found.trained]
    return [row for row in own if row["gain_low"] is not None and row["gain_low"] > 0]


def _symbols(found: Summary) -> list[dict[str, Any]]:
    """Return the rows of the table of symbols, of the first training of each model."""
    firsts = [model["name"] for model in found.families.values()]
    return [row for row in found.rows("symbols") if row["name"] in firsts]


def _embeddings(found: Summary, drawn: FigureList) -> dict[str, Any] | None:
    rows = found.rows("embeddings")
    if not rows:
        return None
    firsts = [name for name in found.of("similarity") if found.families[found.models[name]["family"]]["name"] == name]
    tables = [found.tables["similarity"].filter(name=name) for name in firsts]
    shown = [table for table in tables if table["one"].n_unique() <= MOST_BAGS]
    scale = max([1e-3, *(abs(x) for table in shown for x in table["cosine"].drop_nulls())])
    made = [heatmaps.similarity(table, plain(table["name"][0]), scale) for table in shown]
    return {"rows": rows, "figures": _plots(drawn, "embeddings", *made), "scale": f"{scale:.2f}"}


def _attention(found: Summary, drawn: FigureList) -> dict[str, Any] | None:
    """Return the figures of attention by kind, one for each model; those of one kind share a colour scale."""
    profiles = [found.tables["profile"].filter(name=name) for name in found.of("profile")]
    out = {"profile": _plots(drawn, "attention by distance", *(
        heatmaps.profile(rows, plain(rows["name"][0])) for rows in profiles
    ))}  # fmt: skip
    scales = {}
    for what, draw in (("ends", heatmaps.ends), ("depth", heatmaps.depth), ("pairs", heatmaps.pairs),
                       ("adjacent", heatmaps.adjacent)):  # fmt: skip
        names = found.of(what)
        scale = max([1e-4, *(abs(row["residual"]) for row in found.rows(what) if row["residual"] is not None)])
        made = (draw(found.tables[what].filter(name=name), plain(name), scale) for name in names)
        out[what], scales[what] = _plots(drawn, f"attention {what}", *made), scale
    if not any(out.values()):
        return None
    tables = {
        table: [{"name": name, "levels": found.rows(table, name=name)} for name in found.of(table)]
        for table in ("peaks", "centres", "falls")
    }
    reaches = figures.reaches(found, "How far heads attend")
    out["heads"] = _plots(drawn, "attention by distance", reaches)
    strongest = next(iter(found.rows("strongest")), None)
    return {"figures": {what: some for what, some in out.items() if some}, "strongest": strongest, "scales": scales,
            "floor": heatmaps.FLOOR, "tables": tables, "far": found.rows("scales")}  # fmt: skip


def _robustness(found: Summary, drawn: FigureList) -> dict[str, Any] | None:
    parts = []
    for prefix, keys in groupby(figures.panels(found), lambda key: key[0]):
        made = [figures.robustness(found, prefix, t, f"Temperature {t:g}") for _, t in keys]
        parts.append({"title": PREFIX[prefix], "figures": _plots(drawn, PREFIX[prefix], *made)})
    if not parts:
        return None
    own = {m["architecture"] for m in found.families.values() if m["perturbation"]}
    clean = [name for name in found.trained if found.families[name]["architecture"] in own]
    return {"parts": parts, "clean": clean, "paper": found.grammar["name"] == "cfg3b"}
