"""How large a grammar is: lengths, bits, strings, derivations, states; exact, by recursion over its symbols."""

from __future__ import annotations

import math
from functools import reduce
from itertools import product

import numpy as np

from nextstate.envs.grammar.grammar import Grammar


def bounds(grammar: Grammar) -> tuple[tuple[int, int], ...]:
    """Return for each symbol the shortest and the longest length of what it is rewritten to."""
    out = [(1, 1)] * len(grammar.symbols)
    for a in _upwards(grammar):
        sums = [[sum(out[c][k] for c in right) for k in (0, 1)] for right, _ in grammar.expansions[a]]
        out[a] = min(low for low, _ in sums), max(high for _, high in sums)
    return tuple(out)


def length_distribution(grammar: Grammar) -> np.ndarray:
    """Return the probability of each length, from 0 to the longest one."""
    of: list[np.ndarray] = [np.array([0.0, 1.0])] * len(grammar.symbols)
    for a in _upwards(grammar):
        rows = [p * reduce(np.convolve, [of[c] for c in right]) for right, p in grammar.expansions[a]]
        total = np.zeros(max(map(len, rows)))
        for row in rows:
            total[: len(row)] += row
        of[a] = total
    return of[0]


def length_moments(grammar: Grammar) -> tuple[float, float]:
    """Return mean and standard deviation of the length of a string."""
    p = length_distribution(grammar)
    k = np.arange(len(p))
    mean = float(k @ p)
    return mean, math.sqrt(float((k - mean) ** 2 @ p))


def derivation_bits(grammar: Grammar) -> float:
    """Return the entropy of the derivation of a string, in bits; that of the string is no larger."""
    bits = [0.0] * len(grammar.symbols)
    for a in _upwards(grammar):
        bits[a] = sum(p * (sum(bits[c] for c in right) - math.log2(p)) for right, p in grammar.expansions[a])
    return bits[0]


def collision(grammar: Grammar) -> float:
    """Return the probability that two derivations are the same; that two strings are is no less."""
    same = [1.0] * len(grammar.symbols)
    for a in _upwards(grammar):
        same[a] = sum(p * p * math.prod(same[c] for c in right) for right, p in grammar.expansions[a])
    return same[0]


def n_derivations(grammar: Grammar) -> int:
    """Return the number of derivations of whole strings; as many as strings where none has two of them."""
    return _derivations(grammar)[0]


def n_strings(grammar: Grammar, limit: int = 100_000) -> int | None:
    """Return the number of different strings by listing them; None where some symbol has over `limit` derivations."""
    if any(many > limit for many in _derivations(grammar)):
        return None
    of: list[set[tuple[int, ...]]] = [{(a,)} for a in range(len(grammar.symbols))]
    for a in _upwards(grammar):
        bodies = [product(*[of[c] for c in right]) for right, _ in grammar.expansions[a]]
        of[a] = {tuple([t for part in parts for t in part]) for body in bodies for parts in body}
    return len(of[0])


def n_states(grammar: Grammar) -> int:
    """Return the number of ways in which a derivation can have come to a token, left to right, and 1 for none yet.

    These are the states of the game: each is the derivation so far, all rules chosen that were needed to get there.
    """
    whole = _derivations(grammar)
    part = [1] * len(grammar.symbols)
    for a in _upwards(grammar):
        part[a] = 0
        for right, _ in grammar.expansions[a]:
            before = 1
            for child in right:
                part[a] += before * part[child]
                before *= whole[child]
    return 1 + part[0]


def n_beginnings(grammar: Grammar) -> int:
    """Return the number of ways in which a derivation can come to the first token."""
    ways = [1] * len(grammar.symbols)
    for a in _upwards(grammar):
        ways[a] = sum(ways[right[0]] for right, _ in grammar.expansions[a])
    return ways[0]


def n_places(grammar: Grammar) -> int:
    """Return the number of places that a token can have in a derivation: on each level a rule and a position in it.

    With the place of the last token the future is independent of what came before: these are the states of the hidden
    Markov chain whose tokens are the string.
    """
    places = [1] * len(grammar.symbols)
    for a in _upwards(grammar):
        places[a] = sum(places[child] for right, _ in grammar.expansions[a] for child in right)
    return places[0]


def _derivations(grammar: Grammar) -> list[int]:
    many = [1] * len(grammar.symbols)
    for a in _upwards(grammar):
        many[a] = sum(math.prod(many[child] for child in right) for right, _ in grammar.expansions[a])
    return many


def _upwards(grammar: Grammar) -> range:
    """Return the numbers of the symbols that have rules, children before parents."""
    return range(grammar.first[-1] - 1, -1, -1)
