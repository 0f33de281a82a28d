"""Convert exceptions from models and libraries into errors with a one-line message."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nextstate.agents.agent import AgentError
from nextstate.envs.game import GameError

T = TypeVar("T")


class Broken(AgentError):
    """An unexpected failure. The message is one line; `__cause__` is the original exception."""


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, prefixed with the type unless nextstate defines it.

    If a line ends with a colon, the next line is included.
    """
    lines = [words for line in str(error).splitlines() if (words := " ".join(line.split()))]
    text = " ".join(lines[: next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines)) + 1])
    if type(error).__module__.startswith("nextstate."):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def guarded(
    do: Callable[[], T],
    describe: Callable[[BaseException], str] = one_line,
    passing: tuple[type[Exception], ...] = (AgentError, GameError),
) -> T:
    """Call `do` and return its result; the only place that catches every exception.

    Args:
        do: the function to call, which may run code of a model or of third-party libraries.
        describe: returns the message for an exception.
        passing: exception types that are re-raised unchanged, since their messages are already clear.

    Raises:
        Broken: `do` raised any other `Exception`. `KeyboardInterrupt` and `SystemExit` are not caught.
    """
    try:
        return do()
    except passing:
        raise
    except Exception as error:  # a failure of one model must not stop the others
        raise Broken(describe(error)) from error
