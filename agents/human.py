"""A person as an agent and as a player: sees the story in the terminal, answers or gives commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from nextstate.agents.agent import Agent, Prediction, Prompt, from_belief
from nextstate.agents.play import Player, View
from nextstate.envs.game import one_hot

STOP = ("q", "quit", "exit")
_NAMED = 5  # commands that a question lists; of more it says how many there are


class GivenUp(Exception):
    """A person wants to stop."""


class Human(Agent):
    """Asks a person, who may give a part of the answer that no other has; case does not count.

    An answer that is none of the choices is asked again; "q" and "quit" raise `GivenUp` unless they are a choice.
    """

    name = kind = "human"

    def __init__(self, console: Console, ask: Callable[[str], str]) -> None:
        self.console, self.ask = console, ask

    def predict(self, prompts: Sequence[Prompt]) -> list[Prediction]:
        return [self._answer(p) for p in prompts]

    def _answer(self, prompt: Prompt) -> Prediction:
        question = prompt.asked
        words = [c.strip() for c in question.choices]
        folded = [w.casefold() for w in words]
        while True:
            typed = self.ask(f"{question.stem.strip() or 'Next'} … ").strip()
            meant = typed.casefold()
            if meant in STOP and meant not in folded:
                raise GivenUp
            found = [i for i, w in enumerate(folded) if w == meant] or [i for i, w in enumerate(folded) if meant in w]
            if len(found) == 1:
                return from_belief(one_hot(len(words), found[0]), question, 0.0)
            self.console.print(Text(f"{typed!r} is none of: {', '.join(words)}", style="yellow"))


class HumanPlayer(Player):
    """Asks a person for commands: in words, as the beginning of one command alone, or by number.

    "?" lists the commands, "q" and "quit" raise `GivenUp`. What is no command is asked again, and costs nothing.
    """

    name = "human"

    def __init__(self, console: Console, ask: Callable[[str], str]) -> None:
        self.console, self.ask = console, ask

    def choose(self, views: Sequence[View]) -> list[str]:
        return [self._command(v.commands) for v in views]

    def _command(self, commands: Sequence[str]) -> str:
        while True:
            typed = " ".join(self.ask("> ").split()).casefold()
            if typed in STOP and typed not in map(str.casefold, commands):
                raise GivenUp
            found = meant(typed, commands)
            if len(found) == 1:
                return found[0]
            if typed == "?":
                width = len(str(len(commands)))
                for number, command in enumerate(commands, start=1):
                    self.console.print(Text(f"{number:>{width}}  {command}", style="cyan"))
            elif found and typed:
                few = ", ".join(found[:_NAMED]) + (f" or {len(found) - _NAMED} others" if len(found) > _NAMED else "")
                self.console.print(Text(f"Which one: {few}?", style="yellow"))
            else:
                self.console.print(Text("That is no command here. ? lists what is, q quits.", style="yellow"))


def meant(typed: str, commands: Sequence[str]) -> list[str]:
    """Return the commands that `typed` may mean: that one, the one of that number (from 1), or all that begin so.

    >>> meant("take w", ["take whisk", "take fork", "go west"])
    ['take whisk']
    """
    typed = typed.casefold()
    exact = [c for c in commands if c.casefold() == typed]
    if not exact and typed.isdecimal() and 0 < int(typed) <= len(commands):
        return [commands[int(typed) - 1]]
    return exact or [c for c in commands if c.casefold().startswith(typed)]
