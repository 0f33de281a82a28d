"""The cells of a grid: a game with its settings, a name, and the seeds of its episodes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl
from pydantic import Field

from nextstate.agents.config import Strict
from nextstate.envs.files import file_digest, slug
from nextstate.envs.game import Game
from nextstate.envs.games import make_game
from nextstate.envs.plugins import source_digest

GRID: dict[str, Any] = {
    "slug": pl.String, "game": pl.String, "settings": pl.String, "size_name": pl.String, "size": pl.Int64,
    "variant": pl.String, "steps": pl.Int64, "episodes": pl.Int64, "played": pl.Boolean, "writes": pl.Boolean,
    "bayes": pl.Boolean,
}  # fmt: skip


class GridConfig(Strict):
    """A game over a grid of settings."""

    game: str = Field(description="name of a game, or pkg.module:Name")
    grid: dict[str, list[Any]] = Field({}, description="values of arguments; every combination is a cell")
    game_args: dict[str, Any] = Field({}, description="arguments shared by all cells")


class Cell(NamedTuple):
    """One cell of a grid.

    Attributes:
        slug: the name of the cell in tables and of its files.
        game: the game.
        variant: the settings other than the size, as text.
        steps: length of its episodes.
        questions_per_step: number of questions after each step.
        seeds: seeds of its episodes.
        writes: whether language models write commands as free text.
    """

    slug: str
    game: Game
    variant: str
    steps: int
    questions_per_step: int | Literal["all"]
    seeds: range
    writes: bool = False

    @property
    def size(self) -> int:
        """The value of the setting that determines the size of the state space."""
        return int(getattr(self.game, self.game.size))

    @property
    def columns(self) -> dict[str, Any]:
        """The columns by which tables refer to the cell."""
        return {"game": self.game.name, "setting": self.slug, "size": self.size, "variant": self.variant}


class Made(NamedTuple):
    """A game of a grid with its name."""

    slug: str
    game: Game
    variant: str


def games_of(entry: GridConfig) -> Iterator[Made]:
    """Yield the games of a grid, in order.

    Raises:
        GameError: there is no such game, or a setting is not possible.
    """
    for values in product(*entry.grid.values()):
        given = entry.game_args | dict(zip(entry.grid, values, strict=True))
        game = make_game(entry.game, **given)
        variant = ", ".join(f"{k}={v}" for k, v in sorted(given.items()) if k != game.size)
        yield Made(slug("-".join([entry.game, *(f"{k}={v}" for k, v in given.items())])), game, variant)


def game_identity(game: Game) -> dict[str, Any]:
    """Return everything besides nextstate's code and the settings that determines a game's episodes, as JSON.

    These are the source file of a game from another package, and the files named in its settings.
    """
    files = [Path(value) for value in game.settings.values() if isinstance(value, str) and Path(value).is_file()]
    found = {"game": source_digest(type(game)), "files": file_digest(*files) if files else None}
    return {name: digest for name, digest in found.items() if digest}


def grid_table(asked: Sequence[Cell], played: Sequence[Cell]) -> pl.DataFrame:
    """Return one row for each cell: first cells with questions, then cells that are played.

    `bayes` is whether the game's ideal reader is exact, so that the ceiling cannot be exceeded but by chance.
    """
    rows = [
        {
            "slug": cell.slug, "game": cell.game.name, "settings": json.dumps(cell.game.settings),
            "size_name": cell.game.size, "size": cell.size, "variant": cell.variant, "steps": cell.steps,
            "episodes": len(cell.seeds), "played": i >= len(asked), "writes": cell.writes,
            "bayes": cell.game.ideal_is_bayes,
        }
        for i, cell in enumerate([*asked, *played])
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=GRID)
