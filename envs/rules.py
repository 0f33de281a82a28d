"""The rules of a game: states, actions, transitions, the text that describes them, and the reader of that text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

State = Hashable
Action = Hashable
Feedback = Literal["inline", "branch"]
Distribution = tuple[float, ...]
CERTAIN = 1e-9  # the largest probability of an error that counts as none


class GameError(ValueError):
    """A setting or argument is not possible; the message names the argument, its value and the legal range."""


def require(legal: bool, name: str, value: object, expected: str) -> None:
    """Raise `GameError` unless `legal`.

    >>> require(False, "boxes", 1, "a whole number from 2 to 26")
    Traceback (most recent call last):
    nextstate.envs.rules.GameError: boxes=1 is not possible: expected a whole number from 2 to 26
    """
    if not legal:
        raise GameError(f"{name}={value!r} is not possible: expected {expected}")


def require_whole(name: str, value: object, low: int, high: int) -> None:
    """Raise `GameError` unless `value` is an int (not a bool or float) with low <= value <= high."""
    ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(ok, name, value, f"a whole number from {low} to {high}")


def split_uniform(u: float, n: int) -> tuple[int, float]:
    """Split a uniform draw `u` in [0, 1) into a uniform index below `n` and a remainder that is uniform in [0, 1).

    One float per step therefore determines the whole step, so that single, vector and replayed episodes are identical.
    """
    scaled = u * n  # below n even after rounding: n * 2**-53 exceeds half the spacing of floats there
    index = int(scaled)
    return index, scaled - index


@lru_cache(maxsize=4096)
def one_hot(n: int, index: int) -> Distribution:
    """Return the distribution over `n` choices with probability 1 at `index`."""
    return tuple(float(i == index) for i in range(n))


@lru_cache(maxsize=4096)
def uniform(n: int, support: tuple[int, ...] | None = None) -> Distribution:
    """Return the uniform distribution over `support` (all `n` choices by default)."""
    chosen = range(n) if support is None else support
    return tuple(1 / len(chosen) if i in chosen else 0.0 for i in range(n))


class Frequencies:
    """How often things were named, with the most frequent ones at hand."""

    def __init__(self, named: Iterable[int]) -> None:
        self._counts: dict[int, int] = {}
        self._top, self._most = 0, list[int]()
        for one in named:
            self.add(one)

    def add(self, one: int) -> None:
        """Count another mention."""
        count = self._counts[one] = self._counts.get(one, 0) + 1
        if count > self._top:
            self._top, self._most = count, [one]
        elif count == self._top:
            self._most.append(one)

    def belief(self, n: int) -> Distribution:
        """Return the uniform distribution over the most frequent of `n` things."""
        most = self._most
        return one_hot(n, most[0]) if len(most) == 1 else uniform(n, tuple(sorted(most)))


class Question(NamedTuple):
    """A cloze question about one variable of the next state: transcript + stem is the prompt, a choice the answer."""

    variable: str
    stem: str
    choices: tuple[str, ...]  # continuations of the stem, including the leading space
    truth: int  # index of the true answer
    accepted: tuple[int, ...]  # indices of all answers that count as right
    closing: str = "."  # what follows the answer in a transcript that keeps it

    @property
    def answer(self) -> str:
        """The true answer, without its leading space."""
        return self.choices[self.truth].strip()

    @property
    def chance(self) -> float:
        """The expected accuracy of a uniform guess among the choices."""
        return len(self.accepted) / len(self.choices)

    def accepts(self, answer: str) -> bool:
        """Return whether `answer` is right; surrounding white space is ignored."""
        return any(answer.strip() == self.choices[i].strip() for i in self.accepted)


class Step(NamedTuple):
    """One transition with its text and questions; questions are asked after the narration, before the outcome."""

    state: State
    action: Action
    next_state: State
    narration: str
    questions: tuple[Question, ...]
    outcome: str = ""


@lru_cache(maxsize=65536)
def expected_accuracy(belief: Distribution, accepted: tuple[int, ...]) -> float:
    """Return the expected accuracy of answering with the most probable choice, with ties broken uniformly."""
    top = max(belief)
    best = [i for i, p in enumerate(belief) if p >= top - 1e-12]
    return sum(i in accepted for i in best) / len(best)


def own_accuracy(belief: Distribution, accepted: tuple[int, ...]) -> float:
    """Return the accuracy that a reader with this belief expects of its most probable choice.

    That is the largest probability, whichever choice is right. Of several accepted answers, a belief is even over those
    that may be right; their share is the accuracy.

    >>> own_accuracy((0.75, 0.25), (1,)), own_accuracy((0.5, 0.5, 0.0), (0, 1))
    (0.75, 1.0)
    """
    if len(accepted) > 1:
        return expected_accuracy(belief, accepted)
    top = max(belief)
    return top if top < 1 - CERTAIN else 1.0


class Reader(ABC):
    """The beliefs of readers that see the transcript only: the ideal reader, the lookup reader, and shortcuts.

    The ideal reader knows the rules and how episodes are drawn, and answers by Bayes' rule; no reader is right more
    often on average. (Games whose ideal reader falls short of this say so.) The lookup reader answers what the text
    settles and guesses evenly elsewhere.

    The reader gets only what the text contains: `observe` is called with each narrated action, and `observe_answer`
    with each answer that stays in the transcript.
    """

    @abstractmethod
    def observe(self, action: Action) -> None:
        """Update the beliefs by the outcome of the previous step, if it has one, and by the narration of `action`."""

    def observe_answer(self, answer: int) -> None:  # noqa: B027 - many readers learn nothing from answers
        """Update the beliefs by the index of the last question's answer (inline feedback only)."""

    @abstractmethod
    def guess(self, name: str, question: Question) -> Distribution:
        """Return the distribution over the question's choices of `name`, "ideal" or one of the game's shortcuts."""

    def lookup(self, question: Question) -> Distribution:
        """Return the distribution of the lookup reader: the answer that the text settles, else even over the others.

        By default that of the ideal reader, which is right where no knowledge of how episodes are drawn helps.
        """
        return self.guess("ideal", question)

    def ceiling(self, question: Question) -> float:
        """Return the probability, given the text, that the ideal reader's answer is accepted.

        By default `own_accuracy` of its belief, which is right where the text says how many answers are accepted.
        """
        return own_accuracy(self.guess("ideal", question), question.accepted)


