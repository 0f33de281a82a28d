"""The registry of games: a new game is one file here and one line below."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from nextstate.envs.game import Game, GameError, setting_names
from nextstate.envs.games.box import Box
from nextstate.envs.games.cycle import Cycle
from nextstate.envs.games.dfa import DFA
from nextstate.envs.games.fruit import FruitStore
from nextstate.envs.games.grammar import CFG
from nextstate.envs.games.textworld import TextWorld

GAMES: dict[str, type[Game]] = {
    "Box": Box,
    "DFA": DFA,
    "Cycle": Cycle,
    "FruitStore": FruitStore,
    "TextWorld": TextWorld,
    "CFG": CFG,
}


def make_game(name: str, **settings: Any) -> Game:
    """Return the game `name` with these settings; raises `GameError` that suggests what was meant."""
    if name not in GAMES:
        raise GameError(f"unknown game {name!r}: expected one of {', '.join(GAMES)}{_hint(name, list(GAMES))}")
    known = setting_names(GAMES[name])
    for key in settings:
        if key not in known:
            raise GameError(f"unknown setting {key!r} of {name}: expected one of {', '.join(known)}{_hint(key, known)}")
    return GAMES[name](**settings)


def _hint(word: str, known: list[str] | tuple[str, ...]) -> str:
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
