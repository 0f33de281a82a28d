"""Agents to measure against: the ideal reader, chance, and the cheap shortcuts of each game."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from nextstate.agents.agent import Agent, Prediction, Prompt, from_belief
from nextstate.envs.game import Distribution, Game

SHORTCUT = "shortcut:"


class Reference(Agent):
    """Answers from what a game's reader believes: "ideal", "chance", or "shortcut:NAME".

    Ties are broken by a hash of name, seed, step and question: evenly, yet alike in every batch and on every machine.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.belief = name.removeprefix(SHORTCUT)

    def predict(self, prompts: Sequence[Prompt]) -> list[Prediction]:
        beliefs: dict[int, list[list[Distribution]]] = {}
        out = []
        for prompt in prompts:
            episode = prompt.episode
            if id(episode) not in beliefs:
                beliefs[id(episode)] = episode.beliefs(self.belief)
            tie = crc32(f"{self.belief} {episode.seed} {prompt.step} {prompt.question}".encode()) / 2**32
            out.append(from_belief(beliefs[id(episode)][prompt.step][prompt.question], prompt.asked, tie))
        return out


def references(game: type[Game] | Game, shortcuts: bool = True) -> list[Reference]:
    """Return the ideal reader, chance, and the shortcuts of a game."""
    names = ["ideal", "chance"] + [SHORTCUT + s for s in game.shortcuts if shortcuts]
    return [Reference(name) for name in names]
