"""The rules of a game: states, actions and transitions, the text that describes them, and what its reader can know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

State = Hashable
Action = Hashable
Feedback = Literal["inline", "branch"]
Distribution = tuple[float, ...]


class GameError(ValueError):
    """A game was asked for something that it cannot be; the message names argument, value and legal range."""


def require(legal: bool, name: str, value: object, expected: str) -> None:
    """Raise `GameError` unless `legal`.

    >>> require(False, "boxes", 1, "a whole number from 2 to 26")
    Traceback (most recent call last):
    nextstate.envs.rules.GameError: boxes=1 is not possible: expected a whole number from 2 to 26
    """
    if not legal:
        raise GameError(f"{name}={value!r} is not possible: expected {expected}")


def require_whole(name: str, value: object, low: int, high: int) -> None:
    """Raise `GameError` unless `value` is an int (no bool, no float) within `low` and `high`, both included."""
    ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(ok, name, value, f"a whole number from {low} to {high}")


def split_uniform(u: float, n: int) -> tuple[int, float]:
    """Cut a uniform draw `u` in [0, 1) into a uniform index below `n` and what is left of `u`, again uniform.

    One float a step thus decides everything about the step, so that single, vector and replayed episodes draw alike.
    """
    scaled = u * n  # less than n also when rounded: n * 2**-53 is more than half of what lies between floats there
    index = int(scaled)
    return index, scaled - index


@lru_cache(maxsize=4096)
def one_hot(n: int, index: int) -> Distribution:
    """Return the distribution over `n` choices that is certain of `index`."""
    return tuple(float(i == index) for i in range(n))


@lru_cache(maxsize=4096)
def uniform(n: int, support: tuple[int, ...] | None = None) -> Distribution:
    """Return the uniform distribution over `support` (all `n` choices by default)."""
    chosen = range(n) if support is None else support
    return tuple(1 / len(chosen) if i in chosen else 0.0 for i in range(n))


class Question(NamedTuple):
    """A cloze about one variable of the next state: transcript + stem is the prompt, a choice is the answer."""

    variable: str
    stem: str
    choices: tuple[str, ...]  # as they continue the stem, so with their leading space
    truth: int  # index of what really happened
    accepted: tuple[int, ...]  # indices of all right answers
    closing: str = "."  # what follows the answer in a transcript that keeps it

    @property
    def answer(self) -> str:
        """The true answer, without its leading space."""
        return self.choices[self.truth].strip()

    @property
    def chance(self) -> float:
        """What a uniform guess among the choices scores."""
        return len(self.accepted) / len(self.choices)

    def accepts(self, answer: str) -> bool:
        """Tell whether `answer` is right; surrounding white space does not count."""
        return any(answer.strip() == self.choices[i].strip() for i in self.accepted)


class Step(NamedTuple):
    """One transition, its words, and the questions asked about it, after the narration and before the outcome."""

    state: State
    action: Action
    next_state: State
    narration: str
    questions: tuple[Question, ...]
    outcome: str = ""


@lru_cache(maxsize=65536)
def expected_accuracy(belief: Distribution, accepted: tuple[int, ...]) -> float:
    """Return the expected accuracy of answering with the likeliest choice, ties broken evenly."""
    top = max(belief)
    best = [i for i, p in enumerate(belief) if p >= top - 1e-12]
    return sum(i in accepted for i in best) / len(best)


class Reader(ABC):
    """What a reader who knows the game's rules can conclude from the text alone, and what shortcuts would answer.

    The reader is given only what the text says: `observe` is called with each action that is narrated, and
    `observe_answer` with each answer that stays in the text.
    """

    @abstractmethod
    def observe(self, action: Action) -> None:
        """Take in the outcome of the previous step, if it has one, and the narration of `action`."""

    def observe_answer(self, answer: int) -> None:  # noqa: B027 - many readers have nothing to learn from answers
        """Take in that choice `answer` was the last question's answer (inline feedback only)."""

    @abstractmethod
    def guess(self, name: str, question: Question) -> Distribution:
        """Return the belief of `name` ("ideal" or one of the game's shortcuts) over the question's choices."""


