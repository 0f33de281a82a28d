"""The study of grammars: models are trained on strings of a grammar; what do they write, hold and attend to?

Tables, one for each MODEL: `training/MODEL` (size, steps, digest of the weights), `speed/MODEL`, `curve/MODEL` (of
learning), `generation/MODEL`, `diversity/MODEL` and `symbols/MODEL` (what it writes), `probes/MODEL` and
`probe-curve/MODEL`, `embeddings/MODEL` and `similarity/MODEL` (of grammars with hidden terminals), and
`attention-profile/MODEL`, `attention-heads/MODEL`, `attention-scales/MODEL`, `attention-ends/MODEL`,
`attention-peaks/MODEL`, `attention-pairs/MODEL`, `attention-centres/MODEL`, `attention-adjacent/MODEL`,
`attention-falls/MODEL`. The models themselves are in `models/MODEL`. With several seeds, each training is a MODEL.

With `models_of`, a run measures the trained models of an earlier one, for example with longer training of probes.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from nextstate.agents.config import AgentConfig
from nextstate.agents.identity import device_kind, files_digest
from nextstate.agents.training_config import ModelSpec, check_training
from nextstate.analysis.grammar.config import REACHES, GrammarConfig, ProbeConfig
from nextstate.analysis.grammar.embeddings import bags, clustering, similarity
from nextstate.analysis.grammar.symbols import by_symbol
from nextstate.analysis.grammar.tables import SCHEMAS, summaries
from nextstate.analysis.run import Run, RunError
from nextstate.analysis.study import Job, Study, identity_of
from nextstate.analysis.table import code_digest
from nextstate.envs.files import read_json, slug, write_json
from nextstate.envs.games.grammar import CFG
from nextstate.envs.grammar import sizes
from nextstate.envs.grammar.grammar import Grammar

if TYPE_CHECKING:
    from nextstate.analysis.page.page import Page

TITLES = {
    "training": "training", "generation": "writing", "diversity": "diversity and divergence", "probes": "probes",
    "attention-profile": "attention", "embeddings": "embeddings",
}  # fmt: skip
Tables = dict[str, pl.DataFrame]
PARSED = 500  # strings of a model, at most, whose symbols are compared with the grammar's


TRAINS = (  # the code that decides the weights
    "envs/games/grammar.py", "envs/grammar", "agents/architectures.py", "agents/grammar_training.py",
    "agents/trainer.py", "agents/training_config.py",
)  # fmt: skip


class GrammarStudy(Study[GrammarConfig]):
    """Train models on a grammar, and find out what they know of it."""

    name = "grammar"
    config = GrammarConfig

    def jobs(self, config: GrammarConfig) -> list[Job]:
        check_training(config.training, _grammar(config))
        steps = config.training.steps
        share = max(1, steps // 10)  # of a measurement, in steps of training
        out = [_job("training", spec, 1 if spec.untrained else steps) for spec in config.trainings]
        hidden = bags(_grammar(config)) is not None
        for spec in config.trainings:
            parts = ["generation", "diversity"] if spec.writes else []
            parts += ["probes"] if config.probes is not None else []
            parts += ["embeddings"] if hidden else []
            parts += ["attention-profile"] if config.attends(spec) else []
            out += [_job(part, spec, share) for part in parts]
        return out

    def identity(self, job: Job, run: Run[GrammarConfig]) -> dict[str, Any]:
        device = {"device": device_kind(AgentConfig(name="trained"))}
        # Hours of training are not repeated for a change of code that has no part in it.
        return device | ({"code": code_digest(*TRAINS)} if job.key.startswith("training/") else {})

    def stale(self, job: Job, run: Run[GrammarConfig]) -> str:
        return changed(run, job.given) if job.key.startswith("training/") else ""

    def do(self, job: Job, run: Run[GrammarConfig]) -> pl.DataFrame | Tables:
        import torch

        part = job.key.partition("/")[0]
        torch.set_num_threads(run.config.training.threads)  # measurements too repeat only with the same number
        if part == "training":
            return _train(run, job.given, identity_of(self, job, run))
        if part == "attention-profile":
            return _attend(run, job.given)
        measures: dict[str, Callable[[Run[GrammarConfig], ModelSpec], pl.DataFrame | Tables]]
        measures = {"generation": _write, "diversity": _diversity, "probes": _probe, "embeddings": _embeddings}
        return measures[part](run, job.given)

    def metrics(self, job: Job, frame: pl.DataFrame) -> dict[str, float | None]:
        part = job.key.partition("/")[0]
        if part == "generation":
            found = {f"{r['prefix']}-{r['temperature']:g}": r["right"] / r["strings"] for r in frame.to_dicts()}
        else:
            found = {"kl": frame["kl"][0]} if part == "diversity" else {}
        return {f"{job.key}/{name}": value for name, value in found.items()}

    def summarise(self, run: Run[GrammarConfig]) -> Tables:
        return summaries(run)

    def headline(self, run: Run[GrammarConfig]) -> pl.DataFrame:
        return run.summary("headline")

    def page(self, run: Run[GrammarConfig]) -> Page:
        from nextstate.analysis.grammar.page import page

        return page(run)

    def worker(self, config: GrammarConfig, out: Path) -> None:
        """Train along with the first process, which does everything else."""
        from nextstate.agents.grammar_training import train

        if config.models_of:
            return
        while not (out / "run.json").exists():  # the first process has not yet checked that `out` can be used
            time.sleep(0.1)
        for spec in config.trainings:
            folder = model_folder(out, spec)
            train(config.training, spec, _grammar(config), folder, config.seed_of(spec), config.wandb)


def model_folder(out: Path, spec: ModelSpec) -> Path:
    """Return the folder of a model in that of a run: checkpoints, `history.json`, and `model` once it is trained."""
    return out / "models" / slug(spec.title)


def changed(run: Run[GrammarConfig], spec: ModelSpec) -> str:
    """Return in words how a trained model's files differ from those that its table in `training/` is about."""
    folder = model_folder(run.path, spec) / "model"
    found = files_digest(str(folder.resolve()))
    if found == run.table(f"training/{slug(spec.title)}")["weights"][0]:
        return ""
    return f"{folder} was {'removed' if found is None else 'changed'} after training"


