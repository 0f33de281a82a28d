"""Derivations from left to right, one token at a time: where a token stands, and where the next one can.

A place is, for each level from the root down to the terminals' parents, which rule was chosen there and which of its
symbols is being written. A rule is chosen when its symbol begins, so the place of the last token is all that the rest
of the string depends on.
"""

from __future__ import annotations

from functools import lru_cache

from nextstate.envs.grammar.grammar import Grammar

Place = tuple[tuple[int, int], ...]  # (rule, symbol of its body), both from 0


@lru_cache(maxsize=65536)
def ancestors(grammar: Grammar, place: Place) -> tuple[int, ...]:
    """Return the symbol of each level, from the root to the token itself, by the numbers of `Grammar.symbols`."""
    out = [0]
    for rule, k in place:
        out.append(grammar.expansions[out[-1]][rule].right[k])
    return tuple(out)


@lru_cache(maxsize=65536)
def ends(grammar: Grammar, place: Place) -> tuple[bool, ...]:
    """Return for each level whether its symbol ends with the token."""
    out = [True]
    for a, (rule, k) in zip(ancestors(grammar, place)[-2::-1], place[::-1], strict=True):
        out.append(out[-1] and k + 1 == len(grammar.expansions[a][rule].right))
    return tuple(out[::-1])


@lru_cache(maxsize=512)
def following(grammar: Grammar, place: Place) -> tuple[Place, ...]:
    """Return the places that the next token can have, of the first one after the empty place; () after the last."""
    begun = _resume(grammar, place)
    if begun is None:
        return ()
    kept, a = begun
    out = [(kept, a)]
    while out[0][1] < grammar.first[-1]:
        out = [
            ((*so_far, (rule, 0)), right[0])
            for so_far, symbol in out
            for rule, (right, _) in enumerate(grammar.expansions[symbol])
        ]
    return tuple([each for each, _ in out])


def draw(grammar: Grammar, place: Place, u: float) -> Place | None:
    """Turn a uniform draw `u` in [0, 1) into the place of the next token; None after the last."""
    begun = _resume(grammar, place)
    if begun is None:
        return None
    kept, a = begun
    while a < grammar.first[-1]:
        expansions = grammar.expansions[a]
        rule = 0
        while rule < len(expansions) - 1 and u >= expansions[rule].p:
            u -= expansions[rule].p
            rule += 1
        u /= expansions[rule].p  # what is left of it, again uniform
        kept, a = (*kept, (rule, 0)), expansions[rule].right[0]
    return kept


def chosen(grammar: Grammar, place: Place, after: Place) -> tuple[int, ...]:
    """Return the rules, from 0, that were chosen for the token at `after` when `place` was that of the last one."""
    begun = _resume(grammar, place)
    return tuple([rule for rule, _ in after[len(begun[0]) :]]) if begun else ()


def _resume(grammar: Grammar, place: Place) -> tuple[Place, int] | None:
    """Return the place as far as it is settled for the token after `place`, and the symbol that begins there."""
    if not place:
        return (), 0
    symbols = ancestors(grammar, place)
    for level in range(len(place) - 1, -1, -1):
        rule, k = place[level]
        right = grammar.expansions[symbols[level]][rule].right
        if k + 1 < len(right):
            return (*place[:level], (rule, k + 1)), right[k + 1]
    return None
