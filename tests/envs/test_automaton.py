"""Exact sizes, and the promise that an automaton is the game it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, factorial
from typing import ClassVar

import numpy as np
import pytest

from nextstate.envs import Automaton, Game, GameError, Question, Reader, make_game, unroll
from nextstate.envs.game import Action, Feedback, State


@pytest.mark.parametrize(("boxes", "objects"), [(2, 1), (2, 5), (3, 4), (4, 4), (5, 2)])
def test_box(boxes: int, objects: int) -> None:
    automaton = Automaton.explore(make_game("Box", boxes=boxes, objects=objects))
    assert automaton.n_states == boxes**objects
    assert automaton.n_transitions == boxes**objects * objects * (boxes - 1)
    assert automaton.diameter == objects  # each object moves once
    assert automaton.minimal().n_states == automaton.n_states


@pytest.mark.parametrize("period", [2, 7, 26])
def test_cycle(period: int) -> None:
    automaton = Automaton.explore(make_game("Cycle", period=period))
    assert (automaton.n_states, automaton.n_transitions, automaton.diameter) == (period, period, period - 1)
    assert automaton.minimal().n_states == period


@pytest.mark.parametrize("people", [2, 3, 4])
def test_fruit_store(people: int) -> None:
    automaton = Automaton.explore(make_game("FruitStore", people=people))
    given = [comb(people, k) ** 2 * factorial(k) for k in range(people)]  # states with k fruits given
    assert automaton.n_states == sum(given)
    # A clue takes one of those left, one of the fruits left, and one of `people` wordings: nobody, or any other, gives.
    assert automaton.n_transitions == sum(n * (people - k) ** 2 * people for k, n in enumerate(given[:-1]))
    assert automaton.diameter == people - 1


@pytest.mark.parametrize("density", ["min", "middle", "max"])
def test_dfa(density: str) -> None:
    game = make_game("DFA", states=9, density=density)
    for seed in range(10):
        automaton = Automaton.explore(game, seed=seed)
        machine = game.initial(np.random.default_rng(seed)).machine
        assert automaton.n_states <= 9
        assert automaton.n_transitions == sum(len(machine.table[place.at]) for place in automaton.states)
        assert automaton.minimal().n_states == automaton.n_states  # the values name the state


def test_known_numbers() -> None:
    """Pin a few, so that a change of rules or draws is seen."""
    found = {
        name: (a.n_states, a.n_transitions, a.diameter)
        for name in ("Box", "DFA", "Cycle", "FruitStore")
        for a in [Automaton.explore(make_game(name))]
    }
    assert found == {"Box": (256, 3072, 4), "DFA": (4, 5, 3), "Cycle": (4, 4, 3), "FruitStore": (185, 1792, 3)}


def test_an_automaton_is_its_game(small: Game) -> None:
    automaton = Automaton.explore(small, seed=5)
    steps = min(6, small.max_steps or 6)
    mine, theirs = unroll(automaton, 5, steps), unroll(small, 5, steps)
    assert mine.texts == theirs.texts
    assert mine.transcripts == theirs.transcripts
    assert [s.questions for s in mine.steps] == [s.questions for s in theirs.steps]
    assert [automaton.states[s.next_state] for s in mine.steps] == [s.next_state for s in theirs.steps]
    for name in ("ideal", "chance", *small.shortcuts):
        assert mine.beliefs(name) == theirs.beliefs(name)
    assert automaton.max_choices == small.max_choices
    assert automaton.settings == {"game": small.name, **small.settings}
    assert automaton.command(0, automaton.actions(0)[0]) == small.command(theirs.start, small.actions(theirs.start)[0])


def test_start_can_be_given() -> None:
    game = make_game("Box", boxes=2, objects=2)
    assert Automaton.explore(game, start=(1, 0)).states[0] == (1, 0)


def test_episodes_start_where_the_game_draws_if_that_can_be_reached() -> None:
    game = make_game("Box")
    automaton = Automaton.explore(game)
    for seed in range(20):
        assert unroll(automaton, seed, 10).texts == unroll(game, seed, 10).texts
    drawn_anew = make_game("DFA", states=8)
    automaton = Automaton.explore(drawn_anew, seed=3)
    assert all(unroll(automaton, seed, 5).start == 0 for seed in range(20))


def test_too_many_states_says_what_to_do() -> None:
    with pytest.raises(GameError, match=r"max_states=100 is too small for Box.*Raise max_states"):
        Automaton.explore(make_game("Box", boxes=5), max_states=100)
    assert Automaton.explore(make_game("Box", boxes=2, objects=3), max_states=8).n_states == 8
    with pytest.raises(GameError, match=r"max_states=7 "):
        Automaton.explore(make_game("Box", boxes=2, objects=3), max_states=7)
    with pytest.raises(GameError, match=r"max_states=0 is not possible"):
        Automaton.explore(make_game("Box"), max_states=0)
    with pytest.raises(GameError, match=r"Automaton\.explore"):
        Automaton()


@dataclass(frozen=True)
class Counter(Game):
    """Counts to six and over again, and shows only whether it is even: a game whose states are more than needed."""

    name: ClassVar[str] = "Counter"
    size: ClassVar[str] = "n"
    shortcuts: ClassVar[tuple[str, ...]] = ()
    feedbacks: ClassVar[tuple[Feedback, ...]] = ("inline",)

    n: int = 6
    jump_at: int | None = None  # where there is a second command

    max_choices: ClassVar[int] = 2  # type: ignore[misc]

    def initial(self, rng: np.random.Generator) -> int:
        return 0

    def actions(self, state: State) -> Sequence[Action]:
        return ("count", "jump") if state == self.jump_at else ("count",)

    def transition(self, state: State, action: Action) -> State:
        return 0 if action == "jump" else (state + 1) % self.n

    def values(self, state: State) -> Mapping[str, str]:
        return {"even": str(state % 2 == 0)}

    def opening(self, state: State) -> str:
        return ""

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        return ""

    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        return ()

    def command(self, state: State, action: Action) -> str:
        return str(action)

    def reader(self, state: State) -> Reader:
        raise NotImplementedError


def test_minimal_automaton_merges_what_no_future_tells_apart() -> None:
    automaton = Automaton.explore(Counter())
    assert automaton.n_states == 6
    assert automaton.classes == (0, 1, 0, 1, 0, 1)
    minimal = automaton.minimal()
    assert (minimal.n_states, minimal.targets, minimal.diameter) == (2, ((1,), (0,)), 1)
    assert minimal.minimal().n_states == 2
    # Where one state has one more command, counting towards it tells all of them apart; an odd cycle does too.
    assert Automaton.explore(Counter(jump_at=4)).minimal().n_states == 6
    assert Automaton.explore(Counter(n=5)).minimal().n_states == 5


def test_minimal_automaton_shows_the_same_futures() -> None:
    automaton = Automaton.explore(Counter(n=8))
    minimal = automaton.minimal()
    a = b = 0
    for _ in range(20):
        a, b = automaton.transition(a, "count"), minimal.transition(b, "count")
        assert automaton.values(a) == minimal.values(b)
