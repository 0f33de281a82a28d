"""The text of compiled games: Inform 7 compiles a game, and a separate process plays it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

from nextstate.envs.game import GameError, require
from nextstate.envs.textworld import zmachine
from nextstate.envs.textworld.generate import MOST_BYTES, Recipe, check_story, make, metadata_of, quiet, read_bytes
from nextstate.envs.textworld.pool import FOLDER, cache_path

MOST_LETTERS = 200  # of a command
MOST_WORDS = 2**20  # bytes of one text
SECONDS = 20.0  # to wait for one text
_REMEMBERED = 4096  # texts

_STATUS = re.compile(r"\s*-= [^\n]* =-\s*-?\d+/-?\d+\s*\Z")  # the line at the top of the screen: room, score, moves
_PROMPT = re.compile(r"\n>\s*\Z")
_MENU = re.compile(r"\n[^\n]*\bRESTART, RESTORE a saved game\b[^\n]*\Z")  # what the interpreter offers at the end
_TAG = re.compile(r"^\[[^\]\n]+\]\n?", re.MULTILINE)  # what it says when actions are traced
_BANNER = re.compile(r"^ +_{8} [ _]*\n(?:[^\n]*\S[^\n]*\n)*", re.MULTILINE)  # TEXT WORLD, drawn in dollars
_CENTRED = re.compile(r"^ {8,}", re.MULTILINE)


def compile_story(recipe: Recipe, seed: int) -> Path:
    """Return the compiled game of a recipe and seed; compile it (about a second) where it is not in the cache.

    A user's .z8 is used where it is, and a user's .json compiled.

    Raises:
        GameError: the game cannot be made, read or compiled, or there is no place to keep it; the message names it.
    """
    given = Path(recipe.file)
    if given.suffix == ".z8":
        check_story(given)
        return given.absolute()
    key: dict[str, Any] = {**recipe.describe(), "seed": seed}
    name = f"the game of {recipe.describe()} with seed={seed}"
    if recipe.file:
        name = f"file={recipe.file!r}"
        key = {"contents": hashlib.sha256(read_bytes(metadata_of(given), MOST_BYTES)).hexdigest()}
    path = cache_path("story", key, ".z8").absolute()
    if path.is_file():
        try:
            check_story(path)
        except GameError:
            pass  # damaged: made again
        else:
            return path
    _compile(make(recipe, seed), name, path)
    return path


def _compile(game: Any, name: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own: several processes may compile the same game at the same time.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="partial-") as folder, quiet():
            from textworld.generator import GameOptions, compile_game
            from textworld.generator.inform7 import CouldNotCompileGameError

            options = GameOptions()
            options.path = str(Path(folder) / path.name)
            try:
                made = Path(compile_game(game, options))
            except (
                CouldNotCompileGameError, ArithmeticError, AssertionError, AttributeError, LookupError, NameError,
                RecursionError, TypeError, ValueError,
            ) as error:  # fmt: skip
                message = " ".join(str(error).split()) or type(error).__name__
                raise GameError(f"{name} cannot be compiled: ...{message[-400:]}") from error
            check_story(made)
            made.with_suffix(".json").replace(path.with_suffix(".json"))
            made.replace(path)
    except OSError as error:
        raise GameError(
            f"{name} cannot be compiled to {path} ({error.strerror or error}): make room there, or set {FOLDER} to a "
            "folder that can be written"
        ) from error


def clean(text: str) -> str:
    """Return the text for players, without banner, status line, prompt, debug tags and unprintable characters."""
    text = "".join(letter for letter in text if letter == "\n" or letter.isprintable())
    text = _MENU.sub("", _PROMPT.sub("", _STATUS.sub("", text)).rstrip())
    text = _CENTRED.sub("", _TAG.sub("", _BANNER.sub("", text)))
    text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Gone(Exception):
    """The interpreter process has died, does not answer, or sends too much."""


class Story:
    """A compiled game that answers commands. It is played in another process, which is started when it is needed.

    A process that dies or hangs is started again, and plays the past again; nobody notices, unless it does so twice.
    """

    def __init__(self, path: Path) -> None:
        check_story(path)
        self.path = path.absolute()
        self._answers: OrderedDict[tuple[str, ...], str] = OrderedDict()  # by all commands up to the one it answers
        self._process: _Process | None = None

    def opening(self) -> str:
        """Return the words the game begins with."""
        return self._answer(())

    def say(self, past: tuple[str, ...], command: str) -> str:
        """Return what the game answers to a command, after the commands of `past` from its beginning.

        Raises:
            GameError: the command is not one line of at most 200 printable letters, or the game cannot be played.
        """
        for line in (*past, command):
            legal = isinstance(line, str) and line.isprintable() and len(line) <= MOST_LETTERS
            require(legal, "command", line, f"one line of at most {MOST_LETTERS} printable letters")
        return self._answer((*past, command))

    def close(self) -> None:
        """End the process, if there is one; the next command starts another."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _answer(self, commands: tuple[str, ...]) -> str:
        if commands in self._answers:
            self._answers.move_to_end(commands)
            return self._answers[commands]
        try:
            self._play(commands)
        except _Gone:
            self.close()
            try:
                self._play(commands)
            except _Gone as error:
                self.close()
                what = f"the command {commands[-1]!r}" if commands else "its beginning"
                raise GameError(f"{self.path} cannot be played: {error}, twice at {what}") from error
        return self._answers[commands]

    def _play(self, commands: tuple[str, ...]) -> None:
        """Have all commands played that are not yet, and keep what is answered."""
        process = self._process
        if process is None or process.owner != os.getpid():  # after a fork the other side goes on with it
            try:
                process = self._process = _Process(self.path)
            except OSError as error:
                raise GameError(f"{self.path} cannot be played: no process for it ({error.strerror})") from error
        done = process.done
        if done is None or done != commands[: len(done)] or len(done) == len(commands):
            process.ask(again=True, commands=commands)
            self._keep((), process.answer())
            done = ()
        else:
            process.ask(again=False, commands=commands[len(done) :])
        for k in range(len(done), len(commands)):
            self._keep(commands[: k + 1], process.answer())
        process.done = commands

    def _keep(self, commands: tuple[str, ...], text: str) -> None:
        self._answers[commands] = clean(text)
        self._answers.move_to_end(commands)
        if len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)


