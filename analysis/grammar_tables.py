"""The files of a grammar study, read and checked; beside them what the paper reports of the same grammars."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from nextstate.analysis.tables import RunError

ARCHITECTURES = ("rotary", "absolute", "relative", "position", "uniform", "masked")
PREFIXES = ("nothing", "clean", "corrupted")
PERTURBATIONS = ("token", "symbol", "permutation")
REACHES = ("full", "tridiagonal", "diagonal")
TARGETS = (("ancestor", "all"), ("ancestor", "ends"), ("boundary", "all"))  # what a probe reads, and of which tokens
_T, _N, _F, _B = pl.String, pl.Int64, pl.Float64, pl.Boolean
SCHEMAS: dict[str, dict[str, Any]] = {  # by the name of the file, its columns
    "models": {"name": _T, "architecture": _T, "untrained": _B, "perturbation": _T, "fraction": _F, "rate": _F,
               "parameters": _N, "steps": _N, "tokens": _N, "seconds": _F, "tokens_per_second": _F, "utilisation": _F,
               "device": _T},
    "curve": {"name": _T, "step": _N, "tokens": _N, "loss": _F, "accuracy": _F, "kl": _F},
    "generation": {"name": _T, "prefix": _T, "given": _N, "temperature": _F, "strings": _N, "right": _N,
                   "accuracy": _F, "low": _F, "high": _F},
    "diversity": {"name": _T, "strings": _N, "ended": _N, "bits": _F, "bits_low": _F, "bits_high": _F,
                  "bits_truth": _F, "distinct": _N, "equal_pairs": _N, "equal_pairs_expected": _F, "kl": _F,
                  "kl_low": _F, "kl_high": _F},
    "probes": {"name": _T, "layer": _N, "reach": _T, "shuffled": _B, "target": _T, "level": _N, "where": _T,
               "accuracy": _F, "low": _F, "high": _F, "chance": _F, "tokens": _N, "strings": _N},
    "attention-profile": {"name": _T, "layer": _N, "head": _N, "distance": _N, "weight": _F},
    "attention-ends": {"name": _T, "layer": _N, "head": _N, "level": _N, "delta": _N, "residual": _F, "pairs": _N},
    "attention-peaks": {"name": _T, "level": _N, "residual": _F, "low": _F, "high": _F, "pairs": _N},
    "attention-pairs": {"name": _T, "layer": _N, "head": _N, "level": _N, "delta_query": _N, "delta_key": _N,
                        "residual": _F, "pairs": _N},
    "attention-adjacent": {"name": _T, "level_from": _N, "level_to": _N, "distance": _N, "residual": _F, "low": _F,
                           "high": _F, "pairs": _N},
}  # fmt: skip
_NULL = {  # what may be unknown; every other value must be there
    "utilisation", "loss", "accuracy", "kl", "low", "high", "bits", "bits_low", "bits_high", "bits_truth",
    "equal_pairs_expected", "kl_low", "kl_high", "chance", "weight", "residual", "fraction", "rate",
    "tokens_per_second", "ended", "distinct", "equal_pairs", "seconds",
}  # fmt: skip
_VALUES = {"architecture": ARCHITECTURES, "perturbation": ("", *PERTURBATIONS), "prefix": PREFIXES, "reach": REACHES,
           "target": ("ancestor", "boundary"), "where": ("all", "ends")}  # fmt: skip
_INFO = ("name", "config", "config_hash", "seed", "command", "started", "finished", "seconds", "versions", "hardware",
         "remarks", "grammar")  # fmt: skip
_GRAMMAR = ("name", "rules", "levels", "states", "strings", "length_mean", "length_sd", "length_min", "length_max",
            "derivation_bits")  # fmt: skip
_SAID = {  # what is not there yet, in words
    "generation": "written strings", "curve": "learning curves", "diversity": "diversity and divergence",
    "probes": "probes", "attention-profile": "attention by distance", "attention-ends": "attention to ends",
    "attention-peaks": "attention to ends against tokens beside them",
    "attention-pairs": "attention from end to end", "attention-adjacent": "attention between neighbours",
}  # fmt: skip


class Published(NamedTuple):
    """What the paper reports of a grammar; shares from 0 to 1, by architecture ("random": the untrained network)."""

    accuracy: Mapping[str, Mapping[str, float]]  # by prefix
    bits: Mapping[str, float]  # of the strings that a model writes
    kl: Mapping[str, float]
    probes: Mapping[tuple[str, str], Mapping[str, Mapping[int, float]]]  # ancestors by reach and where, then by level


# Figures of "Physics of Language Models: Part 1" (arXiv 2305.13673): generation, with its prefix of 50 tokens, and
# probes of seven grammars, robustness of cfg3b. Numbers alone; where the paper only says "about", nothing is here.
SOURCE = "arXiv 2305.13673"
_FIVE = ("absolute", "relative", "rotary", "position", "uniform")  # its GPT, GPT_rel, GPT_rot, GPT_pos, GPT_uni
_WRITTEN = {  # per cent: from nothing, then after 50 tokens; bits; divergence in hundred-thousandths of a nat
    "cfg3b": "99.8 99.8 99.8 99.9 99.9 / 99.8 99.9 99.9 99.9 100 / 169 169 169 169 169 / 8 11 9 9 4",
    "cfg3i": "99.5 99.8 99.4 99.8 99.6 / 99.5 99.8 99.5 99.8 99.7 / 190 189 189 190 189 / 24 14 28 15 21",
    "cfg3h": "96.8 99.7 99.6 99.0 98.9 / 96.9 99.6 99.5 99.0 98.8 / 203 203 203 202 203 / 78 23 23 27 36",
    "cfg3g": "64.1 99.1 98.6 97.0 96.7 / 63.8 99.2 98.4 96.9 96.9 / 272 267 268 266 267 / 450 34 47 58 69",
    "cfg3f": "57.1 98.8 97.6 93.9 92.8 / 57.3 98.8 97.7 93.8 92.9 / 275 270 272 269 269 / 455 43 60 93 112",
    "cfg3e1": "98.1 98.4 98.2 98.3 98.6 / 98.9 99.0 98.9 98.9 99.0 / 214 213 213 214 213 / 19 14 16 13 11",
    "cfg3e2": "99.3 99.6 99.6 99.5 99.4 / 99.5 99.7 99.7 99.7 99.6 / 252 255 251 253 252 / 31 25 25 11 11",
}
_ALL = dict.fromkeys(_FIVE, "100 100 100 100 100")
_FULL: dict[str, dict[str, str]] = {  # per cent of ancestors read at all tokens, levels 6 to 2
    "cfg3b": _ALL | {"masked": "100 100 100 99.7 99.9", "random": "85.0 65.7 56.8 61.5 62.7"},
    "cfg3i": {"rotary": "99.6 99.7 99.6 99.2 99.8", "masked": "99.7 99.7 99.7 99.2 99.4",
              "random": "84.6 71.7 64.6 66.4 65.2"},
    "cfg3h": {"rotary": "99.7 98.4 98.2 99.3 100", "absolute": "99.7 98.3 98.3 99.2 100",
              "masked": "99.9 99.8 99.8 99.7 100", "random": "67.5 47.2 50.6 66.3 92.8"},
    "cfg3g": {"absolute": "100 99.2 95.6 94.6 97.3", "relative": "100 99.3 96.7 97.2 99.0",
              "rotary": "100 99.3 96.6 97.2 99.0", "position": "100 99.3 96.7 96.9 98.8",
              "uniform": "100 99.4 97.0 97.2 98.9", "masked": "100 99.5 95.5 85.6 90.5",
              "random": "70.8 56.4 49.4 57.0 73.1"},
    "cfg3f": {"absolute": "100 97.6 94.3 88.4 85.9", "relative": "100 97.5 94.8 92.9 93.5",
              "rotary": "100 97.7 95.2 93.3 94.2", "position": "100 97.9 95.6 93.5 93.9",
              "uniform": "100 98.2 95.8 93.2 93.5", "masked": "100 99.6 96.3 84.0 77.5",
              "random": "71.3 49.9 44.6 59.1 68.6"},
    "cfg3e1": {"random": "45.4 27.6 34.6 47.2 76.3"},
    "cfg3e2": {"random": "36.0 16.6 23.5 44.6 78.3"},
}  # fmt: skip
_DIAGONAL: dict[str, dict[str, str]] = {  # the same of single tokens, at the ends of constituents
    "cfg3b": {"rotary": "100 100 99.6 99.8 100", "masked": "100 100 98.9 85.7 85.7"},
    "cfg3i": {"rotary": "97.2 98.4 100 100 100"},
    "cfg3h": {"masked": "99.9 99.7 97.8 87.8 98.5"},
    "cfg3g": {"rotary": "100 100 99.7 99.5 99.8", "masked": "100 99.1 84.3 74.6 81.8"},
    "cfg3f": {"rotary": "100 99.2 99.3 98.9 98.1", "absolute": "100 99.1 99.1 98.2 96.2",
              "relative": "100 99.2 99.2 98.9 98.4", "masked": "100 99.1 78.2 69.3 80.0",
              "random": "75.4 58.8 54.4 66.4 77.6"},
    "cfg3e1": {"masked": "100 100 100 89.2 86.1"},
}  # fmt: skip
_SHARES = (0.1, 0.9, 1.0)  # of perturbed strings in training
_ROBUST: dict[tuple[str, float], str] = {  # cfg3b, per cent: the clean model / token / symbol / permutation at _SHARES
    ("nothing", 1.0): "99.8 / 92.5 14.1 0 / 91.8 14.3 0 / 91.8 14.7 0",
    ("nothing", 0.1): "100 / 100 100 100 / 100 100 100 / 100 100 99.8",
    ("corrupted", 0.1): "30.0 / 80.8 80.4 82.6 / 77.9 78.9 78.3 / 56.9 58.3 60.4",
    ("corrupted", 0.2): "30.3 / 80.4 81.1 81.1 / 77.9 78.7 77.4 / 57.1 57.7 59.5",
    ("corrupted", 1.0): "29.6 / 0.6 0.4 0 / 0.7 0.5 0 / 0.3 0.1 0",
    ("clean", 1.0): "99.9 / 99.7 92.8 0 / 99.4 91.5 0 / 99.3 83.4 0",
    ("clean", 0.1): "100 / 100 100 100 / 100 100 100 / 100 100 99.4",
}


def published(name: str) -> Published | None:
    """Return what the paper reports of a grammar, None where it has no such one."""
    if name not in _WRITTEN:
        return None
    nothing, clean, bits, kl = ([float(x) for x in part.split()] for part in _WRITTEN[name].split("/"))
    probes = {
        key: {who: dict(zip((6, 5, 4, 3, 2), _shares(line), strict=True)) for who, line in rows.get(name, {}).items()}
        for key, rows in ((("full", "all"), _FULL), (("diagonal", "ends"), _DIAGONAL))
    }
    accuracy = {"nothing": [x / 100 for x in nothing], "clean": [x / 100 for x in clean]}
    return Published(
        {prefix: dict(zip(_FIVE, values, strict=True)) for prefix, values in accuracy.items()},
        dict(zip(_FIVE, bits, strict=True)),
        {who: x * 1e-5 for who, x in zip(_FIVE, kl, strict=True)},
        probes,
    )


def published_robustness(name: str, prefix: str, temperature: float) -> dict[str, dict[float, float]]:
    """Return for each perturbation the accuracy by share of perturbed strings; "" is the clean model, at share 0."""
    if name != "cfg3b" or (prefix, temperature) not in _ROBUST:
        return {}
    clean, *kinds = (_shares(part) for part in _ROBUST[prefix, temperature].split("/"))
    return {"": {0.0: clean[0]}} | {
        kind: dict(zip(_SHARES, values, strict=True)) for kind, values in zip(PERTURBATIONS, kinds, strict=True)
    }


def _shares(line: str) -> list[float]:
    return [float(x) / 100 for x in line.split()]


@dataclass(frozen=True)
class GrammarRun:
    """The folder of a grammar study, read; what cannot be finite is null."""

    path: Path
    info: dict[str, Any]
    tables: Mapping[str, pl.DataFrame]  # by the name of the file; those that have rows

    @property
    def grammar(self) -> dict[str, Any]:
        """What `run.json` says of the grammar."""
        found: dict[str, Any] = self.info["grammar"]
        return found

    @property
    def sizes(self) -> list[int]:
        """How many symbols each level has, the root's first."""
        return [level if isinstance(level, int) else len(level) for level in self.grammar["levels"]]

    @property
    def paper(self) -> Published | None:
        """What the paper reports of this grammar."""
        return published(str(self.grammar["name"]))

    @property
    def absent(self) -> list[str]:
        """What is not there yet, of what the config asks for, in words."""
        config = self.info["config"]
        unasked = [part for part in ("probes", "attention") if part in config and config[part] is None]
        return [
            words for name, words in _SAID.items()
            if name not in self.tables and name.partition("-")[0] not in unasked
        ]  # fmt: skip

    @cached_property
    def models(self) -> dict[str, dict[str, Any]]:
        """The models by name: trained on clean strings first, then on perturbed ones, then untrained."""
        order = self.tables["models"].sort("untrained", pl.col("perturbation") != "", maintain_order=True)
        return {row["name"]: row for row in order.iter_rows(named=True)}

    @property
    def plain(self) -> list[str]:
        """Models that saw no perturbed strings, the untrained ones included."""
        return [name for name, model in self.models.items() if not model["perturbation"]]

    @property
    def trained(self) -> list[str]:
        """Models that were trained, and on clean strings alone."""
        return [name for name in self.plain if not self.models[name]["untrained"]]

    def of(self, table: str) -> list[str]:
        """Return the models that a table has rows of, in the order of `models`."""
        seen = set(self.tables[table]["name"]) if table in self.tables else set()
        return [name for name in self.models if name in seen]

    def who(self, name: str) -> str:
        """Return under what the paper's numbers of a model stand: its architecture, or "random"."""
        model = self.models[name]
        return "random" if model["untrained"] else str(model["architecture"])

    @cached_property
    def written(self) -> pl.DataFrame | None:
        """Shares of right strings at the temperature nearest to 1, a row a model and prefix."""
        rows = self.at_length
        if rows is None:
            return None
        nearest = min(rows["temperature"].unique().sort().to_list(), key=lambda t: abs(t - 1))
        return rows.filter(temperature=nearest)

    @cached_property
    def at_length(self) -> pl.DataFrame | None:
        """Shares of right strings, with the length of each kind of prefix that most rows have."""
        rows = self.tables.get("generation")
        if rows is None:
            return None
        parts = [mine.filter(given=mine["given"].mode().max()) for _, mine in rows.group_by("prefix")]
        return pl.concat(parts).sort("name", "prefix", "temperature")

    @cached_property
    def probed(self) -> pl.DataFrame | None:
        """Probes of the deepest layer that was probed of each model; layers below 0 count from the last one."""
        rows, layer = self.tables.get("probes"), pl.col("layer")
        depth = pl.when(layer < 0).then(layer + 10**6).otherwise(layer)
        return None if rows is None else rows.filter(depth == depth.max().over("name"))

    def averaged(self, table: str, *by: str) -> pl.DataFrame | None:
        """Return the mean residual over layers and heads, or over what else `by` leaves out, of each model."""
        if table not in self.tables:
            return None
        rows = self.tables[table].drop_nulls("residual")
        return rows.group_by("name", *by).agg(pl.col("residual").mean(), pl.col("pairs").max()).sort("name", *by)


