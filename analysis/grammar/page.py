"""One self-contained page about a grammar study: written strings, divergence, probes, attention, robustness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl

from nextstate.analysis import grammar_figures as figures
from nextstate.analysis import grammar_heatmaps as heatmaps
from nextstate.analysis.figures import SCALE, plain
from nextstate.analysis.grammar_tables import PERTURBATIONS, REACHES, SOURCE, TARGETS, GrammarRun, load, support
from nextstate.analysis.log import slug
from nextstate.analysis.page import Drawn, environment, furniture, replace

LONG = 20  # rules of a grammar that are shown unfolded, at most
WORDS = {  # of what a probe reads, and of which tokens
    ("ancestor", "all"): ("Ancestors, at all tokens", "The symbol of each level that a token comes from."),
    ("ancestor", "ends"): ("Ancestors, where a constituent ends",
                           "The same, only of tokens that are the last ones of a constituent of the level."),
    ("boundary", "all"): ("Boundaries", "Whether a token is the last one of a constituent of the level."),
}  # fmt: skip
SEEN = {
    "full": "the whole string",
    "tridiagonal": "the token and its neighbours",
    "diagonal": "the token alone",
}
CURVES = {"accuracy": ("From nothing, against tokens", "in the grammar"), "kl": ("Divergence, against tokens",
          "nats a token"), "loss": ("Loss, against tokens", "nats a token")}  # fmt: skip
PREFIX = {"nothing": "From nothing", "clean": "After a clean prefix", "corrupted": "After a corrupted prefix"}
PREFIX_ORDER = {prefix: k for k, prefix in enumerate(PREFIX)}
DASH = {"solid": "", "dash": "6 3", "dot": "2 3", "dashdot": "6 3 2 3"}
MARKS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "cross": "✚", "star": "★", "x": "✖"}


def write(run: Path) -> Path:
    """Write `report.html` into the folder of a grammar study. The page needs no network.

    Raises:
        RunError: the folder is none, or cannot be read.
    """
    loaded = load(Path(run))
    page = render(loaded)
    return replace(loaded.path / "report.html", lambda path: path.write_text(page, encoding="utf-8"))


def render(run: GrammarRun) -> str:
    """Return the page as text."""
    templates = environment(percents=_percents, short=_short, big=_big, thousandths=_thousandths, bits=_bits)
    drawn, look = Drawn(), figures.styles(run)
    rules = [line for line in str(run.grammar["rules"]).splitlines() if line.strip()]
    sections = {
        "generation": _generation(run, drawn),
        "probes": _probes(run, drawn),
        "attention": _attention(run, drawn),
        "robustness": _robustness(run, drawn),
    }
    legend = [
        {"name": name, "colour": style.colour, "dash": DASH[style.dash], "mark": MARKS[style.marker]}
        for name, style in look.items()
    ]
    return templates.get_template("grammar.html.jinja").render(
        run=run,
        info=run.info,
        grammar=run.grammar,
        headline=headline(run),
        rules=rules,
        long=LONG,
        legend=legend,
        learners=figures.learners(run),
        kinds=[{"name": kind, "colour": figures.KINDS[kind].colour, "mark": MARKS[figures.KINDS[kind].marker]}
               for kind in PERTURBATIONS if any(m["perturbation"] == kind for m in run.models.values())],
        seen=SEEN,
        source=SOURCE,
        drawn=drawn.figures,
        ramp=", ".join(colour for _, colour in SCALE),
        **sections,
        **furniture(templates, "heads.script.html.jinja"),
    )  # fmt: skip


def _percents(value: float | None) -> str:
    """Return a share with as many digits as it needs not to be taken for all or nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    digits = 1 if value in (0.0, 1.0) or 0.0005 <= value < 0.9995 else 3
    text = f"{100 * value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}\u202f%"


def _short(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}".replace("-", "−")
    if not value or abs(value) >= 1e-3:
        return f"{value:.2g}".replace("-", "−")
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')} × 10{figures.raised(int(power))}".replace("-", "−")


