"""A patching experiment: minimal pairs of a game, sweeps over a model's sites, and a folder with all of it."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from nextstate.agents.config import AgentConfig
from nextstate.agents.registry import load_model
from nextstate.envs.contrast import Pair
from nextstate.envs.game import Game, GameError
from nextstate.envs.games import make_game
from nextstate.folder import (
    ExperimentError,
    Progress,
    RunConfig,
    begin,
    now,
    of_one_model,
    remembered,
    write_json,
    write_parquet,
)

PAPER_STEPS = (6, 10, 14, 18, 22, 26, 30)  # of the published state pairs
PAPER_DISTANCES = (1, 5, 10, 20, 40)  # and noop pairs
SHOWN = 12  # heads whose attention is kept, at most


class PatchConfig(RunConfig):
    """Everything that decides what a patching run finds."""

    model: str | AgentConfig
    game: str = "DFA"
    settings: dict[str, Any] = {}
    pairs: int = Field(64, ge=2, le=100_000, description="of each kind; published designs have as many as they have")
    kinds: list[Literal["state", "action", "name", "noop"]] = Field(
        default=["state", "action", "name", "noop"], min_length=1
    )
    designs: list[Literal["balanced", "paper"]] = Field(default=["balanced"], min_length=1)
    directions: list[Literal["denoise", "noise", "zero", "mean", "resample"]] = Field(
        default=["denoise", "noise"], min_length=1, description="the last three ablate heads at all positions"
    )
    sites: list[Literal["head", "resid_pre", "attn_out", "mlp_out"]] = Field(
        default=["head", "resid_pre", "attn_out", "mlp_out"], min_length=1
    )
    steps: int | None = Field(None, ge=1, description="of an episode; a noop pair has `distance` more")
    distance: int | None = Field(None, ge=1, description="of noop pairs")
    resamples: int = Field(2000, ge=100, le=100_000)
    max_gigabytes: float = Field(2.0, gt=0, description="bound on the memory a sweep takes beside the model")

    @model_validator(mode="after")
    def _once(self) -> PatchConfig:
        for name in ("kinds", "designs", "directions", "sites"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}={given} names one twice")
        return self


def kinds_of(config: PatchConfig, game: Game) -> list[tuple[str, str]]:
    """Return the designs and kinds of pairs that are asked for and that the game has.

    Raises:
        ExperimentError: it has none of them.
    """
    found: list[tuple[str, str]] = [
        (d, k) for d in config.designs for k in config.kinds if d in game.contrasts.get(k, ())
    ]
    if not found:
        has = ", ".join(f"{k} ({' and '.join(d)})" for k, d in game.contrasts.items()) or "nothing"
        raise ExperimentError(f"{game.name} has no {', '.join(config.designs)} pairs of kinds {', '.join(config.kinds)}"
                              f"; it has {has}")  # fmt: skip
    return found


def draw(config: PatchConfig, game: Game, design: str, kind: str) -> list[Pair]:
    """Draw the pairs of one kind; of published ones there is one for each length, with each side as the clean one.

    Raises:
        GameError: the game cannot make such pairs.
    """
    if design == "paper":
        sizes = [{"steps": s} for s in PAPER_STEPS] if kind == "state" else [{"distance": d} for d in PAPER_DISTANCES]
        pairs = [game.contrast(np.random.default_rng(0), kind, design, **size) for size in sizes]
        return [p for pair in pairs for p in (pair, pair.swapped())]
    rng = _rng(config.seed, design, kind)
    steps, distance = config.steps, None
    if kind == "noop":
        distance = config.distance or min(5, (game.max_steps or 6) - 1)
        steps = None if steps is None or game.max_steps else steps + distance
    return [game.contrast(rng, kind, design, steps=steps, distance=distance) for _ in range(config.pairs)]


def _rng(seed: int, *names: str) -> np.random.Generator:
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in names)])


def jobs_of(config: PatchConfig, kinds: list[tuple[str, str]]) -> Iterator[Any]:
    """Yield every sweep of a run, the telling ones first."""
    from nextstate.analysis.heads.pairs import PATCHES
    from nextstate.analysis.heads.tables import Job

    patches = [d for d in config.directions if d in PATCHES]
    for site in config.sites:
        for direction in patches:
            yield from (Job(design, kind, site, direction, "last") for design, kind in kinds)
    if "head" in config.sites:
        if "denoise" in patches:
            yield from (Job(design, kind, "head", "denoise", "last", exact=False) for design, kind in kinds)
        for direction in config.directions:
            if direction not in PATCHES:
                yield from (Job(design, kind, "head", direction, "all") for design, kind in kinds)
    if "resid_pre" in config.sites:
        for direction in patches:
            yield from (Job(design, kind, "resid_pre", direction, "map") for design, kind in kinds)


def run(config: PatchConfig, out: Path, progress: Progress | None = None, command: str = "", model: Any = None) -> Path:
    """Run a patching experiment, or finish one that was begun in `out`; return the report page.

    Args:
        config: what to do.
        out: the run's folder.
        progress: told what goes on.
        command: that began it, for `run.json`.
        model: a `LanguageModel` to use instead of loading the one that the config names.

    Raises:
        ExperimentError: `out` belongs to another config.
        ModelFailed: the model cannot be loaded or patched; the message says why, and so does `run.json`.
        GameError: something asked for cannot be.
    """
    from nextstate.agents.sites import SiteError
    from nextstate.analysis.heads.pairs import PatchError

    game = make_game(config.game, **config.settings)
    kinds = kinds_of(config, game)
    drawn = {which: draw(config, game, *which) for which in kinds}  # before anything is written
    record = begin(config, [{"design": d, "kind": k, "pairs": len(p)} for (d, k), p in drawn.items()], out, command)
    name = config.model if isinstance(config.model, str) else config.model.name
    do = partial(_run, config, out, progress or Progress(), record, drawn, model)
    return of_one_model(do, name if model is None else model.name, out, record, PatchError, SiteError)


def _run(
    config: PatchConfig,
    out: Path,
    progress: Progress,
    record: dict[str, Any],
    drawn: dict[tuple[str, str], list[Pair]],
    model: Any,
) -> Path:
    from nextstate.analysis import heads_report, log
    from nextstate.analysis.heads.routing import layout
    from nextstate.analysis.heads.tables import PAIRS, load, sweep_rows

    began, before = time.monotonic(), float(record["seconds"])

    def note(**changes: Any) -> None:
        record.update(changes, seconds=round(before + time.monotonic() - began, 1))
        write_json(out / "run.json", record)

    progress.on("loading the model")
    if model is None:
        model = load_model(config.model)

    def describe() -> None:
        size = {"layers": model.sites.layers, "heads": model.sites.heads}
        note(agents=[remembered(record["agents"], model.describe() | size)])

    describe()
    mirror = log.Log(config.wandb)
    mirror.start(out, config.name, config.model_dump())

    progress.on("pairs")
    joined: dict[tuple[str, str], list[Any]] = {}
    rows, left_out = [], []
    for (design, kind), pairs in drawn.items():
        mine, kept = _measure(model, design, kind, pairs)
        rows += mine
        joined[design, kind] = kept
        if not kept:
            sound = sum(r["tokens"] is not None for r in mine)
            reason = (
                f"{model.name} fails on all {sound} pairs: in none does it prefer the right answer in both prompts"
                if sound else f"no pair can be used: {mine[0]['reason']}"
            )  # fmt: skip
            left_out.append({"agent": model.name, "setting": f"{design} {kind} pairs", "reason": reason})
            progress.warn(left_out[-1]["setting"] + ": " + reason)
    write_parquet(out / "pairs.parquet", pl.DataFrame(rows, schema=PAIRS))
    note(left_out=left_out, remarks=_remarks(model, drawn))

    jobs = [job for job in jobs_of(config, list(drawn)) if joined[job.design, job.kind]]
    where = {which: layout(pairs) for which, pairs in joined.items() if pairs}
    sizes = [_size(model, job, joined[job.design, job.kind], where[job.design, job.kind]) for job in jobs]
    progress.begin(sum(sizes))
    failed = {which: sum(not r["kept"] and r["tokens"] is not None and (r["design"], r["kind"]) == which for r in rows)
              for which in joined}  # fmt: skip
    for job, size in zip(jobs, sizes, strict=True):
        which, path = (job.design, job.kind), out / "sweeps" / f"{job.slug}.parquet"
        progress.on(f"{job.design} {job.kind} pairs: {job.direction} {job.site}, {job.where}")
        if not path.exists():
            try:
                sweep, found = _sweep(config, model, job, joined[which], where[which])
            except _NoScale as error:
                progress.warn(f"{job.slug}: {error}")
                note(remarks=[*record["remarks"], f"{job.slug}: {error}"])
                progress.advance(size)
                continue
            frame = sweep_rows(job, sweep, found, failed[which])
            write_parquet(path, frame)
            describe()  # with what was proved of longer prompts
        else:
            frame = pl.read_parquet(path)
        top = frame.sort("recovery", descending=True).row(0, named=True)
        mirror.cell({f"{job.slug}/largest_recovery": top["recovery"], f"{job.slug}/pairs": top["pairs"],
                     f"{job.slug}/carry": int(frame["carries"].sum())})  # fmt: skip
        progress.advance(size)
    progress.on("report")
    loaded = load(out)
    _conclude(loaded, model, out)
    note(finished=now())
    page = heads_report.write(out)
    mirror.close(heads_report.mirrored(load(out)) if config.wandb != "disabled" else {})
    return page


class _NoScale(Exception):
    """A sweep has nothing to be measured by, and is left out."""


def _measure(model: Any, design: str, kind: str, pairs: list[Pair]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Write pairs as tokens and ask the model about them, unpatched; return their rows, and those that count."""
    from nextstate.analysis.heads.recovery import Readout
    from nextstate.analysis.heads.routing import baseline, prefers, token_pairs
    from nextstate.analysis.heads.tables import pair_rows

    found, excluded = token_pairs(model.encoder, pairs)
    reasons = {x.pair: x.reason for x in excluded}
    joined = dict(zip([i for i in range(len(pairs)) if i not in reasons], found, strict=True))
    base = baseline(model, found) if found else (Readout.empty(0), Readout.empty(0))
    words = {i: [model.tokenizer.decode([t]) for t in pair.clean] for i, pair in joined.items()}
    rows = pair_rows(design, kind, pairs, joined, reasons, base, words)
    return rows, [pair for pair, ok in zip(found, prefers(*base), strict=True) if ok]


