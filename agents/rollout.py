"""Ask an agent about episodes, in replay (all at once) or live (step by step); answers become a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from nextstate.agents.agent import Agent, ContextError, Predictions, Prompt
from nextstate.agents.columns import Asked, Grid, answer_frame
from nextstate.envs.game import Episode, Game, unroll
from nextstate.envs.vector import PredictionVectorEnv

Mode = Literal["replay", "live"]


class Rollout(NamedTuple):
    """The rows of a player, and the reason why episodes were left out ("" if none were)."""

    rows: list[dict[str, Any]]
    left_out: str


@dataclass(frozen=True)
class Answers:
    """The answers of an agent, and the reason why questions were left out ("" if none were).

    `frame` has the columns of `nextstate.analysis.predict.tables.ANSWERS` but for the agent.
    """

    frame: pl.DataFrame
    left_out: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the table."""
        return self.frame.rows(named=True)


def seeds_for(seed: int, episodes: int, cell: int = 0) -> range:
    """Return episode seeds, distinct for each `seed` and `cell` (below 1,000) for up to a million episodes each."""
    start = seed * 10**9 + cell * 10**6
    return range(start, start + episodes)


def prompts_of(episode: Episode, grid: Grid = "episodes") -> list[Prompt]:
    """Return the prompts of an episode: of every step, or with `grid="cells"` of the last step only."""
    return list(Asked.all_of([episode], grid))


def replay(agent: Agent, episodes: Sequence[Episode] | Asked, grid: Grid = "episodes") -> Answers:
    """Ask all questions in one call; questions with a prompt that is too long for the agent are left out.

    Args:
        agent: the agent.
        episodes: the episodes, or all their prompts with columns that several agents share.
        grid: which steps of episodes are asked about; see `prompts_of`.
    """
    asked = episodes if isinstance(episodes, Asked) else Asked.all_of(episodes, grid)
    left_out = ""
    try:
        predictions = agent.predict(asked)
    except ContextError as error:
        left_out, asked = str(error), asked.without(error.prompts)
        predictions = agent.predict(asked) if len(asked) else []
    return Answers(answer_frame(asked, Predictions.of(asked, predictions)), left_out)


def live(agent: Agent, game: Game, seeds: range, steps: int) -> Answers:
    """Step through a vector environment with the agent's greedy answers as actions."""
    # Answers are given as choice indices, so that a greedy answer without an exact match ("C" for " C") stays wrong.
    envs = PredictionVectorEnv(game, num_envs=len(seeds), steps=steps, answer="choice")
    reader = agent.live()
    frames = []
    try:
        envs.reset(seed=seeds.start)
        episodes = envs.episodes
        for t in range(steps):
            asked = Asked(Prompt(e, t) for e in episodes)
            predictions = Predictions.of(asked, reader.predict(asked))
            _, rewards, *_ = envs.step(predictions.greedy)
            new = answer_frame(asked, predictions)
            wrong = asked.seed[new["greedy_correct"].to_numpy() != rewards.astype(np.bool_)].tolist()
            if wrong:
                raise RuntimeError(f"reward and row disagree on step {t + 1} of {game.name}, episodes {wrong}")
            frames.append(new)
    finally:
        envs.close()
    return Answers(pl.concat(frames).sort("episode", "step"), "")


def episodes_of(game: Game, seeds: Iterable[int], steps: int, ask: int | Literal["all"] = 1) -> list[Episode]:
    """Unroll one episode for each seed."""
    return [unroll(game, seed, steps, ask) for seed in seeds]


def determined_accuracy(agent: Agent, episodes: Sequence[Episode]) -> float:
    """Return the accuracy of greedy answers on the questions whose answer is determined by the transcript.

    NaN if there are no such questions.

    Raises:
        ContextError: a prompt is too long for the agent.
    """
    asked = Asked.all_of(episodes)
    greedy = Predictions.of(asked, agent.predict(asked)).greedy.tolist()
    ceilings = [e.ceilings for e in asked.episodes]
    found = zip(asked.at.tolist(), asked, greedy, strict=True)
    hits = [g in p.asked.accepted for i, p, g in found if ceilings[i][p.step][p.question] == 1]
    return float(np.mean(hits)) if hits else math.nan
