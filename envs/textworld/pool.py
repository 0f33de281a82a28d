"""Pools of compiled TextWorld games: made once, kept in the user's cache folder, read back in milliseconds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from nextstate.envs.game import GameError, require, require_whole
from nextstate.envs.textworld.generate import KITCHENS, MOST_BYTES, Recipe, make, metadata_of, read_bytes
from nextstate.envs.textworld.world import MOST_STATES, World

FORMAT = 1  # of the files; another one makes all pools again
FOLDER = "NEXTSTATE_CACHE"  # environment variable that says where files are kept
MOST_GAMES = 10_000
TRIES = 50  # seeds in a row of which no game comes, before a recipe is given up
SEARCH = 200  # games looked at in a row without one of the size asked for, before the search is given up
NEAR = 0.2  # how far a size may be from the one asked for, as a part of it
_KEPT = 32  # pools that stay in memory

Progress = Callable[[int, int], None]  # called with the number of finished games, and the total
_pools: dict[Path, tuple[World, ...]] = {}


def pool(
    recipe: Recipe,
    games: int,
    seed: int,
    states: int | None = None,
    transitions: int | None = None,
    progress: Progress | None = None,
) -> tuple[World, ...]:
    """Return compiled games; the same ones for the same arguments, on every machine.

    A larger pool begins with the games of a smaller one. Each world says which recipe and seed it is of, and how many
    states and transitions it has (None beyond 20,000 states).

    Args:
        recipe: what the games are made of; a user's file is a pool of that one game.
        games: how many.
        seed: what decides them.
        states: about how many states each is to have: rooms, objects, quest or level are then searched, beginning with
            those of the recipe, until |Q| is within a fifth of it.
        transitions: the same for |T|.
        progress: called with the number of finished games, and the total.

    Raises:
        GameError: an argument is not possible, no matching game is found, or the pool cannot be saved.
    """
    require_whole("games", games, 1, MOST_GAMES)
    require_whole("seed", seed, 0, 2**63 - 1)
    for name, target in (("states", states), ("transitions", transitions)):
        if target is not None:
            require(not recipe.file, name, target, f"None with file={recipe.file!r}, which has the size it has")
            require_whole(name, target, 2, MOST_STATES)
    if recipe.file:
        games, seed = 1, 0
    key: dict[str, Any] = {"recipe": recipe.describe(), "games": games, "seed": seed}
    path = cache_path("pool", key | {"states": states, "transitions": transitions} | _contents(recipe), ".json")
    if path not in _pools:
        if len(_pools) == _KEPT:
            del _pools[next(iter(_pools))]
        _pools[path] = _read(path) or _write(path, recipe, games, seed, Target(states, transitions), progress)
    return _pools[path]


def _contents(recipe: Recipe) -> dict[str, str]:
    """Return the hash of a user's file, so that a changed one is another game."""
    if not recipe.file:
        return {}
    data = read_bytes(metadata_of(Path(recipe.file)), MOST_BYTES)
    return {"contents": hashlib.sha256(data).hexdigest()}


def _read(path: Path) -> tuple[World, ...] | None:
    """Return the pool of a file; None where there is none, or it is damaged."""
    try:
        return tuple([World.from_json(world) for world in json.loads(path.read_bytes())])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(
    path: Path, recipe: Recipe, games: int, seed: int, target: Target, progress: Progress | None
) -> tuple[World, ...]:
    worlds: list[World] = []
    for world in itertools.islice(_worlds(recipe, seed, target), games):
        worlds.append(world)
        if progress is not None:
            progress(len(worlds), games)
    keep(path, json.dumps([world.to_json() for world in worlds]).encode())
    return tuple(worlds)


def _worlds(recipe: Recipe, seed: int, target: Target) -> Iterator[World]:
    """Yield one world after another, without end (a user's file: once)."""
    if recipe.file:
        yield _measured(World.compile(make(recipe, 0)), recipe, 0, MOST_STATES)
    elif target.given:
        yield from _search(recipe, seed, target)
    else:
        yield from _plain(recipe, seed)


def _seeds(seed: int) -> Iterator[int]:
    rng = np.random.default_rng(seed)
    while True:
        yield int(rng.integers(2**31))


def _plain(recipe: Recipe, seed: int) -> Iterator[World]:
    failed, reason = 0, ""
    for number in _seeds(seed):
        if failed == TRIES:
            raise GameError(
                f"TextWorld makes no game of {recipe.describe()} with any of {TRIES} seeds (the last one: {reason}); "
                "try a shorter quest, more rooms or fewer objects"
            )
        try:
            world = _measured(World.compile(make(recipe, number)), recipe, number, MOST_STATES)
        except GameError as error:
            failed, reason = failed + 1, str(error)
            continue
        failed = 0
        yield world


def _measured(world: World, recipe: Recipe, seed: int, cap: int) -> World:
    """Return a world that knows where it comes from, and its size where that is at most `cap` states."""
    n_states, n_transitions = world.size(cap) or (None, None)
    return replace(
        world,
        n_states=n_states,
        n_transitions=n_transitions,
        seed=seed,
        recipe=recipe.describe(),
        source=recipe.file,
    )


