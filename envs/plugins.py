"""Games and agents from other packages: found by entry point or by `pkg.module:Name`, imported when first used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from nextstate.envs.files import file_digest


class PluginError(ValueError):
    """A plugin does not exist, is ambiguous, or cannot be imported; the message is one line."""


def names(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group, sorted by name, without importing them.

    If several installed packages use the same name, one of them is listed; `load` raises for such a name.
    """
    found = sorted(entry_points(group=group), key=lambda entry: (entry.name, _origin(entry)), reverse=True)
    return {entry.name: entry for entry in reversed({e.name: e for e in found}.values())}


def check_unique(group: str, name: str, built_in: Collection[str] = ()) -> None:
    """Check that a name is used only once among the built-in names and the entry points of installed packages.

    Raises:
        PluginError: the name is used several times; the message lists where.
    """
    rivals = ["nextstate itself"] if name in built_in else []
    rivals += sorted(_origin(entry) for entry in entry_points(group=group, name=name))
    if len(rivals) > 1:
        raise PluginError(
            f"{len(rivals)} installed packages have the {_noun(group)} {name!r}: {' and '.join(rivals)}; uninstall one"
        )


def load(group: str, name: str, built_in: Collection[str] = ()) -> object:
    """Import and return an entry point by its name, or a module attribute by `pkg.module:Name`.

    Args:
        group: entry-point group, such as `nextstate.agents`.
        name: a name in the group, or `pkg.module:Name`.
        built_in: names that are not plugins; suggested for misspelt names, and not available to plugins.

    Raises:
        PluginError: the name does not exist, several packages use it, or its module or attribute cannot be imported.
    """
    if ":" in name:
        if not EntryPoint.pattern.fullmatch(name) or not all(name.split(":")):
            raise PluginError(f"{name!r} is not the name of a {_noun(group)}: expected a known name or pkg.module:Name")
        return _import(EntryPoint(name, name, group))
    check_unique(group, name, built_in)
    known = names(group)
    if name not in known:
        raise PluginError(unknown(group, name, [*built_in, *known]))
    return _import(known[name])


def source_digest(found: Callable[..., Any]) -> str | None:
    """Return a digest of the source file of a class or function; None if it is part of nextstate, or has no such file.

    Results that a plugin has a part in keep it, so that they are made anew when its code has changed.
    """
    found = inspect.unwrap(found)
    if getattr(found, "__module__", "").partition(".")[0] == "nextstate":
        return None
    try:
        source = inspect.getsourcefile(found)
    except TypeError:  # written in C, or an object that can be called
        return None
    return None if source is None else file_digest(Path(source))


def unknown(group: str, name: str, known: Collection[str]) -> str:
    """Return the error message for an unknown name, with the nearest known name or all known names."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(known))}, or pkg.module:Name"
    return f"there is no {_noun(group)} {name!r}; {hint}"


def _import(entry: EntryPoint) -> object:
    given = entry.name if entry.name == entry.value else f"{entry.name!r} of {_origin(entry)}"
    failed = f"the {_noun(entry.group)} {given} cannot be imported"
    try:
        return entry.load()
    except (Exception, SystemExit) as error:  # plugin code may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())
        hint = "; install its package, or add its folder to PYTHONPATH" if _not_found(entry, error) else ""
        raise PluginError(f"{failed}: {why}{hint}") from error


def _not_found(entry: EntryPoint, error: BaseException) -> bool:
    """Return whether the plugin's own module or a parent package is missing, rather than something it imports."""
    return isinstance(error, ModuleNotFoundError) and f"{entry.module}.".startswith(f"{error.name}.")


def _noun(group: str) -> str:
    name = group.rpartition(".")[2]
    return f"{name[:-3]}y" if name.endswith("ies") else name.removesuffix("s")


def _origin(entry: EntryPoint) -> str:
    return f"the package {entry.dist.name if entry.dist else 'unknown'} ({entry.value})"
