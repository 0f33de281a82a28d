"""Run an agent over episodes and write down a row a question: by replay (fast) or live (step by step)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from nextstate.agents.agent import Agent, ContextError, Prompt, row
from nextstate.envs.game import Distribution, Episode, Game, unroll
from nextstate.envs.vector import PredictionVectorEnv

Road = Literal["replay", "live"]
Grid = Literal["episodes", "cells"]


class Rollout(NamedTuple):
    """The rows of an agent on one setting, and what it could not be asked ("" where nothing was left out)."""

    rows: list[dict[str, Any]]
    left_out: str


def seeds_for(seed: int, episodes: int, cell: int = 0) -> range:
    """Return episode seeds; other seeds, and other cells below 1,000, share none, up to a million episodes each."""
    start = seed * 10**9 + cell * 10**6
    return range(start, start + episodes)


def prompts_of(episode: Episode, grid: Grid = "episodes") -> list[Prompt]:
    """Return the prompts of an episode: of every step, or with `grid="cells"` of the last one alone."""
    first = len(episode.steps) - 1 if grid == "cells" else 0
    return [
        Prompt(episode, t, q) for t in range(first, len(episode.steps)) for q in range(len(episode.steps[t].questions))
    ]


def replay(agent: Agent, episodes: Sequence[Episode], grid: Grid = "episodes") -> Rollout:
    """Ask everything at once; prompts that are too long for the agent are left out, and said."""
    prompts = [p for e in episodes for p in prompts_of(e, grid)]
    left_out = ""
    try:
        predictions = agent.predict(prompts)
    except ContextError as error:
        left_out = str(error)
        gone = set(error.prompts)
        prompts = [p for i, p in enumerate(prompts) if i not in gone]
        predictions = agent.predict(prompts) if prompts else []
    ideal = _ideal(episodes)
    rows = [row(p, q, ideal[id(p.episode)][p.step][p.question]) for p, q in zip(prompts, predictions, strict=True)]
    return Rollout(rows, left_out)


def live(agent: Agent, game: Game, seeds: range, steps: int) -> Rollout:
    """Play through the vector environment, the agent's greedy answer being the action of each step."""
    # Answers go in as choices: a greedy answer that is none of them exactly, " C" against "C" say, stays wrong.
    envs = PredictionVectorEnv(game, num_envs=len(seeds), steps=steps, answer="choice")
    reader = agent.live()
    try:
        envs.reset(seed=seeds.start)
        episodes = envs.episodes
        ideal = _ideal(episodes)
        rows = []
        for t in range(steps):
            prompts = [Prompt(e, t) for e in episodes]
            predictions = reader.predict(prompts)
            _, rewards, *_ = envs.step(np.array([p.greedy for p in predictions]))
            new = [row(p, q, ideal[id(p.episode)][t][0]) for p, q in zip(prompts, predictions, strict=True)]
            wrong = [
                r["episode"] for r, reward in zip(new, rewards, strict=True) if r["greedy_correct"] != bool(reward)
            ]
            if wrong:
                raise RuntimeError(f"reward and row disagree on step {t + 1} of {game.name}, episodes {wrong}")
            rows.extend(new)
    finally:
        envs.close()
    order = {seed: i for i, seed in enumerate(seeds)}
    return Rollout(sorted(rows, key=lambda r: (order[r["episode"]], r["step"])), "")


def episodes_of(game: Game, seeds: Iterable[int], steps: int, ask: int | Literal["all"] = 1) -> list[Episode]:
    """Unroll one episode a seed."""
    return [unroll(game, seed, steps, ask) for seed in seeds]


def accuracy(rows: Sequence[dict[str, Any]]) -> float:
    """Return the share of greedy answers that are right."""
    return float(np.mean([r["greedy_correct"] for r in rows]))


def _ideal(episodes: Sequence[Episode]) -> dict[int, list[list[Distribution]]]:
    return {id(e): e.beliefs("ideal") for e in episodes}
