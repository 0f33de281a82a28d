"""Reference agents: the ideal reader, the lookup reader, chance, and the shortcuts of each game."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from nextstate.agents.agent import Agent, Prediction, Prompt, from_belief
from nextstate.envs.game import Distribution

READERS = ("ideal", "lookup", "chance")


class Reference(Agent):
    """Answers with the most probable choice according to one of the game's readers.

    Ties are broken uniformly by a hash of belief, seed, step and question, so that answers are reproducible.

    Args:
        belief: "ideal", "lookup", "chance", or one of a game's `shortcuts`.
    """

    def __init__(self, belief: str) -> None:
        self.belief = belief
        self.kind = belief if belief in READERS else "shortcut"
        self.name = belief if belief == self.kind else f"shortcut:{belief}"

    def predict(self, prompts: Sequence[Prompt]) -> Sequence[Prediction]:
        beliefs: dict[int, list[list[Distribution]]] = {}
        out = []
        for prompt in prompts:
            episode = prompt.episode
            if id(episode) not in beliefs:
                beliefs[id(episode)] = episode.beliefs(self.belief)
            tie = crc32(f"{self.belief} {episode.seed} {prompt.step} {prompt.question}".encode()) / 2**32
            out.append(from_belief(beliefs[id(episode)][prompt.step][prompt.question], prompt.asked, tie))
        return out
