"""The episode viewer of the page: a few whole episodes with the answers of all agents."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from nextstate.analysis.grid import Cell
from nextstate.analysis.predict import tables
from nextstate.analysis.predict.config import PredictConfig
from nextstate.analysis.run import Run

ANSWERS = 6000  # most answers shown
EPISODES = 4  # most episodes of a cell
STEPS = 40  # most steps of an episode
TOP = 5  # choices shown with their probability
_OF_QUESTION = ("stem", "truth", "accepted", "determined", "lookup", "ceiling", "chance")
QUESTIONS: dict[str, Any] = {
    "setting": pl.String, **{name: tables.QUESTIONS[name] for name in (*tables.KEY, *_OF_QUESTION)}, "of": pl.Int64,
    "opening": pl.String, "added": pl.String, "closing": pl.String, "outcome": pl.String,
}  # fmt: skip
ANSWERED: dict[str, Any] = {
    "setting": pl.String, **dict.fromkeys(tables.KEY, pl.Int64), "agent": pl.String, "greedy": pl.String,
    "greedy_correct": pl.Boolean, "choice": pl.String, "choice_correct": pl.Boolean, "rank": pl.Int64,
    "top": pl.List(pl.String), "probabilities": pl.List(pl.Float64),
}  # fmt: skip


def sample(run: Run[PredictConfig], cells: Sequence[Cell]) -> dict[str, pl.DataFrame]:
    """Return whole episodes of the smallest, a middle and the largest size of each game and variant, as two tables.

    The number of episodes of a cell is limited by `ANSWERS`, and episodes are cut after `STEPS` steps with questions.
    `shown_questions` has a row for each question, `shown_answers` one for each answer. In the former, `opening` is the
    text before an episode's first step (only in its first row), and `added` the text that a step adds.
    """
    parts = [pl.LazyFrame(schema=tables.ROWS), *(_first_episodes(run, cell) for cell in _spread(cells))]
    rank = pl.col("step").rank("dense").over("agent", "setting", "episode")
    rows = pl.concat(parts).collect().filter(rank <= STEPS)
    counts = rows.group_by("setting", "episode").len().sort("setting", "episode")
    per_round = max(1, int(counts.group_by("setting").agg(pl.col("len").mean())["len"].sum()))
    keep = counts.group_by("setting", maintain_order=True).head(max(1, min(EPISODES, ANSWERS // per_round)))
    rows = rows.join(keep, on=["setting", "episode"], how="semi")
    given = rows.select(*(c for c in ANSWERED if c in tables.ROWS), "choices", "logprobs")
    wanted = ("choices", "prompt", "narration", "closing", "outcome")
    asked = rows.select(*tables.QUESTION, *_OF_QUESTION, *wanted).unique(tables.QUESTION)
    inline = {cell.slug for cell in cells if cell.game.feedback == "inline"}
    texts = [
        row
        for (setting, _), part in asked.sort(tables.QUESTION).group_by("setting", "episode", maintain_order=True)
        for row in _texts(part.rows(named=True), setting in inline)
    ]
    order = given.sort(*tables.QUESTION, "agent").rows(named=True)
    return {
        "shown_questions": pl.DataFrame(texts, schema=QUESTIONS),
        "shown_answers": pl.DataFrame([row | _likeliest(row) for row in order], schema=ANSWERED),
    }


def _first_episodes(run: Run[PredictConfig], cell: Cell) -> pl.LazyFrame:
    """Return the answers about the first episodes of a cell that have any; no others are read."""
    files = [pl.scan_parquet(run.file(key)).select("episode") for key in run.keys(f"answers/*/{cell.slug}")]
    if not files:
        return pl.LazyFrame(schema=tables.ROWS)
    first = pl.concat(files).unique().bottom_k(EPISODES, by="episode").collect()["episode"].to_list()
    return tables.rows(run, [cell]).filter(pl.col("episode").is_in(first))


def _spread(cells: Iterable[Cell]) -> Iterable[Cell]:
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.game.name, cell.variant), []).append(cell)
    for group in groups.values():
        group.sort(key=lambda c: (c.size, c.steps))
        yield from (group[i] for i in sorted({0, len(group) // 2, len(group) - 1}))


def _texts(asked: Sequence[Mapping[str, Any]], inline: bool) -> Iterable[dict[str, Any]]:
    """Yield the questions of an episode, with the text that each step adds to the transcript."""
    seen = 0  # characters of the transcript
    for i, row in enumerate(asked):
        text = {"opening": "", "added": ""}
        if row["question"] == asked[0]["question"]:
            head = row["prompt"][: len(row["prompt"]) - len(row["stem"])]
            if i == 0:
                seen = len(head) - len(row["narration"])
                text["opening"] = head[:seen]
            text["added"], seen = head[seen:], len(head)
        if inline:
            answer = next(c for c in row["choices"] if c.strip() == row["truth"])
            seen += len(row["stem"]) + len(answer) + len(row["closing"])
        if i + 1 == len(asked) or asked[i + 1]["step"] != row["step"]:
            seen += len(row["outcome"])
        yield {**row, **text, "of": len(row["choices"])}


def _likeliest(row: Mapping[str, Any]) -> dict[str, Any]:
    chances = [math.exp(min(x, 0.0)) if x is not None else 0.0 for x in row["logprobs"]]
    top = sorted(range(len(chances)), key=lambda i: -chances[i])[:TOP]
    return {"top": [row["choices"][i].strip() for i in top], "probabilities": [round(chances[i], 3) for i in top]}


def for_page(found: Mapping[str, pl.DataFrame]) -> dict[str, Any]:
    """Return the data for the script of the page; `found` are the tables of `summary/`."""
    agents = {agent: i for i, agent in enumerate(found["agents"]["agent"])}
    cells = {row["slug"]: row for row in found["grid"].filter(~pl.col("played")).rows(named=True)}
    by: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in found["shown_answers"].rows(named=True):
        by.setdefault(tuple(row[k] for k in tables.QUESTION), {})[agents[row["agent"]]] = {
            "text": row["greedy"], "right": row["greedy_correct"], "choice": row["choice"],
            "choice_right": row["choice_correct"], "rank": row["rank"],
            "top": [list(pair) for pair in zip(row["top"], row["probabilities"], strict=True)],
        }  # fmt: skip
    settings = []
    for slug in found["shown_questions"]["setting"].unique(maintain_order=True):
        part, cell = found["shown_questions"].filter(setting=slug), cells[slug]
        inline = json.loads(cell["settings"])["feedback"] == "inline"
        episodes = [
            {
                "id": seed, "opening": mine["opening"][0], "inline": inline,
                "steps": [_step(one.rows(named=True), by) for _, one in mine.group_by("step", maintain_order=True)],
            }
            for (seed,), mine in part.group_by("episode", maintain_order=True)
        ]  # fmt: skip
        named = {k: cell[k] for k in ("slug", "game", "variant", "size", "size_name", "steps")}
        settings.append(named | {"episodes": episodes})
    order = {slug: i for i, slug in enumerate(_by_size(cells.values()))}
    return {"agents": list(agents), "settings": sorted(settings, key=lambda s: order[s["slug"]])}


def _by_size(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return cells by game and variant in the order of the grid, within these by size."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["game"], cell["variant"]), []).append(cell)
    return [c["slug"] for group in groups.values() for c in sorted(group, key=lambda c: (c["size"], c["steps"]))]


def _step(rows: Sequence[Mapping[str, Any]], by: Mapping[tuple[Any, ...], dict[int, dict[str, Any]]]) -> dict[str, Any]:
    asked = [
        {name: row[name] for name in ("stem", "truth", "accepted", "determined", "of")}
        | {name: round(row[name], 3) for name in ("ceiling", "lookup", "chance")}
        | {"by": by[tuple(row[k] for k in tables.QUESTION)]}
        for row in rows
    ]
    first, last = rows[0], rows[-1]
    more = {"closing": last["closing"], "outcome": last["outcome"]}
    return {"step": first["step"], "added": first["added"], "asked": asked, **more}
