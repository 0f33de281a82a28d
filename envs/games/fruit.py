"""The fruit store ("Scaling Laws for State Dynamics", arXiv 2505.14892, text game)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple, final

import numpy as np

from nextstate.envs.contrast import Pair, Span, build_episode, draw_balanced, find_span, last, piece_of, roles
from nextstate.envs.game import (
    Action,
    Distribution,
    Episode,
    Feedback,
    Frequencies,
    Game,
    Question,
    Reader,
    Sample,
    State,
    Step,
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
PUBLISHED_NAMES = (
    "Dean", "Sarah", "Jack", "Kate", "Ryan", "Bob", "Jill", "Mary", "Peter", "Luke", "John",
    "Sean", "Elle", "Neil", "Tom", "Jerry", "Joan", "Blake", "Seth", "Beth", "Kelly",
)  # fmt: skip
PUBLISHED_FRUITS = (
    "apple", "pear", "peach", "grape", "mango", "banana", "kiwi", "orange", "lemon", "melon", "cherry",
    "plum", "fig", "apricot", "durian", "honeydew", "cantaloupe", "papaya", "persimmon", "lemon", "lime",
)  # fmt: skip
WORDS = {"default": (NAMES, FRUITS), "paper": (PUBLISHED_NAMES, PUBLISHED_FRUITS)}


class Clue(NamedTuple):
    """Somebody gets a fruit, from somebody else where `giver` is not None; places in the episode's own lists."""

    person: int
    fruit: int
    giver: int | None


class Store(NamedTuple):
    """Who is there, what there is (indices into the words), and for each person the place of their fruit or None."""

    people: tuple[int, ...]
    fruits: tuple[int, ...]
    has: tuple[int | None, ...]

    @property
    def waiting(self) -> list[int]:
        """The people without a fruit."""
        return [p for p, has in enumerate(self.has) if has is None]

    @property
    def free(self) -> list[int]:
        """The places of the fruits that nobody has."""
        taken = set(self.has)
        return [f for f in range(len(self.fruits)) if f not in taken]