@dataclass(frozen=True)
class Rules(ABC):
    """The dynamics of a game, its text and its reader. Games derive from `nextstate.envs.game.Game`, which adds to it.

    Args:
        style: the wording of the text.
        feedback: what happens to a question: "branch" (it leaves no trace in the text), or "inline" (it stays in the
            text together with its answer).
    """

    name: ClassVar[str]
    size: ClassVar[str]
    sizes: ClassVar[range] = range(2, 9)
    shortcuts: ClassVar[tuple[str, ...]] = ()
    feedbacks: ClassVar[tuple[Feedback, ...]] = ("branch",)
    styles: ClassVar[tuple[str, ...]] = ("paper",)

    style: str = "paper"
    feedback: str = ""

    def __post_init__(self) -> None:
        require(self.style in self.styles, "style", self.style, f"one of {', '.join(self.styles)}")
        if not self.feedback:
            object.__setattr__(self, "feedback", self.feedbacks[0])
        require(self.feedback in self.feedbacks, "feedback", self.feedback, f"one of {', '.join(self.feedbacks)}")

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make this game again; JSON types only."""
        return asdict(self)

    @property
    def max_steps(self) -> int | None:
        """The longest episode that can be, None where there is no end."""
        return None

    @property
    @abstractmethod
    def max_choices(self) -> int:
        """The largest number of choices of any question."""

    @abstractmethod
    def initial(self, rng: np.random.Generator) -> State:
        """Draw the state an episode starts in."""

    @abstractmethod
    def actions(self, state: State) -> Sequence[Action]:
        """Return the legal actions, in a fixed order; empty only where the game has ended."""

    @abstractmethod
    def transition(self, state: State, action: Action) -> State:
        """Return the state after `action`; pure."""

    def policy(self, state: State, u: float) -> Action:
        """Turn a uniform draw `u` in [0, 1) into the game's own next action; by default each legal one alike."""
        legal = self.actions(state)
        return legal[split_uniform(u, len(legal))[0]]

    @abstractmethod
    def values(self, state: State) -> Mapping[str, str]:
        """Return the value of each variable that can change."""

    @abstractmethod
    def opening(self, state: State) -> str:
        """Return the words an episode from `state` begins with."""

    @abstractmethod
    def narrate(self, state: State, action: Action, next_state: State) -> str:
        """Return the words added when `action` is taken, before any question; never ones that give a question away."""

    def outcome(self, state: State, action: Action, next_state: State) -> str:
        """Return the words added after the questions of a step; "" where the narration has said it all."""
        return ""

    @abstractmethod
    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        """Return every question that can be asked after the step, in a fixed order."""

    def command(self, state: State, action: Action) -> str:
        """Return what a player types for `action`, different for each legal action; by default the narration."""
        return self.narrate(state, action, self.transition(state, action)).strip().rstrip(".")

    def step(self, state: State, u: float, v: float, ask: int) -> Step:
        """Take a step of its own: `u` draws the action, `v` the `ask` questions. Overrides may only be faster."""
        action = self.policy(state, u)
        after = self.transition(state, action)
        asked = self.questions(state, action, after)
        if len(asked) > ask:
            asked = (asked[int(v * len(asked))],) if ask == 1 else _draw(asked, ask, v)
        # Half the price of Step(...), and this line runs once for every step of every experiment.
        words = self.narrate(state, action, after)
        return tuple.__new__(Step, (state, action, after, words, asked, self.outcome(state, action, after)))

    def size_of(self, state: State) -> int | None:
        """Return |Q|, how many states an episode that starts in `state` can come to; None where it is not known."""
        return None

    def objective(self, state: State) -> str:
        """Return what a player who starts in `state` is told to do; "" where the game has no aim of its own."""
        return ""

    def points(self, state: State) -> int:
        """Return the score of a player who has come to `state`, where the game has an aim."""
        return 0

    def most_points(self, state: State) -> int:
        """Return the score of a player who reaches all there is to reach, where the game has an aim."""
        return 0

    def won(self, state: State) -> bool:
        """Tell whether the game's own aim is reached."""
        return False

    def walkthrough(self, state: State) -> tuple[Action, ...]:
        """Return actions that lead from a start to the game's own aim; () where it has none, or gives none."""
        return ()

    def reader(self, state: State) -> Reader:
        """Return a reader of an episode that starts in `state`, who knows of `state` only what the opening says.

        The default knows all of `state`, which is right where openings and narrations say everything.
        """
        return FullReader(self, state)


class FullReader(Reader):
    """The reader of a game whose opening and narrations say everything: it always knows the state."""

    def __init__(self, rules: Rules, state: State) -> None:
        self.rules, self.next_state = rules, state

    def observe(self, action: Action) -> None:
        self.state, self.action = self.next_state, action
        self.next_state = self.rules.transition(self.state, action)

    def guess(self, name: str, question: Question) -> Distribution:
        if name != "ideal":
            raise KeyError(name)
        known = self.rules.questions(self.state, self.action, self.next_state)
        accepted = next(q.accepted for q in known if q.variable == question.variable)
        return uniform(len(question.choices), accepted)


def _draw(asked: tuple[Question, ...], k: int, v: float) -> tuple[Question, ...]:
    left = list(asked)
    picked = []
    for _ in range(k):
        i, v = split_uniform(v, len(left))
        picked.append(left.pop(i))
    return tuple(picked)


def setting_names(cls: type[Rules]) -> tuple[str, ...]:
    """Return the names of a game's settings."""
    return tuple(f.name for f in fields(cls))
