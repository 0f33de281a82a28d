"""The part of a config about play, and its cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field

from nextstate.agents.rollout import seeds_for
from nextstate.analysis.grid import Cell, GridConfig, games_of
from nextstate.analysis.run import RunError
from nextstate.envs.aims import MAX_STATES, Aim, shortest
from nextstate.envs.files import slug
from nextstate.envs.game import GameError, check_steps


class PlayConfig(GridConfig):
    """A game that is played, over a grid of settings."""

    steps: int = Field(10, ge=1, description="most commands in an episode")
    episodes: int = Field(50, ge=1, le=1_000_000, description="of each cell")
    writes: bool = Field(False, description="language models write commands as free text")
    max_states: int = Field(
        MAX_STATES, ge=1, le=100_000_000, description="most states visited in the search for a shortest solution"
    )


class PlayCell(NamedTuple):
    """A cell that is played, with the search for shortest solutions."""

    cell: Cell
    optima: Optima


class Optima:
    """Lengths of shortest solutions, computed once for each aim.

    Args:
        max_states: most states that a search visits.
    """

    def __init__(self, max_states: int) -> None:
        self.max_states = max_states
        self._known: dict[Aim, int | None] = {}

    def __call__(self, aim: Aim) -> int | None:
        """Return the least number of commands; None if the search visits too many states or there is no solution."""
        if aim not in self._known:
            try:
                found = shortest(aim, self.max_states)
            except GameError:
                found = None
            self._known[aim] = None if found is None else len(found)
        return self._known[aim]


def play_cells(entries: Sequence[PlayConfig], seed: int) -> list[PlayCell]:
    """Return the cells that are played, in order.

    Raises:
        GameError: there is no such game, or a setting is not possible.
        RunError: two cells have the same settings.
    """
    out: list[PlayCell] = []
    for entry in entries:
        optima = Optima(entry.max_states)
        for name, game, variant in games_of(entry):
            steps = min(entry.steps, game.max_steps or entry.steps)
            check_steps(game, steps)
            if entry.writes:
                name, variant = slug(f"{name}-writes"), ", ".join(filter(None, [variant, "written"]))
            out.append(
                PlayCell(Cell(name, game, variant, steps, 1, seeds_for(seed, entry.episodes), entry.writes), optima)
            )
    if len({p.cell.slug for p in out}) < len(out):
        raise RunError("two entries of `play` have the same settings; give each setting once")
    return out
