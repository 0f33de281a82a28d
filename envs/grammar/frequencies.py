"""How often what occurs in the strings of a grammar: all that a reader can use who has seen no token, or only the last.

Exact, by expected numbers: of each symbol in a string, of each terminal under it, of each pair of tokens side by side.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from nextstate.envs.grammar.grammar import Grammar


class Frequencies(NamedTuple):
    """Expected numbers in a string; t is the last token read, a symbol a is counted once for each token under it.

    `pairs` has the shape [T + 1, T + 1]: what follows what, where index T is the end, before and after a string.
    `under` has for each level the shape [symbols, T]: tokens t with that ancestor. `ends` has the shape [levels, T]:
    tokens t that are the last one of their ancestor.
    """

    pairs: np.ndarray
    under: tuple[np.ndarray, ...]
    ends: np.ndarray


@lru_cache(maxsize=64)
def frequencies(grammar: Grammar) -> Frequencies:
    """Return the expected numbers of a grammar."""
    many, first = len(grammar.terminals), grammar.first[-1]
    begins, closes, holds = (np.zeros((len(grammar.symbols), many)) for _ in range(3))
    for table in (begins, closes, holds):
        table[first:] = np.eye(many)
    for a in range(first - 1, -1, -1):
        for right, p in grammar.expansions[a]:
            begins[a] += p * begins[right[0]]
            closes[a] += p * closes[right[-1]]
            holds[a] += p * sum(holds[child] for child in right)
    uses = np.zeros(len(grammar.symbols))
    uses[0] = 1
    pairs = np.zeros((many + 1, many + 1))
    pairs[many, :many], pairs[:many, many] = begins[0], closes[0]
    for a in range(first):
        for right, p in grammar.expansions[a]:
            for child in right:
                uses[child] += p * uses[a]
            for left, after in pairwise(right):
                pairs[:many, :many] += p * uses[a] * np.outer(closes[left], begins[after])
    levels = [slice(low, low + len(level)) for low, level in zip(grammar.first, grammar.levels, strict=True)]
    under = tuple([uses[level, None] * holds[level] for level in levels])
    return Frequencies(pairs, under, np.array([uses[level] @ closes[level] for level in levels]))
