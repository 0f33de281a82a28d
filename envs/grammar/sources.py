"""Sources of grammars: published ones, files, random grammars, and grammars with hidden terminals."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from math import perm
from pathlib import Path

import numpy as np

from nextstate.envs.game import GameError, require, require_whole
from nextstate.envs.grammar.grammar import Grammar, Rule

PUBLISHED = ("cfg3b", "cfg3i", "cfg3h", "cfg3g", "cfg3f", "cfg3e1", "cfg3e2", "cfg3j", "cfg3k")
MOST_LEVELS = 12
MOST_SYMBOLS = 1000
LONGEST_FILE = 10_000_000  # characters


@lru_cache(maxsize=len(PUBLISHED))
def published(name: str) -> Grammar:
    """Return a grammar of "Physics of Language Models" by its name there (Part 1, arXiv 2305.13673; j and k Part 4.1).

    Raises:
        GameError: there is no grammar of this name.
    """
    require(name in PUBLISHED, "grammar", name, f"one of {', '.join(PUBLISHED)}")
    text = (files("nextstate.envs.grammar") / "published" / f"{name}.cfg").read_text(encoding="utf-8")
    return Grammar.read(text, unreachable=True)


def read_file(path: str | Path) -> Grammar:
    """Read a file in the notation of `Grammar.read`.

    Raises:
        GameError: the file cannot be read or does not contain a grammar.
    """
    try:
        with open(path, encoding="utf-8") as opened:
            text = opened.read(LONGEST_FILE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise GameError(f"file={str(path)!r} cannot be read: {error}") from error
    if len(text) > LONGEST_FILE:
        raise GameError(f"file={str(path)!r} is too long for a grammar: expected at most {LONGEST_FILE:,} characters")
    try:
        return Grammar.read(text)
    except GameError as error:
        raise GameError(f"file={str(path)!r} is not a grammar: {error}") from error


def random_grammar(
    rng: np.random.Generator,
    levels: int = 4,
    symbols: int = 3,
    rules_min: int = 2,
    rules_max: int = 2,
    length_min: int = 2,
    length_max: int = 3,
    distinct_symbols: bool = False,
    distinct_bodies: bool = True,
) -> Grammar:
    """Draw a layered grammar. Symbols are numbers, terminals from 1 on, the root the last, as published ones have it.

    The number of rules of a symbol is drawn uniformly, and so is the length of each rule, then its symbols. By chance
    a symbol may be in no body (`Grammar.unreachable`).

    Args:
        rng: where to draw from.
        levels: of symbols, root and terminals included, 2 to 12.
        symbols: at each level but the root's.
        rules_min: the fewest rules of a symbol.
        rules_max: the most.
        length_min: of a rule.
        length_max: of a rule.
        distinct_symbols: no symbol twice in a rule.
        distinct_bodies: no body twice at a level, so that a body tells whose it is. (A symbol never has one twice.)

    Raises:
        GameError: an argument is out of range, or there are not that many different bodies.
    """
    require_whole("levels", levels, 2, MOST_LEVELS)
    require_whole("symbols", symbols, 1, MOST_SYMBOLS)
    require_whole("rules_min", rules_min, 1, 1000)
    require_whole("rules_max", rules_max, rules_min, 1000)
    require_whole("length_min", length_min, 1, 10)
    require_whole("length_max", length_max, length_min, 10)
    lengths = range(length_min, length_max + 1)
    possible = {k: perm(symbols, k) if distinct_symbols else symbols**k for k in lengths}
    owners = symbols if distinct_bodies and levels > 2 else 1
    require(
        owners * rules_max <= sum(possible.values()),
        "rules_max",
        rules_max,
        f"at most {sum(possible.values()) // owners}, since there are {sum(possible.values())} different bodies",
    )

    first = 1  # number of the first symbol of the level below
    lines: list[list[Rule]] = []
    for level in range(levels - 1, 0, -1):
        below = [str(first + i) for i in range(symbols)]
        first += symbols
        used: set[tuple[str, ...]] = set()
        rows: list[Rule] = []
        for i in range(symbols if level > 1 else 1):
            if not distinct_bodies:
                used = set()
            for _ in range(int(rng.integers(rules_min, rules_max + 1))):
                body = _draw(rng, below, possible, used, distinct_symbols)
                used.add(body)
                rows.append(Rule(str(first + i), body))
        lines.append(rows)
    return Grammar(tuple([rule for rows in lines[::-1] for rule in rows]))


def _draw(
    rng: np.random.Generator, below: list[str], possible: dict[int, int], used: set[tuple[str, ...]], distinct: bool
) -> tuple[str, ...]:
    """Draw a body that is not used yet: its length first, of those that have one left."""
    left = [k for k, many in possible.items() if many > sum(len(body) == k for body in used)]
    k = left[int(rng.integers(len(left)))]
    while True:
        picked = rng.permutation(len(below))[:k] if distinct else rng.integers(len(below), size=k)
        body = tuple([below[i] for i in picked.tolist()])
        if body not in used:
            return body


def implicit(
    grammar: Grammar, rng: np.random.Generator, vocabulary: int, overlap: bool = False, skewed: bool = False
) -> Grammar:
    """Hide the terminals: each becomes a bag of observable tokens, from which one is drawn wherever it occurs.

    This is the grammar with one more level, w1, w2, ...; nothing else has to know (Part 1, Result 10).

    Args:
        grammar: whose terminals are hidden.
        rng: where overlapping bags are drawn from.
        vocabulary: number of tokens, at least one for each terminal.
        overlap: each bag is made of 1.5 V / T draws with replacement from all V tokens, each counted once; tokens in no
            bag are left out. Otherwise bags are disjoint, and token i belongs to terminal i mod T.
        skewed: the tokens of a bag weigh 1, 2, 3, ...; otherwise they are drawn alike.
    """
    terminals = grammar.terminals
    require_whole("vocabulary", vocabulary, len(terminals), 100_000)
    rules = list(grammar.rules)
    for k, terminal in enumerate(terminals):
        bag = list(range(k, vocabulary, len(terminals)))
        if overlap:
            bag = sorted(set(rng.integers(vocabulary, size=max(1, 3 * vocabulary // (2 * len(terminals)))).tolist()))
        rules += [Rule(terminal, (f"w{i + 1}",), j if skewed else 1.0) for j, i in enumerate(bag, start=1)]
    return Grammar(tuple(rules))
