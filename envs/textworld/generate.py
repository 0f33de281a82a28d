"""TextWorld games made from a recipe, or read from a user's file."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from ctypes import CDLL, LibraryLoader
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nextstate.envs.game import GameError, require, require_whole

CHALLENGES = ("", "coin_collector", "treasure_hunter", "cooking", "simple")
THEMES = ("house", "basic")
SKILLS = ("cook", "cut", "open")
KITCHENS = (1, 6, 9, 12)  # numbers of rooms a cooking game can have
MOST_BYTES = 4 * 2**20  # of a user's .json; TextWorld's own largest games take 300 kB
STORY_VERSION = 8  # of the Z-machine, the first byte of a .z8
_HEADER = 64  # bytes

# For each kind of game the settings it takes: default, least, most.
_SETTINGS: Mapping[str, Mapping[str, tuple[int, int, int]]] = {
    "": {"rooms": (3, 1, 20), "objects": (5, 0, 60), "quest": (4, 1, 20), "breadth": (1, 1, 2)},
    "coin_collector": {"level": (5, 1, 233)},
    "treasure_hunter": {"level": (5, 1, 30)},
    "cooking": {"rooms": (6, 1, 12), "level": (1, 1, 5)},
    "simple": {},
}


class _Interpreter(CDLL):
    """The Z-machine's C library, whose function `save` is found although nnsight gives all objects a method `save`."""

    @cached_property
    def save(self) -> Any:
        """The function of the library."""
        return self["save"]


class GenerationError(GameError):
    """TextWorld cannot make a game of a recipe and a seed; another seed or a larger recipe may work."""


@dataclass(frozen=True)
class Recipe:
    """The parameters of a generated game, as JSON types; together with a seed they determine the game.

    None is replaced by the default of the kind of game; it stays None if the kind has no such setting.
    TextWorld's skill "drop" of cooking games is left out: it gives the player interchangeable slots to carry things in,
    and which of them is in use is no variable of its own.

    Args:
        rooms: number of rooms, 1-20; 1, 6, 9 or 12 for cooking.
        objects: number of things besides rooms and doors, 0-60; more where the quest needs more.
        quest: number of commands of the shortest solution, 1-20.
        breadth: number of branches of the quest, 1 or 2; TextWorld finds quests of two branches from 4 commands on.
        theme: names of things: "house", or "basic" (such as "box0").
        challenge: "" (free), "coin_collector", "treasure_hunter", "cooking" or "simple".
        level: of coin_collector (1-150 or 201-233) and treasure_hunter (1-30) their own; of cooking the number of
            ingredients (1-5), all of which have to be found.
        skills: of cooking, those of "cook", "cut" and "open" that it takes, joined by "+".
        file: path of a .z8 (with its .json in the same folder) or .json; excludes the other arguments.
    """

    rooms: int | None = None
    objects: int | None = None
    quest: int | None = None
    breadth: int | None = None
    theme: str = "house"
    challenge: str = ""
    level: int | None = None
    skills: str = ""
    file: str = ""

    def __post_init__(self) -> None:
        require(self.challenge in CHALLENGES, "challenge", self.challenge, f"one of {', '.join(map(repr, CHALLENGES))}")
        takes = {} if self.file else _SETTINGS[self.challenge]
        kind = f"file={self.file!r}" if self.file else f"challenge={self.challenge!r}"
        for name in ("rooms", "objects", "quest", "breadth", "level"):
            value = getattr(self, name)
            if name not in takes:
                require(value is None, name, value, f"None with {kind}, which has no such setting")
                continue
            default, low, high = takes[name]
            if value is None:
                object.__setattr__(self, name, default)
            elif self.challenge == "cooking" and name == "rooms":
                require(value in KITCHENS and type(value) is int, name, value, "1, 6, 9 or 12 with challenge='cooking'")
            else:
                require_whole(name, value, low, high)
        if self.breadth == 2:
            require((self.quest or 0) >= 4, "quest", self.quest, "a whole number from 4 to 20 with breadth=2")
        if self.challenge == "coin_collector" and not self.file:
            fits = self.level is not None and not 150 < self.level <= 200
            require(fits, "level", self.level, "1 to 150 or 201 to 233 (games of at most 100 rooms)")
        require(self.theme in THEMES, "theme", self.theme, f"one of {', '.join(THEMES)}")
        if self.challenge or self.file:
            require(self.theme == "house", "theme", self.theme, f"'house' with {kind}")
        require(not (self.file and self.challenge), "challenge", self.challenge, f"'' with {kind}")
        given = self.skills.split("+") if isinstance(self.skills, str) and self.skills else []
        known = isinstance(self.skills, str) and len(set(given)) == len(given) and set(given) <= set(SKILLS)
        require(known, "skills", self.skills, f"'' or some of {', '.join(SKILLS)}, joined by +")
        require(not given or self.challenge == "cooking", "skills", self.skills, f"'' with {kind}")
        # One recipe, one name: the order in which skills are given does not matter.
        object.__setattr__(self, "skills", "+".join(sorted(given)))

    def describe(self) -> dict[str, Any]:
        """Return the settings that this kind of game takes; `Recipe(**described)` is the recipe again."""
        own = {k: v for k, v in asdict(self).items() if v not in (None, "")}
        return {k: v for k, v in own.items() if k != "theme" or not (self.challenge or self.file)}