def _big(value: float | str | None) -> str:
    """Return a count: in full where it is short, else as a power of ten; text holds whole numbers of any size."""
    if value is None:
        return "–"
    digits = value.lstrip("0") or "0" if isinstance(value, str) else f"{value:.0f}"
    if len(digits) <= 6:
        return f"{int(digits):,}"
    first, power = f"{Decimal(digits):.1e}".split("e")
    return f"{first} × 10{figures.raised(int(power))}"


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _thousandths(value: float | None) -> str:
    return "–" if value is None else f"{round(1000 * value, 1) + 0.0:.1f}".replace("-", "−")


def headline(run: GrammarRun) -> dict[str, Any]:
    """Return what the page says first, as numbers: by model the right strings, the divergence, probes, attention.

    Models with perturbed strings are told in a section of their own. Probes are those of the whole string; attention
    is the mean over layers and heads, at ends (delta 0) and beside them.
    """
    return {
        "written": _written(run),
        "kl": _kl(run),
        "probes": _readable(run),
        "ends": _at_ends(run),
        "perturbed": _perturbed(run),
    }


def _written(run: GrammarRun) -> list[dict[str, Any]]:
    rows = run.written
    if rows is None:
        return []
    out = []
    for name in run.trained:
        found = {row["prefix"]: row for row in rows.filter(name=name).iter_rows(named=True)}
        told = found.get("nothing", found.get("clean"))
        if told is not None and told["accuracy"] is not None:
            out.append({"name": name, "prefixes": found} | told)
    return sorted(out, key=lambda row: -row["accuracy"])


def _kl(run: GrammarRun) -> list[dict[str, Any]]:
    if "diversity" not in run.tables:
        return []
    rows = run.tables["diversity"].drop_nulls("kl").sort("kl")
    return rows.filter(pl.col("name").is_in(run.trained)).rows(named=True)


def _readable(run: GrammarRun) -> dict[str, Any] | None:
    """Return how much of the ancestors the models' states hold, by model, and how much the controls give.

    `beyond` counts the levels at which the best model's interval is above those of all controls; None without any.
    """
    rows = run.probed
    if rows is None:
        return None
    rows = rows.filter(reach="full", target="ancestor", where="all").drop_nulls("accuracy").sort("level")
    out: dict[str, Any] = {"models": [], "random": None, "shuffled": None, "beyond": None}
    for name in (name for name in run.models if not run.models[name]["perturbation"]):
        for shuffled in (False, True):
            mine = rows.filter(name=name, shuffled=shuffled)
            if not len(mine):
                continue
            told = {"name": name, "levels": dict(mine.select("level", "accuracy").rows()),
                    "mean": mine["accuracy"].mean(), "low": mine["accuracy"].min(), "high": mine["accuracy"].max(),
                    "hardest": mine.sort("accuracy")["level"][0],
                    "lows": dict(mine.select("level", "low").rows()),
                    "highs": dict(mine.select("level", "high").rows())}  # fmt: skip
            if run.models[name]["untrained"]:
                out["random"] = out["random"] or (None if shuffled else told)
            elif shuffled:
                out["shuffled"] = out["shuffled"] or told
            else:
                out["models"].append(told)
    out["models"].sort(key=lambda told: -told["mean"])
    controls = [one for one in (out["random"], out["shuffled"]) if one is not None]
    if out["models"] and controls:
        best = out["models"][0]["lows"]
        out["beyond"] = sum(
            all(low is not None and low > (one["highs"].get(level) or 0.0) for one in controls)
            for level, low in best.items()
        )
    return out if out["models"] or out["random"] else None


