"""Ask an agent about episodes, in replay (all at once) or live (step by step); each answer becomes a table row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from nextstate.agents.agent import Agent, ContextError, Prompt, answer_row, question_row
from nextstate.envs.game import Episode, Game, unroll
from nextstate.envs.vector import PredictionVectorEnv

Mode = Literal["replay", "live"]
Grid = Literal["episodes", "cells"]


class Rollout(NamedTuple):
    """The rows of an agent, and the reason why questions or episodes were left out ("" if none were)."""

    rows: list[dict[str, Any]]
    left_out: str


def seeds_for(seed: int, episodes: int, cell: int = 0) -> range:
    """Return episode seeds, distinct for each `seed` and `cell` (below 1,000) for up to a million episodes each."""
    start = seed * 10**9 + cell * 10**6
    return range(start, start + episodes)


def prompts_of(episode: Episode, grid: Grid = "episodes") -> list[Prompt]:
    """Return the prompts of an episode: of every step, or with `grid="cells"` of the last step only."""
    first = len(episode.steps) - 1 if grid == "cells" else 0
    return [
        Prompt(episode, t, q) for t in range(first, len(episode.steps)) for q in range(len(episode.steps[t].questions))
    ]


def questions(episodes: Iterable[Episode], grid: Grid = "episodes") -> Iterator[tuple[Prompt, dict[str, Any]]]:
    """Yield each question of the episodes with its table row; see `question_row`."""
    for episode in episodes:
        for prompt in prompts_of(episode, grid):
            yield prompt, question_row(prompt)


def replay(agent: Agent, episodes: Sequence[Episode], grid: Grid = "episodes") -> Rollout:
    """Ask all questions in one call; questions with a prompt that is too long for the agent are left out."""
    prompts = [p for e in episodes for p in prompts_of(e, grid)]
    left_out = ""
    try:
        predictions = agent.predict(prompts)
    except ContextError as error:
        left_out = str(error)
        gone = set(error.prompts)
        prompts = [p for i, p in enumerate(prompts) if i not in gone]
        predictions = agent.predict(prompts) if prompts else []
    return Rollout([answer_row(p, q) for p, q in zip(prompts, predictions, strict=True)], left_out)


def live(agent: Agent, game: Game, seeds: range, steps: int) -> Rollout:
    """Step through a vector environment with the agent's greedy answers as actions."""
    # Answers are given as choice indices, so that a greedy answer without an exact match ("C" for " C") stays wrong.
    envs = PredictionVectorEnv(game, num_envs=len(seeds), steps=steps, answer="choice")
    reader = agent.live()
    try:
        envs.reset(seed=seeds.start)
        episodes = envs.episodes
        rows = []
        for t in range(steps):
            prompts = [Prompt(e, t) for e in episodes]
            predictions = reader.predict(prompts)
            _, rewards, *_ = envs.step(np.array([p.greedy for p in predictions]))
            new = [answer_row(p, q) for p, q in zip(prompts, predictions, strict=True)]
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
    """Unroll one episode for each seed."""
    return [unroll(game, seed, steps, ask) for seed in seeds]


def determined_accuracy(agent: Agent, episodes: Sequence[Episode]) -> float:
    """Return the accuracy of greedy answers on the questions whose answer is determined by the transcript.

    NaN if there are no such questions.

    Raises:
        ContextError: a prompt is too long for the agent.
    """
    asked = list(questions(episodes))
    answers = agent.predict([prompt for prompt, _ in asked])
    found = zip(asked, answers, strict=True)
    hits = [a.greedy in prompt.asked.accepted for (prompt, row), a in found if row["determined"]]
    return float(np.mean(hits)) if hits else math.nan
