"""Derivations of strings as labels of their tokens, and many of them drawn at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nextstate.envs.game import require_whole
from nextstate.envs.grammar.grammar import Grammar


@dataclass(frozen=True, eq=False)
class Derivation:
    """The derivation of a string of n tokens: the ancestor of each token i at each level l, with levels from the root.

    Args:
        symbols: s_l(i), the symbol of the ancestor (index into `Grammar.levels[l - 1]`); shape [levels, n].
        index: p_l(i), the position of the ancestor among those of its level, from 1; shape [levels, n].
    """

    symbols: np.ndarray
    index: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """The string, as indices of terminals; shape [n]."""
        tokens: np.ndarray = self.symbols[-1]
        return tokens

    @cached_property
    def ends(self) -> np.ndarray:
        """b_l(i), whether i is the last token of its ancestor; shape [levels, n]."""
        last = np.ones((len(self.index), 1), dtype=bool)
        return np.concatenate([self.index[:, 1:] != self.index[:, :-1], last], axis=1)

    @cached_property
    def highest(self) -> np.ndarray:
        """b#(i), the level nearest to the root (from 2) whose symbol ends with token i; shape [n].

        It equals the number of levels if nothing but the token itself ends.
        """
        levels: np.ndarray = np.argmax(self.ends[1:], axis=0) + 2
        return levels


Change = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


def sample(grammar: Grammar, rng: np.random.Generator, n: int, change: Change | None = None) -> list[Derivation]:
    """Draw `n` strings with their derivations, all at once: level by level, each symbol by one of its rules.

    Args:
        grammar: the grammar.
        rng: the generator to draw from.
        n: number of strings.
        change: function of a level (from 2), its symbols (indices into the level) and the string of each (from 0) that
            returns replacements for the symbols. The levels below are derived from the replacements.
    """
    require_whole("n", n, 1, 10_000_000)
    symbols = [np.zeros(n, dtype=np.int64)]  # of each level, all strings after each other
    parents, strings = [np.zeros(n, dtype=np.int64)], [np.arange(n)]
    for level in range(1, len(grammar.levels)):
        now = symbols[-1]
        rule, lengths, bodies = _draw_rules(grammar, level, now, rng)
        parent = np.repeat(np.arange(len(now)), lengths)
        offset = np.arange(len(parent)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        parents.append(parent)
        strings.append(strings[-1][parent])
        below = bodies[now[parent], rule[parent], offset]
        symbols.append(change(level + 1, below, strings[-1]) if change else below)
    at = np.arange(len(symbols[-1]))
    rows, index = [], []
    for now, parent, string in zip(symbols[::-1], parents[::-1], strings[::-1], strict=True):
        rows.append(now[at])
        index.append(at - np.searchsorted(string, string[at]) + 1)
        at = parent[at]
    cuts = np.searchsorted(strings[-1], np.arange(1, n))
    labels = [np.split(np.stack(each[::-1]), cuts, axis=1) for each in (rows, index)]
    return [Derivation(s, p) for s, p in zip(*labels, strict=True)]


def _draw_rules(
    grammar: Grammar, level: int, now: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a rule for each symbol of a level; return it, its length, and all bodies by symbol, rule and position."""
    first, below = grammar.first[level - 1], grammar.first[level]
    own = grammar.expansions[first:below]
    most = max(map(len, own))
    bodies = np.zeros((len(own), most, max(len(right) for e in own for right, _ in e)), dtype=np.int64)
    lengths = np.zeros((len(own), most), dtype=np.int64)
    u, rule = rng.random(len(now)), np.zeros(len(now), dtype=np.int64)
    for a, expansions in enumerate(own):
        for r, (right, _) in enumerate(expansions):
            bodies[a, r, : len(right)] = np.array(right) - below
            lengths[a, r] = len(right)
        mine = np.flatnonzero(now == a)
        edges = np.cumsum([p for _, p in expansions])[:-1]  # without the last, which may be just below 1
        rule[mine] = np.searchsorted(edges, u[mine], side="right")
    return rule, lengths[now, rule], bodies
