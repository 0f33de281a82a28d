"""Agents that act: players choose one command per turn; episodes are played in parallel until each has ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from nextstate.agents.agent import Agent, AgentError, ContextError, OutOfMemory, Prompt
from nextstate.agents.rollout import Rollout
from nextstate.envs.aims import CUE, MAX_STATES, Aim, plan
from nextstate.envs.environments import PlayEnv
from nextstate.envs.game import Action, Episode, Game, GameError, Question, Step

_STREAM = 7919  # random numbers of the random player are independent of those of the games


class View(NamedTuple):
    """What a player sees: the episode so far and the available commands; `aim` is for players that know the game."""

    episode: Episode
    commands: tuple[str, ...]
    aim: Aim


class Player(ABC):
    """Chooses commands. `name` identifies it in configs and tables."""

    name: str
    together: int = 64  # maximum number of episodes played in parallel

    @abstractmethod
    def choose(self, views: Sequence[View]) -> list[str]:
        """Return the text to type in each episode; it need not be one of the available commands.

        Raises:
            ContextError: some transcripts are too long for this player.
            AgentError: the player failed for another reason.
        """

    def begin(self) -> Player:
        """Return a player without memory of earlier episodes, for new episodes; by default this player itself."""
        return self


class RandomPlayer(Player):
    """Draws commands uniformly; the draw depends only on the episode's seed and the number of commands so far."""

    name = "random"

    def choose(self, views: Sequence[View]) -> list[str]:
        return [v.commands[int(self._rng(v).integers(len(v.commands)))] for v in views]

    @staticmethod
    def _rng(view: View) -> np.random.Generator:
        return np.random.default_rng([_STREAM, max(view.episode.seed, 0), len(view.episode.steps)])


class WalkthroughPlayer(Player):
    """Follows the game's own walkthrough if it has one, else a shortest solution.

    Args:
        max_states: maximum number of states to visit in the search for a solution.
    """

    name = "walkthrough"

    def __init__(self, max_states: int = MAX_STATES) -> None:
        self.max_states = max_states
        self._plans: dict[Aim, tuple[Action, ...]] = {}

    def choose(self, views: Sequence[View]) -> list[str]:
        return [self._next(v) for v in views]

    def _next(self, view: View) -> str:
        episode, aim = view.episode, view.aim
        if aim not in self._plans:
            try:
                self._plans[aim] = plan(aim, self.max_states)
            except GameError as error:
                raise AgentError(f"{self.name} of episode {episode.seed}: {error}") from error
        done = len(episode.steps)
        return aim.game.command(episode.steps[-1].next_state if done else episode.start, self._plans[aim][done])


class AgentPlayer(Player):
    """A player that uses an agent: a language model, with or without ablated heads.

    The agent predicts the next command after the transcript and the prompt of text adventures ("\\n\\n>"). Commands
    end with a newline, so that a command that is a prefix of another has no advantage.

    Args:
        agent: the agent to use.
        writes: generate a line of text, which may be none of the commands, instead of choosing the most likely command
            (by its summed log-probability).
    """

    def __init__(self, agent: Agent, writes: bool = False) -> None:
        self.agent, self.writes, self.name, self.together = agent, writes, agent.name, agent.batch_size
        self._reader = agent

    def begin(self) -> Player:
        new = AgentPlayer(self.agent, self.writes)
        new._reader = self.agent.live()
        return new

    def choose(self, views: Sequence[View]) -> list[str]:
        prompts = [Prompt(asking(v, self.writes), len(v.episode.steps)) for v in views]
        found = self._reader.predict(prompts)
        return [p.answer if self.writes else v.commands[p.choice] for v, p in zip(views, found, strict=True)]


def asking(view: View, writes: bool = False) -> Episode:
    """Return the episode so far with one more step, whose question asks for the next command.

    The question's choices are the available commands; with `writes` there are none, so the answer is generated.
    """
    now = view.episode
    state = now.steps[-1].next_state if now.steps else now.start
    choices = () if writes else tuple([f" {command}\n" for command in view.commands])
    question = Question("command", CUE, choices, 0, (0,), "")
    return replace(now, steps=(*now.steps, Step(state, None, state, "", (question,))))


@dataclass
class Playing:
    """An episode in progress."""

    env: PlayEnv
    seed: int
    info: dict[str, Any] = field(init=False)
    opening: str = field(init=False)
    ended: str = ""  # "won", "lost" (no command is left), "steps" (out of time), "context" (the transcript is too long)
    commands: list[str] = field(default_factory=list)
    legal: list[bool] = field(default_factory=list)
    observations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.opening, self.info = self.env.reset(seed=self.seed)

    @property
    def view(self) -> View:
        """What a player sees now."""
        assert self.env.aim is not None
        return View(self.env.episode, tuple(self.info["admissible_commands"]), self.env.aim)

    def take(self, command: str) -> None:
        """Execute a command and record the outcome."""
        shown, _, terminated, truncated, self.info = self.env.step(command)
        self.commands.append(command)
        self.legal.append(not self.info["illegal"])
        self.observations.append(shown)
        if terminated or truncated:
            self.ended = "won" if self.info["won"] else "lost" if terminated else "steps"

    def row(self, optimum: int | None) -> dict[str, Any]:
        """Return one row of the table of played episodes; columns: `nextstate.analysis.play.tables.PLAYS`."""
        assert self.env.aim is not None
        won, steps = bool(self.info["won"]), len(self.commands)
        return {
            "episode": self.seed,
            "states": self.env.game.size_of(self.env.aim.start),
            "goal": self.env.aim.words,
            "score": self.info["score"],
            "max_score": self.info["max_score"],
            "success": won,
            "steps": steps,
            "optimum": optimum,
            "steps_over": steps - optimum if won and optimum is not None else None,
            "illegal": self.legal.count(False),
            "ended": self.ended,
            "opening": self.opening,
            "commands": self.commands,
            "legal": self.legal,
            "observations": self.observations,
        }


def play(player: Player, game: Game, seeds: Sequence[int], steps: int, optimum: Callable[[Aim], int | None]) -> Rollout:
    """Play one episode for each seed, in parallel; if memory runs out, in halves.

    Args:
        player: chooses the commands.
        game: a game that `make_game` knows by name.
        seeds: the seed of each episode, which determines its start and goal.
        steps: maximum number of commands in an episode.
        optimum: returns the smallest number of commands that reaches an aim, None if it is not known.

    Raises:
        AgentError: the player failed.
    """
    try:
        return _play(player.begin(), game, seeds, steps, optimum)
    except OutOfMemory:
        if len(seeds) == 1:
            raise
    half = len(seeds) // 2
    one, two = (play(player, game, part, steps, optimum) for part in (seeds[:half], seeds[half:]))
    return Rollout(one.rows + two.rows, one.left_out or two.left_out)


def _play(
    player: Player, game: Game, seeds: Sequence[int], steps: int, optimum: Callable[[Aim], int | None]
) -> Rollout:
    playing = [Playing(PlayEnv(game.name, steps, **game.settings), seed) for seed in seeds]
    going, left_out = playing, ""
    while going:
        try:
            commands = player.choose([p.view for p in going])
        except ContextError as error:
            left_out = left_out or f"played until the transcript was too long: {error}"
            for i in error.prompts:
                going[i].ended = "context"
        else:
            for p, command in zip(going, commands, strict=True):
                p.take(command)
        going = [p for p in going if not p.ended]
    return Rollout([p.row(optimum(p.view.aim)) for p in playing], left_out)
