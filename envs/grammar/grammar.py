"""Layered context-free grammars, their notation, and what makes one a grammar."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import numpy as np

from nextstate.envs.game import GameError

_SYMBOL = re.compile(r"[^\s|()#]+")
_BODY = re.compile(r"\s*(?P<symbols>[^()\s][^()]*?)\s*(?:\((?P<weight>[^()]*)\))?\s*")


class Rule(NamedTuple):
    """A symbol of one level, and what it may be rewritten to, symbols of the next; drawn in proportion to `weight`."""

    left: str
    right: tuple[str, ...]
    weight: float = 1.0


class Expansion(NamedTuple):
    """A rule of a symbol, by the numbers of symbols in `Grammar.symbols`, with its probability among those rules."""

    right: tuple[int, ...]
    p: float


@dataclass(frozen=True)
class Grammar:
    """A layered context-free grammar: each rule rewrites a symbol of level l to symbols of level l + 1.

    The root is the left side of the first rule, level 1; terminals are the symbols without rules, level L. Levels are
    counted as in "Physics of Language Models: Part 1" (arXiv 2305.13673): L levels of symbols, L - 1 rewritings.

    Symbols that cannot be reached from the root are kept (a published grammar has some) and listed by `unreachable`;
    they occur in no string. `read` rejects them by default, since in a file they are probably a mistake.

    Raises:
        GameError: there is no rule, a rule comes twice or has no positive weight, symbols lead back to themselves,
            or levels do not hold; the message names the symbols.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise GameError("this grammar has no rules: expected at least one, such as 1 -> a b")
        seen: set[tuple[str, tuple[str, ...]]] = set()
        for left, right, weight in self.rules:
            rule = f"{left} -> {' '.join(right)}"
            if not right or not all(_SYMBOL.fullmatch(s) and s != "->" for s in (left, *right)):
                raise GameError(f"rule {rule!r} is not possible: expected symbols without spaces, |, (, ), # and ->")
            if (left, right) in seen:
                raise GameError(f"rule {rule!r} comes twice: give it once, with a weight, such as {rule} (2)")
            if not 0 < weight < float("inf"):
                raise GameError(f"rule {rule!r} has weight {weight!r}: expected a number above 0")
            seen.add((left, right))
        _ = self.levels  # refuses what is not layered

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.rules)

    def __reduce__(self) -> tuple[type[Grammar], tuple[tuple[Rule, ...]]]:
        return Grammar, (self.rules,)  # without what is kept for speed: hashes differ from process to process

    @classmethod
    def read(cls, text: str, unreachable: bool = False) -> Grammar:
        """Read the notation that `str` writes: one symbol a line, `22 -> 21 20 | 20 19`, the root first.

        A weight may follow a body, in brackets: `1 -> a (1) | b (2)`. What follows a # is a comment. A symbol may have
        several lines.

        Args:
            text: the grammar.
            unreachable: allow symbols that cannot be reached from the root.

        Raises:
            GameError: a line cannot be parsed (the message has its number), or the rules do not form a grammar.
        """
        rules: list[Rule] = []
        for number, line in enumerate(text.splitlines(), start=1):
            line = line.partition("#")[0].strip()
            if not line:
                continue
            left, arrow, bodies = line.partition("->")
            found = [_BODY.fullmatch(body) for body in bodies.split("|")]
            if not arrow or not all(found):
                raise GameError(
                    f"line {number}, {line!r}, is no rule: expected a symbol, ->, and bodies with | between"
                )
            for body in found:
                assert body is not None
                try:
                    weight = float(body["weight"] or 1)
                except ValueError as error:
                    raise GameError(f"line {number}: weight {body['weight']!r} is no number") from error
                rules.append(Rule(left.strip(), tuple(body["symbols"].split()), weight))
        made = cls(tuple(rules))
        if made.unreachable and not unreachable:
            raise GameError(
                f"unreachable symbols {', '.join(made.unreachable)}: {made.root} does not lead to them; "
                "leave out their rules, or put them into the body of another"
            )
        return made

    def __str__(self) -> str:
        lines: dict[str, list[str]] = {}
        for left, right, weight in self.rules:
            lines.setdefault(left, []).append(
                " ".join(right) + (f" ({str(weight).removesuffix('.0')})" if weight != 1 else "")
            )
        return "".join(f"{left} -> {' | '.join(bodies)}\n" for left, bodies in lines.items())

    @property
    def root(self) -> str:
        """The symbol that every string comes from."""
        return self.rules[0].left

    @cached_property
    def levels(self) -> tuple[tuple[str, ...], ...]:
        """For each level its symbols, in the order of their numbers where they are numbers."""
        bodies: dict[str, list[tuple[str, ...]]] = {}
        for left, right, _ in self.rules:
            bodies.setdefault(left, []).append(right)
        try:
            order = tuple(TopologicalSorter({a: [s for b in bs for s in b] for a, bs in bodies.items()}).static_order())
        except CycleError as error:
            raise GameError(f"symbols lead back to themselves: {' -> '.join(error.args[1][::-1])}") from error
        height: dict[str, int] = {}  # rewritings from a symbol to terminals
        for symbol in order:
            below = {child: height[child] for body in bodies.get(symbol, ()) for child in body}
            height[symbol] = 1 + max(below.values()) if below else 0
            for child, found in below.items():
                if found != height[symbol] - 1:
                    raise GameError(self._unlayered(symbol, child, found, height[symbol] - 1))
        top = height[self.root]
        above = [s for s in order if height[s] >= top and s != self.root]
        if above:
            raise GameError(
                f"unreachable symbols {', '.join(above)}: the root {self.root} (left of the first rule) does not lead "
                "to them, and they are no lower than it"
            )
        return tuple([tuple(sorted((s for s in order if height[s] == h), key=_natural)) for h in range(top, -1, -1)])

    def _unlayered(self, symbol: str, child: str, found: int, expected: int) -> str:
        if not found:
            return (
                f"symbol {child} is not productive: a rule of {symbol} has it, it has no rules, and terminals are "
                f"{expected} levels further down; give it rules"
            )
        return (
            f"not layered: rules of {symbol} lead to {child}, {found} above the terminals, and to symbols {expected} "
            "above them; all that it leads to must be of one level"
        )

    @property
    def terminals(self) -> tuple[str, ...]:
        """The symbols of the last level; strings are arrays of their indices here."""
        return self.levels[-1]

    @cached_property
    def unreachable(self) -> tuple[str, ...]:
        """The symbols that the root does not lead to."""
        reached = {0}
        for a, expansions in enumerate(self.expansions):  # parents come before children
            if a in reached:
                reached.update(child for right, _ in expansions for child in right)
        return tuple([s for a, s in enumerate(self.symbols) if a not in reached])

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """All symbols, level by level from the root, which is number 0."""
        return tuple([s for level in self.levels for s in level])

    @cached_property
    def level_of(self) -> tuple[int, ...]:
        """For each symbol its level, from 1."""
        return tuple([i for i, level in enumerate(self.levels, start=1) for _ in level])

    @cached_property
    def first(self) -> tuple[int, ...]:
        """For each level the number of its first symbol."""
        return tuple(np.cumsum([0, *map(len, self.levels[:-1])]).tolist())

    @cached_property
    def expansions(self) -> tuple[tuple[Expansion, ...], ...]:
        """For each symbol its rules, in the order in which they were given; none for terminals."""
        number = {s: a for a, s in enumerate(self.symbols)}
        own: list[list[Rule]] = [[] for _ in self.symbols]
        for rule in self.rules:
            own[number[rule.left]].append(rule)
        out = []
        for rules in own:
            total = sum(rule.weight for rule in rules)
            out.append(tuple([Expansion(tuple([number[s] for s in r.right]), r.weight / total) for r in rules]))
        return tuple(out)

    def encode(self, words: str | Iterable[str]) -> np.ndarray:
        """Return terminals, in one text or one by one, as their indices; `GameError` names a foreign one."""
        given = words.split() if isinstance(words, str) else list(words)
        known = {s: i for i, s in enumerate(self.terminals)}
        for k, word in enumerate(given, start=1):
            if word not in known:
                raise GameError(f"token {k} is {word!r}: expected one of the terminals {' '.join(self.terminals)}")
        return np.array([known[word] for word in given], dtype=np.int64)

    def decode(self, string: Sequence[int] | np.ndarray) -> str:
        """Return the terminals of these indices, with spaces between."""
        return " ".join([self.terminals[i] for i in string])


def _natural(symbol: str) -> tuple[bool, int, str]:
    number = symbol.isascii() and symbol.isdecimal()
    return not number, int(symbol) if number else 0, symbol
