"""Diversity by symbol against a count of trees written out, and entropies whose truth is known."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nextstate.analysis.grammar.symbols import by_symbol, constituents_of, entropy
from nextstate.envs.grammar.derivation import Derivation, sample
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.sources import published

GRAMMAR = Grammar.read("S -> A B | B A\nA -> c d | d c c\nB -> c c | d d d\nc -> x y | x x\nd -> y x | y y")


def one(text: str, index: list[list[int]]) -> Derivation:
    """Return a derivation from its symbols, level by level, a word for each token."""
    levels = [line.split() for line in text.strip().splitlines()]
    symbols = [[GRAMMAR.levels[k].index(word) for word in line] for k, line in enumerate(levels)]
    return Derivation(np.array(symbols), np.array(index))


def test_constituents_are_those_of_the_tree() -> None:
    string = one("""
        S S S S S S S S
        A A A A B B B B
        c c d d c c c c
        x y y x x x x y
    """, [[1] * 8, [1] * 4 + [2] * 4, [1, 1, 2, 2, 3, 3, 4, 4], list(range(1, 9))])  # fmt: skip
    found = [
        (GRAMMAR.symbols[x.symbol], x.rule, " ".join(GRAMMAR.terminals[t] for t in x.tokens))
        for x in constituents_of(GRAMMAR, string)
    ]
    assert found == [
        ("S", 0, "x y y x x x x y"), ("A", 0, "x y y x"), ("B", 0, "x x x y"),
        ("c", 0, "x y"), ("d", 0, "y x"), ("c", 1, "x x"), ("c", 0, "x y"),
    ]  # fmt: skip


@pytest.mark.parametrize("grammar", [GRAMMAR, published("cfg3b")])
def test_strings_of_the_grammar_are_as_diverse_as_the_grammar(grammar: Grammar) -> None:
    rng = np.random.default_rng(0)
    table = by_symbol(grammar, sample(grammar, rng, 150), sample(grammar, rng, 150), rng)
    assert table["symbol"].to_list() == list(grammar.symbols[: grammar.first[-1]])
    inside = table["bits_truth"].is_between(table["low"] - 1e-12, table["high"] + 1e-12)
    assert inside.mean() > 0.9
    assert ((table["low"] <= table["bits"]) & (table["bits"] <= table["high"])).all()
    lowest = table.filter(level=len(grammar.levels) - 1)
    assert (lowest["distinct"] == lowest["possible"]).all()
    assert (lowest["distinct_truth"] == lowest["possible"]).all()
    near = table.filter(table["compared"] > 100)
    assert (near["distinct"] / near["distinct_truth"] - 1).abs().max() < 0.2  # type: ignore[operator]


def test_a_model_that_repeats_itself_is_found_out() -> None:
    """Its c is always x y, and it writes one string again and again; all else is as in the grammar."""
    drawn = sample(GRAMMAR, np.random.default_rng(0), 300)
    narrow = Grammar.read(str(GRAMMAR).replace("c -> x y | x x", "c -> x y (999999) | x x"))
    written = sample(narrow, np.random.default_rng(1), 300)
    table = {row["symbol"]: row for row in by_symbol(GRAMMAR, written, drawn, np.random.default_rng(0)).to_dicts()}
    assert (table["c"]["distinct"], table["c"]["distinct_truth"], table["c"]["possible"]) == (1, 2, 2)
    assert table["c"]["high"] < table["c"]["bits_truth"] == 1
    assert table["d"]["low"] <= 1 <= table["d"]["high"]
    counts = Counter(x.tokens for s in written for x in constituents_of(GRAMMAR, s) if GRAMMAR.symbols[x.symbol] == "A")
    assert table["A"]["distinct"] <= len(counts) < table["A"]["distinct_truth"]
    once = by_symbol(GRAMMAR, written[:1] * 50, drawn, np.random.default_rng(0))
    assert once.filter(symbol="S").select("distinct", "bits", "high").row(0) == (1, 0, 0)


def test_an_ambiguous_grammar_has_no_truth_for_rules() -> None:
    grammar = Grammar.read("S -> A B | B A\nA -> x y | x\nB -> y x | x")
    drawn = sample(grammar, np.random.default_rng(0), 50)
    assert by_symbol(grammar, drawn, drawn, np.random.default_rng(0))["bits_truth"].null_count() == 3


@pytest.mark.parametrize("p", [[0.5, 0.5], [0.2, 0.8], [1 / 3, 1 / 3, 1 / 3], [0.6, 0.3, 0.1], [1.0, 0.0]])
def test_intervals_of_entropy_hold_the_truth(p: list[float]) -> None:
    """Also where all rules are equally likely, and every sample's own entropy is below the truth."""
    truth = -sum(x * np.log2(x) for x in p if x)
    inside, values = [], []
    for k in range(200):
        rng = np.random.default_rng([9, k])
        value, low, high = entropy(rng.multinomial(5, p, size=60), rng)
        inside.append(low - 1e-12 <= truth <= high + 1e-12)
        values.append(value)
    assert np.mean(inside) > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 200)
    assert np.mean(values) == pytest.approx(truth, abs=0.01)


def test_one_string_has_no_interval() -> None:
    value, low, high = entropy(np.array([[3, 1]]), np.random.default_rng(0))
    assert value > 0.8
    assert np.isnan(low)
    assert np.isnan(high)
