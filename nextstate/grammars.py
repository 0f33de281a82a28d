"""A grammar study: models trained on strings of a grammar; what they write, what their states hold, where they look."""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from nextstate.agents.config import Strict
from nextstate.agents.grammar_training import GrammarTraining, ModelSpec, check
from nextstate.analysis.probe import ProbeConfig
from nextstate.envs.games.grammar import CFG
from nextstate.envs.grammar import sizes
from nextstate.folder import Progress, RunConfig, begin, now, slugify, write_json, write_parquet

LISTED = 100_000  # derivations of a symbol, up to which strings are counted
REACHES = {"full": None, "tridiagonal": 1, "diagonal": 0}


class Writing(Strict):
    """What models write, and from what."""

    strings: int = Field(default=1000, ge=1, description="for each kind of prefix and temperature")
    prefix: int = Field(default=50, ge=1, description="tokens given; of a shorter string all but its last one")
    kinds: list[Literal["nothing", "clean", "corrupted"]] = Field(default=["nothing", "clean"], min_length=1)
    temperatures: list[float] = Field(default=[1.0], min_length=1)
    corruption: float = Field(
        default=0.15, ge=0, le=1,
        description="of the tokens of a corrupted prefix, drawn anew; what follows it is judged after the right one",
    )  # fmt: skip


class Probing(ProbeConfig):
    """Probes for the ancestors and ends of constituents."""

    layers: list[int] = Field(default=[-1], min_length=1, description="0 is the embedding, -1 the last one")
    reaches: list[Literal["full", "tridiagonal", "diagonal"]] = ["full", "tridiagonal", "diagonal"]
    shuffled: bool = Field(default=True, description="also with labels of other strings, as a control")


class Attending(Strict):
    """Where attention goes."""

    strings: int = Field(default=100, ge=1)
    models: list[str] = Field(default=[], description="by name; all by default")


class GrammarConfig(RunConfig):
    """Everything that decides what a grammar study finds."""

    grammar: dict[str, Any] = Field(default={}, description="settings of the game CFG")
    models: list[ModelSpec] = Field(default=[ModelSpec()], min_length=1)
    training: GrammarTraining = GrammarTraining()
    writing: Writing = Writing()
    probes: Probing | None = None
    attention: Attending | None = None

    @model_validator(mode="after")
    def _named(self) -> GrammarConfig:
        titles = [spec.title for spec in self.models]
        twice = sorted({t for t in titles if titles.count(t) > 1})
        if twice:
            raise ValueError(f"models has {', '.join(twice)} more than once: give each a name of its own")
        unknown = sorted(set(self.attention.models if self.attention else ()) - set(titles))
        if unknown:
            raise ValueError(f"attention.models names {', '.join(unknown)}: expected some of {'; '.join(titles)}")
        return self


def run(config: GrammarConfig, out: Path, progress: Progress | None = None, command: str = "") -> Path:
    """Run a grammar study, or finish one that was begun in `out`; return the report page.

    Under torchrun all processes train, and the first one does everything else.

    Raises:
        ExperimentError: `out` belongs to another config.
        GameError, ConfigError, RunError: something asked for cannot be.
    """
    game = CFG(**config.grammar)
    check(config.training, game.rules)  # before anything is written
    if int(os.environ.get("RANK", "0")):
        while not (out / "run.json").exists():  # the first process says whether `out` can be had, or ends all others
            time.sleep(0.1)
        for spec in config.models:
            _train(config, spec, game, out)
        return out / "report.html"
    record = begin(config, [{"model": spec.title} for spec in config.models], out, command)
    return _Study(config, game, out, progress or Progress(), record).go()


def _train(
    config: GrammarConfig, spec: ModelSpec, game: CFG, out: Path, progress: Callable[[int], None] | None = None
) -> Path:
    from nextstate.agents import grammar_training

    where = out / "models" / slugify(spec.title)
    return grammar_training.train(config.training, spec, game.rules, where, config.seed, config.wandb, progress)


