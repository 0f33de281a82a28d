"""A small game with an aim of its own: a corridor with two treasures, and a pit at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import numpy as np

from nextstate.envs.game import Action, Distribution, Feedback, Game, Question, Reader, State, one_hot

TREASURES = (1, 3)  # the rooms where they lie


class Walk(NamedTuple):
    """Where the player is, and which treasures they have."""

    at: int
    has: tuple[bool, ...]


@final
@dataclass(frozen=True)
class Corridor(Game):
    """Walk east and west and take both treasures; east of the last room is a pit."""

    name: ClassVar[str] = "Corridor"
    size: ClassVar[str] = "rooms"
    shortcuts: ClassVar[tuple[str, ...]] = ()
    feedbacks: ClassVar[tuple[Feedback, ...]] = ("branch",)

    rooms: int = 5
    helpful: bool = False  # gives a walkthrough of its own, a detour

    @property
    def max_choices(self) -> int:
        return self.rooms + 1

    def initial(self, rng: np.random.Generator) -> Walk:
        return Walk(int(rng.integers(self.rooms)), (False, False))

    def actions(self, state: State) -> Sequence[str]:
        walk = _walk(state)
        if all(walk.has) or walk.at == self.rooms:
            return ()
        here = [not has for room, has in zip(TREASURES, walk.has, strict=True) if room == walk.at]
        return ["east", *(["west"] if walk.at else []), *(["take"] if any(here) else [])]

    def transition(self, state: State, action: Action) -> Walk:
        at, has = _walk(state)
        if action == "take":
            return Walk(at, tuple([h or room == at for room, h in zip(TREASURES, has, strict=True)]))
        return Walk(at + (1 if action == "east" else -1), has)

    def values(self, state: State) -> Mapping[str, str]:
        return {"player": _room(_walk(state).at)}

    def opening(self, state: State) -> str:
        return f"You are in room {_room(_walk(state).at)}."

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        return f"\n\n> {self.command(state, action)}\n"

    def outcome(self, state: State, action: Action, next_state: State) -> str:
        return f"You are in room {_room(_walk(next_state).at)}."

    def questions(self, state: State, action: Action, next_state: State) -> tuple[Question, ...]:
        at = _walk(next_state).at
        return (Question("player", "You are in room", tuple(f" {_room(i)}" for i in range(self.rooms + 1)), at, (at,)),)

    def command(self, state: State, action: Action) -> str:
        return "take treasure" if action == "take" else f"go {action}"

    def reader(self, state: State) -> Reader:
        return Knows(self, _walk(state))

    def objective(self, state: State) -> str:
        return "Take both treasures."

    def points(self, state: State) -> int:
        return sum(_walk(state).has)

    def most_points(self, state: State) -> int:
        return len(TREASURES)

    def won(self, state: State) -> bool:
        return all(_walk(state).has)

    def walkthrough(self, state: State) -> tuple[str, ...]:
        if not self.helpful:
            return ()
        home = ["west"] * _walk(state).at
        return (*home, "east", "take", "east", "east", "take")


class Knows(Reader):
    """Knows all."""

    def __init__(self, game: Corridor, state: Walk) -> None:
        self.game, self.state = game, state

    def observe(self, action: Action) -> None:
        self.state = self.game.transition(self.state, action)

    def guess(self, name: str, question: Question) -> Distribution:
        return one_hot(len(question.choices), self.state.at)


def _walk(state: State) -> Walk:
    assert isinstance(state, Walk)
    return state


def _room(at: int) -> str:
    return "ABCDEFGHIJ"[at]


def register(monkeypatch: Any) -> type[Game]:
    """Put the corridor into the registry for the time of a test."""
    from nextstate.envs.games import GAMES

    monkeypatch.setitem(GAMES, Corridor.name, Corridor)
    return Corridor