def _remarks(model: Any, drawn: dict[tuple[str, str], list[Pair]]) -> list[str]:
    found = [line for pairs in drawn.values() for line in model.remark(pairs[0].clean).splitlines()]
    return [*dict.fromkeys(found)]


def _sweep(config: PatchConfig, model: Any, job: Any, pairs: list[Any], where: Any) -> tuple[Any, Any]:
    from nextstate.analysis.heads.pairs import PatchError
    from nextstate.analysis.heads.patch import attribution, recovery, sweep

    lengths = {len(p.clean) for p in pairs}
    if job.direction in ("mean", "resample") and len(lengths) > 1:
        raise _NoScale(f"pairs of {len(lengths)} lengths cannot lend each other activations at all positions")
    positions = {"last": "last", "all": "all", "map": where}[job.where]
    given: dict[str, Any] = {"site": job.site, "positions": positions, "direction": job.direction}
    given |= {"failures": "include", "rng": _rng(config.seed, job.slug)}  # those that failed are not among them
    if job.exact:
        # Few copies afford the whole vocabulary; maps and ablations do without.
        given |= {"vocabulary": job.where == "last", "max_bytes": int(config.max_gigabytes * 2**30)}
        found = sweep(model, pairs, **given)
    else:
        found = attribution(model, pairs, **given)
    try:
        return found, recovery(found, _rng(config.seed, job.slug, "bootstrap"), resamples=config.resamples)
    except PatchError as error:
        raise _NoScale(str(error)) from error


