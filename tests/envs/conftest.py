"""Fixtures that go through every game."""

from __future__ import annotations

import pytest
from every_game import label, variants

from nextstate.envs import GAMES, Game


@pytest.fixture(params=list(variants(3)), ids=label)
def small(request: pytest.FixtureRequest) -> Game:
    """Each game small enough to walk through all of it."""
    return request.param


@pytest.fixture(params=list(variants(5)), ids=label)
def game(request: pytest.FixtureRequest) -> Game:
    """Each game at a middling size."""
    return request.param


@pytest.fixture(params=list(GAMES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param
