"""Games to check laws on: parameters come from the registry, so that a new game is checked from its first day."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from nextstate.envs import GAMES, Game, make_game

SMALL: dict[str, dict[str, object]] = {"TextWorld": {"games": 3}}  # what keeps a game quick to make
EXTRA = {  # settings that change the words or what is drawn, beyond style and feedback
    "DFA": ({"kind": "state-state"}, {"generator": "paper"}, {"generator": "paper", "kind": "state-state"}),
    "FruitStore": ({"generator": "paper"},),
}


def variants(size: int) -> Iterator[Game]:
    """Yield every game in each of its wordings and ways of being asked, `size` large."""
    for name, cls in GAMES.items():
        for style, feedback, extra in product(cls.styles, cls.feedbacks, ({}, *EXTRA.get(name, ()))):
            yield make_game(name, **{cls.size: size}, style=style, feedback=feedback, **SMALL.get(name, {}), **extra)


def label(game: Game) -> str:
    keys = sorted({key for more in EXTRA.get(game.name, ()) for key in more}, reverse=True)
    extra = [str(game.settings[key]) for key in keys]
    return "-".join([game.name, game.style, game.feedback, *(value for value in extra if value != "default")])
