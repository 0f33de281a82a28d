"""Episodes: the steps of a game from an initial state, and the texts that players and readers see."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, TypeVar

import numpy as np

from nextstate.envs.rules import Distribution, Question, Reader, Rules, State, Step, require_whole, uniform

T = TypeVar("T")


@dataclass(frozen=True)
class Episode:
    """An opening and a sequence of steps. Environments produce episodes; agents and analyses read them."""

    game: Rules
    seed: int
    start: State
    opening: str
    steps: tuple[Step, ...]
    _beliefs: dict[str, list[list[Distribution]]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _ceilings: list[list[float]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def texts(self) -> tuple[str, ...]:
        """The text that each step adds to the transcript: narration, inline questions with answers, outcome."""
        if self.game.feedback == "branch":
            return tuple([s.narration + s.outcome for s in self.steps])
        texts = []
        for _, _, _, words, asked, outcome in self.steps:
            for _, stem, choices, truth, _, closing in asked:
                words = f"{words}{stem}{choices[truth]}{closing}"
            texts.append(words + outcome)
        return tuple(texts)

    @property
    def transcripts(self) -> tuple[str, ...]:
        """The transcript before each step, followed by the complete transcript; T + 1 strings."""
        return tuple(accumulate(self.texts, initial=self.opening))

    def prompt(self, step: int, question: int = 0) -> str:
        """Return the text up to the answer of a question; `step` and `question` are counted from 0."""
        now = self.steps[step]
        asked = now.questions[: question + 1]
        head = self.opening + "".join(self.texts[:step]) + now.narration
        if self.game.feedback == "inline":
            head += "".join(q.stem + q.choices[q.truth] + q.closing for q in asked[:-1])
        return head + asked[-1].stem

    def beliefs(self, name: str) -> list[list[Distribution]]:
        """Return the distributions of `name` ("ideal", "lookup", "chance" or a shortcut), by step and question.

        The results are cached for each name.
        """
        if name not in self._beliefs:
            self._beliefs[name] = self._read(name)
        return self._beliefs[name]

    @property
    def ceilings(self) -> list[list[float]]:
        """The accuracy that the ideal reader expects of its answers, given the text; by step and question."""
        if not self._ceilings:
            self._ceilings.extend(self._ask(lambda reader, q: reader.ceiling(q)))
        return self._ceilings

    def _read(self, name: str) -> list[list[Distribution]]:
        if name == "chance":
            return [[uniform(len(q.choices)) for q in step.questions] for step in self.steps]
        return self._ask((lambda r, q: r.lookup(q)) if name == "lookup" else (lambda r, q: r.guess(name, q)))

    def _ask(self, ask: Callable[[Reader, Question], T]) -> list[list[T]]:
        """Return what a reader of the transcript says about each question."""
        reader = self.game.reader(self.start)
        observe, observe_answer = reader.observe, reader.observe_answer
        inline = self.game.feedback == "inline"
        out: list[list[T]] = []
        for _, action, _, _, asked, _ in self.steps:
            observe(action)
            if not inline:
                out.append([ask(reader, question) for question in asked])
                continue
            row: list[T] = []
            for question in asked:
                row.append(ask(reader, question))
                observe_answer(question.truth)
            out.append(row)
        return out


def check_steps(game: Rules, steps: int) -> None:
    """Raise `GameError` if episodes of `steps` steps are not possible."""
    require_whole("steps", steps, 1, game.max_steps or 1_000_000)


def unroll(
    game: Rules, seed: int, steps: int, ask: int | Literal["all"] = 1, rng: np.random.Generator | None = None
) -> Episode:
    """Play one episode by the game's policy.

    Args:
        game: the game to play.
        seed: determines the episode on every computer; stored in the episode.
        steps: number of transitions.
        ask: number of questions after each step, drawn without replacement from `game.questions`, or "all".
        rng: the generator to draw from; by default the one that `gym.Env.reset(seed=seed)` creates.
    """
    check_steps(game, steps)
    if rng is None:
        rng = np.random.default_rng(seed)
    state = start = game.initial(rng)
    draws = rng.random((steps, 2)).tolist()
    step, most = game.step, sys.maxsize if ask == "all" else ask
    done: list[Step] = []
    for u, v in draws:
        now = step(state, u, v, most)
        done.append(now)
        state = now.next_state
    return Episode(game, seed, start, game.opening(start), tuple(done))
