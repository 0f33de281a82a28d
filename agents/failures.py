"""Turn whatever goes wrong inside a model into one line that says which, why and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nextstate.agents.agent import AgentError
from nextstate.envs.game import GameError

T = TypeVar("T")


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