def _at_ends(run: GrammarRun) -> list[dict[str, Any]]:
    rows = run.averaged("attention-ends", "level", "delta")
    if rows is None:
        return []
    out = []
    for name in run.plain:
        by_level = {level: dict(mine.select("delta", "residual").rows())
                    for (level,), mine in rows.filter(name=name).group_by("level", maintain_order=True)}  # fmt: skip
        by_level = {level: found for level, found in by_level.items() if 0 in found and len(found) > 1}
        if not by_level:
            continue
        others = [value for found in by_level.values() for delta, value in found.items() if delta]
        at = [found[0] for found in by_level.values()]
        out.append({
            "name": name, "untrained": run.models[name]["untrained"], "at": sum(at) / len(at),
            "beside": sum(others) / len(others), "levels": len(by_level),
            "peaks": sum(found[0] > max(v for d, v in found.items() if d) for found in by_level.values()),
        })  # fmt: skip
    return sorted(out, key=lambda told: (told["untrained"], told["beside"] - told["at"]))


def _perturbed(run: GrammarRun) -> dict[str, Any] | None:
    """Return the best perturbed model and the clean one after corrupted prefixes, at the lowest temperature."""
    rows = run.at_length
    if rows is None or not figures.panels(run):
        return None
    rows = rows.filter(prefix="corrupted").drop_nulls("accuracy")
    rows = rows.filter(pl.col("temperature") == pl.col("temperature").min()).sort("accuracy", descending=True)
    best = rows.filter(~pl.col("name").is_in(run.plain)).head(1).rows(named=True)
    if not best:
        return None
    own = run.models[best[0]["name"]]["architecture"]
    same = [name for name in run.trained if run.models[name]["architecture"] == own]
    return {"best": best[0], "clean": next(iter(rows.filter(pl.col("name").is_in(same)).rows(named=True)), None)}


def _plots(drawn: Drawn, *made: Any) -> list[dict[str, Any]]:
    return [drawn.add(figure) for figure in made if figure is not None]


def _generation(run: GrammarRun, drawn: Drawn) -> dict[str, Any] | None:
    if not {"generation", "curve", "diversity"} & run.tables.keys():
        return None
    order = {name: k for k, name in enumerate(run.models)}
    rows = [] if run.tables.get("generation") is None else run.tables["generation"].rows(named=True)
    many = [] if run.tables.get("diversity") is None else run.tables["diversity"].rows(named=True)
    paper = run.paper
    for row in rows:
        known = paper is not None and row["temperature"] == 1 and not run.models[row["name"]]["perturbation"]
        row["paper"] = paper.accuracy.get(row["prefix"], {}).get(run.who(row["name"])) if known and paper else None
    for row in many:
        counted = row["ended"] is not None and row["equal_pairs"] is not None
        row["support"] = support(row["ended"], row["equal_pairs"]) if counted else None
        known = paper is not None and not run.models[row["name"]]["perturbation"]
        row["paper_bits"] = paper.bits.get(run.who(row["name"])) if known and paper else None
        row["paper_kl"] = paper.kl.get(run.who(row["name"])) if known and paper else None
    return {
        "accuracy": _plots(drawn, figures.generation(run, "Written strings that are in the grammar")),
        "divergence": _plots(drawn, figures.divergence(run, "Divergence from the exact next tokens")),
        "curves": _plots(drawn, *(figures.curve(run, column, *words) for column, words in CURVES.items())),
        "rows": sorted(rows, key=lambda r: (order[r["name"]], PREFIX_ORDER[r["prefix"]], r["temperature"])),
        "diversity": sorted(many, key=lambda r: order[r["name"]]),
        "paper": paper is not None,
    }  # fmt: skip


