"""The study of heads: minimal pairs of a game, and exact patching sweeps over the sites of a model.

Tables: `pairs/DESIGN-KIND` with one row for each pair, `sweeps/DESIGN-KIND-SITE-DIRECTION-WHERE` with one row for each
cell, `attention/DESIGN` with one row for each head and example, `published/KIND` with one row for each cell of each
trial that is patched as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from nextstate.analysis.grid import game_identity
from nextstate.analysis.heads.config import (
    CONTROL_ROUNDS,
    SHOWN,
    PatchConfig,
    Sweeping,
    draw,
    draw_one,
    kinds_of,
    main_first,
    published_sizes,
    sweeps_of,
)
from nextstate.analysis.run import Run
from nextstate.analysis.study import Job, Skip, Study
from nextstate.envs.contrast import Pair
from nextstate.envs.games import make_game

if TYPE_CHECKING:
    from nextstate.agents.language import LanguageModel
    from nextstate.analysis.heads.pairs import TokenPair
    from nextstate.analysis.page.page import Page


class Heads(Study[PatchConfig]):
    """Find the heads that carry state, by activation patching over minimal pairs of a game."""

    name = "patch"
    config = PatchConfig

    def jobs(self, config: PatchConfig) -> list[Job]:
        game = make_game(config.game, **config.game_args)
        kinds = kinds_of(config, game)
        for design, kind in kinds:  # raises before anything is written if the game cannot make such pairs
            draw(config.model_copy(update={"pairs": 1}), game, design, kind, np.random.default_rng(0))
        jobs = [Job(f"pairs/{d}-{k}", f"{d} {k} pairs", config.pairs, (d, k), agent=config.agent) for d, k in kinds]
        sweeps = list(sweeps_of(config, kinds))
        for s in sweeps:
            cost = config.pairs * {"last": 4, "all": 16, "map": 40}[s.where]
            title = f"{s.design} {s.kind} pairs: {s.direction} {s.site}, {s.where if s.exact else 'attribution'}"
            jobs.append(Job(f"sweeps/{s.key}", title, cost, s, (s.pairs,), config.agent))
        if config.aggregate == "sum":
            for kind in (kind for design, kind in kinds if design == "paper"):
                title = f"published {kind} pairs, added up as published"
                jobs.append(Job(f"published/{kind}", title, 20, kind, agent=config.agent))
        for design in main_first(config.designs):
            needs = [Sweeping(design, kind, "head", "denoise", "last") for kind in ("state", "action")]
            if all(s in sweeps for s in needs):
                keys = tuple(key for s in needs for key in (s.pairs, f"sweeps/{s.key}"))
                jobs.append(Job(f"attention/{design}", "attention of the top heads", 8, design, keys, config.agent))
                break
        return jobs

    def identity(self, job: Job, run: Run[PatchConfig]) -> dict[str, Any]:
        def game() -> dict[str, Any]:
            return game_identity(make_game(run.config.game, **run.config.game_args))

        return run.asks(run.config.model) | run.once("game", game)

    def do(self, job: Job, run: Run[PatchConfig]) -> pl.DataFrame:
        if job.key.startswith("pairs/"):
            return _measure(run, *job.given)
        if job.key.startswith("attention/"):
            return _attend(run, job.given)
        if job.key.startswith("published/"):
            return _publish(run, job.given)
        return _sweep(run, job.given)

    def metrics(self, job: Job, frame: pl.DataFrame) -> dict[str, float | None]:
        if not isinstance(job.given, Sweeping) or frame.is_empty():
            return {}
        top = frame.sort("recovery", descending=True).row(0, named=True)
        numbers = {"largest_recovery": top["recovery"], "pairs": top["pairs"]}
        if top["carries"] is not None:
            numbers |= {"carry": int(frame["carries"].sum()), "tested": top["tested"]}
        return {f"{job.given.key}/{name}": value for name, value in numbers.items()}

    def summarise(self, run: Run[PatchConfig]) -> dict[str, pl.DataFrame]:
        from nextstate.analysis.heads.tables import summaries

        return summaries(run)

    def headline(self, run: Run[PatchConfig]) -> pl.DataFrame:
        found = run.summary("heads").filter(pl.col("carries") != "")
        found = found.sort(pl.max_horizontal("state", "action"), descending=True).head(SHOWN)
        ends = [f"{kind}{end}" for kind in ("state", "action") for end in ("", "_low", "_high")]
        return found.select(pl.format("{}.{}", "layer", "head").alias("head"), *ends, "routing", "carries")

    def page(self, run: Run[PatchConfig]) -> Page:
        from nextstate.analysis.heads.page import page

        return page(run)


def _drawn(run: Run[PatchConfig], design: str, kind: str) -> list[Pair]:
    game = make_game(run.config.game, **run.config.game_args)
    return run.once(("drawn", design, kind), lambda: draw(run.config, game, design, kind, run.rng(design, kind)))


def _measure(run: Run[PatchConfig], design: str, kind: str) -> pl.DataFrame:
    """Tokenise pairs and run the model on them, unpatched; return one row for each pair."""
    from nextstate.analysis.heads.recovery import Readout
    from nextstate.analysis.heads.routing import baseline, token_pairs
    from nextstate.analysis.heads.tables import PAIRS, pair_rows

    pairs, model = _drawn(run, design, kind), run.model(run.config.model)
    run.warn(model.episode_warnings(pairs[0].clean))
    found, excluded = token_pairs(model.encoder, pairs)
    reasons = {x.pair: x.reason for x in excluded}
    joined = dict(zip([i for i in range(len(pairs)) if i not in reasons], found, strict=True))
    base = baseline(model, found) if found else (Readout.empty(0), Readout.empty(0))
    words = {i: [model.tokenizer.decode([t]) for t in pair.clean] for i, pair in joined.items()}
    rows = pair_rows(design, kind, pairs, joined, reasons, base, words)
    if any(sweep.tested for sweep in sweeps_of(run.config, [(design, kind)])):
        _add_controls(run, model, rows, joined)
    if not any(row["kept"] for row in rows):
        reason = (
            f"{model.name} fails on all {len(found)} pairs: it never prefers the correct answer in both prompts"
            if found else f"no pair can be used: {rows[0]['reason']}"
        )  # fmt: skip
        run.left_out(run.config.agent, f"{design} {kind} pairs", reason, failed=True)
        run.progress.warn(f"{design} {kind} pairs: {reason}")
    run.describe_model(model)
    return pl.DataFrame(rows, schema=PAIRS)


def _add_controls(
    run: Run[PatchConfig], model: LanguageModel, rows: list[dict[str, Any]], joined: Mapping[int, TokenPair]
) -> None:
    """Find a control prompt for each counted pair, and write it into the pair's row."""
    from nextstate.analysis.heads.controls import control_prompts

    config, kept = run.config, [(row["pair"], joined[row["pair"]]) for row in rows if row["kept"]]
    if not kept:
        return
    design, kind = rows[0]["design"], rows[0]["kind"]
    game, rng = make_game(config.game, **config.game_args), run.rng(design, kind, "control")
    run.progress.on(f"control prompts of {design} {kind} pairs")
    found = control_prompts(
        model, kept, lambda number: draw_one(config, game, design, kind, rng, number), CONTROL_ROUNDS
    )
    for number, tokens in found.items():
        rows[number] |= {"control_ids": list(tokens), "control_prompt": model.tokenizer.decode(list(tokens))}
    if len(found) < len(kept):
        run.warn(
            f"{len(kept) - len(found)} of {len(kept)} {design} {kind} pairs have no unrelated prompt with the same "
            f"token layout among {CONTROL_ROUNDS} draws each, and are left out of the test of heads"
        )