def support(ended: int, equal_pairs: int) -> float:
    """Return how many equally likely strings would make so many pairs equal; with none, a lower bound in order.

    The birthday paradox: n draws from N equally likely strings have n² / 2N equal pairs on average. Where they are not
    equally likely there are more of them than this.
    """
    return ended**2 / 2 / max(equal_pairs, 1)


def load(path: Path) -> GrammarRun:
    """Read the folder of a grammar study.

    Raises:
        RunError: it is none, or a file in it is broken; the message says which, and what is wrong.
    """
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not the folder of a grammar study: {error}") from error
    _check_info(path, info)
    if not (path / "models.parquet").is_file():
        raise RunError(f"{path} is not the folder of a grammar study: there is no models.parquet in it; run it again")
    tables = {name: _read(path / f"{name}.parquet") for name in SCHEMAS if (path / f"{name}.parquet").is_file()}
    names = tables["models"]["name"].to_list()
    if not names or len(set(names)) < len(names):
        raise RunError(f"{path / 'models.parquet'}: expected a row a model, each with a name of its own; found {names}")
    for name, rows in tables.items():
        foreign = sorted(set(rows["name"]) - set(names))
        if foreign:
            raise RunError(
                f"{path / f'{name}.parquet'} is about {', '.join(map(repr, foreign))}, which models.parquet does not "
                "have; both must be of one run: run it again"
            )
    return GrammarRun(path, info, {name: rows for name, rows in tables.items() if len(rows)})


