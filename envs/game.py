"""The base class of games. Authors of new games need only this module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from nextstate.envs import pairs
from nextstate.envs.contrast import Pair
from nextstate.envs.episode import Episode, check_steps, unroll
from nextstate.envs.rules import (
    Action,
    Distribution,
    Feedback,
    Frequencies,
    GameError,
    Question,
    Reader,
    Rules,
    State,
    Step,
    expected_accuracy,
    one_hot,
    own_accuracy,
    require,
    require_whole,
    setting_names,
    split_uniform,
    uniform,
)

__all__ = [
    "Action",
    "Distribution",
    "Episode",
    "Feedback",
    "Frequencies",
    "Game",
    "GameError",
    "Pair",
    "Question",
    "Reader",
    "Sample",
    "State",
    "Step",
    "check_steps",
    "expected_accuracy",
    "one_hot",
    "own_accuracy",
    "require",
    "require_whole",
    "setting_names",
    "split_uniform",
    "uniform",
    "unroll",
]


class Sample(NamedTuple):
    """A training episode to draw: the game, the number of steps, and the number of questions after each step."""

    game: Game
    steps: int
    questions: int


@dataclass(frozen=True)
class Game(Rules):
    """A deterministic finite-state system with a text that describes it.

    A game is a frozen dataclass derived from this class. Its dataclass fields are the settings of the game; the "Args"
    section of its docstring explains them and is shown by `nextstate list games`. A state contains both what is drawn
    once per episode (such as an automaton) and what changes.

    A new game must define:
        name: letters, digits and underscores, starting with a letter; used in file names.
        size: the name of the setting that controls the size of the state space.
        max_choices: the largest number of choices of any question.
        initial, actions, transition: the dynamics. States and actions must be hashable and picklable.
        values: the value of each variable that can change.
        opening, narrate, questions: the text.

    Everything else has a default:
        sizes: the values of `size` used in tests and training; 2 to 8.
        style, feedback, styles, feedbacks: one style, and questions that do not appear in the transcript.
        max_steps: no limit.
        policy: each legal action is equally likely.
        outcome: no text after the questions.
        command: the text that a player types is the narration.
        reader, shortcuts: a reader that knows the state, and no shortcuts. This is right only if the opening and the
            narrations determine the state; other games must define their own `Reader`.
        contrasts, draw_pair: minimal pairs found by search (`nextstate.envs.pairs.search`).
        sample: training episodes.
        size_of, objective, points, most_points, won, walkthrough: an unknown number of states, and no objective.

    `nextstate.envs.laws.check_game` tests whether a game meets these requirements.

    Args:
        style: the wording of the text.
        feedback: "branch" (questions do not appear in the transcript) or "inline" (questions and their answers stay in
            the transcript).
    """

    contrasts: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(pairs.KINDS, ("balanced",))

    @classmethod
    def sample(cls, rng: np.random.Generator, size: int, level: int) -> Sample:
        """Draw the game and length of a training episode. Overrides may add keyword arguments as options.

        Args:
            rng: the generator to draw from.
            size: a size drawn uniformly from 2 to `level`; this default uses the nearest value in `sizes`.
            level: the current maximum size of the training curriculum.
        """
        settings: dict[str, Any] = {cls.size: min(max(size, cls.sizes[0]), cls.sizes[-1])}
        game = cls(**settings)
        return Sample(game, int(rng.integers(1, min(12, game.max_steps or 12) + 1)), 1)

    def contrast(
        self,
        rng: np.random.Generator,
        kind: str,
        design: str = "balanced",
        steps: int | None = None,
        distance: int | None = None,
    ) -> Pair:
        """Draw a minimal pair: two episodes that differ in one respect (see `nextstate.envs.contrast.Pair`).

        Args:
            rng: the generator to draw from.
            kind: "state", "action", "name" or "noop"; `contrasts` lists those that the game supports.
            design: "balanced" (answers differ and are determined by the transcript, and if possible no shortcut is
                right on both sides) or "paper" (the published design, including its weaknesses).
            steps: length of both episodes, including the last step, whose question is asked (in the published design
                without it); the default depends on the game.
            distance: for noop pairs, the number of steps in between that do not change the answer (in the published
                design its length, 3 more); by default 5, or as many as fit.

        Raises:
            GameError: such a pair is not possible; the message names the argument, its value and what is possible.
        """
        if kind not in self.contrasts:
            possible = ", ".join(self.contrasts) or "nothing"
            raise GameError(
                f"kind={kind!r} is not possible: {self.name} has no contrast of kind {kind}; expected {possible}"
            )
        require(design in self.contrasts[kind], "design", design, f"{' or '.join(self.contrasts[kind])} of kind {kind}")
        if kind == "noop":
            distance = min(5, (self.max_steps or 6) - 1) if distance is None else distance
            require_whole("distance", distance, 1, 100_000)
        else:
            require(distance is None, "distance", distance, "None, since only noop pairs have a distance")
        return self.draw_pair(rng, kind, design, steps, distance or 0)

    def draw_pair(self, rng: np.random.Generator, kind: str, design: str, steps: int | None, distance: int) -> Pair:
        """Draw a pair; called by `contrast` with validated arguments."""
        return pairs.search(self, rng, kind, steps)