def make(recipe: Recipe, seed: int) -> Any:
    """Make a `textworld.Game`; the same one for the same recipe and seed, whatever ran before.

    Args:
        recipe: what to make it of; a user's file is read, whatever the seed.
        seed: a whole number from 0, which decides everything that the recipe leaves open.

    Raises:
        GenerationError: the recipe cannot be met with this seed.
        GameError: the seed, or the user's file, cannot be.
    """
    require_whole("seed", seed, 0, 2**63 - 1)
    if recipe.file:
        return read(Path(recipe.file))
    with quiet():
        import jericho.jericho
        from textworld.challenges import CHALLENGES as MAKERS
        from textworld.generator import QuestGenerationError, make_game
        from textworld.generator.data import KnowledgeBase
        from textworld.generator.game import GameOptions
        from textworld.generator.inform7 import CouldNotCompileGameError
        from textworld.generator.world import NoFreeExitError

        jericho.jericho.cdll = LibraryLoader(_Interpreter)
        options = GameOptions()
        # TextWorld fills seeds that are not given from a global generator.
        numbers = np.random.SeedSequence(seed).generate_state(4).tolist()
        options.seeds = dict(zip(("map", "objects", "quest", "grammar"), numbers, strict=True))
        try:
            if recipe.challenge:
                game = MAKERS[f"tw-{recipe.challenge}"][1](_challenge(recipe), options)
            else:
                options.kb = KnowledgeBase.default()  # parsing the same rules again takes most of the time
                options.nb_rooms, options.nb_objects = recipe.rooms, recipe.objects
                options.quest_length, options.quest_breadth = recipe.quest, recipe.breadth
                options.grammar.theme = recipe.theme
                game = make_game(options)
        except (QuestGenerationError, NoFreeExitError, CouldNotCompileGameError, ValueError, AssertionError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise GenerationError(
                f"TextWorld makes no game of {recipe.describe()} with seed={seed} ({reason[0]}); "
                "try another seed, a shorter quest, or more rooms"
            ) from error
    # TextWorld goes through sets of words here, whose order differs from process to process.
    for quest in game.quests:
        quest.fail_events = sorted(quest.fail_events, key=lambda e: [str(p) for p in e.condition.preconditions])
    game.grammar.options.names_to_exclude.sort(key=str)
    return game


def _challenge(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe in TextWorld's own words for its challenge."""
    if recipe.challenge == "cooking":
        skills = {skill: skill in recipe.skills.split("+") for skill in SKILLS}
        number = recipe.level
        return {"recipe": number, "take": number, "go": recipe.rooms, "recipe_seed": 0, "split": None, **skills}
    if recipe.challenge == "simple":
        return {"rewards": "dense", "goal": "detailed", "test": False}
    return {"level": recipe.level}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep TextWorld silent, and what it does to its global generator without effect; say so where it is missing."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            from textworld import g_rng
            from textworld.generator.data import LOGIC_DATA_PATH, KnowledgeBase
        except ModuleNotFoundError as error:
            raise GameError(
                f"{error.name} is not installed: TextWorld games need it (Linux and macOS only; pip install textworld)"
            ) from error
        rules = KnowledgeBase.default().logic_path
        if rules != LOGIC_DATA_PATH:
            raise GameError(f"TextWorld has read other rules than its own, from {rules}: start in another folder")
        before = g_rng.seed
        try:
            yield
        finally:
            g_rng.set_seed(before)


def read(path: Path) -> Any:
    """Read a user's game as a `textworld.Game`: its .json, or the one beside its .z8.

    The file is untrusted: it is parsed, never evaluated.

    Raises:
        GameError: the file is missing, is not what its name says, is cut off, or has no metadata; the message names it.
    """
    path = metadata_of(path)
    text = read_bytes(path, MOST_BYTES)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GameError(
            f"file={str(path)!r} is not JSON ({error}); expected the metadata of a TextWorld game"
        ) from error
    _check_metadata(path, data)
    with quiet():
        from tatsu.exceptions import ParseException
        from textworld.generator.data import TEXT_GRAMMARS_PATH
        from textworld.generator.game import Game

        try:
            game = Game.deserialize(data)
        except (
            ArithmeticError, AssertionError, AttributeError, LookupError, NameError, ParseException, RecursionError,
            TypeError, ValueError,
        ) as error:  # fmt: skip
            raise GameError(
                f"file={str(path)!r} is not a TextWorld game ({type(error).__name__}: {str(error)[:200]}); "
                "expected the .json that TextWorld writes when it compiles a game"
            ) from error
    game.kb.text_grammars_path = TEXT_GRAMMARS_PATH  # the file's own is a path of another machine
    return game


def metadata_of(path: Path) -> Path:
    """Return the .json of a user's game: itself, or what lies beside a whole .z8; raises `GameError` otherwise."""
    if path.suffix not in (".z8", ".json"):
        raise GameError(f"file={str(path)!r} is not possible: expected a TextWorld game, a .z8 or its .json")
    if path.suffix == ".json":
        return path
    check_story(path)
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise GameError(
            f"file={str(path)!r} has no metadata: expected {beside.name} in its folder, as TextWorld writes it when it "
            "compiles a game"
        )
    return beside


def read_bytes(path: Path, most: int) -> bytes:
    """Return what is in a user's file of at most `most` bytes; raises `GameError` that names the file."""
    try:
        if path.is_dir() or not path.exists():
            raise GameError(f"file={str(path)!r} is not possible: expected the path of a file that is there")
        with path.open("rb") as file:
            out = file.read(most + 1)
    except OSError as error:
        raise GameError(f"file={str(path)!r} cannot be read ({error.strerror or error})") from error
    if len(out) > most:
        raise GameError(f"file={str(path)!r} is too large: expected at most {most:,} bytes")
    return out


def check_story(path: Path) -> bytes:
    """Return a compiled game; raises `GameError` where it is not one of the Z-machine, or not whole."""
    story = read_bytes(path, 2**19)  # what version 8 can address
    if len(story) < _HEADER or story[0] != STORY_VERSION:
        raise GameError(f"file={str(path)!r} is not a compiled game: expected a story of the Z-machine, version 8")
    length = int.from_bytes(story[0x1A:0x1C]) * 8  # the header says how long it is, and what its bytes sum up to
    if len(story) < length:
        raise GameError(f"file={str(path)!r} is cut off: has {len(story):,} of {length:,} bytes; compile it again")
    if sum(story[_HEADER:length]) % 2**16 != int.from_bytes(story[0x1C:0x1E]):
        raise GameError(f"file={str(path)!r} is damaged: its checksum does not fit; compile it again")
    return story


def _check_metadata(path: Path, data: Any) -> None:
    """Raise `GameError` unless what TextWorld will take on trust is as it should be."""
    parts = {"KB": dict, "world": list, "quests": list, "infos": list, "grammar": dict}
    if not isinstance(data, dict) or not all(isinstance(data.get(k), t) for k, t in parts.items()):
        raise GameError(
            f"file={str(path)!r} is not the metadata of a TextWorld game: expected an object with {', '.join(parts)}"
        )
    if data.get("version") != 1:
        raise GameError(f"file={str(path)!r} has version {data.get('version')!r}: expected 1, as TextWorld 1.x writes")
    metadata = data.get("metadata", {})
    words: list[Any] = [data.get("objective") or ""]
    words += metadata.get("walkthrough") or () if isinstance(metadata, dict) else [metadata]
    for entry in data["infos"]:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], dict)):
            raise GameError(f"file={str(path)!r}: infos has {entry!r:.80}: expected an id and what is known of it")
        words.append(entry[1].get("name") or "")
    for word in words:
        if not isinstance(word, str) or not word.replace("\n", " ").isprintable():
            raise GameError(
                f"file={str(path)!r}: {word!r:.80} is no name, command or objective: expected printable text"
            )
