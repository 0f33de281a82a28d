"""Exact computations on many strings of a grammar at once: membership, parses, probabilities, next tokens.

Strings lie one after another on one axis of places, a string of n tokens on n + 1 of them. For each symbol a there is
one sparse matrix M_a, with M_a[i, j] the probability that a becomes the tokens between places i and j (or the number of
ways, or whether there is one). Upwards M_a is the sum over the rules of a of their probability times the product of the
children's matrices; downwards go the probabilities v_a[i] of the tokens before i and that an a begins there: v_root is
1 where a string begins, and a rule a -> b c d adds p v_a to v_b, p v_a M_b to v_c, p v_a M_b M_c to v_d. At terminals
that is the probability of a prefix and its next token (Lari and Young 1990; Jelinek and Lafferty 1991).

Spans never cross strings and are few, as levels bound their lengths: sparse products do no more work than there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import log, log2
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from nextstate.envs.game import GameError
from nextstate.envs.grammar.derivation import Derivation
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.reading import Posterior
from nextstate.envs.grammar.sizes import derivation_bits, length_moments

PLACES = 20_000  # held at once: what keeps matrices of a few MB each, and shares the cost of a call among strings
EXACT = 2.0**53  # whole numbers below are exact as floats
FLOOR = -1000.0  # bits; float64 is less exact from -1022 on

Strings = Sequence[Sequence[int] | np.ndarray]


class Next(NamedTuple):
    """The distributions of the next token after the prefixes of one string of n tokens.

    `p[k]` is the distribution of what follows its first k tokens: each terminal, then the end; shape [n + 1, T + 1].
    `log_prefix[k]` is the log-probability (in nats) that a string begins with them; shape [n + 1]. Where no string
    does, that is -inf, and the row of `p` is 0.
    """

    p: np.ndarray
    log_prefix: np.ndarray


@dataclass(frozen=True, eq=False)
class Packed:
    """Strings on one axis of places."""

    grammar: Grammar
    tokens: np.ndarray  # of all strings
    lengths: np.ndarray  # of each string

    @cached_property
    def starts(self) -> np.ndarray:
        """The first place of each string."""
        starts: np.ndarray = np.cumsum(self.lengths + 1) - self.lengths - 1
        return starts

    @cached_property
    def before(self) -> np.ndarray:
        """The place before each token."""
        return np.arange(len(self.tokens)) + np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def places(self) -> int:
        """Their number."""
        return len(self.tokens) + len(self.lengths)

    def string(self, k: int) -> np.ndarray:
        """Return the tokens of string `k`."""
        begin = int(self.lengths[:k].sum())
        return self.tokens[begin : begin + int(self.lengths[k])]

    def spans(self, leaf: bool | float, weighted: bool) -> list[csr_array]:
        """Return M_a for each symbol; that of the root has a row for each string, since it begins nowhere else.

        Args:
            leaf: the entry of a token; its type is that of all entries.
            weighted: rules count with their probabilities, otherwise each as 1.
        """
        grammar, dtype = self.grammar, type(leaf)
        shape = self.places, self.places
        out = [csr_array(shape, dtype=dtype)] * len(grammar.symbols)
        for t in range(len(grammar.terminals)):
            at = self.before[self.tokens == t]
            out[grammar.first[-1] + t] = csr_array((np.full(len(at), leaf, dtype), (at, at + 1)), shape)
        made: dict[tuple[int, ...], csr_array] = {}  # products of one level: bodies often begin alike
        for a in range(grammar.first[-1] - 1, -1, -1):
            total = csr_array((len(self.lengths) if a == 0 else self.places, self.places), dtype=dtype)
            for right, p in grammar.expansions[a]:
                made[right[:1]] = out[right[0]][self.starts] if a == 0 else out[right[0]]
                for k in range(2, len(right) + 1):
                    if right[:k] not in made:
                        made[right[:k]] = made[right[: k - 1]] @ out[right[k - 1]]
                total = total + (made[right] * p if weighted else made[right])
            out[a] = total
            if a in grammar.first:
                made.clear()
        return out

    def ends(self, root: csr_array) -> np.ndarray:
        """Return the root's entry of each whole string."""
        row = np.arange(len(self.lengths))
        return np.asarray(root[row, self.starts + self.lengths]).ravel()


def member(grammar: Grammar, strings: Strings) -> np.ndarray:
    """Return for each string whether it belongs to the grammar; shape [strings]."""
    found = [packed.ends(packed.spans(True, weighted=False)[0]) for packed in _pack(grammar, strings)]
    return np.concatenate(found).astype(bool)


