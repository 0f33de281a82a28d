"""The fruit store ("Scaling Laws for State Dynamics", arXiv 2505.14892, text game)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import numpy as np

from nextstate.envs.contrast import Pair, Span, build_episode, draw_balanced, find_span, last, piece_of, roles
from nextstate.envs.game import (
    Action,
    Distribution,
    Episode,
    Feedback,
    Game,
    Question,
    Reader,
    Sample,
    State,
    one_hot,
    require,
    require_whole,
    split_uniform,
    uniform,
)

NAMES = (
    "Jack", "Dean", "Sarah", "Mary", "John", "Tom", "Anna", "Paul", "Kate", "Mark", "Lucy",
    "Peter", "Jane", "Adam", "Emma", "Luke", "Alice", "Henry", "Grace", "Simon", "Rose",
)  # fmt: skip
FRUITS = (
    "peach", "pear", "apple", "lemon", "orange", "banana", "grape", "cherry", "mango", "plum", "lime",
    "melon", "fig", "kiwi", "olive", "berry", "coconut", "date", "papaya", "apricot", "pineapple",
)  # fmt: skip


class Clue(NamedTuple):
    """Somebody gets a fruit, from somebody else where `giver` is not None; indices into the episode's own lists."""

    person: int
    fruit: int
    giver: int | None


class Store(NamedTuple):
    """Who is there, what there is (indices into NAMES and FRUITS), and for each person their fruit or None."""

    people: tuple[int, ...]
    fruits: tuple[int, ...]
    has: tuple[int | None, ...]


