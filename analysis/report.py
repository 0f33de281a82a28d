"""One self-contained page about a run: what was asked, how well it was answered, and what could have been."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from nextstate.analysis import figures, plays, states, tables
from nextstate.analysis.page import page as pages
from nextstate.analysis.page.page import FigureList, Page, replace
from nextstate.analysis.tables import Run, RunError

ANSWERS = 6000  # agent's answers that the episode viewer holds at most
STEPS = 40  # and steps of an episode
CELLS = 16_000  # rows of the cell table that the page holds at most
TOP = 5  # choices shown with their probability


def write(run: Path) -> Path:
    """Write `report.html`, `figures/` and `cells.parquet` (the whole table of cells) into the folder of a run.

    An existing page is replaced; a killed call leaves it as it was.

    Raises:
        RunError: where the run is not complete or cannot be read.
    """
    loaded = tables.load(Path(run))
    answers = tables.narrow(loaded.rows)
    cells = tables.cells(answers)
    replace(loaded.path / "cells.parquet", lambda path: cells.write_parquet(path))
    return pages.write(make_page(loaded, answers, cells), loaded.info, loaded.path)


def make_page(run: Run, answers: pl.DataFrame, cells: pl.DataFrame) -> Page:
    """Return the page of a run; `answers` from `tables.narrow`, `cells` from `tables.cells`."""
    totals = tables.pooled(answers, ("agent", "game", "variant"))
    by_game = tables.pooled(answers, ("agent", "game"))
    by_size = tables.pooled(alike(run, answers), ("agent", "game", "size"))
    by_states = states.curves(run, answers)
    curves = pl.concat([tables.curves(answers), *([by_states] if len(by_states) else [])])
    hard = tables.on_hard(answers)
    drawn, look = FigureList(), figures.styles(run)
    answered = set(answers["agent"].unique())
    asked = [a for a in run.focus if a in answered]  # a model that was refused has no figures
    played = plays.section(run, plays.load(run), curves, drawn)
    games = [_game(run, name, cells, curves, drawn) for name in dict.fromkeys(s["game"] for s in run.info["settings"])]
    names = dict.fromkeys(game["name"] for game in games + (played["games"] if played else []))
    context = {
        "run": run,
        "label": figures.label,
        "headline": headline(run, by_game, by_size),
        "games": games,
        "determined": [drawn.add(figures.determined(totals, a, look[a])) for a in asked],
        "hard": [drawn.add(figures.hard(hard, totals, a, look[a])) for a in asked if len(hard)],
        "plays": played,
        "never_wrong": _never_wrong(hard),
        "without": without(run, answers),
        "whole": states.whole(run).rows(named=True),
        "forms": states.FORMS,
        "scale": ", ".join(f"{colour} {100 * at:g}%" for at, colour in figures.SCALE),
        "cells": _cell_data(cells, run),
        "episodes": sample(run),
        "rows": len(answers),
    }
    title = f"{run.name}: {', '.join(run.models) or 'reference agents'} in {', '.join(names)}"
    return Page(title, template="report.html.jinja", context=context, figures=drawn)


def _game(run: Run, game: str, cells: pl.DataFrame, curves: pl.DataFrame, drawn: FigureList) -> dict[str, Any]:
    mine = [s for s in run.info["settings"] if s["game"] == game]
    size_names = {s["variant"]: s.get("size_name", "size") for s in mine}
    look = figures.styles(run)
    here = cells.filter(pl.col("game") == game)
    panels = []
    for variant, size_name in size_names.items():
        for agent in run.focus:
            if here.filter((pl.col("variant") == variant) & (pl.col("agent") == agent)).is_empty():
                continue
            maps = [
                drawn.add(figures.heatmap(here, game, variant, agent, v, size_name), f"{game} {variant}")
                for v in figures.VALUES
            ]
            panels.append({"variant": variant, "agent": agent, "maps": maps, "curves": []})
        lines = [
            drawn.add(figures.curve(curves, game, variant, "size", look, size_name), f"{game} {variant}"),
            drawn.add(figures.curve(curves, game, variant, "step", look), f"{game} {variant}"),
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
        "panels": panels,
        "legend": [(figures.label(a), style) for a, style in look.items() if a in present],
    }


def alike(run: Run, answers: pl.DataFrame) -> pl.DataFrame:
    """Return the answers in settings whose size is that of the game's first setting, so that sizes can be compared."""
    first = _size_names(run)
    slugs = [s["slug"] for s in run.info["settings"] if s.get("size_name", "size") == first[s["game"]]]
    return answers.filter(pl.col("setting").is_in(slugs))


