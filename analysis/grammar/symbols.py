"""Diversity of what a model writes, symbol by symbol: which rules and expansions of each symbol its strings have.

"Physics of Language Models: Part 1" (arXiv 2305.13673), Result 2, asks of each symbol how many different expansions a
model writes. Strings are parsed, so only those that are in the grammar count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from nextstate.analysis import stats
from nextstate.envs.grammar import sizes
from nextstate.envs.grammar.derivation import Derivation
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.inside import count_parses

LISTED = 100_000  # strings of a symbol are counted up to this many derivations


class Constituent(NamedTuple):
    """One constituent of a string."""

    symbol: int  # index into `Grammar.symbols`
    rule: int  # which of the symbol's rules it was rewritten by
    tokens: tuple[int, ...]


def constituents_of(grammar: Grammar, string: Derivation) -> Iterator[Constituent]:
    """Yield all constituents of a string but its tokens, level by level from the root."""
    number = [{right: k for k, (right, _) in enumerate(rules)} for rules in grammar.expansions]
    for level in range(len(grammar.levels) - 1):
        own, below = (np.flatnonzero(np.diff(string.index[k], prepend=0)) for k in (level, level + 1))
        children = string.symbols[level + 1][below] + grammar.first[level + 1]
        cuts = np.searchsorted(below, own)
        for first, last, low, high in zip(
            own, [*own[1:], len(string.tokens)], cuts, [*cuts[1:], len(below)], strict=True
        ):
            symbol = int(string.symbols[level, first]) + grammar.first[level]
            rule = number[symbol][tuple(children[low:high].tolist())]
            yield Constituent(symbol, rule, tuple(string.tokens[first:last].tolist()))


def by_symbol(
    grammar: Grammar, written: Sequence[Derivation], drawn: Sequence[Derivation], rng: np.random.Generator
) -> pl.DataFrame:
    """Compare the expansions of each symbol in the strings that a model wrote with those in strings of the grammar.

    Args:
        grammar: the grammar.
        written: derivations of the model's strings.
        drawn: strings of the grammar, for comparison.
        rng: for the intervals, which are over the model's strings.

    Returns:
        One row for each symbol above the terminals that `written` has. `occurrences`: constituents with this symbol.
        `distinct` and `distinct_truth`: different expansions to tokens among as many occurrences of both sides
        (`compared`, the first ones). `possible`: all that the symbol has, null above `LISTED` derivations. `bits`,
        `low`, `high`: entropy of its choice of a rule, see `entropy`. `bits_truth`: the same in the grammar, null where
        a string in `drawn` has several derivations, since a parse then need not be the one that it was made by.
    """
    ours, theirs = ([list(constituents_of(grammar, string)) for string in strings] for strings in (written, drawn))
    unique = set(count_parses(grammar, [x.tokens for x in drawn])) == {1}
    rows = []
    for symbol in range(grammar.first[-1]):
        found = [[x for x in string if x.symbol == symbol] for string in ours]
        other = [x.tokens for string in theirs for x in string if x.symbol == symbol]
        tokens = [x.tokens for string in found for x in string]
        if not tokens:
            continue
        shares = [p for _, p in grammar.expansions[symbol]]
        rules = np.array([np.bincount([x.rule for x in string], minlength=len(shares)) for string in found])
        bits, low, high = entropy(rules, rng)
        n = min(len(tokens), len(other))
        rows.append(
            {"level": grammar.level_of[symbol], "symbol": grammar.symbols[symbol], "occurrences": len(tokens),
             "compared": n, "distinct": len(set(tokens[:n])), "distinct_truth": len(set(other[:n])),
             "possible": sizes.n_strings(_under(grammar, symbol), LISTED), "bits": bits, "low": low, "high": high,
             "bits_truth": float(-np.dot(shares, np.log2(shares))) if unique else None}
        )  # fmt: skip
    return pl.DataFrame(rows, schema=COLUMNS).fill_nan(None)


COLUMNS = {
    "level": pl.Int64, "symbol": pl.String, "occurrences": pl.Int64, "compared": pl.Int64, "distinct": pl.Int64,
    "distinct_truth": pl.Int64, "possible": pl.Int64, "bits": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    "bits_truth": pl.Float64,
}  # fmt: skip


def entropy(counts: Int[np.ndarray, "string rule"], rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the entropy of a choice in bits, and its 95 % interval over strings.

    The value has the correction of Miller 1955 for its bias. The interval is the basic bootstrap, which reflects the
    resamples at the value: percentiles would exclude the largest possible entropy, since each resample lies below it.
    One string has no interval (NaN).
    """
    most = float(np.log2(counts.shape[1]))
    plain = _bits(counts.sum(0)[None])[0]
    value = min(most, plain + ((counts.sum(0) > 0).sum() - 1) / (2 * counts.sum() * np.log(2)))
    if len(counts) < 2:
        return value, np.nan, np.nan
    below, above = stats.percentiles(_bits(stats.resampled_sums(counts.astype(np.float64), rng)))
    return value, max(0.0, min(value, 2 * plain - above)), min(most, max(value, 2 * plain - below))


def _bits(counts: Float[np.ndarray, "draw rule"] | Int[np.ndarray, "draw rule"]) -> Float[np.ndarray, " draw"]:
    with np.errstate(invalid="ignore", divide="ignore"):
        p = counts / counts.sum(1, keepdims=True)
        logs = np.where(p > 0, np.log2(p), 0)
    return np.asarray(-(p * logs).sum(1))


def _under(grammar: Grammar, symbol: int) -> Grammar:
    """Return the grammar whose root is this symbol."""
    reached = {grammar.symbols[symbol]}
    kept = []
    for a in range(symbol, grammar.first[-1]):  # parents come before children
        name = grammar.symbols[a]
        if name in reached:
            own = [rule for rule in grammar.rules if rule.left == name]
            kept += own
            reached.update(child for rule in own for child in rule.right)
    return Grammar(tuple(kept))