@dataclass(frozen=True)
class Target:
    """The sizes asked for."""

    states: int | None = None
    transitions: int | None = None

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return self.states is not None or self.transitions is not None

    @property
    def cap(self) -> int:
        """The number of states from which on a game is too large whatever comes."""
        # A game of n states has n - 1 transitions or more, so that a bound on |T| is one on |Q|.
        return 2 * min(x for x in (self.states, self.transitions) if x is not None)

    def pairs(self, world: World) -> list[tuple[int, int]]:
        """Return each size of a world beside the one asked for; [] where it was too large to count."""
        sizes = ((world.n_states, self.states), (world.n_transitions, self.transitions))
        return [(size, asked) for size, asked in sizes if size is not None and asked is not None]

    def compare(self, world: World) -> int:
        """Return 0 where a world is near enough, -1 where it is too small, 1 where it is too large."""
        pairs = self.pairs(world)
        signs = {(size > asked) - (size < asked) for size, asked in pairs if abs(size - asked) > NEAR * asked}
        return min(signs, default=0) if pairs else 1

    def __str__(self) -> str:
        asked = (("states", self.states), ("transitions", self.transitions))
        return " and ".join(f"about {number:,} {name}" for name, number in asked if number is not None)


@dataclass
class _Arm:
    """A recipe that the search may try, its place on the grid of recipes, and what is known of its games."""

    recipe: Recipe
    at: tuple[int, ...]
    far: int  # steps on the grid from where the search begins
    hits: float = 0.0
    misses: float = 0.0

    @property
    def promise(self) -> float:
        """How likely its next game is to have the size asked for, beginning from one in four."""
        return (1 + self.hits) / (4 + self.hits + self.misses)


def _search(recipe: Recipe, seed: int, target: Target) -> Iterator[World]:
    """Yield games of the size asked for: try the most promising recipe, and learn from it about all others.

    Sizes grow with every argument: what is too large at one place of the grid is so at all larger ones, and so on.
    Plain sums and quotients only, in a fixed order: rounded alike on every machine.
    """
    arms = _arms(recipe)
    missed, nearest = 0, ""
    best = float("inf")
    for number in _seeds(seed):
        if missed == SEARCH:
            raise GameError(
                f"no game around {recipe.describe()} has {target} (looked at {SEARCH} in a row; "
                f"nearest: {nearest or 'none below twice that size'}); give another size, or begin from another recipe"
            )
        arm = max(arms, key=lambda a: (a.promise, -a.far))
        try:
            world = _measured(World.compile(make(arm.recipe, number)), arm.recipe, number, target.cap)
        except GameError:
            _learn(arms, arm, None)
            missed += 1
            continue
        sign = target.compare(world)
        _learn(arms, arm, sign)
        if sign == 0:
            missed = 0
            yield world
            continue
        missed += 1
        off = max((abs(size - asked) / asked for size, asked in target.pairs(world)), default=best)
        if off < best:
            best, nearest = off, f"|Q|={world.n_states}, |T|={world.n_transitions} of {arm.recipe.describe()}"


def _learn(arms: list[_Arm], tried: _Arm, sign: int | None) -> None:
    """Spread what came of one arm: fully to itself, less the further off, and fully where it must be the same."""
    for arm in arms:
        steps = [a - b for a, b in zip(arm.at, tried.at, strict=True)]
        near = 1 / (1 + sum(step * step for step in steps) ** 2)
        if sign == 0:
            arm.hits += near
        elif (sign == 1 and min(steps) >= 0) or (sign == -1 and max(steps) <= 0):
            arm.misses += 1
        else:
            arm.misses += near


def _arms(recipe: Recipe) -> list[_Arm]:
    """Return the recipes around one, in a fixed order; the first is the nearest to it."""
    grid: dict[str, list[int]] = {}
    if recipe.challenge == "":
        rooms, objects, quest = recipe.rooms or 1, recipe.objects or 0, recipe.quest or 1
        grid["rooms"] = list(range(1, min(20, max(8, rooms + 2)) + 1))
        grid["objects"] = list(range(0, min(60, max(8, objects + 4)) + 1))
        grid["quest"] = list(range(4 if recipe.breadth == 2 else 1, min(20, max(6, quest + 2)) + 1))
    elif recipe.challenge == "coin_collector":
        grid["level"] = [*range(1, 151), *range(201, 234)]
    elif recipe.challenge == "treasure_hunter":
        grid["level"] = list(range(1, 31))
    elif recipe.challenge == "cooking":
        grid = {"rooms": list(KITCHENS), "level": [1, 2, 3, 4, 5]}
    out = []
    start = [values.index(getattr(recipe, name)) for name, values in grid.items()]
    for at in itertools.product(*(range(len(values)) for values in grid.values())):
        changed: dict[str, Any] = {name: values[k] for (name, values), k in zip(grid.items(), at, strict=True)}
        far = sum(abs(k - s) for k, s in zip(at, start, strict=True))
        out.append(_Arm(replace(recipe, **changed), at or (0,), far))
    return sorted(out, key=lambda arm: arm.far)


def cache_folder() -> Path:
    """Return where pools and compiled games are kept: the user's cache folder, or what NEXTSTATE_CACHE says."""
    return Path(os.environ.get(FOLDER) or platformdirs.user_cache_dir("nextstate")) / "textworld"


def cache_path(kind: str, key: Mapping[str, Any], suffix: str) -> Path:
    """Return where what `key` decides is kept; another version of TextWorld or of our format is another place."""
    full = {**key, "kind": kind, "format": FORMAT, "textworld": _version()}
    digest = hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{kind}-{digest[:32]}{suffix}"


@lru_cache(maxsize=1)
def _version() -> str:
    return importlib.metadata.version("textworld")


def keep(path: Path, data: bytes) -> None:
    """Write a file of the cache beside its place and rename it; raises `GameError` where the disk does not let us."""
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: several processes may make the same pool at the same time.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="partial-", delete=False) as file:
            beside = Path(file.name)
            file.write(data)
        os.replace(beside, path)
    except OSError as error:
        if beside is not None:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
        raise GameError(
            f"{path} cannot be written ({error.strerror or error}): make room there, or set {FOLDER} to a folder that "
            "can be written"
        ) from error
