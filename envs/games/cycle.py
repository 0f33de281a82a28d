"""A pattern of letters, repeated ("Scaling Laws for State Dynamics", arXiv 2505.14892, cycles): pure induction."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import numpy as np

from nextstate.envs.contrast import Pair, answered, build_episode, draw_balanced, last, roles
from nextstate.envs.game import (
    Action,
    Distribution,
    Feedback,
    Frequencies,
    Game,
    Question,
    Reader,
    Sample,
    State,
    one_hot,
    require,
    require_whole,
    uniform,
)

CHOICES = tuple(f" {c}" for c in string.ascii_lowercase)
ASKED = tuple((Question("letter", "", CHOICES, i, (i,), ""),) for i in range(len(CHOICES)))


class Phase(NamedTuple):
    """A state: a pattern and the position in it."""

    pattern: tuple[int, ...]  # letters as indices
    at: int


@final
@dataclass(frozen=True)
class Cycle(Game):
    """A random pattern of distinct letters is repeated; each step moves to the next letter.

    State: the position in the pattern, |Q| = |T| = period. Each step has one question, the next letter; the answer
    stays in the transcript.

    The letters are distinct and every label is the next letter, unlike in the published prompts, of which no faithful
    copy is offered. There letters may repeat, and the label is the letter after the first place of the last letter in
    the pattern, which is wrong for 8 to 51 % of prompts (patterns of 3 letters to 20); and no answer that begins with a
    blank is counted as right, so that published scores say nothing about the task.

    Ideal reader: knows the period, and that the letters of the pattern are distinct. In the first round it is uniform
    over the letters not yet shown; from the step at which the pattern begins again (step = period), the answer is
    determined, although no text that an agent has read says what the period is.

    Lookup reader: does not know the period. If the current letter occurred before, it repeats the letter that followed.
    Otherwise it is uniform over the letters that the text does not exclude: those not yet shown, and the first one,
    with which the pattern may begin again. (This is Bayes' rule for a period that is uniform from 2 to 26.)

    Args:
        period: length of the pattern, 2 to 26.
    """

    name: ClassVar[str] = "Cycle"
    size: ClassVar[str] = "period"
    sizes: ClassVar[range] = range(2, 13)
    shortcuts: ClassVar[tuple[str, ...]] = ("last_mention", "most_frequent", "stay")
    feedbacks: ClassVar[tuple[Feedback, ...]] = ("inline",)
    contrasts: ClassVar[Mapping[str, tuple[str, ...]]] = {"state": ("balanced",), "name": ("balanced",)}

    period: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("period", self.period, 2, len(CHOICES))

    @classmethod
    def sample(cls, rng: np.random.Generator, size: int, level: int) -> Sample:
        period = int(rng.integers(2, level + 5))
        return Sample(cls(period=period), period * int(rng.integers(2, 5)), 1)

    @property
    def max_choices(self) -> int:
        return len(CHOICES)

    def initial(self, rng: np.random.Generator) -> Phase:
        return Phase(tuple(rng.permutation(len(CHOICES))[: self.period].tolist()), 0)

    def actions(self, state: State) -> Sequence[str]:
        return ("next",)

    def transition(self, state: State, action: Action) -> Phase:
        pattern, at = _phase(state)
        return Phase(pattern, (at + 1) % self.period)

    def values(self, state: State) -> Mapping[str, str]:
        pattern, at = _phase(state)
        return {"letter": CHOICES[pattern[at]].strip()}

    def opening(self, state: State) -> str:
        pattern, at = _phase(state)
        return CHOICES[pattern[at]].strip()

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        return ""

    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        pattern, at = _phase(next_state)
        return ASKED[pattern[at]]

    def size_of(self, state: State) -> int:
        return self.period

    def command(self, state: State, action: Action) -> str:
        return "next"

    def reader(self, state: State) -> Reader:
        pattern, at = _phase(state)
        return CycleReader(self.period, pattern[at])

    def draw_pair(self, rng: np.random.Generator, kind: str, design: str, steps: int | None, distance: int) -> Pair:
        """Draw a pair of at least `period + 1` steps, so that the current letter was followed by the answer before.

        "state": the same cycle entered at another letter; each letter of the story is then another one. "name": the
        answer's letter is one that the pattern does not have.
        """
        n = self.period
        steps = 2 * n if steps is None else steps
        require_whole("steps", steps, n + 1, 10_000)
        require(kind != "name" or n < len(CHOICES), "period", n, f"at most {len(CHOICES) - 1} for a name pair")

        def draw() -> Pair:
            letters = rng.permutation(len(CHOICES)).tolist()
            pattern, other = tuple(letters[:n]), tuple(letters[:n])
            if kind == "state":
                entry = int(rng.integers(1, n))
                other = pattern[entry:] + pattern[:entry]
            else:
                other = tuple([letters[n] if i == steps % n else c for i, c in enumerate(pattern)])
            seed = int(rng.integers(2**31))
            sides = [
                build_episode(self, Phase(letters, 0), ["next"] * steps, seed=seed) for letters in (pattern, other)
            ]
            places = [
                {"state": answered(e, steps - 2), "match": answered(e, steps - 1 - n), "last": last(e)} for e in sides
            ]
            return Pair(kind, design, sides[0], sides[1], roles(*places))

        return draw_balanced(draw, ("last_mention",) if n == 2 else ())


class CycleReader(Reader):
    """Remembers the letters in order."""

    def __init__(self, period: int, first: int) -> None:
        self.period, self.shown = period, [first]
        self.frequencies = Frequencies(self.shown)

    def observe(self, action: Action) -> None:
        pass

    def observe_answer(self, answer: int) -> None:
        self.shown.append(answer)
        self.frequencies.add(answer)

    def lookup(self, question: Question) -> Distribution:
        n, (*before, now) = len(question.choices), self.shown
        if now in before:
            return one_hot(n, self.shown[before.index(now) + 1])
        return uniform(n, tuple([i for i in range(n) if i not in self.shown or (before and i == before[0])]))

    def guess(self, name: str, question: Question) -> Distribution:
        n = len(question.choices)
        if name == "ideal":
            if len(self.shown) >= self.period:
                return one_hot(n, self.shown[-self.period])
            return uniform(n, tuple([i for i in range(n) if i not in self.shown]))
        if name == "stay":
            return one_hot(n, self.shown[-1])
        if name == "last_mention":  # the most recent letter that is not the current one
            return one_hot(n, self.shown[-2]) if len(self.shown) > 1 else uniform(n)
        if name == "most_frequent":
            return self.frequencies.belief(n)
        raise KeyError(name)


def _phase(state: State) -> Phase:
    assert isinstance(state, Phase)
    return state