def _lines(run: GrammarRun, reach: str, target: str, where: str) -> list[dict[str, Any]]:
    """Return the rows of a figure of probes: each model, under it the paper's of its kind; shuffled labels; chance."""
    assert run.probed is not None
    rows = run.probed.filter(reach=reach, target=target, where=where).sort("level")
    out: list[dict[str, Any]] = []
    paper = {} if run.paper is None or target != "ancestor" else run.paper.probes.get((reach, where), {})
    for shuffled in (False, True):
        for name in run.models:
            mine = rows.filter(name=name, shuffled=shuffled).rows(named=True)
            if not mine:
                continue
            label = f"{name}, shuffled" if shuffled else name
            out.append({"label": label, "values": {r["level"]: r["accuracy"] for r in mine},
                        "told": {r["level"]: _told(r) for r in mine}})  # fmt: skip
            theirs = {} if shuffled or run.models[name]["perturbation"] else paper.get(run.who(name), {})
            if theirs:
                out.append(
                    {"label": f"{run.who(name)}, paper", "values": theirs, "told": dict.fromkeys(theirs, SOURCE)}
                )
    if out:
        chance = dict(rows.drop_nulls("chance").group_by("level").agg(pl.col("chance").mean()).rows())
        out.append({"label": "chance", "values": chance, "told": dict.fromkeys(chance, "the commonest symbol")})
    return out


def _told(row: dict[str, Any]) -> str:
    return (
        f"{_percents(row['accuracy'])} ({_percents(row['low'])} to {_percents(row['high'])}), "
        f"{_layer(row['layer'])}, n {row['tokens']:,} tokens of {row['strings']:,} strings"
    )


def _layer(layer: int) -> str:
    return "last layer" if layer == -1 else f"layer {layer}"


def _probe_figures(run: GrammarRun) -> dict[tuple[str, str, str], Any]:
    if run.probed is None:
        return {}
    deepest = max(len(run.sizes) - 1, int(run.probed["level"].max()))  # type: ignore[arg-type]
    out = {}
    for target, where in TARGETS:
        for reach in REACHES:
            lines = _lines(run, reach, target, where)
            if lines:
                out[target, where, reach] = heatmaps.levels(lines, deepest, f"From {SEEN[reach]} (%)")
    return out


def _probes(run: GrammarRun, drawn: Drawn) -> dict[str, Any] | None:
    made = _probe_figures(run)
    if not made:
        return None
    parts = []
    for (target, where), keys in groupby(made, lambda key: key[:2]):
        title, words = WORDS[target, where]
        parts.append({"title": title, "words": words, "figures": _plots(drawn, *(made[key] for key in keys))})
    whose = pl.col("name").cast(pl.Enum(list(run.models)))
    rows = run.tables["probes"].sort(
        whose, "shuffled", "target", "where", pl.col("reach").cast(pl.Enum(REACHES)), "layer", "level"
    )
    return {"parts": parts, "rows": rows.rows(named=True), "paper": run.paper is not None}


def _reach(values: Sequence[float | None]) -> float:
    return max([1e-4, *(abs(v) for v in values if v is not None)])


def _attention_figures(run: GrammarRun) -> dict[str, dict[str, Any]]:
    """Return the figures of attention by what they show, then by model; colours are of one scale within each."""
    out: dict[str, dict[str, Any]] = {}
    if "attention-profile" in run.tables:
        by_name = {name: run.tables["attention-profile"].filter(name=name) for name in run.of("attention-profile")}
        out["profile"] = {
            name: heatmaps.profile(rows, plain(name)) for name, rows in by_name.items() if rows["weight"].count()
        }
    at_ends = run.averaged("attention-ends", "level", "delta")
    if at_ends is not None:
        out["ends"] = _each(run, at_ends, heatmaps.ends)
        by_layer = run.averaged("attention-ends", "layer", "level", "delta")
        assert by_layer is not None
        out["depth"] = _each(run, by_layer.filter(delta=0), heatmaps.depth)
    between = run.averaged("attention-pairs", "level", "delta_query", "delta_key")
    if between is not None:
        out["pairs"] = _each(run, between, heatmaps.pairs)
    if "attention-adjacent" in run.tables:
        out["adjacent"] = _each(run, run.tables["attention-adjacent"], heatmaps.adjacent)
    return out


def _each(run: GrammarRun, rows: pl.DataFrame, draw: Any) -> dict[str, Any]:
    reach, seen = _reach(rows["residual"].to_list()), set(rows["name"])
    return {name: draw(rows.filter(name=name), plain(name), reach) for name in run.models if name in seen}