@final
@dataclass(frozen=True)
class FruitStore(Game):
    """Each person gets a different fruit, one clue at a time; which fruit can a person without one still get?

    State: the fruit of each person. Each step is one clue, until one person is left; a clue draws a remaining person
    and fruit, and one of two wordings with equal probability. There is one question for each person without a fruit;
    every remaining fruit is accepted.

    Ideal reader: sees all clues, so it is uniform over the remaining fruits, which are all accepted: determined.

    Args:
        people: number of people and fruits, 2 to 21.
    """

    name: ClassVar[str] = "FruitStore"
    size: ClassVar[str] = "people"
    sizes: ClassVar[range] = range(2, 13)
    shortcuts: ClassVar[tuple[str, ...]] = ("last_mention", "most_frequent", "first_listed")
    feedbacks: ClassVar[tuple[Feedback, ...]] = ("branch", "inline")
    contrasts: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        ("state", "action", "name", "noop"), ("balanced",)
    )

    people: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("people", self.people, 2, len(NAMES))

    @classmethod
    def sample(cls, rng: np.random.Generator, size: int, level: int) -> Sample:
        return Sample(cls(people=size), int(rng.integers(1, size)), 2)

    @property
    def max_steps(self) -> int:
        return self.people - 1

    @property
    def max_choices(self) -> int:
        return self.people

    def initial(self, rng: np.random.Generator) -> Store:
        people = rng.permutation(len(NAMES))[: self.people].tolist()
        fruits = rng.permutation(len(FRUITS))[: self.people].tolist()
        return Store(tuple(people), tuple(fruits), (None,) * self.people)

    def actions(self, state: State) -> Sequence[Clue]:
        store = _store(state)
        if store.has.count(None) <= 1:
            return ()
        free = [f for f in range(self.people) if f not in store.has]
        givers: list[int | None] = [None, *range(self.people)]
        return [Clue(p, f, g) for p, has in enumerate(store.has) if has is None for f in free for g in givers if g != p]

    def transition(self, state: State, action: Action) -> Store:
        store, clue = _store(state), _clue(action)
        return store._replace(has=(*store.has[: clue.person], clue.fruit, *store.has[clue.person + 1 :]))

    def policy(self, state: State, u: float) -> Clue:
        store = _store(state)
        waiting = [p for p, has in enumerate(store.has) if has is None]
        free = [f for f in range(self.people) if f not in store.has]
        i, u = split_uniform(u, len(waiting))
        j, u = split_uniform(u, len(free))
        given, u = split_uniform(u, 2)
        k, _ = split_uniform(u, self.people - 1)
        return Clue(waiting[i], free[j], k + (k >= waiting[i]) if given else None)

    def values(self, state: State) -> Mapping[str, str]:
        store = _store(state)
        return {
            NAMES[p]: "nothing" if has is None else FRUITS[store.fruits[has]]
            for p, has in zip(store.people, store.has, strict=True)
        }

    def opening(self, state: State) -> str:
        store = _store(state)
        return (
            f"{', '.join(NAMES[p] for p in store.people)} walk into a fruit store. There are only {self.people} fruits "
            f"{', '.join(FRUITS[f] for f in store.fruits)}. Each person gets a different fruit."
        )

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        return f" {self._sentence(_store(state), _clue(action))}."

    def _sentence(self, store: Store, clue: Clue) -> str:
        name, fruit = NAMES[store.people[clue.person]], FRUITS[store.fruits[clue.fruit]]
        if clue.giver is None:
            return f"{name} gets the {fruit}"
        return f"{NAMES[store.people[clue.giver]]} gives {name} the {fruit}"

    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        store = _store(next_state)
        choices = tuple([f" {FRUITS[f]}" for f in store.fruits])
        free = tuple([f for f in range(self.people) if f not in store.has])
        return tuple(
            [
                Question(NAMES[p], f" {NAMES[p]} can have the", choices, free[0], free)
                for p, has in zip(store.people, store.has, strict=True)
                if has is None
            ]
        )

    def command(self, state: State, action: Action) -> str:
        return self._sentence(_store(state), _clue(action))

    def reader(self, state: State) -> Reader:
        return FruitReader(self.people)

    def draw_pair(self, rng: np.random.Generator, kind: str, design: str, steps: int | None, distance: int) -> Pair:
        """Draw a pair in which one fruit is left, so that the answer is settled: `people - 1` steps.

        "state", "noop", "action": one clue names another fruit, so that this one is left: an earlier clue (followed by
        `distance` others), or the last one. "name": two fruits exchange their names, in the list and in the clue.
        Before the last step nothing is asked.
        """
        n = self.people
        require_whole("people", n, 3 if kind in ("state", "noop") else 2, len(NAMES))
        require(steps in (None, n - 1), "steps", steps, f"{n - 1}, since one fruit must be left among {n} people")
        if kind == "noop":
            require_whole("distance", distance, 1, n - 2)

        def draw() -> Pair:
            start = self.initial(rng)
            who, what = rng.permutation(n).tolist(), rng.permutation(n).tolist()
            clues = [Clue(p, f, _giver(rng, p, n)) for p, f in zip(who[:-1], what[:-1], strict=True)]
            low, high = {"state": (0, n - 2), "name": (0, n - 1), "action": (n - 2, n - 1)}.get(
                kind, (n - 2 - distance, n - 1 - distance)
            )
            at = int(rng.integers(low, high))
            twin, others = start, [*clues[:at], clues[at]._replace(fruit=what[-1]), *clues[at + 1 :]]
            if kind == "name":
                order = list(start.fruits)
                order[what[at]], order[what[-1]] = order[what[-1]], order[what[at]]
                twin, others = start._replace(fruits=tuple(order)), clues
            seed, asked = int(rng.integers(2**31)), NAMES[start.people[who[-1]]]
            clean, corrupted = (
                build_episode(self, start, clues, asked, seed),
                build_episode(self, twin, others, asked, seed),
            )
            places = []
            for side, other in ((clean, corrupted), (corrupted, clean)):
                spans = {
                    "action": _given(side, -1),
                    "match": find_span(side, 0, side.steps[-1].questions[0].answer),
                    "distractor": find_span(side, 0, other.steps[-1].questions[0].answer),
                    "subject": find_span(side, piece_of(side, -1, "stem"), asked),
                    "last": last(side),
                }
                places.append(spans if kind == "action" else {"state": _given(side, at), **spans})
            return Pair(kind, design, clean, corrupted, roles(*places))

        return draw_balanced(
            draw, ("first_listed",) if kind == "name" else ()
        )  # or the first would never be the answer


class FruitReader(Reader):
    """Remembers which fruits have been taken."""

    def __init__(self, people: int) -> None:
        self.n, self.gone = people, list[int]()

    def observe(self, action: Action) -> None:
        self.gone.append(_clue(action).fruit)

    def guess(self, name: str, question: Question) -> Distribution:
        if name == "ideal":
            return uniform(self.n, tuple(f for f in range(self.n) if f not in self.gone))
        if name == "last_mention":
            return one_hot(self.n, self.gone[-1])
        if name == "most_frequent":  # each fruit was listed once, the gone ones named once more
            counts = Counter(self.gone)
            return uniform(self.n, tuple(sorted(counts)))
        if name == "first_listed":
            return one_hot(self.n, 0)
        raise KeyError(name)


def _giver(rng: np.random.Generator, person: int, n: int) -> int | None:
    k = int(rng.integers(2 * (n - 1)))  # evenly somebody else, or nobody
    return None if k >= n - 1 else k + (k >= person)


def _given(episode: Episode, step: int) -> Span:
    store, clue = _store(episode.start), _clue(episode.steps[step].action)
    return find_span(episode, piece_of(episode, step, "narration"), FRUITS[store.fruits[clue.fruit]])


def _store(state: State) -> Store:
    assert isinstance(state, Store)
    return state


def _clue(action: Action) -> Clue:
    assert isinstance(action, Clue)
    return action
