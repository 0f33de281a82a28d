"""Sums over the questions of each episode, from which accuracies and their intervals are computed.

Questions and answers are read one cell and one agent at a time, so that memory does not grow with the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int

from nextstate.analysis.grid import Cell
from nextstate.analysis.predict.config import PredictConfig
from nextstate.analysis.predict.tables import CELL, KEY
from nextstate.analysis.run import Run

ASKED = ("lookup", "ceiling", "chance")  # numbers of a question
GIVEN = (
    "greedy_correct", "choice_correct", "choice_token_correct", "choice_byte_correct", "p_accepted", "rank",
)  # numbers of an answer  # fmt: skip
SUMMED = ("n", *GIVEN, *ASKED, "squares")  # squares: of the ceilings
BY_EPISODE = ("n", "greedy_correct", "choice_correct", "ceiling", "squares")  # what intervals are computed from


@dataclass(frozen=True)
class Questions:
    """The questions of a cell in columns; `states` is NaN where it is not known."""

    cell: dict[str, Any]  # game, setting, size, variant
    keys: pl.DataFrame  # the columns `KEY`
    determined: Bool[np.ndarray, " question"]
    states: Float[np.ndarray, " question"]
    numbers: dict[str, Float[np.ndarray, " question"]]
    episodes: Int[np.ndarray, " episode"]  # their seeds
    steps: Int[np.ndarray, " step"]
    episode: Int[np.ndarray, " question"]  # index in `episodes`
    step: Int[np.ndarray, " question"]  # index in `steps`

    @classmethod
    def of(cls, cell: dict[str, Any], frame: pl.DataFrame) -> Questions:
        """Return the questions of a cell from their table."""
        (episodes, episode), (steps, step) = (
            np.unique(frame[name].to_numpy(), return_inverse=True) for name in ("episode", "step")
        )
        ceiling = frame["ceiling"].to_numpy()
        numbers = {name: frame[name].cast(pl.Float64).to_numpy() for name in ASKED}
        states = frame["states"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        determined = frame["determined"].to_numpy()
        numbers |= {"n": np.ones(len(frame)), "squares": ceiling * ceiling}
        return cls(cell, frame.select(KEY), determined, states, numbers, episodes, steps, episode, step)


class Answers(NamedTuple):
    """The answers of an agent to questions of a cell; `row` is the index of the question of each answer."""

    asked: Questions
    row: Int[np.ndarray, " answer"]
    numbers: dict[str, Float[np.ndarray, " answer"]]

    @classmethod
    def of(cls, asked: Questions, frame: pl.DataFrame) -> Answers:
        """Return answers from their table; those to other questions are omitted."""
        row = np.arange(len(asked.keys))
        if not frame.select(KEY).equals(asked.keys):
            at = asked.keys.with_row_index("row")
            frame = frame.join(at, on=KEY, how="inner", maintain_order="left")
            row = frame["row"].to_numpy().astype(np.int64)
        return cls(asked, row, {name: frame[name].cast(pl.Float64).to_numpy() for name in GIVEN})

    def column(self, name: str) -> Float[np.ndarray, " answer"]:
        """Return a number of each answer, or of its question."""
        return self.numbers[name] if name in self.numbers else self.asked.numbers[name][self.row]


class Block(Protocol):
    """The answers in the cells of a game that share all settings but the size."""

    agents: list[str]

    def answers(self, agent: str) -> Iterator[Answers]:
        """Yield the answers of an agent, one cell after the other."""


class RunBlock:
    """A block of a run, whose answers are read when they are needed."""

    def __init__(self, run: Run[PredictConfig], cells: Sequence[Cell]) -> None:
        self._files: dict[str, list[tuple[Questions, Any]]] = {}
        wanted = [*KEY, "determined", "states", *ASKED]
        for cell in cells:
            if keys := run.keys(f"answers/*/{cell.slug}"):
                asked = Questions.of(cell.columns, pl.read_parquet(run.file(f"questions/{cell.slug}"), columns=wanted))
                for key in keys:
                    names = pl.read_parquet(run.file(key), columns=["agent"], n_rows=1)["agent"].to_list()
                    for agent in names:  # none if all questions were left out
                        self._files.setdefault(agent, []).append((asked, run.file(key)))
        self.agents = sorted(self._files)

    def answers(self, agent: str) -> Iterator[Answers]:
        """Yield the answers of an agent, one cell after the other."""
        for asked, file in self._files[agent]:
            yield Answers.of(asked, pl.read_parquet(file, columns=[*KEY, *GIVEN]))


class FrameBlock:
    """A block whose rows are in memory."""

    def __init__(self, rows: pl.DataFrame) -> None:
        self.agents: list[str] = rows["agent"].unique().sort().to_list()
        self._parts: list[tuple[Questions, pl.DataFrame]] = []
        for (_,), part in rows.group_by("setting", maintain_order=True):
            cell = {name: part[name][0] for name in CELL}
            self._parts.append((Questions.of(cell, part.unique(KEY, maintain_order=True)), part))

    def answers(self, agent: str) -> Iterator[Answers]:
        """Yield the answers of an agent, one cell after the other."""
        for asked, part in self._parts:
            mine = part.filter(pl.col("agent") == agent)
            if len(mine):
                yield Answers.of(asked, mine)


def blocks_of(run: Run[PredictConfig], cells: Iterable[Cell]) -> Iterator[Block]:
    """Yield the blocks of a run."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.game.name, cell.variant), []).append(cell)
    for group in groups.values():
        yield RunBlock(run, group)


