"""Reference agents: the ideal reader, the lookup reader, chance, and the shortcuts of each game."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from zlib import crc32

import numpy as np

from nextstate.agents.agent import Agent, Predictions, Prompt, most_likely
from nextstate.agents.columns import Asked, distinct, spread
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

    def predict(self, prompts: Sequence[Prompt]) -> Predictions:
        asked = Asked.of(prompts)
        beliefs, kind = distinct(asked.beliefs(self.belief))  # readers have few beliefs again and again
        read = [_read(belief) for belief in beliefs]
        sizes, ties = (np.array([len(r[i]) for r in read], dtype=np.int64) for i in (0, 1))
        logs, best = (np.array([x for r in read for x in r[i]], dtype=t) for i, t in ((0, np.float64), (1, np.int64)))
        many = ties[kind]
        pick = (np.cumsum(ties) - ties)[kind]
        tied = np.flatnonzero(many > 1)
        pick[tied] += (self._draws(asked, tied.tolist()) * many[tied]).astype(np.int64)
        chosen, counts = best[pick], sizes[kind]
        flat = logs[spread((np.cumsum(sizes) - sizes)[kind], counts)]
        return Predictions(asked.questions, chosen, chosen, chosen, chosen, flat)

    def _draws(self, asked: Asked, which: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return for some prompts a number in [0, 1), from the CRC-32 of belief, seed, step and question."""
        heads = [crc32(f"{self.belief} {e.seed} ".encode()) for e in asked.episodes]
        names, at = asked.names, asked.at.tolist()
        return np.array([crc32(names[i], heads[at[i]]) for i in which], dtype=np.float64) / 2**32


@lru_cache(maxsize=4096)
def _read(belief: Distribution) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return the logarithms of a belief, and the indices of its most probable choices."""
    return tuple([math.log(p) if p > 0 else -math.inf for p in belief]), tuple(most_likely(belief))
