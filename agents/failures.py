"""Turn whatever goes wrong inside a model into one line that says which, why and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TypeVar

from nextstate.agents.agent import AgentError
from nextstate.envs.game import GameError

T = TypeVar("T")
ADVICE = {
    errno.EACCES: "let yourself read and write there, or take a copy of the folder that is yours",
    errno.EPERM: "let yourself read and write there, or take a copy of the folder that is yours",
    errno.EROFS: "copy the folder to where you may write, and use the copy",
    errno.ENOSPC: "free some space, and give the same command again",
    errno.EDQUOT: "free some space, and give the same command again",
    errno.ENOENT: "see whether the path is spelt right",
    errno.ENOTDIR: "a file is where a folder should be: move it away, or give another path",
    errno.EEXIST: "a file is where a folder should be: move it away, or give another path",
    errno.EISDIR: "a folder is where a file should be: move it away",
    errno.ENOTEMPTY: "a folder is where a file should be: move it away",
}
_KINDS: dict[int, type[OSError]] = {  # those of some libraries have no number
    errno.EACCES: PermissionError,
    errno.ENOENT: FileNotFoundError,
    errno.ENOTDIR: NotADirectoryError,
    errno.EEXIST: FileExistsError,
    errno.EISDIR: IsADirectoryError,
}


class Broken(AgentError):
    """Something failed that nobody foresaw; the message is one line, `__cause__` the exception itself."""


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, with its type where it is not one of our own.

    A line that ends with a colon only announces the next one, which is then said too.
    """
    lines = [words for line in str(error).splitlines() if (words := " ".join(line.split()))]
    text = " ".join(lines[: next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines)) + 1])
    if type(error).__module__.startswith("nextstate."):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class PathError(Exception):
    """A file or folder cannot be read or written; the message is one line that names it, and says what to do."""


def path_error(error: OSError, path: object = None) -> PathError:
    """Return the same said in one line.

    Args:
        error: what the system, or a library, says.
        path: what was being written; by default the file that the error names, where it does.

    >>> print(path_error(OSError(errno.ENOSPC, "No space left on device"), "runs/short/report.html"))
    runs/short/report.html: no space left on device; free some space, and give the same command again
    """
    number = error.errno or next((n for n, kind in _KINDS.items() if isinstance(error, kind)), None)
    named = path or error.filename2 or error.filename
    words = error.strerror or one_line(error).removeprefix(f"{type(error).__name__}: ")
    if named and number and not error.errno:  # words of a library, which name a file of its own
        words = os.strerror(number)
    what = f"{named}: {words[:1].lower()}{words[1:]}" if named else words
    return PathError(f"{what}; {ADVICE.get(number or 0, 'see whether the disk can be read and written')}")


def of_a_path(error: OSError) -> bool:
    """Tell whether the error is about a file or a folder, and not about a network, say."""
    return error.filename is not None or error.errno in ADVICE or isinstance(error, tuple(_KINDS.values()))


def guarded(
    do: Callable[[], T],
    told: Callable[[BaseException], str] = one_line,
    passing: tuple[type[Exception], ...] = (AgentError, GameError),
) -> T:
    """Call `do` and return what it returns; the one place where any exception is caught.

    Args:
        do: runs code of a model, or of the libraries below it.
        told: makes the message from an exception.
        passing: exceptions that already say what is wrong; they go through as they are.

    Raises:
        Broken: anything else was raised. What is no `Exception` goes through: Ctrl-C still stops a run.
    """
    try:
        return do()
    except passing:
        raise
    except Exception as error:  # one model must not take the others with it, whatever it raises
        raise Broken(told(error)) from error