def describe(game: CFG) -> dict[str, Any]:
    """Return what the report says of a grammar."""
    rules, (low, high) = game.rules, sizes.bounds(game.rules)[0]
    mean, spread = sizes.length_moments(rules)
    return {
        "name": game.grammar or (f"file {Path(game.file).name}" if game.file else "drawn"), "rules": str(rules),
        "levels": [len(level) for level in rules.levels], "states": str(sizes.n_states(rules)),
        "strings": sizes.n_strings(rules, LISTED), "derivations": str(sizes.n_derivations(rules)), "length_mean": mean,
        "length_sd": spread, "length_min": low, "length_max": high, "derivation_bits": sizes.derivation_bits(rules),
    }  # fmt: skip


class _Study:
    """A study while it goes on. Each stage of a model writes a table, and is skipped where that is there."""

    def __init__(self, config: GrammarConfig, game: CFG, out: Path, progress: Progress, record: dict[str, Any]) -> None:
        self.config, self.game, self.out, self.progress, self.record = config, game, out, progress, record
        self.rules, self.longest = game.rules, sizes.bounds(game.rules)[0][1]
        self.began, self.before = time.monotonic(), float(record["seconds"])

    def rng(self, *names: str) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *(zlib.crc32(name.encode()) for name in names)])

    def note(self, **changes: Any) -> None:
        self.record.update(changes, seconds=round(self.before + time.monotonic() - self.began, 1))
        write_json(self.out / "run.json", self.record)

    def part(self, stage: str, spec: ModelSpec) -> Path:
        return self.out / "parts" / stage / f"{slugify(spec.title)}.parquet"

    def go(self) -> Path:
        from nextstate.analysis import grammar_report, log
        from nextstate.analysis.grammar_tables import load

        self.note(grammar=describe(self.game))
        mirror = log.Log(self.config.wandb)
        stages = [self.write, self.diversity, self.probe, self.attend]
        steps = self.config.training.steps
        share = max(1, steps // 10)  # what a stage counts for beside the steps of training
        self.progress.begin(len(self.config.models) * (steps + share * len(stages)))
        folders: dict[str, Path] = {}

        def train(spec: ModelSpec) -> None:
            done = 0

            def advance(step: int) -> None:
                nonlocal done
                self.progress.advance(step - done)
                done = step

            self.progress.on(f"training {spec.title}")
            folders[spec.title] = _train(self.config, spec, self.game, self.out, advance)
            advance(steps)

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # other processes are not kept waiting while we measure
            for spec in self.config.models:
                train(spec)
        for spec in self.config.models:
            if spec.title not in folders:
                train(spec)
            for stage in stages:
                stage(spec, folders[spec.title])
                self.progress.advance(share)
            self.gather()
        self.progress.on("report")
        self.note(finished=now())
        mirror.start(self.out, self.config.name, self.config.model_dump(mode="json"))
        page = grammar_report.write(self.out)
        mirror.close(grammar_report.mirrored(load(self.out)) if self.config.wandb != "disabled" else {})
        return page

    def gather(self) -> None:
        """Write the tables of all models that are done so far."""
        models, curves = [], []
        for spec in self.config.models:
            where = self.out / "models" / slugify(spec.title) / "history.json"
            if not where.exists():
                continue
            told = json.loads(where.read_text())
            spoilt = spec.perturbation
            models.append({
                "name": spec.title, "architecture": spec.architecture, "untrained": spec.untrained,
                "perturbation": spoilt.kind if spoilt else "", "fraction": spoilt.fraction if spoilt else 0.0,
                "rate": spoilt.rate if spoilt else 0.0, **{k: v for k, v in told.items() if k != "curve"},
            })  # fmt: skip
            curves += [{"name": spec.title, "loss": None, "accuracy": None, "kl": None, **row} for row in told["curve"]]
        real = dict.fromkeys(("seconds", "tokens_per_second", "utilisation"), pl.Float64)
        write_parquet(self.out / "models.parquet", pl.DataFrame(models, schema_overrides=real))
        if curves:
            kinds = {"loss": pl.Float64, "accuracy": pl.Float64, "kl": pl.Float64}
            write_parquet(self.out / "curve.parquet", pl.DataFrame(curves, schema_overrides=kinds))
        for stage in (self.out / "parts").iterdir() if (self.out / "parts").is_dir() else ():
            found = [pl.read_parquet(p) for spec in self.config.models if (p := self.part(stage.name, spec)).exists()]
            if found:
                write_parquet(self.out / f"{stage.name}.parquet", pl.concat(found, how="diagonal_relaxed"))

    def prefixes(self) -> list[np.ndarray]:
        """Return the beginnings of strings of the grammar that all models go on from."""
        from nextstate.envs.grammar.derivation import sample

        drawn = [each.tokens for each in sample(self.rules, self.rng("prefixes"), self.config.writing.strings)]
        return [x[: min(self.config.writing.prefix, len(x) - 1)] for x in drawn]

    def continued(self, model: Any, kind: str, temperature: float) -> list[np.ndarray | None]:
        """Let the model go on from prefixes of a kind; return whole strings, with the prefix as the grammar has it.

        Judged with its errors, a corrupted prefix would be wrong whatever follows. The question is whether the model
        goes on as if it had read the right one.
        """
        from nextstate.agents.generation import write
        from nextstate.agents.grammar_training import codes_of
        from nextstate.envs.grammar.perturb import corrupt

        given, many = self.config.writing, len(self.rules.terminals)
        right = [np.zeros(0, dtype=np.int64)] * given.strings if kind == "nothing" else self.prefixes()
        rng = self.rng("corruption")
        shown = [corrupt(x, rng, given.corruption, many) for x in right] if kind == "corrupted" else right
        draws = self.rng("writing", kind, f"{temperature:g}")
        written = write(model, codes_of(self.rules), shown, draws, self.longest, temperature)
        return [None if w is None else np.concatenate([x, w[len(x) :]]) for x, w in zip(right, written, strict=True)]

    def write(self, spec: ModelSpec, folder: Path) -> None:
        """Let the model write, from each kind of prefix at each temperature; keep what it wrote from nothing."""
        from nextstate.agents.generation import right
        from nextstate.agents.grammar_training import load
        from nextstate.analysis.stats import wilson

        path, given = self.part("generation", spec), self.config.writing
        if path.exists() or spec.architecture == "masked" or spec.untrained:
            return
        model, rows = load(folder, spec.architecture), []
        for kind in given.kinds:
            for temperature in given.temperatures:
                self.progress.on(f"{spec.title} writes from {kind} at temperature {temperature:g}")
                hits = right(self.rules, self.continued(model, kind, temperature))
                low, high = wilson(np.array([float(hits)]), np.array([float(given.strings)]))[:, 0].tolist()
                rows.append({
                    "name": spec.title, "prefix": kind, "given": 0 if kind == "nothing" else given.prefix,
                    "temperature": temperature, "strings": given.strings, "right": hits,
                    "accuracy": hits / given.strings, "low": low, "high": high,
                })  # fmt: skip
        write_parquet(path, pl.DataFrame(rows))

    def diversity(self, spec: ModelSpec, folder: Path) -> None:
        """Compare what the model writes from nothing, and its next tokens, with the grammar's."""
        from nextstate.agents.generation import divergences, diversity, write
        from nextstate.agents.grammar_training import codes_of, load
        from nextstate.envs.grammar.derivation import sample
        from nextstate.envs.grammar.inside import log_probabilities

        path, n = self.part("diversity", spec), self.config.writing.strings
        if path.exists() or spec.architecture == "masked" or spec.untrained:
            return
        self.progress.on(f"{spec.title}: diversity and divergence")
        model, codes = load(folder, spec.architecture), codes_of(self.rules)
        nothing = [np.zeros(0, dtype=np.int64)] * n
        found = diversity(model, codes, write(model, codes, nothing, self.rng("diversity"), self.longest))
        drawn = [each.tokens for each in sample(self.rules, self.rng("truth"), n)]
        kl = divergences(model, codes, self.rules, drawn)
        write_parquet(path, pl.DataFrame([{
            "name": spec.title, "strings": n, "ended": len(found.bits), **_mean("bits", found.bits),
            **_mean("bits_truth", -log_probabilities(self.rules, drawn) / math.log(2)), "distinct": found.distinct,
            "equal_pairs": found.equal_pairs,
            "equal_pairs_expected": n * (n - 1) / 2 * sizes.collision(self.rules), **_mean("kl", kl),
        }]))  # fmt: skip

    def probe(self, spec: ModelSpec, folder: Path) -> None:
        """Read ancestors and ends off the model's states."""
        from nextstate.agents.grammar_training import codes_of, load
        from nextstate.analysis.probe import Wanted, probe

        path, given = self.part("probes", spec), self.config.probes
        if given is None or path.exists():
            return
        self.progress.on(f"{spec.title}: probes")
        wanted = [Wanted(layer, REACHES[reach], False) for layer in given.layers for reach in given.reaches]
        if given.shuffled:
            wanted += [Wanted(layer, REACHES[given.reaches[0]], True) for layer in given.layers]
        settings = ProbeConfig(**given.model_dump(include=set(ProbeConfig.model_fields)))
        model = load(folder, spec.architecture)
        found = probe(model, codes_of(self.rules), self.rules, self.rng("probes"), settings, wanted)
        names = pl.DataFrame({"of": list(REACHES.values()), "named": list(REACHES)}, schema_overrides={"of": pl.Int64})
        found = found.join(names, left_on="reach", right_on="of", how="left", nulls_equal=True, maintain_order="left")
        found = found.with_columns(pl.col("named").alias("reach")).drop("named")
        write_parquet(path, found.select(pl.lit(spec.title).alias("name"), pl.all()))

    def attend(self, spec: ModelSpec, folder: Path) -> None:
        """See where attention goes: by distance, to the ends of constituents, between them."""
        from nextstate.agents.grammar_training import codes_of, load
        from nextstate.analysis.constituents import constituents, means, peaks, rows
        from nextstate.envs.grammar.derivation import sample

        given, path = self.config.attention, self.part("attention-profile", spec)
        own = given is not None and (not given.models or spec.title in given.models)
        if given is None or not own or path.exists():
            return
        self.progress.on(f"{spec.title}: attention")
        causal = spec.architecture != "masked"
        drawn = sample(self.rules, self.rng("attention"), given.strings)
        model = load(folder, spec.architecture, eager=True)
        found = constituents(model, codes_of(self.rules), drawn, causal)
        adjacent = means(found.adjacent, self.rng("attention", "intervals")).filter(pl.col("layer").is_null())
        above = peaks(found.to_end, self.rng("attention", "intervals")).filter(pl.col("layer").is_null())
        tables = {
            "attention-ends": rows(found.to_end).rename({"value": "residual"}),
            "attention-peaks": above.drop("layer").rename({"value": "residual"}),
            "attention-pairs": rows(found.between_ends).rename({
                "value": "residual", "query_delta": "delta_query", "key_delta": "delta_key",
            }),
            "attention-adjacent": adjacent.drop("layer").rename({
                "value": "residual", "query_level": "level_from", "key_level": "level_to", "apart": "distance",
            }),
            "attention-profile": rows(found.profile).rename({"value": "weight"}).drop("pairs"),
        }  # fmt: skip
        for stage, table in tables.items():  # the last one tells that all are there
            write_parquet(self.part(stage, spec), table.select(pl.lit(spec.title).alias("name"), pl.all()))


def _mean(name: str, values: np.ndarray) -> dict[str, float | None]:
    """Return the mean of one value a string and its 95 % interval, as columns whose names begin with `name`."""
    from nextstate.analysis.stats import student

    mean = float(values.mean()) if len(values) else None
    low, high = student(values).tolist() if len(values) > 1 else (None, None)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