@dataclass(frozen=True)
class Rules(ABC):
    """The dynamics, text and reader of a game. Games derive from its subclass `nextstate.envs.game.Game`.

    Args:
        style: the wording of the text.
        feedback: "branch" (questions do not appear in the transcript) or "inline" (questions and their answers stay in
            the transcript).
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
        """The arguments that recreate this game, as JSON types."""
        return asdict(self)

    @property
    def ideal_is_bayes(self) -> bool:
        """Whether the ideal reader follows Bayes' rule exactly; if not, a better reader may exceed the ceiling."""
        return True

    @property
    def max_steps(self) -> int | None:
        """The maximum number of steps in an episode, None if there is no limit."""
        return None

    @property
    @abstractmethod
    def max_choices(self) -> int:
        """The largest number of choices of any question."""

    @abstractmethod
    def initial(self, rng: np.random.Generator) -> State:
        """Draw the initial state of an episode."""

    @abstractmethod
    def actions(self, state: State) -> Sequence[Action]:
        """Return the legal actions in a fixed order; empty only if the game has ended."""

    @abstractmethod
    def transition(self, state: State, action: Action) -> State:
        """Return the state after `action`. Must be a pure function."""

    def policy(self, state: State, u: float) -> Action:
        """Map a uniform draw `u` in [0, 1) to the next action; by default all legal actions are equally likely."""
        legal = self.actions(state)
        return legal[split_uniform(u, len(legal))[0]]

    @abstractmethod
    def values(self, state: State) -> Mapping[str, str]:
        """Return the value of each variable that can change."""

    @abstractmethod
    def opening(self, state: State) -> str:
        """Return the text with which an episode from `state` begins."""

    @abstractmethod
    def narrate(self, state: State, action: Action, next_state: State) -> str:
        """Return the text of `action`, which precedes the questions and must not reveal their answers."""

    def outcome(self, state: State, action: Action, next_state: State) -> str:
        """Return the text that follows the questions of a step; "" if the narration is all."""
        return ""

    @abstractmethod
    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        """Return all questions that can be asked about the step, in a fixed order."""

    def command(self, state: State, action: Action) -> str:
        """Return the text that a player types for `action`, distinct for each legal action; default: the narration."""
        return self.narrate(state, action, self.transition(state, action)).strip().rstrip(".")

    def step(self, state: State, u: float, v: float, ask: int) -> Step:
        """Take a step by the policy: `u` draws the action, `v` the `ask` questions. Overrides must return the same."""
        action = self.policy(state, u)
        after = self.transition(state, action)
        asked = self.questions(state, action, after)
        if len(asked) > ask:
            asked = (asked[int(v * len(asked))],) if ask == 1 else _draw(asked, ask, v)
        # Twice as fast as Step(...), and this line runs once for each step of each experiment.
        words = self.narrate(state, action, after)
        return tuple.__new__(Step, (state, action, after, words, asked, self.outcome(state, action, after)))

    def size_of(self, state: State) -> int | None:
        """Return |Q|, the number of states reachable from `state`; None if it is not known."""
        return None

    def objective(self, state: State) -> str:
        """Return the objective of a player who starts in `state`; "" if the game does not define one."""
        return ""

    def points(self, state: State) -> int:
        """Return the score of a player who has reached `state`, for games with an objective."""
        return 0

    def most_points(self, state: State) -> int:
        """Return the maximum score of a player who starts in `state`, for games with an objective."""
        return 0

    def won(self, state: State) -> bool:
        """Return whether the game's objective is reached."""
        return False

    def walkthrough(self, state: State) -> tuple[Action, ...]:
        """Return actions that lead from `state` to the game's objective; () if the game has or provides none."""
        return ()

    def reader(self, state: State) -> Reader:
        """Return a reader for an episode that starts in `state`; it may use only what the opening says about `state`.

        The default reader uses `state` itself, which is right if openings and narrations determine the state.
        """
        return FullReader(self, state)


class FullReader(Reader):
    """The reader for games whose opening and narrations determine the state: it always knows the state."""

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
