"""A person as an agent or player, who reads the story in the terminal and answers questions or gives commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from nextstate.agents.agent import Agent, Prediction, Prompt, from_belief
from nextstate.agents.play import Player, View
from nextstate.envs.game import one_hot

STOP = ("q", "quit", "exit")
_NAMED = 5  # maximum number of commands listed when the input is ambiguous


class GivenUp(Exception):
    """The person quits."""


class Human(Agent):
    """Asks a person, who may type any part of an answer that no other answer contains; case is ignored.

    If the input matches no choice, the question is repeated; "q" and "quit" raise `GivenUp` unless they are choices.
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
    """Asks a person for commands: by text, by an unambiguous prefix, or by number.

    "?" lists the commands; "q" and "quit" raise `GivenUp`. Unknown commands are asked again and do not count as steps.
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
                self.console.print(Text("Unknown command. ? lists the commands, q quits.", style="yellow"))


def meant(typed: str, commands: Sequence[str]) -> list[str]:
    """Return the commands that `typed` may mean: the same, the one of that number (from 1), or all with that prefix.

    >>> meant("take w", ["take whisk", "take fork", "go west"])
    ['take whisk']
    """
    typed = typed.casefold()
    exact = [c for c in commands if c.casefold() == typed]
    if not exact and typed.isdecimal() and 0 < int(typed) <= len(commands):
        return [commands[int(typed) - 1]]
    return exact or [c for c in commands if c.casefold().startswith(typed)]
