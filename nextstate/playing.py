"""The playing part of an experiment: who plays what, and the table in which every episode played is a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from pydantic import Field

from nextstate.agents.agent import Agent, AgentError
from nextstate.agents.play import AgentPlayer, Player, play
from nextstate.agents.rollout import seeds_for
from nextstate.envs.aims import MAX_STATES, Aim, shortest
from nextstate.envs.game import GameError, check_steps
from nextstate.folder import ExperimentError, slugify
from nextstate.grid import GridConfig, Setting, file_name, games_of

REFERENCES = ("random", "walkthrough")

SCHEMA: dict[str, Any] = {
    "agent": pl.String, "game": pl.String, "setting": pl.String, "size": pl.Int64, "variant": pl.String,
    "episode": pl.Int64, "states": pl.Int64, "goal": pl.String, "score": pl.Float64, "max_score": pl.Float64,
    "success": pl.Boolean, "steps": pl.Int64, "optimum": pl.Int64, "steps_over": pl.Int64, "illegal": pl.Int64,
    "ended": pl.String, "opening": pl.String, "commands": pl.List(pl.String), "legal": pl.List(pl.Boolean),
    "observations": pl.List(pl.String), "incomplete": pl.Boolean,
}  # fmt: skip


class PlayConfig(GridConfig):
    """A game that is played, over a grid of settings."""

    steps: int = Field(10, ge=1, description="commands in an episode, at most")
    episodes: int = Field(50, ge=1, le=1_000_000)
    writes: bool = Field(False, description="language models write their commands instead of picking one")
    max_states: int = Field(
        MAX_STATES, ge=1, le=100_000_000, description="visited at most in search of the fewest commands"
    )


class PlaySetting(NamedTuple):
    """One cell of what is played."""

    setting: Setting
    writes: bool
    optima: Optima

    @property
    def label(self) -> str:
        """How `run.json` calls it where something is left out."""
        return f"{self.setting.slug} (play)"

    def describe(self) -> dict[str, Any]:
        """Return what `run.json` says of it."""
        return self.setting.describe() | {"writes": self.writes}


class Optima:
    """The fewest commands that each aim takes, sought once."""

    def __init__(self, max_states: int) -> None:
        self.max_states = max_states
        self._known: dict[Aim, int | None] = {}

    def __call__(self, aim: Aim) -> int | None:
        """Return how many, None where the search visits too many states or finds no way."""
        if aim not in self._known:
            try:
                found = shortest(aim, self.max_states)
            except GameError:
                found = None
            self._known[aim] = None if found is None else len(found)
        return self._known[aim]


def play_settings(entries: Sequence[PlayConfig], seed: int) -> list[PlaySetting]:
    """Return the cells of what is played, in order.

    Raises:
        GameError: a game or setting that cannot be.
        ExperimentError: two cells with one name.
    """
    out: list[PlaySetting] = []
    for entry in entries:
        optima = Optima(entry.max_states)
        for slug, game, variant in games_of(entry):
            steps = min(entry.steps, game.max_steps or entry.steps)
            check_steps(game, steps)
            if entry.writes:
                slug, variant = file_name([slug, "writes"]), ", ".join(filter(None, [variant, "written"]))
            out.append(
                PlaySetting(
                    Setting(slug, game, variant, steps, 1, seeds_for(seed, entry.episodes)), entry.writes, optima
                )
            )
    if len({s.setting.slug for s in out}) < len(out):
        raise ExperimentError("two entries of `play` have the same settings; give each setting once")
    return out


def plays_path(out: Path, agent: str, cell: PlaySetting) -> Path:
    """Return where the episodes that an agent played in a cell lie."""
    return out / "plays" / slugify(agent) / f"{cell.setting.slug}.parquet"


def play_cell(cell: PlaySetting, advance: Callable[[int], None], who: Agent | Player) -> tuple[pl.DataFrame, str]:
    """Play the episodes of a cell; return their table, and what was left out ("" if nothing).

    Args:
        cell: what is played.
        advance: told how many commands more were given, at most.
        who: a player, or an agent that plays.

    Raises:
        AgentError: the player failed.
    """
    player = who if isinstance(who, Player) else AgentPlayer(who, cell.writes)
    mode = {} if isinstance(who, Player) else who.describe().get("intervene", {})
    if mode.get("mode", "zero") != "zero":
        raise AgentError(f"{who.name} does not play: only heads that are replaced by zeros can be done without in play")
    setting = cell.setting
    rows: list[dict[str, Any]] = []
    said = ""
    for k in range(0, len(setting.seeds), player.together):
        chunk = setting.seeds[k : k + player.together]
        try:
            result = play(player, setting.game, chunk, setting.steps, cell.optima)
        except GameError as error:
            raise AgentError(f"{player.name} cannot play {setting.slug}: {error}") from error
        rows.extend(result.rows)
        said = said or result.left_out
        advance(len(chunk) * setting.steps)
    incomplete = isinstance(who, Agent) and bool(who.incomplete)
    constant = {"agent": player.name, "incomplete": incomplete, **setting.columns}
    return pl.DataFrame([constant | row for row in rows], schema=SCHEMA), said
