"""What a game is: states, actions and transitions, their words, and what a reader of those words can know."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from nextstate.envs.contrast import Pair

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
    nextstate.envs.game.GameError: boxes=1 is not possible: expected a whole number from 2 to 26
    """
    if not legal:
        raise GameError(f"{name}={value!r} is not possible: expected {expected}")


def require_whole(name: str, value: object, low: int, high: int) -> None:
    """Raise `GameError` unless `value` is an int (no bool, no float) within `low` and `high`, both included."""
    ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(ok, name, value, f"a whole number from {low} to {high}")


def split(u: float, n: int) -> tuple[int, float]:
    """Cut a uniform draw `u` in [0, 1) into a uniform index below `n` and what is left of `u`, again uniform.

    One float a step thus decides everything about the step, so that single, vector and replayed episodes draw alike.
    """
    scaled = u * n  # less than n also when rounded: n * 2**-53 is more than half of what lies between floats there
    index = int(scaled)
    return index, scaled - index


@lru_cache(maxsize=4096)
def point(n: int, index: int) -> Distribution:
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
def score(belief: Distribution, accepted: tuple[int, ...]) -> float:
    """Return the expected accuracy of answering with the likeliest choice, ties broken evenly."""
    top = max(belief)
    best = [i for i, p in enumerate(belief) if p >= top - 1e-12]
    return sum(i in accepted for i in best) / len(best)


class Reader(ABC):
    """What somebody who knows the game's rules remembers of a transcript, and what they would answer from it.

    A reader is told only what the words tell: `hear` a narration, `learn` an answer that stays in the transcript.
    """

    @abstractmethod
    def hear(self, action: Action) -> None:
        """Take in the outcome of the step before, where it has one, and the narration of `action`."""

    def learn(self, answer: int) -> None:  # noqa: B027 - some have nothing to learn
        """Take in that the last question's answer was choice `answer` (inline feedback only)."""

    @abstractmethod
    def guess(self, name: str, question: Question) -> Distribution:
        """Return the belief of `name` ("ideal" or one of the game's shortcuts) over the question's choices."""


@dataclass(frozen=True)
class Game(ABC):
    """A deterministic finite-state system with words. The dataclass fields of a leaf class are its settings.

    A state holds what the episode drew once (an automaton, a list of names) and what changes. Leaf classes are final.
    The "Args" of their docstrings say what each setting means; `nextstate list games` shows them.

    Args:
        style: the words that the game is told in.
        feedback: what becomes of a question: "branch" (it leaves no trace), or "inline" (it stays in the story,
            answered).
    """

    name: ClassVar[str]
    size: ClassVar[str]  # the setting that says how large the state space is; the y axis of the report's heatmaps
    shortcuts: ClassVar[tuple[str, ...]]
    feedbacks: ClassVar[tuple[Feedback, ...]]  # the ways in which it can be asked, the natural one first
    styles: ClassVar[tuple[str, ...]] = ("paper",)
    contrasts: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # each kind of minimal pair, and its designs

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
        return legal[split(u, len(legal))[0]]

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

    @abstractmethod
    def command(self, state: State, action: Action) -> str:
        """Return what a player types for `action`; different for each legal action of a state."""

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

    @abstractmethod
    def reader(self, state: State) -> Reader:
        """Return a reader who has read the opening of `state`, and knows of `state` only what that tells."""

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
            rng: where to draw from.
            kind: "state", "action", "name" or "noop"; `contrasts` says which there are.
            design: "balanced" (answers always differ and are settled, no shortcut tells the sides apart where that is
                possible) or "paper" (the published ones, weaknesses included).
            steps: length of both episodes, the queried step included; by default what suits the game.
            distance: of a noop pair, the number of steps in between that change nothing about the answer; by default
                5, or as many as fit.

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
        """Draw what `contrast` has found to be one of the game's `contrasts`."""
        raise NotImplementedError(f"{self.name} names contrasts and draws none")


@dataclass(frozen=True)
class Episode:
    """An opening and its steps: the typed record between whatever plays and whatever measures."""

    game: Game
    seed: int
    start: State
    opening: str
    steps: tuple[Step, ...]

    @property
    def told(self) -> tuple[str, ...]:
        """The words each step adds to the transcript for good: narration, inline questions with answers, outcome."""
        if self.game.feedback == "branch":
            return tuple([s.narration + s.outcome for s in self.steps])
        told = []
        for _, _, _, words, asked, outcome in self.steps:
            for _, stem, choices, truth, _, closing in asked:
                words = f"{words}{stem}{choices[truth]}{closing}"
            told.append(words + outcome)
        return tuple(told)

    @property
    def transcripts(self) -> tuple[str, ...]:
        """The transcript before each step, and at last the whole one; T + 1 strings."""
        return tuple(accumulate(self.told, initial=self.opening))

    def prompt(self, step: int, question: int = 0) -> str:
        """Return the text that ends where the answer to that question belongs (both counted from 0)."""
        now = self.steps[step]
        asked = now.questions[: question + 1]
        head = self.opening + "".join(self.told[:step]) + now.narration
        if self.game.feedback == "inline":
            head += "".join(q.stem + q.choices[q.truth] + q.closing for q in asked[:-1])
        return head + asked[-1].stem

    def beliefs(self, name: str) -> list[list[Distribution]]:
        """Return what `name` ("ideal", "chance" or a shortcut) believes, for each step and question."""
        if name == "chance":
            return [[uniform(len(q.choices)) for q in step.questions] for step in self.steps]
        reader = self.game.reader(self.start)
        hear, guess, learn = reader.hear, reader.guess, reader.learn
        inline = self.game.feedback == "inline"
        out: list[list[Distribution]] = []
        for _, action, _, _, asked, _ in self.steps:
            hear(action)
            if not inline:
                out.append([guess(name, question) for question in asked])
                continue
            row: list[Distribution] = []
            for question in asked:
                row.append(guess(name, question))
                learn(question.truth)
            out.append(row)
        return out


def check_steps(game: Game, steps: int) -> None:
    """Raise `GameError` where an episode of `steps` steps cannot be."""
    require_whole("steps", steps, 1, game.max_steps or 1_000_000)


def unroll(
    game: Game, seed: int, steps: int, ask: int | Literal["all"] = 1, rng: np.random.Generator | None = None
) -> Episode:
    """Play one whole episode by the game's own policy.

    Args:
        game: what is played.
        seed: decides everything, on every machine; kept as the episode's name.
        steps: number of transitions.
        ask: questions after each step, drawn evenly without replacement from `game.questions`, or "all" of them.
        rng: where to draw from; by default a fresh generator of `seed`, the one `gym.Env.reset(seed=seed)` makes.
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


def _draw(asked: tuple[Question, ...], k: int, v: float) -> tuple[Question, ...]:
    left = list(asked)
    picked = []
    for _ in range(k):
        i, v = split(v, len(left))
        picked.append(left.pop(i))
    return tuple(picked)


def setting_names(cls: type[Game]) -> tuple[str, ...]:
    """Return the names of a game's settings."""
    return tuple(f.name for f in fields(cls))
