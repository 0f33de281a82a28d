"""Games to check laws on: parameters come from the registry, so that a new game is checked from its first day."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from nextstate.envs import GAMES, Game, make_game

SMALL: dict[str, dict[str, object]] = {"TextWorld": {"games": 3}}  # what keeps a game quick to make
EXTRA = {"DFA": ({"kind": "state-state"},)}  # settings that change the words, beyond style and feedback


def variants(size: int) -> Iterator[Game]:
    """Yield every game in each of its wordings and ways of being asked, `size` large."""
    for name, cls in GAMES.items():
        for style, feedback, extra in product(cls.styles, cls.feedbacks, ({}, *EXTRA.get(name, ()))):
            yield make_game(name, **{cls.size: size}, style=style, feedback=feedback, **SMALL.get(name, {}), **extra)


def label(game: Game) -> str:
    extra = [str(game.settings[key]) for more in EXTRA.get(game.name, ()) for key in more]
    return "-".join([game.name, game.style, game.feedback, *extra])
