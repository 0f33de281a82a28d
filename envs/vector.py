"""Prediction as a vector environment: all episodes are drawn at reset and stepped together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import contains
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from nextstate.envs.aims import positions
from nextstate.envs.environments import answer_space, ceilings, set_up, text_space
from nextstate.envs.game import Episode, Game, Question, State, require, require_whole, unroll

Arrays = dict[str, Any]  # NumPy arrays of length `num_envs`, masks under `_key`, and nested dicts of the same form


class PredictionVectorEnv(gym.vector.VectorEnv[tuple[str, ...], Any, Any]):
    """`num_envs` copies of `PredictionEnv` that are stepped together, with the same results as separate ones.

    All episodes have `steps` questions and end at the same time; the next call of `step` ignores its actions and starts
    new episodes (`AutoresetMode.NEXT_STEP`). Environment i of `reset(seed=s)` plays the episode of seed `s + i`.

    Observation: a tuple of texts. Actions: a sequence of answers, as text or (`answer="choice"`) as indices.
    Info: a dict of arrays in the format of `gymnasium.vector.SyncVectorEnv`.

    Args:
        game: the name of a game, see `nextstate.envs.make_game`; or a game object.
        num_envs: number of environments.
        steps: questions in an episode; by default 10, or the game's maximum if that is smaller.
        answer: "text" or "choice".
        render_mode: None or "ansi".
        settings: keyword arguments of the game.
    """

    def __init__(
        self,
        game: str | Game,
        num_envs: int = 1,
        steps: int | None = None,
        answer: Literal["text", "choice"] = "text",
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        require_whole("num_envs", num_envs, 1, 1_000_000)
        self.game, self.steps = set_up(game, steps, render_mode, settings)
        self.num_envs, self.render_mode, self.answer = num_envs, render_mode, answer
        self.metadata = {"render_modes": ["ansi"], "render_fps": 1, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space = text_space(self.steps)
        self.single_action_space = answer_space(self.game, answer)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.episodes: tuple[Episode, ...] = ()
        self._generators: list[np.random.Generator] = []
        self._all, self._none = np.ones(num_envs, dtype=np.bool_), np.zeros(num_envs, dtype=np.bool_)
        self._at = -1  # no episode yet

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[str, ...], Arrays]:
        """Draw new episodes with the seeds `seed`, `seed` + 1, ... or a list of seeds; None draws the first seed."""
        require(not (options and "reset_mask" in options), "options", options, "no reset_mask: all end together")
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        require(len(seeds) == self.num_envs, "seed", seed, f"one seed, or a list of {self.num_envs}")
        if not self._generators:
            self._generators = [seeding.np_random(s)[0] for s in seeds]
        else:
            self._generators = [
                old if s is None else seeding.np_random(s)[0] for old, s in zip(self._generators, seeds, strict=True)
            ]
        game, steps = self.game, self.steps
        self.episodes, self._texts, self._states, self._narrations, self._facts = (), [], [], [], []  # frees memory
        self.episodes = tuple(
            [
                unroll(game, int(rng.integers(2**31)), steps) if s is None else unroll(game, s, steps, rng=rng)
                for s, rng in zip(seeds, self._generators, strict=True)
            ]
        )
        # Transposed, so that each step reads one row with the values of all environments.
        self._ceilings = np.array([ceilings(episode) for episode in self.episodes]).T.copy()  # (reader, step, episode)
        self._texts = list(zip(*[episode.texts for episode in self.episodes], strict=True))
        self._states = list(zip(*[[s.next_state for s in episode.steps] for episode in self.episodes], strict=True))
        self._narrations = list(zip(*[[s.narration for s in episode.steps] for episode in self.episodes], strict=True))
        facts: dict[int, Facts] = {}  # most games reuse a few question objects
        self._facts = list(zip(*[[_facts(s.questions[0], facts) for s in e.steps] for e in self.episodes], strict=True))
        self._heads = [episode.opening for episode in self.episodes]
        self._at = 0
        return self._show({})

    def step(self, actions: Any) -> tuple[tuple[str, ...], Any, Any, Any, Arrays]:
        """Answer the current questions, or start new episodes if all have ended."""
        if self._at < 0:
            raise ResetNeeded("no episode has started: call reset()")
        if self._at == self.steps:
            shown, first = self.reset()
            return shown, np.zeros(self.num_envs), self._none.copy(), self._none.copy(), first
        require(len(actions) == self.num_envs, "actions", actions, f"{self.num_envs} answers")
        at = self._at
        _, words, _, answers, accepted, chance = zip(*self._facts[at], strict=True)
        index = self._indices(actions, words)
        correct = np.array(list(map(contains, accepted, index)))
        lookup, ceiling = self._ceilings[:, at]
        info: Arrays = {}
        self._set(info, "answer", objects(answers))
        self._set(info, "accepted", objects(accepted))
        self._set(info, "state", self._values(self._states[at]))
        self._set(info, "lookup", lookup.copy())
        self._set(info, "ceiling", ceiling.copy())
        self._set(info, "determined", ceiling == 1.0)
        self._set(info, "chance", np.array(chance))
        self._set(info, "correct", correct)
        self._set(info, "illegal", np.array(index) < 0)
        self._heads = [head + text for head, text in zip(self._heads, self._texts[at], strict=True)]
        self._at = at + 1
        shown, info = self._show(info)
        ended = self._all if self._at == self.steps else self._none
        return shown, correct.astype(np.float64), ended.copy(), self._none.copy(), info

    def render(self) -> tuple[str, ...] | None:
        """Return the current observations if `render_mode="ansi"`, else None."""
        return self._shown if self.render_mode == "ansi" else None

    def _indices(self, actions: Any, words: Sequence[dict[str, int]]) -> list[int]:
        """Return the index of the choice that each action gives, -1 if it is none of them."""
        if self.answer == "text":
            return [w.get(a.strip(), -1) if isinstance(a, str) else -1 for a, w in zip(actions, words, strict=True)]
        chosen = np.asarray(actions)
        require(np.issubdtype(chosen.dtype, np.integer), "actions", actions, "whole numbers")
        return [a if 0 <= a < len(w) else -1 for a, w in zip(chosen.tolist(), words, strict=True)]

    def _show(self, info: Arrays) -> tuple[tuple[str, ...], Arrays]:
        self._set(info, "step", np.full(self.num_envs, self._at))
        if self._at == self.steps:
            self._shown = tuple(self._heads)
            choices: list[tuple[str, ...]] = [()] * self.num_envs
        else:
            rows = zip(self._heads, self._narrations[self._at], self._facts[self._at], strict=True)
            self._shown = tuple([f"{head}{narration}{facts[0]}" for head, narration, facts in rows])
            choices = [facts[2] for facts in self._facts[self._at]]
        self._set(info, "choices", objects(choices))
        return self._shown, info

    def _set(self, info: Arrays, key: str, value: Any) -> None:
        info[key], info[f"_{key}"] = value, self._all.copy()

    def _values(self, states: Iterable[State]) -> Arrays:
        """Return an array and a mask for each variable that occurs in any of the states."""
        values: list[Mapping[str, str]] = [self.game.values(state) for state in states]
        keys = values[0].keys()
        out: Arrays = {}
        if all(v.keys() == keys for v in values):
            for key in keys:
                self._set(out, key, objects([v[key] for v in values]))
        else:
            for key in dict.fromkeys(key for v in values for key in v):
                out[key] = objects([v.get(key) for v in values])
                out[f"_{key}"] = np.array([key in v for v in values])
        return out


Facts = tuple[str, dict[str, int], tuple[str, ...], str, tuple[int, ...], float]


def _facts(question: Question, known: dict[int, Facts]) -> Facts:
    """Return stem, index of each choice by its text, choices, answer, accepted and chance; cached by identity."""
    facts = known.get(id(question))
    if facts is None:
        choices = question.choices
        facts = (question.stem, positions(choices), choices, question.answer, question.accepted, question.chance)
        known[id(question)] = facts
    return facts


def objects(items: Iterable[object]) -> np.ndarray[Any, np.dtype[np.object_]]:
    """Return a one-dimensional object array of `items`; tuples are not expanded."""
    return np.fromiter(items, dtype=np.object_)