class _Process:
    """A running interpreter: it is asked a line, and answers a line for each text."""

    def __init__(self, path: Path) -> None:
        self.owner, self.patience = os.getpid(), SECONDS
        self.done: tuple[str, ...] | None = None  # the commands it has played; None before it has begun
        folder = tempfile.TemporaryDirectory(prefix="nextstate-story-", ignore_cleanup_errors=True)
        with (Path(folder.name) / "errors").open("wb") as errors:
            where = Path(folder.name) / "play"
            where.mkdir()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(zmachine.__file__).resolve()), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=where,
                start_new_session=True,  # Ctrl-C is for us, not for it
            )
        self._folder = Path(folder.name)
        self._buffer = b""
        # Also when this is forgotten, and when Python ends.
        self.stop = weakref.finalize(self, _stop, self._process, folder, self.owner)

    def ask(self, again: bool, commands: tuple[str, ...]) -> None:
        """Send a request; its answers must be taken one by one."""
        self.done = None  # unless all answers come
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"again": again, "commands": commands}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise _Gone(self._why("the process that plays it has died")) from error

    def answer(self) -> str:
        """Return the next text."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not ready.select(self.patience):
                    raise _Gone(f"no answer came within {self.patience:g} seconds")
                more = os.read(self._process.stdout.fileno(), 65536)
                if not more:
                    raise _Gone(self._why("the process that plays it has died"))
                self._buffer += more
                if len(self._buffer) > MOST_WORDS:
                    raise _Gone(f"it talks without end (more than {MOST_WORDS:,} bytes)")
        line, self._buffer = self._buffer.split(b"\n", 1)
        return str(json.loads(line))

    def _why(self, what: str) -> str:
        lines = (self._folder / "errors").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{what} ({lines[-1][:200]})" if lines else what


def _stop(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str], owner: int) -> None:
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue  # what was still to be sent has no reader any more
    process.wait()
    folder.cleanup()
