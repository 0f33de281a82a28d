"""What a game is made of. An author of a game needs no other module than this one."""

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
    GameError,
    Question,
    Reader,
    Rules,
    State,
    Step,
    expected_accuracy,
    one_hot,
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
    "require",
    "require_whole",
    "setting_names",
    "split_uniform",
    "uniform",
    "unroll",
]


class Sample(NamedTuple):
    """What one training episode is made of: a game, the number of steps, and of questions after each step."""

    game: Game
    steps: int
    questions: int


@dataclass(frozen=True)
class Game(Rules):
    """A deterministic finite-state system with a text that describes it.

    A game is a frozen dataclass derived from this class. Its dataclass fields are the settings of the game; the "Args"
    of its docstring say what they mean, which `nextstate list games` shows. A state holds everything: what the episode
    drew once (such as an automaton) and what changes.

    A new game must give:
        name: letters, digits and underscores, starting with a letter; file names are made of it.
        size: the setting that says how large the state space is.
        max_choices: the largest number of choices of any question.
        initial, actions, transition: the dynamics. States and actions are hashable, and can be pickled.
        values: the value of each variable that can change.
        opening, narrate, questions: the text.

    Everything else has a default:
        sizes: the values of `size` that are tested and trained on; 2 to 8.
        style, feedback, styles, feedbacks: one style, and questions that leave no trace in the text.
        max_steps: no end.
        policy: each legal action is equally likely.
        outcome: no text after the questions.
        command: what a player types is the narration.
        reader, shortcuts: a reader who knows every state, and no shortcuts. Right only where the opening and the
            narrations say everything; other games give a `Reader` of their own.
        contrasts, draw_pair: minimal pairs found by search (`nextstate.envs.pairs.search`).
        sample: training episodes.
        size_of, objective, points, most_points, won, walkthrough: an unknown number of states, and no aim.

    `nextstate.envs.laws.check_game` checks that a game keeps its promises.

    Args:
        style: the wording of the text.
        feedback: what happens to a question: "branch" (it leaves no trace in the text), or "inline" (it stays in the
            text together with its answer).
    """

    contrasts: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(pairs.KINDS, ("balanced",))

    @classmethod
    def sample(cls, rng: np.random.Generator, size: int, level: int) -> Sample:
        """Draw a training episode's game and length. Overrides may take further keyword arguments, as options.

        Args:
            rng: the generator to draw from.
            size: a size drawn uniformly from 2 to `level`; this default uses the nearest one in `sizes`.
            level: the difficulty of the curriculum: the largest size that is drawn now.
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
        """Draw a minimal pair: two episodes that differ in one thing (`nextstate.envs.contrast.Pair` says in which).

        Args:
            rng: the generator to draw from.
            kind: "state", "action", "name" or "noop"; `contrasts` lists those that the game has.
            design: "balanced" (answers always differ and are determined, and where possible no shortcut is right on
                both sides) or "paper" (the published ones, including their weaknesses).
            steps: length of both episodes, the last and queried step included; by default what suits the game.
            distance: for a noop pair, the number of steps in between that do not change the answer; by default 5, or
                as many as fit.

        Raises:
            GameError: there are no such pairs; the message names the argument, its value and what is possible.
        """
        if kind not in self.contrasts:
            possible = ", ".join(self.contrasts) or "nothing"
            raise GameError(
                f"kind={kind!r} is not possible: {self.name} has no contrast of kind {kind}; has {possible}"
            )
        require(design in self.contrasts[kind], "design", design, f"{' or '.join(self.contrasts[kind])} of kind {kind}")
        if kind == "noop":
            distance = min(5, (self.max_steps or 6) - 1) if distance is None else distance
            require_whole("distance", distance, 1, 100_000)
        else:
            require(distance is None, "distance", distance, "None, since only noop pairs have a distance")
        return self.draw_pair(rng, kind, design, steps, distance or 0)

    def draw_pair(self, rng: np.random.Generator, kind: str, design: str, steps: int | None, distance: int) -> Pair:
        """Draw a pair of one of the game's `contrasts`; `contrast` has checked the arguments."""
        return pairs.search(self, rng, kind, steps)