def count_parses(grammar: Grammar, strings: Strings) -> list[int]:
    """Return the number of derivations of each string, exact however large."""
    out: list[int] = []
    for packed in _pack(grammar, strings):
        spans = packed.spans(1.0, weighted=False)
        for k, found in enumerate(packed.ends(spans[0]).tolist()):
            # Every number on the way adds to the last one, so that all are exact where that is.
            out.append(int(found) if found < EXACT else _Forest(packed, spans).count(k))
    return out


def log_probabilities(grammar: Grammar, strings: Strings) -> np.ndarray:
    """Return the log-probability (in nats) of each string, summed over its derivations; -inf where it has none."""
    rate = _rate(grammar)
    rows = []
    for packed in _pack(grammar, strings):
        with np.errstate(divide="ignore"):
            row = np.log(packed.ends(packed.spans(2.0**rate, weighted=True)[0])) - packed.lengths * rate * log(2)
            for k in np.flatnonzero(np.isnan(row) | (row == np.inf) | (_lowest(grammar) < FLOOR)).tolist():
                after = _by_reading(grammar, packed.string(k))
                row[k] = after.log_prefix[-1] + np.log(after.p[-1, -1])
        rows.append(row)
    return np.concatenate(rows)


def next_tokens(grammar: Grammar, strings: Strings) -> list[Next]:
    """Return for each string what follows each of its prefixes, the empty and the whole one included."""
    rate = _rate(grammar)
    out: list[Next] = []
    for packed in _pack(grammar, strings):
        spans = packed.spans(2.0**rate, weighted=True)
        joint = np.zeros((packed.places, len(grammar.terminals) + 1))
        joint[:, :-1] = _begins(packed, spans)
        joint[:, -1] = spans[0].sum(axis=0)
        for k, (start, n) in enumerate(zip(packed.starts.tolist(), packed.lengths.tolist(), strict=True)):
            rows = joint[start : start + n + 1]
            if _lowest(grammar) < FLOOR or not np.isfinite(rows).all():
                out.append(_by_reading(grammar, packed.string(k)))
                continue
            total = rows.sum(axis=1)
            with np.errstate(divide="ignore"):
                log_prefix = np.log(total) - np.arange(n + 1) * rate * log(2)
            out.append(Next(rows / np.where(total > 0, total, 1)[:, None], log_prefix))
    return out


def parse(grammar: Grammar, string: Sequence[int] | np.ndarray) -> Derivation | None:
    """Return a derivation of `string`, by earlier rules and with shorter first parts; None where it has none."""
    (packed,) = _pack(grammar, [string])
    spans = packed.spans(True, weighted=False)
    if not packed.ends(spans[0])[0]:
        return None
    return _Forest(packed, spans).first()


def _begins(packed: Packed, spans: list[csr_array]) -> np.ndarray:
    """Return v_t of each terminal; shape [places, T]."""
    grammar = packed.grammar
    v = np.zeros((len(grammar.symbols), packed.places))
    v[0, packed.starts] = 1
    for a in range(grammar.first[-1]):
        for right, p in grammar.expansions[a]:
            reached = p * v[a]
            for k, child in enumerate(right):
                v[child] += reached
                if k < len(right) - 1:
                    reached = reached @ spans[child]
    return v[grammar.first[-1] :].T


def _rate(grammar: Grammar) -> float:
    """Return the bits of a token. Times 2 to that for each token, probabilities stay near 1 however long the string."""
    return derivation_bits(grammar) / length_moments(grammar)[0]


@lru_cache(maxsize=64)
def _lowest(grammar: Grammar) -> float:
    """Return a bound for the base-2 logarithm of every number that a derivation leads to, with `_rate` for a token."""
    whole = [_rate(grammar)] * len(grammar.symbols)
    part = [0.0] * len(grammar.symbols)  # with only the first ones of the tokens read
    for a in range(grammar.first[-1] - 1, -1, -1):
        whole[a] = min(log2(p) + sum([whole[child] for child in right]) for right, p in grammar.expansions[a])
        rows = [[0.0, *accumulate([whole[child] for child in right])] for right, _ in grammar.expansions[a]]
        part[a] = min(
            log2(p) + min(before + part[child] for before, child in zip(row, right, strict=False))
            for row, (right, p) in zip(rows, grammar.expansions[a], strict=True)
        )
    return min(*whole, *part)