def _sweep(run: Run[PatchConfig], job: Sweeping) -> pl.DataFrame:
    from nextstate.analysis.heads.pairs import PatchError
    from nextstate.analysis.heads.patch import attribution, recovery, sweep
    from nextstate.analysis.heads.recovery import too_few
    from nextstate.analysis.heads.routing import layout, token_pairs
    from nextstate.analysis.heads.tables import SWEEP, sweep_rows

    rows = run.table(job.pairs)
    kept = rows.filter("kept")
    if kept.is_empty():  # `_measure` has reported it
        return pl.DataFrame(schema=SWEEP)
    config, model = run.config, run.model(run.config.model)
    joined = run.once(("joined", job.pairs), lambda: token_pairs(model.encoder, _drawn(run, job.design, job.kind))[0])
    sound = rows.filter(pl.col("tokens").is_not_null())
    pairs = [pair for pair, ok in zip(joined, sound["kept"], strict=True) if ok]
    controls = job.tested and kept["control_ids"].null_count() < len(kept)
    if controls:
        pairs = [
            replace(pair, control=tuple(ids or ()))
            for pair, ids in zip(pairs, kept["control_ids"].to_list(), strict=True)
        ]
    if job.direction in ("mean", "resample") and kept["tokens"].n_unique() > 1:
        lengths = kept["tokens"].n_unique()
        raise Skip(f"pairs have {lengths} different lengths; {job.direction} ablation at all positions needs one")
    positions = {"last": "last", "all": "all", "map": layout(pairs)}[job.where]
    given: dict[str, Any] = {"site": job.site, "positions": positions, "direction": job.direction}
    given |= {"failures": "include", "rng": run.rng(job.key)}  # failed pairs are already filtered out
    if job.exact:
        # Logits of the whole vocabulary are affordable for few copies only, so maps and ablations omit them.
        given |= {"vocabulary": job.where == "last", "max_bytes": int(config.max_gigabytes * 2**30)}
        found = sweep(model, pairs, controls=controls, **given)
    else:
        found = attribution(model, pairs, **given)
    run.describe_model(model)  # including what was verified for longer prompts
    try:
        recovered = recovery(found, run.rng(job.key, "bootstrap"), resamples=config.resamples)
    except PatchError as error:
        raise Skip(str(error)) from error
    if job.tested and (reason := too_few(recovered.test.pairs)):
        run.warn(f"{job.design} {job.kind} pairs: {reason}")
    return sweep_rows(job, found, recovered, len(sound) - len(kept))