def _attention(run: GrammarRun, drawn: Drawn) -> dict[str, Any] | None:
    made = _attention_figures(run)
    out = {what: _plots(drawn, *by_name.values()) for what, by_name in made.items() if by_name}
    if not out:
        return None
    strongest = None
    if "attention-ends" in run.tables:
        own = pl.col("name").is_in([name for name, model in run.models.items() if not model["untrained"]])
        single = run.tables["attention-ends"].drop_nulls("residual").filter(own, delta=0)
        strongest = next(single.sort("residual", descending=True).head(1).iter_rows(named=True), None)
    scales = {
        what: _reach([v for figure in made[what].values() for line in figure.data[0].z for v in line])
        for what in out if what != "profile"
    }  # fmt: skip
    peaks = run.tables.get("attention-peaks")
    above = [] if peaks is None else [
        {"name": name, "levels": peaks.filter(name=name).sort("level").rows(named=True)}
        for name in run.models if name in set(peaks["name"])
    ]  # fmt: skip
    return {"figures": out, "strongest": strongest, "scales": scales, "floor": heatmaps.FLOOR, "above": above}


def _robustness(run: GrammarRun, drawn: Drawn) -> dict[str, Any] | None:
    parts = []
    for prefix, keys in groupby(figures.panels(run), lambda key: key[0]):
        made = [figures.robustness(run, prefix, t, f"Temperature {t:g}") for _, t in keys]
        parts.append({"title": PREFIX[prefix], "figures": _plots(drawn, *made)})
    if not parts:
        return None
    own = {m["architecture"] for m in run.models.values() if m["perturbation"]}
    clean = [name for name in run.trained if run.models[name]["architecture"] in own]
    return {"parts": parts, "clean": clean, "paper": run.grammar["name"] == "cfg3b"}


def mirrored(run: GrammarRun) -> dict[str, Any]:
    """Return what W&B is given at the end: summary numbers by model, and the figures."""
    told, out = headline(run), dict[str, Any]()
    rows = run.written
    for row in [] if rows is None else rows.drop_nulls("accuracy").iter_rows(named=True):
        out[f"summary/{slug(row['name'])}/accuracy_{row['prefix']}"] = row["accuracy"]
    if "diversity" in run.tables:
        for row in run.tables["diversity"].iter_rows(named=True):
            out |= {f"summary/{slug(row['name'])}/{k}": row[k]
                    for k in ("kl", "bits", "distinct", "equal_pairs") if row[k] is not None}  # fmt: skip
    if told["probes"] is not None:
        for one in [*told["probes"]["models"], *filter(None, [told["probes"]["random"]])]:
            out |= {f"summary/{slug(one['name'])}/ancestor_{level}": v for level, v in one["levels"].items()}
    for one in told["ends"]:
        out |= {f"summary/{slug(one['name'])}/attention_{k}": one[k] for k in ("at", "beside")}
    drawn = {
        "generation": figures.generation(run, "Written strings that are in the grammar"),
        "divergence": figures.divergence(run, "Divergence from the exact next tokens"),
    }
    drawn |= {f"curve_{column}": figures.curve(run, column, *words) for column, words in CURVES.items()}
    for (target, where, reach), figure in _probe_figures(run).items():
        drawn[f"probes_{target}_{where}_{reach}"] = figure.update_layout(
            title_text=f"{WORDS[target, where][0]}, {reach}"
        )
    for what, by_name in _attention_figures(run).items():
        drawn |= {f"attention_{what}_{slug(name)}": figure for name, figure in by_name.items()}
    for prefix, temperature in figures.panels(run):
        title = f"{PREFIX[prefix]}, temperature {temperature:g}"
        drawn[f"robustness_{prefix}_{temperature:g}"] = figures.robustness(run, prefix, temperature, title)
    return out | {f"figures/{key}": figure for key, figure in drawn.items() if figure is not None}
