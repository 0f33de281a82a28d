"""The page of a prediction run: accuracy of agents on next-state questions, and that of the ideal reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from nextstate.analysis.figures import SCALE
from nextstate.analysis.page.page import FigureList, Page, Section
from nextstate.analysis.play import page as play
from nextstate.analysis.predict import figures, states, statistics, viewer
from nextstate.analysis.predict.config import PredictConfig
from nextstate.analysis.run import Run
from nextstate.analysis.stats import FEW_EPISODES, FEWEST_EPISODES

CELLS = 16_000  # most rows of the cell table on the page

Tables = Mapping[str, pl.DataFrame]  # of the summary, by name


def page(run: Run[PredictConfig]) -> Page:
    """Return the page, from the tables of `summary/`."""
    found, drawn = run.summaries(), FigureList()
    hard, totals = found["hard"], found["totals"]
    look = figures.styles(found["agents"])
    shown = focus(found["agents"])
    asked = [a for a in shown if a in set(totals["agent"])]  # models without answers have no figures
    games = [_game(found, name, shown, drawn) for name in _asked(found)["game"].unique(maintain_order=True)]
    played = play.section(found, drawn)
    names = dict.fromkeys(game["name"] for game in games + (played["games"] if played else []))
    named = models(found["agents"])
    context = {
        "label": figures.label,
        "models": named,
        "headline": headline(found, shown),
        "games": games,
        "determined": [drawn.add(figures.determined(totals, a, look[a])) for a in asked],
        "hard": [drawn.add(figures.hard(hard, totals, a, look[a])) for a in asked if len(hard)],
        "plays": played,
        "never_wrong": _never_wrong(hard),
        "without": found["without"].rows(named=True),
        "whole": found["whole"].rows(named=True),
        "forms": states.FORMS,
        "scale": ", ".join(f"{colour} {100 * at:g}%" for at, colour in SCALE),
        "cells": _cell_data(_marked(found), found["agents"]),
        "fewest": FEWEST_EPISODES,
        "few": FEW_EPISODES,
        "edge": figures.EDGE,
        "edges": [(row["agent"], row["game"], row["sizes"], row["steps"]) for row in _edges(found)],
        "episodes": viewer.for_page(found),
        "rows": found["by_game"].filter(subset="all")["n"].sum(),
        "cell_counts": [len(_asked(found)), int(found["grid"]["played"].sum())],
    }
    title = f"{run.config.name}: {', '.join(named) or 'reference agents'} in {', '.join(names)}"
    sections = [Section(name, table=found[name]) for name in ("cells", "shown_questions", "shown_answers")]
    return Page(title, sections=sections, template="predict/page.html.jinja", context=context, figures=drawn)


def models(agents: pl.DataFrame) -> list[str]:
    """Return the agents that are not references."""
    return agents.filter(~pl.col("reference"))["agent"].to_list()


def focus(agents: pl.DataFrame) -> list[str]:
    """Return the agents that have figures of their own: the models, or the first agent if there are none."""
    return models(agents) or agents["agent"].to_list()[:1]


def _asked(found: Tables) -> pl.DataFrame:
    return found["grid"].filter(~pl.col("played"))


def _game(found: Tables, game: str, shown: list[str], drawn: FigureList) -> dict[str, Any]:
    mine = _asked(found).filter(game=game).rows(named=True)
    size_names = {s["variant"]: s["size_name"] for s in mine}
    look, curves = figures.styles(found["agents"]), found["curves"]
    trained = {agent: figures.trained_of(found["trained"], agent, game) for agent in shown}
    here = found["cells"].filter(pl.col("game") == game)
    panels = []
    for variant, size_name in size_names.items():
        for agent in shown:
            if here.filter((pl.col("variant") == variant) & (pl.col("agent") == agent)).is_empty():
                continue
            maps = [
                drawn.add(
                    figures.heatmap(here, game, variant, agent, v, size_name, trained[agent]), f"{game} {variant}"
                )
                for v in figures.VALUES
            ]
            panels.append({"variant": variant, "agent": agent, "maps": maps, "curves": []})
        lines = [
            drawn.add(figures.curve(curves, game, variant, "size", look, size_name, trained), f"{game} {variant}"),
            drawn.add(figures.curve(curves, game, variant, "step", look, "", trained), f"{game} {variant}"),
        ]
        exact = (pl.col("game") == game) & (pl.col("variant") == variant) & (pl.col("axis") == "states")
        if curves.filter(exact)["at"].n_unique() > 1:
            lines.append(drawn.add(figures.curve(curves, game, variant, "states", look, "|Q|"), f"{game} {variant}"))
        for panel in panels:
            if panel["variant"] == variant:
                panel["curves"] = lines
    present = set(here["agent"])
    return {
        "name": game,
        "sizes": {
            name: sorted({s["size"] for s in mine if size_names[s["variant"]] == name})
            for name in dict.fromkeys(size_names.values())
        },
        "steps": here["step"].max(),
        "episodes": max(s["episodes"] for s in mine),
        "bayes": all(s["bayes"] for s in mine),
        "panels": panels,
        "legend": [(figures.label(a), style) for a, style in look.items() if a in present],
    }


def headline(found: Tables, shown: list[str]) -> list[dict[str, Any]]:
    """Return for each agent and game its row of each subset, and of the smallest and largest size (determined only).

    `grows` is whether these two sizes differ.
    """
    out = []
    first = {row["game"]: row["size_name"] for row in reversed(_asked(found).rows(named=True))}
    for agent in shown:
        for game in _asked(found)["game"].unique(maintain_order=True):
            subsets = {row["subset"]: row for row in found["by_game"].filter(agent=agent, game=game).rows(named=True)}
            ends = found["by_size"].filter(agent=agent, game=game, subset="determined").sort("size").rows(named=True)
            if "all" in subsets:
                row: dict[str, Any] = {name: subsets.get(name) for name in statistics.SUBSETS}
                row |= {"smallest": ends[0] if ends else None, "largest": ends[-1] if ends else None}
                row |= {"grows": bool(ends) and ends[0]["size"] != ends[-1]["size"]}
                out.append({"agent": agent, "game": game, "size_name": first[game], **row})
    return out


def _edges(found: Tables) -> list[dict[str, Any]]:
    """Return the smallest and largest trained size, and the largest trained step, of each agent and asked game."""
    sizes = pl.format("{} to {}", pl.col("size").min(), pl.col("size").max())
    table = (
        found["trained"].group_by("agent", "game", maintain_order=True).agg(sizes=sizes, steps=pl.col("steps").max())
    )
    return table.join(found["grid"].select("game").unique(), on="game", how="semi").rows(named=True)


def _marked(found: Tables) -> pl.DataFrame:
    """Return the table of cells with `beyond`: whether a cell is outside what the agent was trained on, if known."""
    cells, trained = found["cells"], found["trained"]
    known = trained.select("agent", "game").unique().with_columns(known=pl.lit(True))
    cells = cells.join(known, on=["agent", "game"], how="left", maintain_order="left")
    cells = cells.join(trained, on=["agent", "game", "size"], how="left", maintain_order="left")
    outside = pl.col("step") > pl.col("steps").fill_null(0)
    return cells.with_columns(beyond=pl.when("known").then(outside)).drop("known", "steps")


def _never_wrong(hard: pl.DataFrame) -> list[str]:
    rows = hard.filter(pl.col("n") == 0).select("game", "variant", "shortcut").unique(maintain_order=True)
    return [f"{figures.label(s)} in {figures.place(g, v)}" for g, v, s in rows.iter_rows()]


def _cell_data(cells: pl.DataFrame, agents: pl.DataFrame) -> dict[str, Any]:
    """Return the cell table as columns, with names as indices and numbers rounded to three digits."""
    shown = cells
    if len(shown) > CELLS:
        shown = shown.filter((pl.col("step") <= 10) | (pl.col("step") % 10 == 0))
    if len(shown) > CELLS:
        shown = shown.filter(pl.col("subset") == "all")
    shown = shown.head(CELLS)
    names = {
        "agent": agents["agent"].to_list(),
        "game": shown["game"].unique(maintain_order=True).to_list(),
        "subset": list(statistics.SUBSETS),
    }
    names["variant"] = shown["variant"].unique(maintain_order=True).to_list()
    columns: dict[str, list[Any]] = {}
    for column in shown.columns:
        if column in names:
            columns[column] = shown[column].replace_strict(names[column], range(len(names[column]))).to_list()
        else:
            columns[column] = (shown[column].round(3) if shown[column].dtype == pl.Float64 else shown[column]).to_list()
    return {"names": names, "columns": columns, "left": len(cells) - len(shown), "total": len(cells)}