def _job(part: str, spec: ModelSpec, cost: int) -> Job:
    name, training = slug(spec.title), part == "training"
    needs = () if training else (f"training/{name}",)
    return Job(f"{part}/{name}", f"{spec.title}: {TITLES[part]}", cost, spec, needs, spec.title, not training)


def _grammar(config: GrammarConfig) -> Grammar:
    return CFG(**config.grammar).rules


# --- training


def _train(run: Run[GrammarConfig], spec: ModelSpec, identity: dict[str, Any]) -> Tables:
    """Train a model, from its last checkpoint if that was made under the same identity."""
    from nextstate.agents.grammar_training import settings, train

    config, folder, done = run.config, model_folder(run.path, spec), 0
    # What else the config says, of probes and the like, does not decide the weights.
    identity |= {"config": settings(config.training, spec, _grammar(config), config.seed_of(spec))}
    measured = bool(config.models_of) and not spec.untrained  # an untrained network costs nothing to make
    if measured:
        _copy(model_folder(Path(config.models_of), spec), folder, identity)
    elif reason := _unusable(folder, identity):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the others may have seen the folder as it was
            raise RunError(f"{folder} cannot be used: {reason}; remove it, and run the same command again")
        run.set_aside(f"models/{folder.name}", reason, suffix="")
    if not measured:
        write_json(folder / "identity.json", identity)

    def advance(step: int) -> None:
        nonlocal done
        run.advance(step - done)
        done = step

    train(config.training, spec, _grammar(config), folder, config.seed_of(spec), config.wandb, advance)
    history, name = read_json(folder / "history.json"), {"name": spec.title}
    curve = [dict.fromkeys(SCHEMAS["curve"]) | name | row for row in history.pop("curve")]
    return {f"{part}/{folder.name}": pl.DataFrame(rows, schema=SCHEMAS[part], orient="row") for part, rows in (
        ("curve", curve), ("speed", [name | {k: history[k] for k in SCHEMAS["speed"] if k != "name"}]),
        ("training", [name | {k: history[k] for k in SCHEMAS["training"] if k != "name"}]),
    )}  # fmt: skip


def _copy(source: Path, folder: Path, identity: dict[str, Any]) -> None:
    """Copy a trained model of another run."""
    reason = _unusable(source, identity)
    if reason or not (source / "history.json").exists():
        raise RunError(
            f"models_of cannot use {source}: {reason or 'no model was trained there'}; name a finished run with the "
            "same grammar, models and training, or remove models_of to train here"
        )
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoints", "wandb"))