def _size_names(run: Run) -> dict[str, str]:
    """Return what the size of each game's first setting is called."""
    first: dict[str, str] = {}
    for s in run.info["settings"]:
        first.setdefault(s["game"], s.get("size_name", "size"))
    return first


def headline(run: Run, by_game: pl.DataFrame, by_size: pl.DataFrame) -> list[dict[str, Any]]:
    """Return for each model and game its row of each subset, and of the smallest and largest size (determined only).

    `grows` tells that these two sizes differ. `by_game`, `by_size` come from `tables.pooled`, by agent and game, and
    by size also.
    """
    out = []
    for agent in run.focus:
        for game, size_name in _size_names(run).items():
            mine = (pl.col("agent") == agent) & (pl.col("game") == game)
            subsets = {row["subset"]: row for row in by_game.filter(mine).iter_rows(named=True)}
            ends = by_size.filter(mine & (pl.col("subset") == "determined")).sort("size").rows(named=True)
            if "all" in subsets:
                found: dict[str, Any] = {name: subsets.get(name) for name in tables.SUBSETS}
                found |= {"smallest": ends[0] if ends else None, "largest": ends[-1] if ends else None}
                found |= {"grows": bool(ends) and ends[0]["size"] != ends[-1]["size"]}
                out.append({"agent": agent, "game": game, "size_name": size_name, **found})
    return out


def without(run: Run, answers: pl.DataFrame) -> list[dict[str, Any]]:
    """Return for each model asked also without some heads what that changes, a row a game, subset all or determined.

    Columns as in `tables.paired` (`accuracy` without the heads, `theirs` with them), and the other agent's name, `of`.
    """
    pairs = {a["name"]: a["intervene"]["of"] for a in run.info["agents"] if a.get("intervene")}
    out: list[dict[str, Any]] = []
    for agent, of in pairs.items():
        found = tables.paired(answers, agent, of, by=("game",)).filter(pl.col("subset").is_in(["all", "determined"]))
        rows = found.sort("subset", "game", descending=[True, False]).rows(named=True)
        out.extend({"agent": agent, "of": of, **row} for row in rows)
    return out


def _never_wrong(hard: pl.DataFrame) -> list[str]:
    rows = hard.filter(pl.col("n") == 0).select("game", "variant", "shortcut").unique(maintain_order=True)
    return [f"{figures.label(s)} in {figures.place(g, v)}" for g, v, s in rows.iter_rows()]


def _cell_data(cells: pl.DataFrame, run: Run) -> dict[str, Any]:
    """Return the cell table by columns; names as indices, numbers with three digits."""
    shown = cells
    if len(shown) > CELLS:
        shown = shown.filter((pl.col("step") <= 10) | (pl.col("step") % 10 == 0))
    if len(shown) > CELLS:
        shown = shown.filter(pl.col("subset") == "all")
    shown = shown.head(CELLS)
    names = {
        "agent": list(run.agents),
        "game": shown["game"].unique(maintain_order=True).to_list(),
        "subset": list(tables.SUBSETS),
    }
    names["variant"] = shown["variant"].unique(maintain_order=True).to_list()
    columns: dict[str, list[Any]] = {}
    for column in shown.columns:
        if column in names:
            columns[column] = shown[column].replace_strict(names[column], range(len(names[column]))).to_list()
        else:
            columns[column] = (shown[column].round(3) if shown[column].dtype == pl.Float64 else shown[column]).to_list()
    return {"names": names, "columns": columns, "left": len(cells) - len(shown), "total": len(cells)}


# --- the episode viewer


