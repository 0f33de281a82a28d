"""Look up games by name: built-in games, games of installed packages, and classes given as "package.module:Class".

A package provides a game by an entry point in the group `nextstate.games`, with the same name as the game:

    [project.entry-points."nextstate.games"]
    Cups = "cups_pkg.game:Cups"
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from nextstate.envs import plugins
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
GROUP = "nextstate.games"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_referenced: dict[str, type[Game]] = {}  # games given as "package.module:Class", by this reference and by name


def make_game(name: str, **settings: Any) -> Game:
    """Create a game.

    Args:
        name: a name, see `game_class`.
        settings: keyword arguments of the game.

    Raises:
        GameError: the game does not exist, or a setting or its value is not possible.
    """
    cls = game_class(name)
    known = setting_names(cls)
    for key in settings:
        if key not in known:
            raise GameError(f"unknown setting {key!r} of {name}: expected one of {', '.join(known)}{_hint(key, known)}")
    return cls(**settings)


def game_class(name: str) -> type[Game]:
    """Return the class of a game; imports it if necessary.

    Args:
        name: a built-in game, a game of an installed package, or "package.module:Class". After the last form, the game
            can also be given by its own name (`Game.name`) in the same process.

    Raises:
        GameError: the game does not exist, cannot be imported, or several packages have a game of this name.
    """
    if name in _referenced:
        return _referenced[name]
    if ":" in name:
        return _reference(name)
    path = tuple(sys.path)
    if name in GAMES:
        _check_unique(name, path)
        return GAMES[name]
    return _load(name, path)


def game_names() -> list[str]:
    """Return the names of built-in games and of games of installed packages, without importing the latter."""
    return [*GAMES, *(name for name in plugins.names(GROUP) if name not in GAMES and _NAME.fullmatch(name))]


def load_games() -> tuple[dict[str, type[Game]], dict[str, str]]:
    """Return all games by name, and the error messages of games that cannot be used."""
    found, problems = dict[str, type[Game]](), dict[str, str]()
    for name in dict.fromkeys([*GAMES, *plugins.names(GROUP)]):
        try:
            found[name] = game_class(name)
        except GameError as error:
            problems[name] = str(error)
    return found, problems


def _reference(given: str) -> type[Game]:
    try:
        found = _checked(given, plugins.load(GROUP, given))
    except plugins.PluginError as error:
        raise GameError(str(error)) from error
    name = found.name
    if GAMES.get(name) is found:
        return found
    taken = {
        **dict.fromkeys(plugins.names(GROUP), "a game of an installed package"),
        **dict.fromkeys(GAMES, "built in"),
    }
    if name in _referenced and _place(_referenced[name]) != _place(found):
        taken[name] = _place(_referenced[name])
    elif name in taken and name not in GAMES and _load(name, tuple(sys.path)) is found:
        del taken[name]
    if name in taken:
        raise GameError(f"game {given!r} has the name {name!r}, which is taken ({taken[name]}): give it another one")
    _referenced[given] = _referenced[name] = found
    return found


# Cached by `sys.path`, which determines the installed packages: searching it is slow compared to creating a game, and
# training creates one for each episode.
@lru_cache(maxsize=256)
def _check_unique(name: str, path: tuple[str, ...]) -> None:
    try:
        plugins.check_unique(GROUP, name, GAMES)
    except plugins.PluginError as error:
        raise GameError(str(error)) from error


@lru_cache(maxsize=256)
def _load(name: str, path: tuple[str, ...]) -> type[Game]:
    try:
        found = _checked(name, plugins.load(GROUP, name, GAMES))
    except plugins.PluginError as error:
        raise GameError(str(error)) from error
    if found.name != name:
        raise GameError(f"the entry point {name!r} is a game named {found.name!r}: expected the same name")
    return found


def _checked(given: str, found: object) -> type[Game]:
    if not (isinstance(found, type) and issubclass(found, Game)):
        raise GameError(f"{given!r} is not a game: expected a class derived from nextstate.envs.Game, found {found!r}")
    unset = [name for name in ("name", "size") if not hasattr(found, name)]
    missing = sorted([*getattr(found, "__abstractmethods__", ()), *unset])
    if missing:
        raise GameError(f"the game {given!r} is not complete: expected it to define {', '.join(missing)}")
    if not _NAME.fullmatch(found.name):
        expected = "letters, digits and underscores, starting with a letter"
        raise GameError(f"the game {given!r} has the name {found.name!r}: expected {expected}")
    return found


def _place(cls: type[Game]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _hint(word: str, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