def _by_reading(grammar: Grammar, string: np.ndarray) -> Next:
    """Return what follows the prefixes of a string whose numbers no float64 holds, read token by token."""
    p, log_prefix = np.zeros((len(string) + 1, len(grammar.terminals) + 1)), np.full(len(string) + 1, -np.inf)
    now, so_far = Posterior.start(grammar), 0.0
    for k, token in enumerate((*string.tolist(), None)):
        p[k], log_prefix[k] = now.following, so_far
        if token is None or not now.following[token]:
            break
        so_far += log(now.following[token])
        now = now.read(token)
    return Next(p, log_prefix)


def _pack(grammar: Grammar, strings: Strings) -> Iterator[Packed]:
    """Yield the strings in packs of about as many places as are held at once.

    Raises:
        GameError: there are no strings, or one is not made of indices of terminals.
    """
    if not len(strings):
        raise GameError("strings=[] is not possible: expected at least one string")
    many = len(grammar.terminals)
    rows: list[np.ndarray] = []
    held = 0
    for k, string in enumerate(strings):
        row = np.asarray(string, dtype=None if len(string) else np.int64)
        if row.ndim != 1 or row.dtype.kind not in "iu" or (len(row) and not 0 <= row.min() <= row.max() < many):
            raise GameError(
                f"string {k} has tokens that are not the grammar's: expected whole numbers from 0 to {many - 1}, "
                f"which stand for {' '.join(grammar.terminals[:20])} (see Grammar.encode)"
            )
        if rows and held + len(row) + 1 > PLACES:
            yield _packed(grammar, rows)
            rows, held = [], 0
        rows.append(row.astype(np.int64))
        held += len(row) + 1
    yield _packed(grammar, rows)


def _packed(grammar: Grammar, rows: list[np.ndarray]) -> Packed:
    return Packed(grammar, np.concatenate(rows), np.array([len(row) for row in rows]))


class _Forest:
    """All derivations of packed strings: the spans that each symbol has, and how their rules divide them."""

    def __init__(self, packed: Packed, spans: list[csr_array]) -> None:
        self.packed, self.grammar = packed, packed.grammar
        self.ends = [[row.tolist() for row in np.split(m.sorted_indices().indices, m.indptr[1:-1])] for m in spans]
        self.has = [list(map(set, rows)) for rows in self.ends]
        self.known: dict[tuple[int, int, int], int] = {}

    def count(self, k: int) -> int:
        """Return the number of derivations of string `k`."""
        start = int(self.packed.starts[k])
        end = start + int(self.packed.lengths[k])
        return sum(self._ways(right, start, end) for right, _ in self.grammar.expansions[0])

    def _count(self, a: int, i: int, j: int) -> int:
        if a >= self.grammar.first[-1]:
            return 1
        if (a, i, j) not in self.known:
            self.known[a, i, j] = sum(self._ways(right, i, j) for right, _ in self.grammar.expansions[a])
        return self.known[a, i, j]

    def _ways(self, right: tuple[int, ...], i: int, j: int) -> int:
        child = right[0]
        if len(right) == 1:
            return self._count(child, i, j) if j in self.has[child][i] else 0
        ways = 0
        for m in self.ends[child][i]:
            rest = self._ways(right[1:], m, j) if m < j else 0
            if rest:
                ways += rest * self._count(child, i, m)
        return ways

    def first(self) -> Derivation:
        """Return the first derivation of the only string."""
        n, levels = int(self.packed.lengths[0]), len(self.grammar.levels)
        symbols, index = np.zeros((levels, n), dtype=np.int64), np.ones((levels, n), dtype=np.int64)
        nodes = [(0, 0, n)]
        for level in range(1, levels):
            below: list[tuple[int, int, int]] = []
            for a, i, j in nodes:
                cuts = next(c for right, _ in self.grammar.expansions[a] if (c := self._divide(right, i, j)))
                below += cuts
            for number, (a, i, j) in enumerate(below, start=1):
                symbols[level, i:j] = a - self.grammar.first[level]
                index[level, i:j] = number
            nodes = below
        return Derivation(symbols, index)

    def _divide(self, right: tuple[int, ...], i: int, j: int) -> list[tuple[int, int, int]]:
        """Return where the symbols of a body begin and end between i and j; [] where they do not fit there."""
        child = right[0]
        if len(right) == 1:
            return [(child, i, j)] if j in self.has[child][i] else []
        for m in self.ends[child][i]:
            rest = self._divide(right[1:], m, j) if m < j else []
            if rest:
                return [(child, i, m), *rest]
        return []