def _unusable(folder: Path, identity: dict[str, Any]) -> str:
    """Return why the training in a folder can neither be continued nor used, "" where it can."""
    if not folder.exists():
        return ""
    if read_json(folder / "identity.json") != identity:
        return "its training was begun with other settings, code, versions or devices"
    history = folder / "history.json"
    if history.exists() and read_json(history).get("weights") != files_digest(str((folder / "model").resolve())):
        return "the trained model was changed or removed"
    return ""


def _load(run: Run[GrammarConfig], spec: ModelSpec, eager: bool = False) -> Any:
    from nextstate.agents.grammar_training import load

    if reason := changed(run, spec):
        raise RunError(f"{reason}; run `{run.record['command']}` again, which trains it anew")
    return load(model_folder(run.path, spec) / "model", spec.architecture, eager)


# --- measurements


def prefixes(run: Run[GrammarConfig], kind: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return prefixes as strings of the grammar have them, and as the model is given them: some may be corrupted.

    What the model writes is judged after the right prefix: does the model continue as if it had read that one? After
    the corrupted one, all strings would be wrong.
    """
    from nextstate.envs.grammar.derivation import sample
    from nextstate.envs.grammar.perturb import corrupt

    given, grammar = run.config.writing, _grammar(run.config)
    if kind == "nothing":
        right = [np.zeros(0, dtype=np.int64)] * given.strings
    else:
        drawn = [each.tokens for each in sample(grammar, run.rng("prefixes"), given.strings)]
        right = [x[: min(given.prefix, len(x) - 1)] for x in drawn]
    rng, n = run.rng("corruption"), len(grammar.terminals)
    return right, [corrupt(x, rng, given.corruption, n) for x in right] if kind == "corrupted" else right


def _write(run: Run[GrammarConfig], spec: ModelSpec) -> pl.DataFrame:
    """Let the model write after each kind of prefix at each temperature; a row for each, with how much was right."""
    from nextstate.agents.generation import right, write
    from nextstate.agents.grammar_training import token_map

    given, grammar, model, rows = run.config.writing, _grammar(run.config), _load(run, spec), []
    codes, longest = token_map(grammar), sizes.bounds(grammar)[0][1]
    for kind in given.kinds:
        own, shown = prefixes(run, kind)
        for temperature in given.temperatures:
            run.progress.on(f"{spec.title} writes from {kind} at temperature {temperature:g}")
            draws = run.rng("writing", kind, f"{temperature:g}")
            written = write(model, codes, shown, draws, longest, temperature)
            whole = [None if w is None else np.concatenate([x, w[len(x) :]]) for x, w in zip(own, written, strict=True)]
            tokens = 0 if kind == "nothing" else given.prefix
            rows.append((spec.title, kind, tokens, temperature, given.strings, right(grammar, whole)))
    return pl.DataFrame(rows, schema=SCHEMAS["generation"], orient="row")


def _diversity(run: Run[GrammarConfig], spec: ModelSpec) -> Tables:
    """Compare what the model writes from nothing, and its next tokens, with the grammar's."""
    from nextstate.agents.generation import divergences, diversity, write
    from nextstate.agents.grammar_training import token_map
    from nextstate.envs.grammar.derivation import sample
    from nextstate.envs.grammar.inside import log_probabilities, parse

    n, grammar, model = run.config.writing.strings, _grammar(run.config), _load(run, spec)
    codes, nothing = token_map(grammar), [np.zeros(0, dtype=np.int64)] * n
    written = write(model, codes, nothing, run.rng("diversity"), sizes.bounds(grammar)[0][1])
    found = diversity(model, codes, written)
    truth = sample(grammar, run.rng("truth"), n)
    drawn = [each.tokens for each in truth]
    parsed = [parse(grammar, x) for x in written[:PARSED] if x is not None]
    right = [x for x in parsed if x is not None]
    symbols = by_symbol(grammar, right, truth[:PARSED], run.rng("diversity", "intervals"))
    row = {
        "name": spec.title, "strings": n, "ended": len(found.bits), "distinct": found.distinct,
        "equal_pairs": found.equal_pairs, "equal_pairs_expected": n * (n - 1) / 2 * sizes.collision(grammar),
        "bits_truth": float((-log_probabilities(grammar, drawn) / math.log(2)).mean()),
        **_mean("bits", found.bits), **_mean("kl", divergences(model, codes, grammar, drawn)),
    }  # fmt: skip
    name = slug(spec.title)
    return {f"diversity/{name}": pl.DataFrame([row], schema=SCHEMAS["diversity"]),
            f"symbols/{name}": _named(spec, "symbols", symbols)}  # fmt: skip


def _mean(name: str, values: np.ndarray) -> dict[str, float | None]:
    """Return the mean of values of strings under `name`, with its interval; null where there is none."""
    from nextstate.analysis.stats import student

    found = (float(values.mean()) if len(values) else math.nan, *student(values).tolist())
    names = (name, f"{name}_low", f"{name}_high")
    return {column: x if math.isfinite(x) else None for column, x in zip(names, found, strict=True)}


def _embeddings(run: Run[GrammarConfig], spec: ModelSpec) -> Tables:
    """Measure whether the embeddings of tokens cluster by the hidden terminals that they stand for."""
    from nextstate.agents.grammar_training import token_map

    grammar = _grammar(run.config)
    member = bags(grammar)
    assert member is not None
    every = _load(run, spec).get_input_embeddings().weight.detach().double().cpu().numpy()
    own, name = every[list(token_map(grammar).terminals)], slug(spec.title)
    found = clustering(own, member, run.rng("embeddings"))._asdict() | {"tokens": len(own)}
    return {
        f"embeddings/{name}": _named(spec, "embeddings", pl.DataFrame([found])),
        f"similarity/{name}": _named(spec, "similarity", similarity(own, member, grammar.levels[-2])),
    }


def _probe(run: Run[GrammarConfig], spec: ModelSpec) -> Tables:
    """Read ancestors and ends of constituents off the model's states."""
    from nextstate.agents.grammar_training import token_map
    from nextstate.analysis.grammar.probe import Wanted, probe

    given, grammar = run.config.probes, _grammar(run.config)
    assert given is not None
    wanted = [Wanted(layer, REACHES[reach], False) for layer in given.layers for reach in given.reaches]
    if given.shuffled:
        wanted += [Wanted(layer, REACHES[given.reaches[0]], True) for layer in given.layers]
    settings = ProbeConfig(**given.model_dump(include=set(ProbeConfig.model_fields)))
    found = probe(_load(run, spec), token_map(grammar), grammar, run.rng("probes"), settings, wanted)
    names, tables = {reach: name for name, reach in REACHES.items()}, {}
    for part, table in zip(("probes", "probe-curve"), found, strict=True):
        reach = pl.Series([names[reach] for reach in table["reach"]], dtype=pl.String)
        tables[f"{part}/{slug(spec.title)}"] = _named(spec, part, table.with_columns(reach=reach))
    return tables


def _attend(run: Run[GrammarConfig], spec: ModelSpec) -> Tables:
    """Measure where attention goes: by distance, to the ends of constituents, between them."""
    from nextstate.agents.grammar_training import token_map
    from nextstate.analysis.grammar.constituents import constituents, falls, heads, means, peaks, rows, spread
    from nextstate.envs.grammar.derivation import sample

    grammar = _grammar(run.config)
    assert run.config.attention is not None
    drawn = sample(grammar, run.rng("attention"), run.config.attention.strings)
    model = _load(run, spec, eager=True)
    found = constituents(model, token_map(grammar), drawn, spec.architecture != "masked")
    every = pl.col("layer").is_null()  # the mean over layers
    tables = {
        "attention-profile": rows(found.profile).rename({"value": "weight"}),
        "attention-heads": heads(found.scales),
        "attention-scales": spread(found.scales).with_columns(strings=pl.lit(len(drawn))),
        "attention-ends": rows(found.to_end).rename({"value": "residual"}),
        "attention-peaks": peaks(found.to_end, run.rng("attention", "intervals")).filter(every).rename({
            "value": "residual",
        }),
        "attention-pairs": rows(found.between_ends).rename({
            "value": "residual", "query_delta": "delta_query", "key_delta": "delta_key",
        }),
        "attention-adjacent": means(found.adjacent, run.rng("attention", "intervals")).filter(every).rename({
            "value": "residual", "query_level": "level_from", "key_level": "level_to", "apart": "distance",
        }),
        "attention-centres": peaks(found.between_ends, run.rng("attention", "intervals")).filter(every).rename({
            "value": "residual",
        }),
        "attention-falls": falls(found.adjacent, run.rng("attention", "intervals")).filter(every).rename({
            "value": "residual",
        }),
    }  # fmt: skip
    return {f"{part}/{slug(spec.title)}": _named(spec, part, table) for part, table in tables.items()}


def _named(spec: ModelSpec, part: str, table: pl.DataFrame) -> pl.DataFrame:
    """Return the columns that tables of this part have, with the model's name."""
    schema = SCHEMAS[part]
    return table.with_columns(name=pl.lit(spec.title)).select(pl.col(c).cast(kind) for c, kind in schema.items())
