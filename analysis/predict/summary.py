"""All statistics of a run, as tables; the page and the headline read nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polars as pl

from nextstate.agents.registry import PLAYERS
from nextstate.analysis.grid import Cell, grid_table
from nextstate.analysis.play import statistics as play
from nextstate.analysis.play.config import play_cells
from nextstate.analysis.play.tables import load
from nextstate.analysis.predict import states, viewer
from nextstate.analysis.predict.config import Participant, PredictConfig, asked_cells, participants
from nextstate.analysis.predict.statistics import paired, summed
from nextstate.analysis.predict.sums import blocks_of
from nextstate.analysis.predict.tables import rows
from nextstate.analysis.run import ModelFailed, Run
from nextstate.envs.files import slug


def agents_of(run: Run[PredictConfig], who: Iterable[Participant]) -> pl.DataFrame:
    """Return the agents that have tables, in the order of the page: models, ideal and lookup reader, chance, shortcuts.

    `of` is the name of the model for a model without some of its heads, otherwise null.
    """
    last = {"ideal": 1, "lookup": 2, "chance": 3}
    shown = [p for p in who if p.spec.kind not in PLAYERS and run.keys(f"*/{slug(p.name)}/*")]
    shown.sort(key=lambda p: last.get(p.name, 4) if p.reference else 0)
    rows = [(p.name, p.reference, p.spec.name if p.without else None) for p in shown]
    return pl.DataFrame(rows, schema={"agent": pl.String, "reference": pl.Boolean, "of": pl.String}, orient="row")


def trained(run: Run[PredictConfig]) -> pl.DataFrame:
    """Return what models were trained on, where their folders say so: the largest step of each size of each game.

    The sizes and steps are those of the training episodes; see `nextstate.agents.training.trained_range`.
    """
    rows = [
        (agent["name"], game, int(size), steps)
        for agent in run.record["agents"]
        for game, sizes in (agent.get("trained") or {}).items()
        for size, steps in sizes.items()
    ]
    schema = {"agent": pl.String, "game": pl.String, "size": pl.Int64, "steps": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row").sort("agent", "game", "size")


def alike(asked: Sequence[Cell]) -> list[str]:
    """Return the cells whose size is the same setting as in the game's first cell: comparable sizes."""
    first: dict[str, str] = {}
    for cell in asked:
        first.setdefault(cell.game.name, cell.game.size)
    return [cell.slug for cell in asked if cell.game.size == first[cell.game.name]]


def without(run: Run[PredictConfig], asked: Sequence[Cell], agents: pl.DataFrame) -> pl.DataFrame:
    """Return how the answers of each model change without some of its heads, by game; subsets all and determined.

    Columns as in `paired`: `accuracy` is without the heads, `theirs` that of the whole model `of`.
    """
    pairs = agents.drop_nulls("of").select("agent", "of").rows() or [("", "")]
    found = [
        paired(rows(run, asked, (agent, of)), agent, of, by=("game",)).with_columns(agent=pl.lit(agent), of=pl.lit(of))
        for agent, of in pairs
    ]
    parts = [f.filter(pl.col("subset").is_in(["all", "determined"])) for f in found]
    return pl.concat([p.sort("subset", "game", descending=[True, False]) for p in parts])


def summaries(run: Run[PredictConfig]) -> dict[str, pl.DataFrame]:
    """Return all statistics of a run.

    Raises:
        ModelFailed: no question was answered and nothing was played.
    """
    asked, plays = asked_cells(run.config), play_cells(run.config.play, run.config.seed)
    agents = agents_of(run, participants(run.config, [c.game for c in asked], plays))
    answers, played = summed(blocks_of(run, asked), alike(asked)), load(run)
    if answers["totals"].is_empty() and played.is_empty():
        raise ModelFailed("; ".join(dict.fromkeys(x["reason"] for x in run.record["left_out"])) or "nothing was asked")
    return {
        "agents": agents,
        "trained": trained(run),
        "grid": grid_table(asked, [p.cell for p in plays]),
        **answers,
        "without": without(run, asked, agents),
        "whole": states.whole([rows(run, [c]) for c in asked if c.questions_per_step == "all"]),
        **viewer.sample(run, asked),
        **play.summaries(played, plays, agents),
    }
