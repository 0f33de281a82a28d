"""Exact beliefs about a string of a known grammar while it is read token by token.

A probabilistic Earley parser (Stolcke 1995, Computational Linguistics 21) for layered grammars, which have no cycles
and so need no closures. It keeps, for each place of the string, the rules that are partly read there: `waiting[m][c]`
are those that wait for a symbol c at place m, with the place i where they began and their inner probability (of the
rule, times that of the tokens from i to m under what of it is read). Every token multiplies them by
1 / P(token | tokens before), so that what is kept stays near 1 however long the string is.

Reading a token goes upwards twice at once. Symbols that are whole with it move the rules that waited for them on.
Symbols that it lies in, whole or not, tell what the token's ancestors may be: the rule of an ancestor waits, where the
child that holds the token begins, for that child. Nothing after the token is needed, as rules sum to 1.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

from nextstate.envs.game import Distribution, GameError
from nextstate.envs.grammar.grammar import Grammar

Part = tuple[int, int, int, int]  # a rule partly read: its symbol, its number there, symbols read, place it began at
Waiting = dict[int, list[tuple[Part, float]]]  # for each symbol the rules that wait for it, with inner probability
KEPT = 1024  # readings
STRIDE = 200  # tokens at most that one reading is made of by recursion


@dataclass(frozen=True, eq=False)
class Posterior:
    """The exact posterior after a prefix of a string.

    Args:
        grammar: it is a string of.
        following: the distribution of what follows: each terminal, then the end.
        ancestors: for each level, from the root, the distribution of which symbol of it the last token belongs to; ()
            before the first token.
        ends: for each level the probability that the last token is the last one of that ancestor.
        waiting: for each place so far the rules that are partly read there.
        begun: for each place, and symbol, the probability that such a symbol begins there.
    """

    grammar: Grammar
    following: Distribution
    ancestors: tuple[Distribution, ...]
    ends: tuple[float, ...]
    waiting: tuple[Waiting, ...]
    begun: tuple[dict[int, float], ...]

    @classmethod
    def start(cls, grammar: Grammar) -> Posterior:
        """Return the posterior before the first token."""
        waiting, begun = _predict(grammar, (), {0: 1.0}, 0, defaultdict(list))
        return cls(grammar, _following(grammar, begun, 0.0), (), (), (waiting,), (begun,))

    @property
    def complete(self) -> float:
        """The probability that the string ends here."""
        return self.following[-1]

    def read(self, token: int) -> Posterior:
        """Return the posterior after one more token, the index of a terminal.

        Raises:
            GameError: no string of the grammar continues with this token.
        """
        grammar, at = self.grammar, len(self.waiting)
        known = self.following[token] if 0 <= token < len(grammar.terminals) else 0.0
        if not known:
            raise GameError(f"token {at} is {token}: no string of this grammar has it there; see Posterior.following")
        leaf = grammar.first[-1] + token
        # For each symbol: where it may have begun, if it is whole here, and if it holds the token at all.
        whole: dict[int, dict[int, float]] = {leaf: {at - 1: 1 / known}}
        holds: dict[int, dict[int, float]] = {leaf: {at - 1: 1 / known}}
        waiting: Waiting = defaultdict(list)
        ancestors, ends = [], []
        for level in range(len(grammar.levels), 0, -1):
            names = range(grammar.first[level - 1], grammar.first[level - 1] + len(grammar.levels[level - 1]))
            ancestors.append(tuple([self._outside(holds.get(a, {}), a) for a in names]))
            ends.append(sum([self._outside(whole.get(a, {}), a) for a in names], 0.0))
            if level > 1:
                whole, holds = self._upwards(whole, holds, waiting)
        waiting, begun = _predict(grammar, self.begun, {}, at, waiting)
        end = whole.get(0, {}).get(0, 0.0)
        beliefs = tuple([_normal(row) for row in ancestors[::-1]])
        following = _following(grammar, begun, end)
        return Posterior(grammar, following, beliefs, tuple(ends[::-1]), (*self.waiting, waiting), (*self.begun, begun))

    def _outside(self, origins: dict[int, float], a: int) -> float:
        return sum([p * self.begun[i][a] for i, p in origins.items()], 0.0)

    def _upwards(
        self, whole: dict[int, dict[int, float]], holds: dict[int, dict[int, float]], waiting: Waiting
    ) -> tuple[dict[int, dict[int, float]], dict[int, dict[int, float]]]:
        """Go from the symbols of a level to those above; put rules that wait for more into `waiting`."""
        above: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        around: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        moved: dict[Part, float] = defaultdict(float)
        for child, origins in holds.items():
            done = whole.get(child, {})
            for m, p in origins.items():
                for (a, rule, k, i), inner in self.waiting[m].get(child, ()):
                    around[a][i] += inner * p
                    if m in done:
                        moved[a, rule, k + 1, i] += inner * done[m]
        for part, inner in moved.items():
            a, rule, k, i = part
            right = self.grammar.expansions[a][rule].right
            if k == len(right):
                above[a][i] += inner
            else:
                waiting[right[k]].append((part, inner))
        return above, around


def _predict(
    grammar: Grammar, begun: tuple[dict[int, float], ...], now: dict[int, float], at: int, waiting: Waiting
) -> tuple[Waiting, dict[int, float]]:
    """Add the symbols that may begin at place `at`, from the root down, and their rules, of which nothing is read."""
    chance: dict[int, float] = defaultdict(float, now)
    for a in range(len(grammar.symbols)):  # parents come before children
        for (parent, _, _, i), inner in waiting.get(a, ()):
            if i < at:
                chance[a] += begun[i][parent] * inner
        p = chance.get(a)
        if p:
            for rule, (right, share) in enumerate(grammar.expansions[a]):
                waiting[right[0]].append(((a, rule, 0, at), share))
                chance[right[0]] += p * share
    return dict(waiting), dict(chance)


def _following(grammar: Grammar, begun: dict[int, float], end: float) -> Distribution:
    first = grammar.first[-1]
    return _normal((*[begun.get(first + t, 0.0) for t in range(len(grammar.terminals))], end))


def _normal(row: tuple[float, ...]) -> Distribution:
    """Return a distribution that sums to 1 but for rounding, without what rounding has added up."""
    total = sum(row)
    return tuple([p / total for p in row])


@lru_cache(maxsize=KEPT)
def read(grammar: Grammar, tokens: tuple[int, ...]) -> Posterior:
    """Return the posterior after `tokens`; fast if the posterior of all but the last token is in the cache.

    Raises:
        GameError: no string of the grammar begins with them.
    """
    if not tokens:
        return Posterior.start(grammar)
    for k in range(STRIDE, len(tokens), STRIDE):  # so that recursion stays shallow
        read(grammar, tokens[:k])
    return read(grammar, tokens[:-1]).read(tokens[-1])