def _publish(run: Run[PatchConfig], kind: str) -> pl.DataFrame:
    """Patch the trials that the published aggregation patches; return one row for each cell."""
    from nextstate.analysis.heads.published import PUBLISHED, trial_rows, trials

    config, model = run.config, run.model(run.config.model)
    game, rng = make_game(config.game, **config.game_args), run.rng("published", kind)
    rows = [pl.DataFrame(schema=PUBLISHED)]
    for trial in trials(published_sizes(kind), lambda size: game.contrast(rng, kind, "paper", **size), rng):
        rows.append(trial_rows(model, kind, trial, config.sites, int(config.max_gigabytes * 2**30)))
    run.describe_model(model)
    return pl.concat(rows)


def _attend(run: Run[PatchConfig], design: str) -> pl.DataFrame:
    """Return the attention of the top heads from the answering token, in one state pair and one action pair."""
    from nextstate.analysis.heads.routing import attention_of, head_table, top_heads
    from nextstate.analysis.heads.tables import ATTENTION, routing_of

    found, rows = routing_of(run, design, "head"), []
    if found is None:
        return pl.DataFrame(schema=ATTENTION)
    model = run.model(run.config.model)
    heads = top_heads(head_table(found, model.sites.layers_with("head")))[:SHOWN]
    for kind in ("state", "action") if heads else ():
        example = run.table(f"pairs/{design}-{kind}").filter("kept").row(0, named=True)
        weights = attention_of(model, example["ids"], heads)
        for (layer, head), own in zip(heads, weights, strict=True):
            rows.append({"kind": kind, "layer": layer, "head": head, "tokens": example["pieces"],
                         "weights": [round(float(w), 4) for w in own], "roles": example["roles"],
                         "answer": example["answer_clean"]})  # fmt: skip
    return pl.DataFrame(rows, schema=ATTENTION)