class Sums(NamedTuple):
    """Sums of a group's answers for questions that are not determined, and for determined ones.

    Attributes:
        episodes: the seeds of the episodes.
        each: for each of `BY_EPISODE`, each episode and these two kinds of questions.
        total: for each of `SUMMED` and these two kinds.
    """

    episodes: Int[np.ndarray, " episode"]
    each: Float[np.ndarray, "column episode 2"]
    total: Float[np.ndarray, "summed 2"]

    def plus(self, other: Sums) -> Sums:
        """Return the sums of both groups together; episodes with the same seed are one."""
        total = self.total + other.total
        if np.array_equal(self.episodes, other.episodes):
            return Sums(self.episodes, self.each + other.each, total)
        every = np.union1d(self.episodes, other.episodes)
        each = np.zeros((len(BY_EPISODE), len(every), 2))
        for part in (self, other):
            each[:, np.searchsorted(every, part.episodes)] += part.each
        return Sums(every, each, total)


Pile = dict[tuple[Any, ...], Sums]  # groups by key


def put(pile: Pile, key: tuple[Any, ...], sums: Sums) -> None:
    """Add sums to a group."""
    pile[key] = pile[key].plus(sums) if key in pile else sums


def by_step(answers: Answers, only: Bool[np.ndarray, " answer"] | None = None) -> dict[int, Sums]:
    """Return the sums of an agent's answers in a cell for each step.

    Args:
        answers: the answers.
        only: which answers count; by default all.
    """
    asked, row = answers.asked, answers.row
    chosen = slice(None) if only is None else only
    row = row[chosen]
    kind = 2 * asked.step[row] + asked.determined[row]
    shape = len(asked.steps), len(asked.episodes), 2
    place = (asked.step[row] * shape[1] + asked.episode[row]) * 2 + asked.determined[row]
    each, total = np.empty((len(BY_EPISODE), *shape)), np.empty((len(SUMMED), shape[0], 2))
    for i, name in enumerate(SUMMED):
        column = answers.column(name)[chosen]
        total[i] = np.bincount(kind, column, 2 * shape[0]).reshape(-1, 2)
        if name in BY_EPISODE:
            each[BY_EPISODE.index(name)] = np.bincount(place, column, np.prod(shape)).reshape(shape)
    return {int(step): Sums(asked.episodes, each[:, t], total[:, t]) for t, step in enumerate(asked.steps)}


def all_steps(steps: dict[int, Sums]) -> Sums:
    """Return the sums over all steps of a cell."""
    first, *_ = steps.values()
    each, total = (np.sum([getattr(s, name) for s in steps.values()], axis=0) for name in ("each", "total"))
    return Sums(first.episodes, each, total)
