"""Tables of a grammar study: the columns of those that jobs make, the statistics of `summary/`, and a view of these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Int

from nextstate.agents.training_config import ModelSpec
from nextstate.analysis import stats
from nextstate.analysis.grammar.claims import claims
from nextstate.analysis.grammar.config import GrammarConfig
from nextstate.analysis.grammar.paper import Published, published
from nextstate.analysis.run import Run
from nextstate.analysis.stats import wilson
from nextstate.envs.files import slug
from nextstate.envs.games.grammar import CFG
from nextstate.envs.grammar import sizes

LISTED = 100_000  # strings of a grammar are counted up to this many derivations of a symbol
_T, _N, _F, _B = pl.String, pl.Int64, pl.Float64, pl.Boolean
SCHEMAS: dict[str, dict[str, Any]] = {  # columns of the tables that jobs make, by the first part of their keys
    "training": {"name": _T, "parameters": _N, "steps": _N, "tokens": _N, "threads": _N, "weights": _T},
    "speed": {"name": _T, "seconds": _F, "tokens_per_second": _F, "utilisation": _F, "device": _T},
    "curve": {"name": _T, "step": _N, "tokens": _N, "loss": _F, "accuracy": _F, "kl": _F},
    "generation": {"name": _T, "prefix": _T, "given": _N, "temperature": _F, "strings": _N, "right": _N},
    "diversity": {"name": _T, "strings": _N, "ended": _N, "bits": _F, "bits_low": _F, "bits_high": _F,
                  "bits_truth": _F, "distinct": _N, "equal_pairs": _N, "equal_pairs_expected": _F, "kl": _F,
                  "kl_low": _F, "kl_high": _F},
    "probes": {"name": _T, "layer": _N, "reach": _T, "shuffled": _B, "target": _T, "level": _N, "where": _T,
               "accuracy": _F, "low": _F, "high": _F, "chance": _F, "tokens": _N, "strings": _N},
    "attention-profile": {"name": _T, "layer": _N, "head": _N, "distance": _N, "weight": _F},
    "probe-curve": {"name": _T, "step": _N, "layer": _N, "reach": _T, "shuffled": _B, "target": _T, "level": _N,
                    "where": _T, "accuracy": _F, "low": _F, "high": _F, "gain": _F, "gain_low": _F, "gain_high": _F},
    "symbols": {"name": _T, "level": _N, "symbol": _T, "occurrences": _N, "compared": _N, "distinct": _N,
                "distinct_truth": _N, "possible": _N, "bits": _F, "low": _F, "high": _F, "bits_truth": _F},
    "embeddings": {"name": _T, "auc": _F, "low": _F, "high": _F, "p": _F, "within": _F, "between": _F, "tokens": _N},
    "similarity": {"name": _T, "one": _T, "two": _T, "cosine": _F, "pairs": _N},
    "attention-heads": {"name": _T, "layer": _N, "head": _N, "reach": _F, "low": _F, "high": _F, "explained": _F},
    "attention-scales": {"name": _T, "nearest": _F, "farthest": _F, "spread": _F, "spread_low": _F, "spread_high": _F,
                         "explained": _F, "explained_low": _F, "explained_high": _F, "strings": _N},
    "attention-ends": {"name": _T, "layer": _N, "head": _N, "level": _N, "delta": _N, "residual": _F, "pairs": _N},
    "attention-peaks": {"name": _T, "level": _N, "residual": _F, "low": _F, "high": _F, "pairs": _N},
    "attention-pairs": {"name": _T, "layer": _N, "head": _N, "level": _N, "delta_query": _N, "delta_key": _N,
                        "residual": _F, "pairs": _N},
    "attention-adjacent": {"name": _T, "level_from": _N, "level_to": _N, "distance": _N, "residual": _F, "low": _F,
                           "high": _F, "pairs": _N},
    "attention-centres": {"name": _T, "level": _N, "residual": _F, "low": _F, "high": _F, "pairs": _N},
    "attention-falls": {"name": _T, "level": _N, "residual": _F, "low": _F, "high": _F, "pairs": _N},
}  # fmt: skip
HEADLINE = {"nothing": "from_nothing", "clean": "after_clean", "corrupted": "after_corrupted"}  # columns, by prefix


class Summary:
    """The tables of `summary/`, by name, without those that have no rows.

    Args:
        tables: from `summaries`.
    """

    def __init__(self, tables: Mapping[str, pl.DataFrame]) -> None:
        self.tables = {name: table for name, table in tables.items() if len(table)}
        self.grammar: dict[str, Any] = tables["grammar"].row(0, named=True)

    @property
    def paper(self) -> Published | None:
        """What the paper reports of this grammar."""
        return published(self.grammar["name"])

    @cached_property
    def models(self) -> dict[str, dict[str, Any]]:
        """The trainings by name: trained on clean strings first, then on perturbed ones, then untrained."""
        return {row["name"]: row for row in self.tables["models"].iter_rows(named=True)}

    @cached_property
    def families(self) -> dict[str, dict[str, Any]]:
        """The first training of each model, by the model's name without the seed."""
        out: dict[str, dict[str, Any]] = {}
        for row in self.models.values():
            out.setdefault(row["family"], row)
        return out

    @property
    def seeds(self) -> int:
        """Number of trainings of each model."""
        return len(self.models) // len(self.families)

    @property
    def plain(self) -> list[str]:
        """Families that saw no perturbed strings, the untrained ones included."""
        return [name for name, model in self.families.items() if not model["perturbation"]]

    @property
    def trained(self) -> list[str]:
        """Families that were trained, and only on clean strings."""
        return [name for name in self.plain if not self.families[name]["untrained"]]

    def of(self, table: str) -> list[str]:
        """Return the models, or families, that a table has rows of, in the order of `models`."""
        seen = set(self.tables[table]["name"]) if table in self.tables else set()
        return [name for name in dict.fromkeys([*self.families, *self.models]) if name in seen]

    def own(self, table: str, family: str, **constraints: Any) -> list[dict[str, Any]]:
        """Return the rows of a table about the trainings of a family, in their order."""
        rows = self.rows(table, **constraints)
        names = [name for name, model in self.models.items() if model["family"] == family]
        return [row for name in names for row in rows if row["name"] == name]

    def rows(self, table: str, **constraints: Any) -> list[dict[str, Any]]:
        """Return the rows of a table in which columns have certain values."""
        return self.tables[table].filter(**constraints).rows(named=True) if table in self.tables else []