def _size(model: Any, job: Any, pairs: list[Any], where: Any) -> int:
    """Return about how much work a sweep is, in tokens."""
    if not job.exact:
        return sum(6 * len(p.clean) for p in pairs)
    copies = sum(model.sites.shape(job.site, layer)[0] for layer in model.sites.layers_with(job.site))
    n = len(pairs[0].clean)
    starts = {"last": [n - 1], "all": [0 if job.direction not in ("denoise", "noise") else pairs[0].first_difference]}
    if job.where == "map":
        columns = range(min(p.first_difference for p in pairs), n) if where == "each" else (
            [p for r, p in pairs[0].roles.items() if r in where])  # fmt: skip
        starts["map"] = list(columns)
    return sum((2 * n + sum(copies * (len(p.clean) - s) for s in starts[job.where])) for p in pairs)


def _conclude(run: Any, model: Any, out: Path) -> None:
    """Write the tables of heads and of layers, and the attention of the top ones over an example."""
    from nextstate.analysis.heads.routing import attention_of, head_table, top_heads
    from nextstate.analysis.heads_report import by_layer

    design = next((d for d in ("balanced", "paper") if run.routing(d, "head") is not None), None)
    if design is None:
        return
    rows = []
    found = head_table(run.routing(design, "head"), model.sites.layers_with("head"))
    write_parquet(out / "heads.parquet", found)
    write_parquet(out / "layers.parquet", by_layer(run, design))
    for kind in ("state", "action"):
        example = run.pairs.filter(design=design, kind=kind, kept=True).row(0, named=True)
        heads = top_heads(found)[:SHOWN]
        if not heads:
            continue
        for (layer, head), weights in zip(heads, attention_of(model, example["ids"], heads), strict=True):
            rows.append({"kind": kind, "layer": layer, "head": head, "tokens": example["pieces"],
                         "weights": [round(float(w), 4) for w in weights],
                         "roles": example["roles"],
                         "answer": example["answer_clean"]})  # fmt: skip
    if rows:
        write_parquet(out / "attention.parquet", pl.DataFrame(rows))


def count_sweeps(config: PatchConfig) -> int:
    """Return how many sweeps a config asks for, without loading anything.

    Raises:
        ExperimentError, GameError: it asks for what cannot be.
    """
    game = make_game(config.game, **config.settings)
    kinds = kinds_of(config, game)
    for design, kind in kinds:
        try:
            draw(config.model_copy(update={"pairs": 1}), game, design, kind)
        except GameError as error:
            raise ExperimentError(f"{design} {kind} pairs: {error}") from error
    return len(list(jobs_of(config, kinds)))
