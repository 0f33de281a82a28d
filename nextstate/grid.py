"""The cells of a grid: a game over its settings, how each cell is called, and which episodes it has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any, Literal, NamedTuple

from nextstate.agents.config import Strict
from nextstate.envs.game import Game
from nextstate.envs.games import make_game


class GridConfig(Strict):
    """A game over a grid of settings."""

    game: str
    over: dict[str, list[Any]] = {}
    settings: dict[str, Any] = {}


class Setting(NamedTuple):
    """One cell of the grid: a game, how long it is played, and how it is called."""

    slug: str
    game: Game
    variant: str
    steps: int
    ask: int | Literal["all"]
    seeds: range

    @property
    def size(self) -> int:
        """The value of the setting that says how large the state space is."""
        return int(getattr(self.game, self.game.size))

    def describe(self) -> dict[str, Any]:
        """Return what `run.json` says of it."""
        return {
            "slug": self.slug, "game": self.game.name, "settings": self.game.settings, "size_name": self.game.size,
            "size": self.size, "variant": self.variant, "steps": self.steps, "episodes": len(self.seeds),
        }  # fmt: skip

    @property
    def columns(self) -> dict[str, Any]:
        """What each row of a table says of it."""
        return {"game": self.game.name, "setting": self.slug, "size": self.size, "variant": self.variant}


class Made(NamedTuple):
    """A game of a grid, and how it is called."""

    slug: str
    game: Game
    variant: str


def games_of(entry: GridConfig) -> Iterator[Made]:
    """Yield the games of a grid, in order; raises `GameError` where one cannot be."""
    for values in product(*entry.over.values()):
        given = entry.settings | dict(zip(entry.over, values, strict=True))
        game = make_game(entry.game, **given)
        named = ", ".join(f"{k}={v}" for k, v in sorted(given.items()) if k != game.size)
        yield Made(file_name([entry.game, *(f"{k}={v}" for k, v in given.items())]), game, named)


def file_name(parts: list[str]) -> str:
    """Return a file name for a cell."""
    return re.sub(r"[^A-Za-z0-9=._-]+", "_", "-".join(parts))