def sample(run: Run) -> dict[str, Any]:
    """Return a few whole episodes, with every agent's answers, from the smallest, a middle and the largest size.

    As many episodes a setting as `ANSWERS` allows, at most four; of an episode the first `STEPS` steps asked about.
    """
    chosen = list(_spread(run.info["settings"]))
    slugs = [s["slug"] for s in chosen]
    asked = pl.col("step").rank("dense").over("agent", "setting", "episode")
    few = run.rows.filter(pl.col("setting").is_in(slugs)).filter(asked <= STEPS)
    counts = few.group_by("setting", "episode").len().sort("setting", "episode").collect()
    per_round = max(1, int(counts.group_by("setting").agg(pl.col("len").mean())["len"].sum()))
    keep = counts.group_by("setting", maintain_order=True).head(max(1, min(4, ANSWERS // per_round)))
    rows = (
        few.join(keep.lazy().select("setting", "episode"), on=["setting", "episode"])
        .sort(*tables.QUESTION, "agent")
        .collect()
    )
    agents = {agent: i for i, agent in enumerate(run.agents)}
    settings = []
    for setting in chosen:
        part = rows.filter(pl.col("setting") == setting["slug"])
        if len(part):
            told = _transcripts(run, setting["slug"])
            named = {k: setting.get(k) for k in ("slug", "game", "variant", "size", "size_name", "steps")}
            ids = sorted(part["episode"].unique())
            settings.append(
                {**named, "episodes": [_episode(part.filter(pl.col("episode") == e), told, e, agents) for e in ids]}
            )
    return {"agents": list(agents), "settings": settings}


def _spread(settings: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for setting in settings:
        groups.setdefault((setting["game"], setting["variant"]), []).append(setting)
    for group in groups.values():
        group.sort(key=lambda s: (s["size"], s.get("steps", 0)))
        yield from (group[i] for i in sorted({0, len(group) // 2, len(group) - 1}))


def _transcripts(run: Run, slug: str) -> dict[int, dict[str, Any]]:
    path = run.path / "transcripts" / f"{slug}.parquet"
    again = f"run `{run.info['command']}` again"
    if not path.is_file():
        raise RunError(f"{path} is missing, but the run has answers for it: {again}")
    try:
        return {row["episode"]: row for row in pl.read_parquet(path).iter_rows(named=True)}
    except pl.exceptions.PolarsError as error:
        raise RunError(f"{path} cannot be read ({error}): delete it and {again}") from error


def _episode(
    rows: pl.DataFrame, told: Mapping[int, Mapping[str, Any]], seed: int, agents: Mapping[str, int]
) -> dict[str, Any]:
    if seed not in told:
        raise RunError(
            f"the transcripts of {rows['setting'][0]!r} have no episode {seed}, but there are answers for it"
        )
    story = told[seed]
    closing = story.get("closing") or []
    by_step = {step: asked for (step,), asked in rows.group_by("step", maintain_order=True)}
    steps = []
    for step in range(1, max(int(s) for s in rows["step"]) + 1):
        questions = []
        asked = by_step.get(step)
        for _, answers in [] if asked is None else asked.group_by("question", maintain_order=True):
            one = answers.row(0, named=True)
            given = {agents[a["agent"]]: _answer(a) for a in answers.iter_rows(named=True)}
            questions.append(
                {name: one[name] for name in ("stem", "truth", "accepted", "determined")}
                | {name: round(one[name], 3) for name in ("ceiling", "chance")}
                | {"of": len(one["choices"]), "by": given}
            )
        after = closing[step - 1] if step <= len(closing) else ""
        # A step of which nothing was asked (grid=cells) is told whole, with the answers that stay in the transcript.
        words = story["told" if asked is None else "narrations"][step - 1]
        outcome = "" if asked is None else (story.get("outcomes") or [""] * step)[step - 1]
        steps.append({"step": step, "told": words, "closing": after, "asked": questions, "outcome": outcome})
    return {"id": seed, "opening": story["opening"], "inline": story["feedback"] == "inline", "steps": steps}


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    chances = [math.exp(min(x, 0.0)) if x is not None else 0.0 for x in row["logprobs"]]
    top = sorted(range(len(chances)), key=lambda i: -chances[i])[:TOP]
    return {
        "text": row["greedy"],
        "right": row["greedy_correct"],
        "choice": row["choice"],
        "choice_right": row["choice_correct"],
        "rank": row["rank"],
        "top": [[row["choices"][i].strip(), round(chances[i], 3)] for i in top],
    }
