"""Finding games by name: the built-in ones, those of installed packages, and any class as "package.module:Class".

A package offers a game by an entry point of the group `nextstate.games`, whose name is that of the game:

    [project.entry-points."nextstate.games"]
    Cups = "cups_pkg.game:Cups"
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
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
GROUP = "nextstate.games"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_classes: dict[str, type[Game]] = {}  # games that were named as "package.module:Class" in this process, by their names


def make_game(name: str, **settings: Any) -> Game:
    """Return the game `name` with these settings.

    Args:
        name: see `game_class`.
        settings: the game's own.

    Raises:
        GameError: there is no such game, or it has no such setting or value.
    """
    cls = game_class(name)
    known = setting_names(cls)
    for key in settings:
        if key not in known:
            raise GameError(f"unknown setting {key!r} of {name}: expected one of {', '.join(known)}{_hint(key, known)}")
    return cls(**settings)


def game_class(name: str) -> type[Game]:
    """Return the class of a game.

    Args:
        name: a built-in game, a game of an installed package, or "package.module:Class". A game that was given in the
            last form is then known by its own name (`Game.name`) too, until the process ends.

    Raises:
        GameError: there is no such game, it cannot be imported, or several packages offer a game of that name.
    """
    if ":" in name:
        return _import_class(name)
    offered = _plugins(tuple(sys.path)).get(name, ())
    sources = ["nextstate"] * (name in GAMES) + [_package(e) for e in offered] + [_origin(name)] * (name in _classes)
    if name in _classes and len(sources) == 2 and offered and offered[0].value == _origin(name):
        sources.pop()  # the same class, found in two ways
    if len(sources) > 1:
        raise GameError(f"game {name!r} is offered by {' and '.join(sources)}: uninstall or rename all but one")
    if name in GAMES:
        return GAMES[name]
    if offered:
        return _load(offered[0])
    if name in _classes:
        return _classes[name]
    known = game_names()
    raise GameError(
        f"unknown game {name!r}: expected one of {', '.join(known)}, or package.module:Class{_hint(name, known)}"
    )


def game_names() -> list[str]:
    """Return the names of the built-in games and of those that installed packages offer; imports none of them."""
    offered = sorted(set(_plugins(tuple(sys.path))) - set(GAMES))
    return [*GAMES, *(name for name in offered if _NAME.fullmatch(name))]


def load_games() -> tuple[dict[str, type[Game]], dict[str, str]]:
    """Return all games of `game_names` by name, and for those that cannot be used the reason."""
    found, problems = dict[str, type[Game]](), dict[str, str]()
    for name in dict.fromkeys([*game_names(), *_plugins(tuple(sys.path))]):
        try:
            found[name] = game_class(name)
        except GameError as error:
            problems[name] = str(error)
    return found, problems


@lru_cache(maxsize=8)
def _plugins(path: tuple[str, ...]) -> dict[str, tuple[EntryPoint, ...]]:
    """Return the entry points of games by name. They depend on `path`, the folders that Python imports from."""
    out: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=GROUP):
        out[entry.name] = (*out.get(entry.name, ()), entry)
    return out


def _load(entry: EntryPoint) -> type[Game]:
    given = f"game {entry.name!r} of {_package(entry)} ({entry.value})"
    found = _checked(given, _imported(given, entry.module, entry.attr))
    if found.name != entry.name:
        raise GameError(f"{given} has the name {found.name!r}: expected that of the entry point")
    return found


def _import_class(reference: str) -> type[Game]:
    module, _, attribute = reference.partition(":")
    given = f"game {reference!r}"
    if not module or not attribute:
        raise GameError(f"{given} is not possible: expected a name or package.module:Class")
    found = _checked(given, _imported(given, module, attribute))
    known = _classes.get(found.name)
    if found.name in GAMES and GAMES[found.name] is not found:
        raise GameError(f"{given} has the name {found.name!r}, which is that of a built-in game: expected another")
    if known not in (None, found) and _origin(found.name) != f"{found.__module__}:{found.__qualname__}":
        raise GameError(
            f"{given} has the name {found.name!r}, which is that of {_origin(found.name)}: expected another"
        )
    if found.name not in GAMES:
        _classes[found.name] = found
    return found


def _imported(given: str, module: str, attribute: str) -> Any:
    try:
        found: Any = import_module(module)
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise GameError(f"{given} cannot be imported: {type(error).__name__}: {text}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise GameError(f"{given} cannot be found: {module} has no {attribute!r}")
        found = getattr(found, part)
    return found


def _checked(given: str, found: Any) -> type[Game]:
    if not (isinstance(found, type) and issubclass(found, Game)):
        raise GameError(f"{given} is no game: expected a class derived from nextstate.envs.Game, found {found!r}")
    missing = sorted(
        {*getattr(found, "__abstractmethods__", ()), *(n for n in ("name", "size") if not hasattr(found, n))}
    )
    if missing:
        raise GameError(f"{given} is not complete: expected it to define {', '.join(missing)}")
    if not _NAME.fullmatch(found.name):
        raise GameError(
            f"{given} has the name {found.name!r}: expected letters, digits and underscores, starting with a letter"
        )
    return found


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _origin(name: str) -> str:
    return f"{_classes[name].__module__}:{_classes[name].__qualname__}" if name in _classes else ""


def _hint(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
