"""The tables of questions and of answers, and how they are joined.

`questions/CELL` has one row for each question, `answers/AGENT/CELL` one row for each question that an agent answered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import polars as pl

from nextstate.analysis.grid import Cell
from nextstate.analysis.predict.config import PredictConfig, asked_cells
from nextstate.analysis.run import Run
from nextstate.envs.files import slug

KEY = ("episode", "step", "question")  # of a question within its cell
QUESTION = ("setting", *KEY)
QUESTIONS: dict[str, Any] = {
    "episode": pl.Int64, "step": pl.Int64, "question": pl.Int64, "variable": pl.String, "stem": pl.String,
    "choices": pl.List(pl.String), "truth": pl.String, "accepted": pl.List(pl.String), "lookup": pl.Float64,
    "ceiling": pl.Float64, "determined": pl.Boolean, "chance": pl.Float64, "states": pl.Int64, "prompt": pl.String,
    "narration": pl.String, "closing": pl.String, "outcome": pl.String,
}  # fmt: skip
ANSWERS: dict[str, Any] = {
    "agent": pl.String, "incomplete": pl.Boolean, "episode": pl.Int64, "step": pl.Int64, "question": pl.Int64,
    "greedy": pl.String, "greedy_correct": pl.Boolean, "choice": pl.String, "choice_correct": pl.Boolean,
    "choice_token_correct": pl.Boolean, "choice_byte_correct": pl.Boolean, "logprobs": pl.List(pl.Float32),
    "p_accepted": pl.Float64, "rank": pl.Int64, "prompt_tokens": pl.Int64,
}  # fmt: skip
CELL: dict[str, Any] = {"game": pl.String, "setting": pl.String, "size": pl.Int64, "variant": pl.String}
ROWS = CELL | ANSWERS | QUESTIONS


def rows(
    run: Run[PredictConfig], cells: Iterable[Cell] | None = None, agents: Iterable[str] | None = None
) -> pl.LazyFrame:
    """Return every answer joined with its question, lazily: only the columns that are then selected are read.

    Args:
        run: with its tables; see `nextstate.analysis.study.open_run`.
        cells: of which cells; by default all.
        agents: of which agents; by default all.
    """
    parts = [pl.LazyFrame(schema=ROWS)]
    for cell in asked_cells(run.config) if cells is None else cells:
        keys = sorted(run.keys(f"answers/*/{cell.slug}"))
        if agents is not None:
            keys = [key for key in keys if key.split("/")[1] in {slug(agent) for agent in agents}]
        if keys:
            given = pl.concat([pl.scan_parquet(run.file(key)) for key in keys])
            asked = pl.scan_parquet(run.file(f"questions/{cell.slug}"))
            columns = [pl.lit(value, CELL[name]).alias(name) for name, value in cell.columns.items()]
            parts.append(
                given.join(asked, on=KEY, how="inner", maintain_order="left").with_columns(columns).select(*ROWS)
            )
    return pl.concat(parts)
