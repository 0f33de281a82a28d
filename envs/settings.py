"""The settings of a game with type, default, legal values and meaning, extracted from its code."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, NamedTuple

from nextstate.envs.game import Game, GameError

IMPOSSIBLE: Any = "?"  # rejected by all settings except paths
_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


class Setting(NamedTuple):
    """One setting of a game."""

    name: str
    type: str
    default: Any  # None if there is none
    legal: str  # legal values while the other settings are at their defaults; "" if unrestricted or unknown
    meaning: str


def listed(cls: type[Game]) -> tuple[Setting, ...]:
    """Return the settings of a game.

    Types come from the signature, defaults from an instance created without arguments, legal values from the error for
    an impossible value, and meanings from the docstring.
    """
    made, meanings = cls(), _meanings(Game.__doc__) | _meanings(cls.__doc__)
    out = []
    for f in fields(cls):
        legal = _legal(cls, f.name)
        meaning = meanings.get(f.name, "")
        if legal:
            meaning = meaning.replace(f", {legal}", "", 1)
        kind = str(f.type).removesuffix(" | None")
        out.append(Setting(f.name, kind, getattr(made, f.name), legal, meaning))
    return tuple(out)


def _legal(cls: type[Game], name: str) -> str:
    try:
        cls(**{name: IMPOSSIBLE})
    except GameError as error:
        expected = str(error).partition(" is not possible: expected ")[2]
        if not expected.startswith("None with "):
            return expected.removeprefix("a whole number from ").removeprefix("one of ")
    except (TypeError, ValueError):  # the game does not validate this setting
        pass
    return ""


def _meanings(doc: str | None) -> dict[str, str]:
    """Return the first sentence of each entry in the "Args" section of a docstring."""
    section = (doc or "").partition("    Args:\n")[2]
    entries = _ENTRY.findall("\n".join(line.removeprefix("    ") for line in section.splitlines()))
    plain = {name: " ".join(words.replace("`", "").split()) for name, words in entries}
    return {name: re.split(r"\. (?=[A-Z])", words)[0].rstrip(".") for name, words in plain.items()}