def kind_of(model: Mapping[str, Any]) -> str:
    """Return the key of a model's numbers in the paper: its architecture, or "random" for an untrained network."""
    return "random" if model["untrained"] else str(model["architecture"])


def summaries(run: Run[GrammarConfig]) -> dict[str, pl.DataFrame]:
    """Return the statistics of a grammar study.

    - `headline`: a row a model, over its trainings; `grammar`: one row; `models`: a row a training, in the order of
      the page; `claims`: what the paper says, and whether the models agree (`nextstate.analysis.grammar.claims`).
    - `trainings`: the main numbers of each model, with the range and the interval over its trainings.
    - `written`: shares of right strings, over trainings.
    - `curve`, `generation`, `diversity`, `probes`: as in the tables of the trainings, with intervals, the paper's
      numbers, `nearest` (at the temperature nearest to 1) and `deepest` (the deepest layer that was probed).
    - `entropy`, `rules`: entropy of strings less that of the grammar's, and of the choice of rules, relative to it.
    - `probed`: accuracies of probes, over trainings; `ancestors`: how much of the ancestors the states of each model
      hold, over levels; `chance`: of each probe; `learning`: as in the tables of the trainings.
    - `profile`: attention of each head by bins of distances, of the first training; `heads`, `scales`; `ends`, `depth`,
      `pairs`, `adjacent`: means over heads and trainings; `peaks`, `centres`, `falls`; `at_ends`: a row a model;
      `strongest`: the head of trained models that attends most to ends.
    """
    config = run.config
    specs = sorted(config.trainings, key=lambda spec: (spec.untrained, spec.perturbation is not None))
    found = {part: _gathered(run, part, specs) for part in SCHEMAS}
    grammar = describe(CFG(**config.grammar))
    measured = found["training"].join(found["speed"], on="name")
    models = _models(config, specs).join(measured, on="name", maintain_order="left")
    families = models.unique("family", keep="first", maintain_order=True)
    paper = published(grammar["name"][0])
    probed, merged = _deepest(found["probes"]), {part: _merged(found[part], models) for part in _HEADS}
    to_end = merged["attention-ends"]
    ends = averaged(to_end, "level", "delta")
    trained = models.filter(~pl.col("untrained"))["name"].implode()
    at_end = found["attention-ends"].drop_nulls("residual").filter(pl.col("name").is_in(trained), delta=0)
    first = found["attention-profile"].filter(pl.col("name").is_in(families["name"].implode()))
    profiles = first.drop_nulls("weight").partition_by("name", maintain_order=True)
    generation, diversity = _judged(found["generation"], models, paper), _compared(found["diversity"], models, paper)
    by_probe = probed.filter("deepest").group_by("reach", "target", "where", "level", maintain_order=True)
    by_family = over_trainings(probed, models, ("layer", "reach", "shuffled", "target", "level", "where", "deepest"),
                               "accuracy", ("low", "high"), ("tokens", "strings"), (0.0, 1.0))  # fmt: skip
    alone = families.with_columns(name=pl.col("family"))
    ancestors = _ancestors(by_family, alone)
    trainings = _trainings(models, generation, diversity, probed, config.writing.kinds)
    tables = {
        "headline": _headline(families, trainings, config.writing.kinds),
        "trainings": trainings,
        "grammar": grammar,
        "models": models,
        "curve": found["curve"],
        "generation": generation,
        "written": over_trainings(
            generation, models, ("prefix", "temperature"), "accuracy", ("low", "high"), ("given", "strings"), (0.0, 1.0)
        ),
        "diversity": diversity,
        "entropy": _excess(found["diversity"]),
        "symbols": found["symbols"],
        "rules": _rule_numbers(found["symbols"]),
        "probes": probed,
        "probed": by_family,
        "ancestors": ancestors,
        "chance": by_probe.agg(pl.col("chance").drop_nulls().mean()).drop_nulls(),
        "learning": _deepest(found["probe-curve"]),
        "embeddings": found["embeddings"],
        "similarity": found["similarity"],
        "profile": pl.concat([pl.DataFrame(schema=_PROFILE), *map(binned, profiles)]),
        "heads": found["attention-heads"],
        "scales": found["attention-scales"].with_columns(
            pl.col(f"spread{end}").log(2).alias(f"octaves{end}") for end in ("", "_low", "_high")
        ),
        "ends": ends,
        "depth": averaged(to_end, "layer", "level", "delta").filter(delta=0),
        "pairs": averaged(merged["attention-pairs"], "level", "delta_query", "delta_key"),
        "peaks": found["attention-peaks"],
        "centres": found["attention-centres"],
        "adjacent": over_trainings(
            found["attention-adjacent"], models, ("level_from", "level_to", "distance"), "residual", ("low", "high"),
            ("pairs",),
        ),
        "falls": found["attention-falls"],
        "at_ends": _at_ends(ends, alone),
        "strongest": at_end.sort("residual", descending=True, maintain_order=True).head(1),
    }  # fmt: skip
    return tables | {"claims": claims(tables)}


