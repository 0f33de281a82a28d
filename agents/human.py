"""A person as an agent: sees the story in the terminal, answers, is told the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from nextstate.agents.agent import Agent, Prediction, Prompt, from_belief
from nextstate.envs.game import point


class Human(Agent):
    """Asks a person. An answer that is none of the choices is asked again; its first letter in any case will do."""

    name = "human"

    def __init__(self, console: Console, ask: Callable[[str], str]) -> None:
        self.console, self.ask = console, ask

    def predict(self, prompts: Sequence[Prompt]) -> list[Prediction]:
        return [self._answer(p) for p in prompts]

    def _answer(self, prompt: Prompt) -> Prediction:
        question = prompt.asked
        words = [c.strip() for c in question.choices]
        folded = [w.casefold() for w in words]
        while True:
            said = self.ask(f"{question.stem.strip() or 'Next'} … ").strip()
            if said.casefold() in folded:
                index = folded.index(said.casefold())
                return from_belief(point(len(words), index), question, 0.0)
            self.console.print(Text(f"{said!r} is none of: {', '.join(words)}", style="yellow"))
