"""Minimal pairs that are found by search, for games of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from corridor import Corridor
from hypothesis import given, settings
from hypothesis import strategies as st

from nextstate.envs import Automaton, Game, GameError, make_game
from nextstate.envs.contrast import differences, piece_of, problems, segments, shortcuts
from nextstate.envs.game import Action, State
from nextstate.envs.pairs import KINDS, search

# Games, and their shortcuts that are right on both sides of every pair.
SEARCHED: list[tuple[Game, tuple[str, ...]]] = [
    (make_game("Box", boxes=4), ("last_mention",)),
    (make_game("Box", boxes=5, objects=3, style="plain", feedback="inline"), ("last_mention",)),
    (make_game("FruitStore", people=4), ("first_listed",)),
    (Corridor(rooms=6), ()),
    (Automaton.explore(Corridor(rooms=6)), ()),
]


@settings(max_examples=60, deadline=None)
@given(which=st.sampled_from(SEARCHED), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32))
def test_a_pair_that_is_found_differs_in_what_its_kind_says(
    which: tuple[Game, tuple[str, ...]], kind: str, seed: int
) -> None:
    game, hopeless = which
    pair = search(game, np.random.default_rng(seed), kind, 3, hopeless)
    assert problems(pair) == ()
    assert all(value <= 0.5 for name, value in shortcuts(pair).items() if name not in hopeless)
    clean, corrupted = pair.sides
    same_start, steps = clean.start == corrupted.start, list(zip(clean.steps, corrupted.steps, strict=True))
    changed = [t for t, (one, other) in enumerate(steps) if one.action != other.action]
    narration = piece_of(clean, -1, "narration")
    found = differences(pair)
    if kind == "action":
        assert (same_start, changed) == (True, [2])
        assert {role.clean.piece for role in found} == {narration}
        assert pair.roles["action"] in found
    else:
        assert len(changed) + (not same_start) == 1
        assert 2 not in changed
        assert all(role.clean.piece < narration for role in found)
        assert pair.roles["state"] in found
    for i, side in enumerate(pair.sides):
        texts = segments(side)
        said = {name: texts[role[i].piece][role[i].start : role[i].end] for name, role in pair.roles.items()}
        assert said.get("match", pair.answers[i].strip()) == pair.answers[i].strip()
        assert said.get("distractor", pair.answers[1 - i].strip()) == pair.answers[1 - i].strip()
        assert "".join(texts) == side.prompt(len(side.steps) - 1)
    assert search(game, np.random.default_rng(seed), kind, 3, hopeless) == pair


class Eastward(Corridor):
    """A corridor whose own policy always goes east."""

    def policy(self, state: State, u: float) -> Action:
        return "east"


class Telling(Corridor):
    """A corridor whose last narration says what the state is, so that the text differs after the last action too."""

    def narrate(self, state: State, action: Action, next_state: State) -> str:
        return f" From room {self.values(state)['player']} {action}."


def test_neither_side_is_the_games_own() -> None:
    pairs = [search(Eastward(rooms=6), np.random.default_rng(seed), "action", 2) for seed in range(200)]
    east = [[side.steps[-1].action == "east" for side in pair.sides] for pair in pairs]
    assert all(sum(sides) == 1 for sides in east)
    assert 0.35 < np.mean(east, axis=0)[0] < 0.65


def test_starts_and_earlier_actions_are_changed() -> None:
    rng = np.random.default_rng(0)
    pairs = [search(Corridor(rooms=6), rng, "state", 3) for _ in range(100)]
    assert 0.1 < np.mean([p.clean.start != p.corrupted.start for p in pairs]) < 0.9


@pytest.mark.parametrize(
    ("game", "kind", "steps", "message"),
    [
        (make_game("Cycle"), "action", None, "all pairs found in 2,000 draws can be solved by a shortcut"),
        (make_game("Box"), "state", None, "draws can be solved by a shortcut"),
        (make_game("FruitStore"), "state", 4, "steps=4 is not possible: expected a whole number from 1 to 3"),
        (Telling(rooms=6), "state", None, "draws can be solved by a shortcut"),
        (Corridor(), "name", None, "kind='name' is not possible: expected one of state, action"),
        (Corridor(), "state", 0, "steps=0 is not possible"),
    ],
)
def test_where_there_is_no_pair(game: Game, kind: str, steps: int | None, message: str) -> None:
    with pytest.raises(GameError, match=message):
        search(game, np.random.default_rng(0), kind, steps)
