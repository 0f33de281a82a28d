"""The table of play: one row for each episode that an agent or player played."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl

from nextstate.agents.agent import Agent, AgentError
from nextstate.agents.play import AgentPlayer, Player, play
from nextstate.analysis.play.config import PlayCell
from nextstate.analysis.run import Run
from nextstate.envs.game import GameError

PLAYS: dict[str, Any] = {
    "agent": pl.String, "game": pl.String, "setting": pl.String, "size": pl.Int64, "variant": pl.String,
    "episode": pl.Int64, "states": pl.Int64, "goal": pl.String, "score": pl.Float64, "max_score": pl.Float64,
    "success": pl.Boolean, "steps": pl.Int64, "optimum": pl.Int64, "steps_over": pl.Int64, "illegal": pl.Int64,
    "ended": pl.String, "opening": pl.String, "commands": pl.List(pl.String), "legal": pl.List(pl.Boolean),
    "observations": pl.List(pl.String), "incomplete": pl.Boolean,
}  # fmt: skip


def play_cell(where: PlayCell, advance: Callable[[int], None], who: Agent | Player) -> tuple[pl.DataFrame, str]:
    """Play the episodes of a cell; return their table, and why some ended early ("" if none did).

    Args:
        where: what is played.
        advance: is called with the number of commands that were given, at most.
        who: a player, or an agent that plays.

    Raises:
        AgentError: the player failed.
    """
    cell = where.cell
    player = who if isinstance(who, Player) else AgentPlayer(who, cell.writes)
    mode = {} if isinstance(who, Player) else who.describe().get("intervene", {})
    if mode.get("mode", "zero") != "zero":
        raise AgentError(f"{who.name} does not play: in play, heads can only be replaced by zeros")
    rows: list[dict[str, Any]] = []
    reason = ""
    for k in range(0, len(cell.seeds), player.together):
        chunk = cell.seeds[k : k + player.together]
        try:
            result = play(player, cell.game, chunk, cell.steps, where.optima)
        except GameError as error:
            raise AgentError(f"{player.name} cannot play {cell.slug}: {error}") from error
        rows.extend(result.rows)
        reason = reason or result.left_out
        advance(len(chunk) * cell.steps)
    incomplete = isinstance(who, Agent) and bool(who.incomplete)
    constant = {"agent": player.name, "incomplete": incomplete, **cell.columns}
    return pl.DataFrame([constant | row for row in rows], schema=PLAYS), reason


def load(run: Run[Any]) -> pl.DataFrame:
    """Return all episodes played in a run, one row each."""
    return pl.concat([pl.DataFrame(schema=PLAYS), *map(run.table, sorted(run.keys("plays/*")))])
