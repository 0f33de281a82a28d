"""Clusters of embeddings against loops over all pairs, and where we have planted them or know that there are none."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from nextstate.analysis.grammar.embeddings import bags, clustering, cosines, similarity
from nextstate.envs import GameError
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.sources import implicit, published, random_grammar

PLAIN = random_grammar(np.random.default_rng(0), 3)


def hidden(overlap: bool, vocabulary: int = 30) -> tuple[Grammar, np.ndarray]:
    made = implicit(PLAIN, np.random.default_rng(1), vocabulary, overlap)
    member = bags(made)
    assert member is not None
    return made, member


@pytest.mark.parametrize("overlap", [False, True])
def test_bags_are_the_rules_of_hidden_terminals(overlap: bool) -> None:
    made, member = hidden(overlap)
    for token, terminal in product(range(member.shape[0]), range(member.shape[1])):
        rule = any(r.left == made.levels[-2][terminal] and r.right == (made.terminals[token],) for r in made.rules)
        assert member[token, terminal] == rule
    assert (member.sum(1) == 1).all() == (not overlap)


def test_a_grammar_without_hidden_terminals_has_no_bags() -> None:
    assert bags(PLAIN) is None
    assert bags(published("cfg3b")) is None
    assert bags(Grammar.read("S -> a b | b a\na -> x\nb -> y")) is None  # nothing to compare
    assert bags(Grammar.read("S -> a b\na -> x | y\nb -> x | y")) is None


@pytest.mark.parametrize("overlap", [False, True])
def test_clustering_is_what_loops_over_pairs_say(overlap: bool) -> None:
    made, member = hidden(overlap)
    rng = np.random.default_rng(2)
    own = rng.normal(size=(len(member), 5)) + 0.7 * member @ rng.normal(size=(member.shape[1], 5))
    found = clustering(own, member, np.random.default_rng(0))
    same, other = [], []
    for i in range(len(own)):
        for j in range(i):
            cosine = own[i] @ own[j] / np.sqrt((own[i] @ own[i]) * (own[j] @ own[j]))
            (same if (member[i] == member[j]).all() else other).append(cosine)
    wins = sum((a > b) + 0.5 * (a == b) for a in same for b in other)
    assert found.auc == pytest.approx(wins / len(same) / len(other))
    assert (found.within, found.between) == pytest.approx((np.mean(same), np.mean(other)))
    assert found.low < found.auc < found.high
    table = similarity(own, member, made.levels[-2])
    assert table["pairs"].sum() == len(own) * (len(own) - 1)
    names = np.array(made.levels[-2])
    for row in table.iter_rows(named=True):
        one, two = ([" ".join(names[m]) == row[side] for m in member] for side in ("one", "two"))
        cells = [cosines(own)[i, j] for i in np.flatnonzero(one) for j in np.flatnonzero(two) if i != j]
        assert row["pairs"] == len(cells)
        assert row["cosine"] is None if not cells else row["cosine"] == pytest.approx(np.mean(cells))


def test_planted_clusters_are_found_and_perfect_ones_are_perfect() -> None:
    _, member = hidden(False)
    rng = np.random.default_rng(3)
    centres = np.eye(3, 8) * 5
    tight = centres[member.argmax(1)] + 0.1 * rng.normal(size=(30, 8))
    found = clustering(tight, member, np.random.default_rng(0))
    assert (found.auc, found.low, found.high) == (1, 1, 1)
    assert found.p == pytest.approx(1 / 1001)
    assert found.within > 0.95
    assert abs(found.between) < 0.1


@pytest.mark.slow
def test_embeddings_without_clusters_are_not_called_clustered() -> None:
    """Under the null, p is uniform, and the interval holds one half in 95 of 100 samples."""
    _, member = hidden(True)
    found = [
        clustering(np.random.default_rng([4, k]).normal(size=(len(member), 6)), member, np.random.default_rng(k))
        for k in range(60)
    ]
    p = np.array([x.p for x in found])
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.085)  # 3 standard errors
    assert p.mean() == pytest.approx(0.5, abs=3 * np.sqrt(1 / 12 / 60))
    assert np.mean([x.low <= 0.5 <= x.high for x in found]) > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 60)


def test_what_cannot_be_compared_is_named() -> None:
    for member in (np.ones((4, 2), dtype=bool), np.eye(4, dtype=bool)):
        with pytest.raises(GameError, match="some tokens, and not all, have the same membership"):
            clustering(np.eye(4), member, np.random.default_rng(0))