_HEADS = ("attention-ends", "attention-pairs")  # tables of heads, which means over trainings are taken of


def _merged(rows: pl.DataFrame, models: pl.DataFrame) -> pl.DataFrame:
    """Return rows under the names of families, so that what is averaged is averaged over trainings too."""
    family = dict(models.select("name", "family").iter_rows())
    return rows.with_columns(name=pl.col("name").replace(family))


def over_trainings(
    rows: pl.DataFrame, models: pl.DataFrame, by: Sequence[str], value: str, ends: tuple[str, str],
    kept: Sequence[str] = (), within: tuple[float, float] = (-math.inf, math.inf),
) -> pl.DataFrame:  # fmt: skip
    """Return the mean of a number over the trainings of each family, as `nextstate.analysis.grammar.claims.estimate`.

    Args:
        rows: one for each training (`name`) and `by`.
        models: the table of this name.
        by: columns that tell numbers of one training apart.
        value: the column of the number.
        ends: the columns of its interval.
        kept: columns of which the first training's value is kept.
        within: the smallest and the largest possible number.

    Returns:
        One row for each family (`name`) and `by`, with the columns `value` and `ends` as they were called, `trainings`,
        `least` and `most`.
    """
    types = rows.schema
    schema = {c: types[c] for c in ("name", *by, value, *ends)} | {"trainings": _N, "least": _F, "most": _F}
    schema |= {c: types[c] for c in kept}
    out = []
    for key, own in _merged(rows, models).group_by("name", *by, maintain_order=True):
        known = own.drop_nulls(value)
        numbers: tuple[Any, ...] = (None, None, None, 0, None, None)
        if len(known):
            values, low, high = (known[c].to_list() for c in (value, *ends))
            numbers = stats.estimate(values, low, high, within)[: len(numbers)]
        out.append((*key, *numbers, *(own[c][0] for c in kept)))
    return pl.DataFrame(out, schema=schema, orient="row").fill_nan(None)


