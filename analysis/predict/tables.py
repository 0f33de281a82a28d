"""The tables of questions and of answers, and how they are joined.

`questions/CELL` has one row for each question, `answers/AGENT/CELL` one row for each question that an agent answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from nextstate.agents.agent import Prompt
from nextstate.analysis.grid import Cell
from nextstate.analysis.predict.config import PredictConfig, asked_cells
from nextstate.analysis.run import Run

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


def question_frame(asked: Iterable[tuple[Prompt, Mapping[str, Any]]]) -> pl.DataFrame:
    """Return questions as a table.

    Args:
        asked: questions with their rows, from `rollout.questions`. The columns that are added: `states` is |Q| of the
            episode's system, `prompt` all that an agent reads, up to and including the stem; `narration` is the part
            that the step added before its questions, `closing` follows the answer where the transcript keeps answers,
            and `outcome` all questions of the step.
    """
    rows = []
    for prompt, row in asked:
        episode, step = prompt.episode, prompt.episode.steps[prompt.step]
        text = {"prompt": episode.prompt(prompt.step, prompt.question), "narration": step.narration}
        text |= {"closing": prompt.asked.closing, "outcome": step.outcome}
        rows.append({**row, **text, "states": episode.game.size_of(episode.start)})
    return frame_of(rows, QUESTIONS)


def frame_of(rows: Sequence[Mapping[str, Any]], schema: Mapping[str, Any], **constant: Any) -> pl.DataFrame:
    """Return rows as a table, with the same values of `constant` in each row."""
    columns: dict[str, Any] = {}
    for name, dtype in schema.items():
        if name in constant:
            columns[name] = pl.repeat(constant[name], len(rows), dtype=dtype, eager=True)
        elif isinstance(dtype, pl.List):  # built flat: one Series for each row would take most of the time of a run
            lists = [r[name] for r in rows]
            flat = pl.Series("flat", [x for one in lists for x in one], dtype=dtype.inner)
            row = pl.Series("row", np.repeat(np.arange(len(lists)), [len(one) for one in lists]))
            columns[name] = pl.DataFrame([row, flat]).group_by("row", maintain_order=True).agg("flat")["flat"]
        else:
            columns[name] = pl.Series(name, [r[name] for r in rows], dtype=dtype)
    return pl.DataFrame(columns)


def rows(run: Run[PredictConfig], cells: Iterable[Cell] | None = None) -> pl.LazyFrame:
    """Return every answer joined with its question, lazily: only the columns that are then selected are read.

    Args:
        run: with its tables; see `nextstate.analysis.study.open_run`.
        cells: of which cells; by default all.
    """
    parts = [pl.LazyFrame(schema=ROWS)]
    for cell in asked_cells(run.config) if cells is None else cells:
        if keys := sorted(run.keys(f"answers/*/{cell.slug}")):
            given = pl.concat([pl.scan_parquet(run.file(key)) for key in keys])
            asked = pl.scan_parquet(run.file(f"questions/{cell.slug}"))
            columns = [pl.lit(value, CELL[name]).alias(name) for name, value in cell.columns.items()]
            parts.append(
                given.join(asked, on=KEY, how="inner", maintain_order="left").with_columns(columns).select(*ROWS)
            )
    return pl.concat(parts)
