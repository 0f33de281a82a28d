"""The section of the page about play."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl

from nextstate.analysis.figures import Style
from nextstate.analysis.page.page import FigureList
from nextstate.analysis.predict import figures
from nextstate.envs.aims import reply

Axis = Literal["size", "states"]
LOOK = {"random": figures.REFERENCES["chance"], "walkthrough": figures.REFERENCES["ideal"]}
STEPS = 60  # most commands shown of an episode


def styles(agents: pl.DataFrame) -> dict[str, Style]:
    """Return the style of each player: models as in other figures, random as chance, walkthrough as ideal reader."""
    models = set(agents.filter(~pl.col("reference"))["agent"])
    return {agent: style for agent, style in figures.styles(agents).items() if agent in models} | LOOK


def success(
    won: pl.DataFrame,
    game: str,
    variant: str,
    axis: Axis,
    look: Mapping[str, Style],
    name: str,
    trained: Mapping[str, figures.Trained] | None = None,
) -> go.Figure:
    """Draw success in play against `axis` for every player, with 95 % intervals; `won` comes from `curves`."""
    figure = figures.curve(won, game, variant, axis, look, name, trained)
    return figure.update_layout(title_text=f"Success in play against {name}", yaxis_title_text="episodes won")


def accuracy(
    asked: pl.DataFrame,
    game: str,
    variant: str,
    axis: Axis,
    look: Mapping[str, Style],
    name: str,
    trained: Mapping[str, figures.Trained] | None = None,
) -> go.Figure:
    """Draw next-state accuracy against `axis` for models, readers and chance."""
    few = {agent: style for agent, style in look.items() if not agent.startswith("shortcut:")}
    figure = figures.curve(asked, game, variant, axis, few, name, trained)
    return figure.update_layout(title_text=f"Next-state accuracy against {name}")


def section(found: Mapping[str, pl.DataFrame], drawn: FigureList) -> dict[str, Any] | None:
    """Return the template variables of the section about play; None if nothing was played.

    Args:
        found: the tables of `summary/`.
        drawn: list to which figures are added.
    """
    rows, look = found["plays"], styles(found["agents"])
    if rows.is_empty():
        return None
    games: dict[str, dict[str, Any]] = {}
    for game, variant, size_name in _places(found):
        panels = games.setdefault(game, {"name": game, "size_name": size_name, "panels": []})["panels"]
        here = rows.filter((pl.col("game") == game) & (pl.col("variant") == variant))
        if here.is_empty():
            continue
        pairs = _pairs(found, game, variant, size_name)
        panels.append(
            {
                "variant": variant,
                "figures": [[drawn.add(f, f"{game} {variant}") for f in pair] for pair in pairs],
                "rows": _ordered(here, look, "size"),
            }
        )
    for game, entry in games.items():
        entry["pooled"] = _ordered(found["plays_by_game"].filter(pl.col("game") == game), look)
        present = {r["agent"] for r in entry["pooled"]}
        entry["legend"] = [(figures.label(a), style) for a, style in look.items() if a in present]
    shown = [game for game in games.values() if game["panels"]]
    return {
        "games": shown, "written": found["grid"]["writes"].any(), "cut": int(rows["cut"].sum()),
        "episodes": _shown(found),
    }  # fmt: skip


def _pairs(found: Mapping[str, pl.DataFrame], game: str, variant: str, size_name: str) -> Iterator[list[go.Figure]]:
    """Yield figures of accuracy (if measured) and success: against size, and against |Q| if it varies."""
    asked, won, look = found["curves"], found["play_curves"], figures.styles(found["agents"])
    plain = variant.removesuffix("written").removesuffix(", ")  # the variant where questions are asked
    trained = {agent: figures.trained_of(found["trained"], agent, game) for agent in look}
    axes: tuple[tuple[Axis, str], ...] = (("size", size_name), ("states", "|Q|"))
    for axis, name in axes:
        mine = (pl.col("game") == game) & (pl.col("axis") == axis)
        if axis == "states" and won.filter(mine & (pl.col("variant") == variant))["at"].n_unique() < 2:
            continue
        known = not asked.filter(mine & (pl.col("variant") == plain)).is_empty()
        left = [accuracy(asked, game, plain, axis, look, name, trained)] if known else []
        yield [*left, success(won, game, variant, axis, styles(found["agents"]), name, trained)]


def _shown(found: Mapping[str, pl.DataFrame]) -> list[dict[str, Any]]:
    names = {(game, variant): size_name for game, variant, size_name in _places(found)}
    return [
        {**row, "size_name": names[row["game"], row["variant"]], "turns": _turns(row)}
        for row in found["shown_plays"].rows(named=True)
    ]


def _turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the commands of an episode and the reply to each."""
    turns = zip(row["commands"], row["legal"], row["observations"], strict=True)
    return [{"command": c, "legal": legal, "reply": reply(c, text)} for c, legal, text in turns][:STEPS]


def _places(found: Mapping[str, pl.DataFrame]) -> list[tuple[str, str, str]]:
    """Return each game and variant that is played, with the name of its size."""
    played = found["grid"].filter("played").unique(["game", "variant"], keep="first", maintain_order=True)
    return played.select("game", "variant", "size_name").rows()


def _ordered(rows: pl.DataFrame, look: Mapping[str, Style], *first: str) -> list[dict[str, Any]]:
    order = {agent: i for i, agent in enumerate(look)}
    at = pl.col("agent").replace_strict(order, default=len(order), return_dtype=pl.Int64)
    return rows.sort([*first, at]).to_dicts()
