"""The config of `nextstate run`, the cells of its grid, and the agents and players that take part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from nextstate.agents.columns import Grid
from nextstate.agents.config import AgentEntry, InterveneConfig, KindConfig
from nextstate.agents.intervention import Intervention
from nextstate.agents.registry import PLAYERS, REFERENCES, Spec, kind_of, spec_of, specs_of
from nextstate.agents.rollout import Mode, seeds_for
from nextstate.analysis.grid import Cell, GridConfig, games_of
from nextstate.analysis.play.config import PlayCell, PlayConfig
from nextstate.analysis.run import RunConfig, RunError
from nextstate.envs.game import Game, check_steps


class GameConfig(GridConfig):
    """A game with questions, over a grid of settings."""

    steps: int | list[int] = Field(10, description="most steps of an episode; a list of numbers with grid=cells")
    episodes: int = Field(50, ge=1, le=1_000_000, description="of each cell")
    questions_per_step: int | Literal["all"] = Field(1, description="drawn at random, or all that the game has")


class PredictConfig(RunConfig):
    """Everything that determines the tables of a prediction run."""

    agents: list[AgentEntry] = Field(min_length=1, description="who is asked; language models also play")
    games: list[GameConfig] = Field([], description="what questions are asked about")
    play: list[PlayConfig] = Field([], description="what is played")
    players: list[Literal["random", "walkthrough"]] = Field(
        ["random", "walkthrough"], description="who plays beside the language models"
    )
    grid: Grid = Field(
        "episodes",
        description="ask after every step of an episode, or (cells) only after the last of episodes of each length",
    )
    mode: Mode = Field("replay", description="read whole episodes at once, or (live) answer step by step")
    intervene: InterveneConfig | None = Field(
        None, description="ask every language model again without some of its heads"
    )

    @model_validator(mode="after")
    def _fits(self) -> PredictConfig:
        if not self.games and not self.play:
            raise ValueError("`games` and `play` are both empty: give at least one game to ask about or to play")
        for game in self.games:
            if isinstance(game.steps, list) != (self.grid == "cells"):
                raise ValueError(
                    f"{game.game}: steps={game.steps} does not fit grid={self.grid}: "
                    "'cells' takes a list, 'episodes' a number"
                )
            if self.mode == "live" and (game.questions_per_step != 1 or self.grid == "cells"):
                raise ValueError(
                    f"{game.game}: the live mode asks one question after each step "
                    "(questions_per_step=1, grid=episodes)"
                )
        if self.intervene and all(kind_of(a) != "model" for a in self.agents):
            raise ValueError("intervene: only language models have heads, and `agents` names none")
        return self


def asked_cells(config: PredictConfig) -> list[Cell]:
    """Return the cells that questions are asked about, in order.

    Raises:
        GameError: there is no such game, or a setting is not possible.
        RunError: two cells have the same settings.
    """
    out: list[Cell] = []
    for entry in config.games:
        for name, game, variant in games_of(entry):
            for steps in entry.steps if isinstance(entry.steps, list) else [entry.steps]:
                most = min(steps, game.max_steps or steps)
                check_steps(game, most)
                slug = f"{name}-steps={most}" if config.grid == "cells" else name
                if config.grid == "cells" and out and out[-1].slug == slug:
                    continue  # the same cell: the game limits the length of its episodes
                # With grid=cells each cell has different seeds; otherwise all cells share the same seeds.
                seeds = seeds_for(config.seed, entry.episodes, len(out) if config.grid == "cells" else 0)
                out.append(Cell(slug, game, variant, most, entry.questions_per_step, seeds))
    if len({c.slug for c in out}) < len(out):
        raise RunError("two entries of `games` have the same settings; give each setting once")
    return out


@dataclass(frozen=True)
class Participant:
    """An agent or player of a run.

    Args:
        name: name in tables.
        spec: specification to build it from.
        without: heads that are ablated; None for the unchanged agent.
    """

    name: str
    spec: Spec
    without: Intervention | None = None

    @property
    def reference(self) -> bool:
        """Whether it is a reference agent, which needs neither files nor a device."""
        return self.spec.kind in REFERENCES

    @property
    def model(self) -> bool:
        """Whether it is a language model, with or without all of its heads."""
        return self.spec.kind == "model"


def participants(config: PredictConfig, games: Sequence[Game], plays: Sequence[PlayCell]) -> list[Participant]:
    """Return all participants, in order; with `intervene`, every language model also without those heads.

    Args:
        config: config of the run.
        games: games with questions.
        plays: the cells that are played.

    Raises:
        AgentError: an entry of `agents` cannot be used; the message is one line.
        RunError: two participants have the same name, or an agent cannot answer questions.
    """
    out: list[Participant] = []
    for spec in specs_of(config.agents, games):
        if spec.kind in PLAYERS:
            raise RunError(f"{spec.kind} gives commands and answers no questions: put it under `players`")
        out.append(Participant(spec.name, spec))
        if config.intervene and spec.kind == "model":
            what = Intervention(tuple(config.intervene.heads), config.intervene.mode, config.intervene.episodes)
            out.append(Participant(what.named(spec.name), spec, what))
    for name in config.players if plays else []:
        most = {"max_states": max(p.optima.max_states for p in plays)} if name == "walkthrough" else {}
        out.append(Participant(name, spec_of(KindConfig.model_validate({"kind": name, **most}))))
    twice = [name for name, n in Counter(p.name for p in out).items() if n > 1]
    if twice:
        raise RunError(f"{twice[0]} is given twice; give each agent once")
    return out