def _excess(diversity: pl.DataFrame) -> pl.DataFrame:
    """Return the entropy of each training's strings relative to that of as many of the grammar, less 1.

    The interval is wider than that of `bits` by the root of 2, since the grammar's strings are a sample too.
    """
    truth, bits = pl.col("bits_truth"), pl.col("bits")
    ends = {end: (bits + 2**0.5 * (pl.col(f"bits_{end}") - bits)) / truth - 1 for end in ("low", "high")}
    return diversity.select("name", excess=bits / truth - 1, **ends)


def _rule_numbers(symbols: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over symbols of the entropy of their choice of a rule relative to the grammar's, less 1.

    The ends of the interval are means of the ends, as if all symbols erred together: it is wider than need be.
    """
    known = symbols.filter(pl.col("bits_truth") > 0).group_by("name", maintain_order=True)
    return known.agg((pl.col(c) / pl.col("bits_truth")).mean() - 1 for c in ("bits", "low", "high")).rename(
        {"bits": "excess"}
    )


def _trainings(
    models: pl.DataFrame, generation: pl.DataFrame, diversity: pl.DataFrame, probes: pl.DataFrame, kinds: Sequence[str]
) -> pl.DataFrame:
    """Return the main numbers of each family (`name`): `measure`, `value`, `low`, `high`, `trainings`, range."""
    written = generation.filter("nearest").rename({"accuracy": "value"})
    parts = [written.filter(prefix=kind).with_columns(measure=pl.lit(HEADLINE[kind])) for kind in kinds]
    for number in ("kl", "bits"):
        ends = {f"{number}_{end}": end for end in ("low", "high")}
        parts.append(diversity.select("name", *ends, value=number).rename(ends).with_columns(measure=pl.lit(number)))
    full = probes.filter("deepest", ~pl.col("shuffled"), reach="full", target="ancestor", where="all")
    means = full.drop_nulls("accuracy").group_by("name", maintain_order=True).agg(value=pl.col("accuracy").mean())
    none = pl.lit(None, dtype=_F)
    parts.append(means.with_columns(measure=pl.lit("ancestors"), low=none, high=none))
    columns = ("name", "measure", "value", "low", "high")
    rows = pl.concat([part.select(columns) for part in parts]).drop_nulls("value")
    shares = pl.col("measure").is_in([*HEADLINE.values(), "ancestors"])
    return pl.concat(
        over_trainings(part, models, ("measure",), "value", ("low", "high"), within=(0.0, most))
        for part, most in ((rows.filter(shares), 1.0), (rows.filter(~shares), math.inf))
    )


def _gathered(run: Run[GrammarConfig], part: str, specs: Sequence[ModelSpec]) -> pl.DataFrame:
    keys = [key for spec in specs if run.has(key := f"{part}/{slug(spec.title)}")]
    return pl.concat([pl.DataFrame(schema=SCHEMAS[part]), *map(run.table, keys)])


def describe(game: CFG) -> pl.DataFrame:
    """Return the numbers of a grammar, one row; those that may have hundreds of digits are text."""
    rules, (low, high) = game.rules, sizes.bounds(game.rules)[0]
    mean, spread = sizes.length_moments(rules)
    return pl.DataFrame([{
        "name": game.grammar or (f"file {Path(game.file).name}" if game.file else "drawn"), "rules": str(rules),
        "levels": [len(level) for level in rules.levels], "states": str(sizes.n_states(rules)),
        "strings": sizes.n_strings(rules, LISTED), "derivations": str(sizes.n_derivations(rules)), "length_mean": mean,
        "length_sd": spread, "length_min": low, "length_max": high, "derivation_bits": sizes.derivation_bits(rules),
    }], schema_overrides={"strings": _N})  # fmt: skip


def _models(config: GrammarConfig, specs: Sequence[ModelSpec]) -> pl.DataFrame:
    rows = []
    for spec in specs:
        given = spec.perturbation
        perturbed = (given.kind, given.fraction, given.rate) if given else ("", None, None)
        rows.append((spec.title, spec.family, config.seed_of(spec), spec.architecture, spec.untrained, *perturbed))
    schema = {"name": _T, "family": _T, "seed": _N, "architecture": _T, "untrained": _B}
    schema |= {"perturbation": _T, "fraction": _F, "rate": _F}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _judged(rows: pl.DataFrame, models: pl.DataFrame, paper: Published | None) -> pl.DataFrame:
    """Add the share of right strings with Wilson's interval, `nearest`, and the paper's share at temperature 1."""
    low, high = wilson(rows["right"].to_numpy().astype(float), rows["strings"].to_numpy().astype(float))
    off = (pl.col("temperature") - 1).abs()
    known = {row["name"]: kind_of(row) for row in models.iter_rows(named=True) if not row["perturbation"]}
    theirs = [
        paper.accuracy.get(prefix, {}).get(known.get(name, "")) if paper and temperature == 1 else None
        for name, prefix, temperature in rows.select("name", "prefix", "temperature").iter_rows()
    ]
    return rows.with_columns(
        accuracy=pl.col("right") / pl.col("strings"),
        low=pl.Series(low, dtype=_F),
        high=pl.Series(high, dtype=_F),
        nearest=off == off.min(),
        paper=pl.Series(theirs, dtype=_F),
    )


def _compared(rows: pl.DataFrame, models: pl.DataFrame, paper: Published | None) -> pl.DataFrame:
    """Add the number of equally likely strings that would give as many equal pairs, and the paper's numbers."""
    known = {row["name"]: kind_of(row) for row in models.iter_rows(named=True) if not row["perturbation"]}
    kinds = [known.get(name, "") for name in rows["name"]]
    return rows.with_columns(
        support=pl.Series([support(*row) for row in rows.select("ended", "equal_pairs").iter_rows()], dtype=_F),
        paper_bits=pl.Series([paper.bits.get(kind) if paper else None for kind in kinds], dtype=_F),
        paper_kl=pl.Series([paper.kl.get(kind) if paper else None for kind in kinds], dtype=_F),
    )


def support(ended: int, equal_pairs: int) -> float:
    """Return how many equally likely strings would give this number of equal pairs; without any, a rough lower bound.

    The birthday paradox: n draws from N equally likely strings have n² / 2N equal pairs on average, and more where they
    are not equally likely.
    """
    return ended**2 / 2 / max(equal_pairs, 1)


def _headline(families: pl.DataFrame, trainings: pl.DataFrame, kinds: Sequence[str]) -> pl.DataFrame:
    out = families.select(name="family")
    for measure in (*(HEADLINE[kind] for kind in kinds), "kl"):
        own = trainings.filter(measure=measure).select(
            "name", **{measure: "value", f"{measure}_low": "low", f"{measure}_high": "high"}
        )
        out = out.join(own, on="name", how="left", maintain_order="left")
    own = trainings.filter(measure="ancestors").select("name", ancestors="value")
    many = pl.lit(len(trainings) and trainings["trainings"].max(), dtype=_N)
    return out.join(own, on="name", how="left", maintain_order="left").with_columns(trainings=many).rename(
        {"name": "model"}
    )  # fmt: skip


# --- probes


def _deepest(rows: pl.DataFrame) -> pl.DataFrame:
    layer = pl.col("layer")
    depth = pl.when(layer < 0).then(layer + 10**6).otherwise(layer)  # below 0 they count from the last one
    return rows.with_columns(deepest=depth == depth.max().over("name"))


def _ancestors(probes: pl.DataFrame, models: pl.DataFrame) -> pl.DataFrame:
    """Return the mean and least accuracy over levels, of probes that see the whole string, a row a model and labels.

    `beyond` counts the levels at which a trained model's interval is above those of all controls; null without any.
    """
    rows = models.select("name", "untrained").join(
        probes.filter("deepest", reach="full", target="ancestor", where="all").drop_nulls("accuracy"), on="name",
        maintain_order="left_right",
    )  # fmt: skip
    controls = [rows.filter(untrained=True, shuffled=False), rows.filter(untrained=False, shuffled=True)]
    first = pl.concat([control.filter(pl.col("name") == pl.col("name").first()) for control in controls])
    bound = first.group_by("level").agg(bound=pl.col("high").max())
    above = (pl.col("low") > pl.col("bound").fill_null(0.0)).sum().cast(_N)
    known = pl.lit(len(bound) > 0) & ~pl.col("untrained") & ~pl.col("shuffled")
    rows = rows.join(bound, on="level", how="left", maintain_order="left")
    return rows.group_by("name", "untrained", "shuffled", maintain_order=True).agg(
        mean=pl.col("accuracy").mean(), least=pl.col("accuracy").min(),
        hardest=pl.col("level").get(pl.col("accuracy").arg_min()), levels=pl.len().cast(_N),
        beyond=pl.when(known.first()).then(above),
    )  # fmt: skip


# --- attention


def averaged(rows: pl.DataFrame, *by: str) -> pl.DataFrame:
    """Return the mean residual of each model over layers and heads, or over what else `by` leaves out."""
    groups = rows.drop_nulls("residual").group_by("name", *by, maintain_order=True)
    return groups.agg(pl.col("residual").mean(), pl.col("pairs").max()).sort("name", *by)


def _at_ends(ends: pl.DataFrame, models: pl.DataFrame) -> pl.DataFrame:
    """Return for each model the mean attention to ends and to tokens beside them, and at how many levels ends get most.

    Counts only levels at which both were measured, and models that saw no perturbed strings.
    """
    here, level = pl.col("delta") == 0, pl.col("residual")
    by_level = ends.group_by("name", "level", maintain_order=True).agg(
        at=level.filter(here).first(), sum=level.filter(~here).sum(), others=level.filter(~here).len(),
        peak=level.filter(here).first() > level.filter(~here).max(),
    )  # fmt: skip
    found = by_level.drop_nulls("peak").group_by("name").agg(
        at=pl.col("at").mean(), beside=pl.col("sum").sum() / pl.col("others").sum(), levels=pl.len().cast(_N),
        peaks=pl.col("peak").sum().cast(_N),
    )  # fmt: skip
    plain = models.filter(perturbation="").select("name", "untrained")
    return plain.join(found, on="name", maintain_order="left")


_PROFILE = {"name": _T, "layer": _N, "head": _N, "first": _N, "last": _N, "weight": _F, "reach": _F}


def binned(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the mean attention of each head of one model over bins of distances.

    Args:
        rows: `name`, `layer`, `head`, `distance`, `weight`; below 0 a token looks ahead.

    Returns:
        a row a head and bin: `first` and `last` distance, `weight`, and `reach`, the head's mean distance. Within a
        layer the heads are sorted by it.
    """
    distance = rows["distance"].to_numpy()
    longest = int(np.abs(distance).max())
    edges = _edges(longest)
    last: Int[np.ndarray, " bin"] = np.array([*edges[1:] - 1, longest])
    at, sign = np.searchsorted(edges, np.abs(distance), side="right") - 1, np.sign(distance)
    rows = rows.with_columns(first=pl.Series(sign * edges[at]), last=pl.Series(sign * last[at]))
    far = (pl.col("weight") * pl.col("distance").abs()).sum() / pl.col("weight").sum()
    rows = rows.with_columns(reach=far.over("layer", "head"))
    bins = rows.group_by("name", "layer", "head", "first", "last", maintain_order=True)
    out = bins.agg(pl.col("weight").mean(), pl.col("reach").first())
    return out.sort("layer", "reach", "head", "first").cast(_PROFILE)  # type: ignore[arg-type]


def _edges(longest: int) -> Int[np.ndarray, " bin"]:
    """Return where the bins of distances begin: each distance by itself at first, then two bins an octave."""
    return np.array(sorted({0, 1, 2, 3, *(round(2 ** (k / 2)) for k in range(4, 64))} & set(range(longest + 1))))