def _check_info(path: Path, info: Any) -> None:
    where = path / "run.json"
    for part, keys, found in (
        ("", _INFO, info),
        ("grammar.", _GRAMMAR, isinstance(info, dict) and info.get("grammar")),
    ):
        if not isinstance(found, dict):
            raise RunError(f"{where}: expected {part.removesuffix('.') or 'it'} to be an object; run the study again")
        missing = [f"{part}{key}" for key in keys if key not in found]
        if missing:
            raise RunError(f"{where} lacks {', '.join(missing)}; is it of a grammar study? run it again")
    grammar = info["grammar"]
    states, levels = grammar["states"], grammar["levels"]
    if not (isinstance(states, str) and states.isascii() and states.isdecimal()):
        raise RunError(f"{where}: grammar.states={states!r}, expected a whole number written as text")
    if not (isinstance(levels, list) and levels and all(isinstance(x, int | list) for x in levels)):
        raise RunError(f"{where}: grammar.levels={levels!r}, expected the symbols of each level")
    for key in ("length_mean", "length_sd", "length_min", "length_max", "derivation_bits", "string_bits", "strings"):
        value = grammar.get(key)
        number = isinstance(value, int) and not isinstance(value, bool)
        if not (number or value is None or (isinstance(value, float) and math.isfinite(value))):
            raise RunError(f"{where}: grammar.{key}={value!r}, expected a finite number or null")


def _read(path: Path) -> pl.DataFrame:
    schema = SCHEMAS[path.stem]
    try:
        rows = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunError(f"{path} cannot be read ({error}); remove it, and run the study again") from error
    missing = [column for column in schema if column not in rows.columns]
    if missing:
        raise RunError(f"{path} lacks the columns {', '.join(missing)}: expected {', '.join(schema)}")
    try:
        rows = rows.select(pl.col(name).cast(kind) for name, kind in schema.items())
    except pl.exceptions.PolarsError as error:
        raise RunError(f"{path} has values of another kind than expected: {error}") from error
    numbers = [name for name, kind in schema.items() if kind == _F]
    rows = rows.with_columns(pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name) for name in numbers)
    for column in schema:
        if column not in _NULL and rows[column].null_count():
            raise RunError(f"{path}: column {column} has {rows[column].null_count()} missing values, expected none")
        other = sorted(set(rows[column]) - set(_VALUES[column])) if column in _VALUES else []
        if other:
            raise RunError(f"{path}: {column}={other[0]!r} is not possible: expected one of {_VALUES[column]}")
    return rows