@final
@dataclass(frozen=True)
class FruitStore(Game):
    """Each person gets a different fruit, one clue at a time; which fruit can a person without one still get?

    State: the fruit of each person. Each step is one clue, until one person is left. There is one question for each
    person without a fruit; every remaining fruit is accepted. There are two generators:

    - "default" (ours): random people and fruits. A clue draws a remaining person and fruit independently, and one of
      two wordings with equal probability; in one of them somebody gives the fruit, anybody but the person.
    - "paper": the distribution of the published prompts. The people and fruits are the first ones of fixed lists, and
      both lists are shuffled. A person always gets the fruit at their own place of the list, and giver is one of the
      others who are still without a fruit. The published list names lemon twice, so with 20 or 21 people it is listed
      twice; it is one choice then, accepted until two people have got it. The true answer is the person's own fruit.

    The default stays ours because in the published clues a person's fruit can be read from the lists alone. Published
    prompts ask about one random person, as here with `ask=1`, and the clues of one puzzle are prefixes of each other,
    as here those of one seed. Minimal pairs, which exchange fruits, exist for the default generator only.

    Ideal reader: sees all clues, so it is uniform over the remaining fruits, which are all accepted: determined. With
    `generator="paper"` it names the person's own fruit, which the lists give away.

    Lookup reader: uniform over the remaining fruits.

    Args:
        people: number of people and fruits, 2 to 21.
        generator: "default" or "paper", the distribution of stores and clues; see above.
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
    generator: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("people", self.people, 2, len(NAMES))
        require(self.generator in WORDS, "generator", self.generator, f"one of {', '.join(WORDS)}")

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
        n, paper = self.people, self.generator == "paper"
        people, fruits = (rng.permutation(n if paper else len(words))[:n].tolist() for words in WORDS[self.generator])
        return Store(tuple(people), tuple(fruits), (None,) * n)

    def actions(self, state: State) -> Sequence[Clue]:
        store = _store(state)
        waiting = store.waiting
        if len(waiting) <= 1:
            return ()
        givers: list[int | None] = [None, *(waiting if self.generator == "paper" else range(self.people))]
        return [Clue(p, f, g) for p in waiting for f in self._fruits_for(store, p) for g in givers if g != p]

    def _fruits_for(self, store: Store, person: int) -> Sequence[int]:
        return (person,) if self.generator == "paper" else store.free

    def transition(self, state: State, action: Action) -> Store:
        store, clue = _store(state), _clue(action)
        return store._replace(has=(*store.has[: clue.person], clue.fruit, *store.has[clue.person + 1 :]))

    def policy(self, state: State, u: float) -> Clue:
        store = _store(state)
        waiting = store.waiting
        i, u = split_uniform(u, len(waiting))
        person = waiting[i]
        fruits = self._fruits_for(store, person)
        j, u = split_uniform(u, len(fruits))
        given, u = split_uniform(u, 2)
        givers = [p for p in (waiting if self.generator == "paper" else range(self.people)) if p != person]
        k, _ = split_uniform(u, len(givers))
        return Clue(person, fruits[j], givers[k] if given else None)

    def values(self, state: State) -> Mapping[str, str]:
        store = _store(state)
        names, fruits = WORDS[self.generator]
        return {
            names[p]: "nothing" if has is None else fruits[store.fruits[has]]
            for p, has in zip(store.people, store.has, strict=True)
        }

    def opening(self, state: State) -> str:
        store = _store(state)
        names, fruits = WORDS[self.generator]
        return (
            f"{', '.join(names[p] for p in store.people)} walk into a fruit store. There are only {self.people} fruits "
            f"{', '.join(fruits[f] for f in store.fruits)}. Each person gets a different fruit."
        )

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        return f" {self._sentence(_store(state), _clue(action))}."

    def _sentence(self, store: Store, clue: Clue) -> str:
        names, fruits = WORDS[self.generator]
        name, fruit = names[store.people[clue.person]], fruits[store.fruits[clue.fruit]]
        if clue.giver is None:
            return f"{name} gets the {fruit}"
        return f"{names[store.people[clue.giver]]} gives {name} the {fruit}"

    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        return self._questions(_store(next_state), _store(next_state).waiting)

    def step(self, state: State, u: float, v: float, ask: int) -> Step:
        if ask > 1:
            return super().step(state, u, v, ask)
        action = self.policy(state, u)
        after = self.transition(state, action)
        waiting = after.waiting
        asked = self._questions(after, [waiting[int(v * len(waiting))]])  # only the question that is asked is made
        return tuple.__new__(Step, (state, action, after, self.narrate(state, action, after), asked, ""))

    def _questions(self, store: Store, people: Sequence[int]) -> tuple[Question, ...]:
        names, _ = WORDS[self.generator]
        choices, at = self._choices(store)
        accepted = tuple(sorted({at[f] for f in store.free}))
        return tuple(
            [
                Question(
                    names[store.people[p]],
                    f" {names[store.people[p]]} can have the",
                    choices,
                    at[p] if self.generator == "paper" else accepted[0],
                    accepted,
                )
                for p in people
            ]
        )

    def _choices(self, store: Store) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the different fruits as choices, and for each place of the list the index of its choice."""
        return _listed(self.generator, store.fruits)

    def command(self, state: State, action: Action) -> str:
        return self._sentence(_store(state), _clue(action))

    def reader(self, state: State) -> Reader:
        store = _store(state)
        choices, (names, _) = self._choices(store)[1], WORDS[self.generator]
        own = {names[p]: c for p, c in zip(store.people, choices, strict=True)} if self.generator == "paper" else {}
        return FruitReader(choices, own)

    def draw_pair(self, rng: np.random.Generator, kind: str, design: str, steps: int | None, distance: int) -> Pair:
        """Draw a pair in which one fruit is left, so that the answer is settled: `people - 1` steps.

        "state", "noop", "action": one clue names another fruit, so that this one is left: an earlier clue (followed by
        `distance` others), or the last one. "name": two fruits exchange their names, in the list and in the clue.
        Before the last step nothing is asked.
        """
        n = self.people
        require(
            self.generator == "default",
            "generator",
            self.generator,
            "default for minimal pairs, since a person's place in the list decides their fruit in published clues",
        )
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

    def __init__(self, choices: tuple[int, ...], own: Mapping[str, int]) -> None:
        self.choices, self.gone = choices, list[int]()  # for each place of the list its choice; the places taken
        self.frequencies = Frequencies(choices)
        self.own = own  # for each person the choice that is their own fruit, if the lists say it

    def observe(self, action: Action) -> None:
        self.gone.append(_clue(action).fruit)
        self.frequencies.add(self.choices[self.gone[-1]])

    def lookup(self, question: Question) -> Distribution:
        gone = set(self.gone)
        free = {c for f, c in enumerate(self.choices) if f not in gone}
        return uniform(len(question.choices), tuple(sorted(free)))

    def guess(self, name: str, question: Question) -> Distribution:
        n = len(question.choices)
        if name == "ideal":
            own = self.own.get(question.variable)
            return self.lookup(question) if own is None else one_hot(n, own)
        if name == "last_mention":
            return one_hot(n, self.choices[self.gone[-1]])
        if name == "most_frequent":
            return self.frequencies.belief(n)
        if name == "first_listed":
            return one_hot(n, 0)
        raise KeyError(name)


@lru_cache(maxsize=256)
def _listed(generator: str, places: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    _, fruits = WORDS[generator]
    listed = [f" {fruits[f]}" for f in places]
    choices = tuple(dict.fromkeys(listed))
    return choices, tuple([choices.index(fruit) for fruit in listed])


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
