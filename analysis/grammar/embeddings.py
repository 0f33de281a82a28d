"""Do the embeddings of tokens cluster by the hidden terminals that tokens stand for?

"Physics of Language Models: Part 1" (arXiv 2305.13673), Result 10. In a grammar with hidden terminals each of these is
written as one token of its bag (`nextstate.envs.grammar.sources.implicit`). Tokens of the same bags are interchangeable
for the grammar, and a model that has learned it may give them similar embeddings. Bags may overlap, so tokens are
compared by their membership: the set of bags that a token is in.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from nextstate.analysis import stats
from nextstate.envs.game import GameError
from nextstate.envs.grammar.grammar import Grammar

PERMUTATIONS = 1000


class Clustering(NamedTuple):
    """How much more alike the embeddings of tokens with the same membership are than those of other tokens.

    Attributes:
        auc: probability that the cosine of two tokens with the same membership is larger than that of two tokens with
            different ones; 0.5 if embeddings do not depend on membership.
        low: lower end of the 95 % interval, by bootstrap over tokens within each membership.
        high: upper end.
        p: share of permutations of the tokens with at least this `auc`, the observed order counted as one.
        within: mean cosine of two tokens with the same membership.
        between: mean cosine of two tokens with different ones.
    """

    auc: float
    low: float
    high: float
    p: float
    within: float
    between: float


def bags(grammar: Grammar) -> Bool[np.ndarray, "token terminal"] | None:
    """Return which hidden terminals each token may stand for; None where the grammar has no hidden terminals.

    It has them where all symbols above the tokens are rewritten to one token each, and some token shares its bags with
    another, so that there are tokens to compare.
    """
    first, below = grammar.first[-2], grammar.first[-1]
    hidden = grammar.expansions[first:below]
    if len(hidden) < 2 or any(len(right) > 1 for rules in hidden for right, _ in rules):
        return None
    member = np.zeros((len(grammar.terminals), len(hidden)), dtype=bool)
    for k, rules in enumerate(hidden):
        member[[right[0] - below for right, _ in rules], k] = True
    many = len(np.unique(member, axis=0))
    return member if 1 < many < len(member) else None


def cosines(embeddings: Float[np.ndarray, "token width"]) -> Float[np.ndarray, "token token"]:
    """Return the cosine of each pair of embeddings; 0 where one has no length."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(lengths > 0, lengths, 1)
    return np.asarray(unit @ unit.T)


def clustering(
    embeddings: Float[np.ndarray, "token width"], member: Bool[np.ndarray, "token terminal"], rng: np.random.Generator
) -> Clustering:
    """Measure how embeddings cluster by membership.

    Args:
        embeddings: of each token.
        member: from `bags`.
        rng: for permutations and resamples.

    Raises:
        GameError: all tokens have the same membership, or all have different ones.
    """
    group = np.unique(member, axis=0, return_inverse=True)[1].ravel()
    one, two = np.triu_indices(len(group), 1)
    same = group[one] == group[two]
    if same.all() or not same.any():
        raise GameError("embeddings can only be compared where some tokens, and not all, have the same membership")
    cosine = cosines(embeddings)[one, two]
    rank = np.unique(cosine, return_inverse=True)[1].ravel()
    observed = stats.auc(rank, same)
    shuffled = (rng.permutation(group) for _ in range(PERMUTATIONS))
    at_least = sum(stats.auc(rank, g[one] == g[two]) >= observed - 1e-12 for g in shuffled)
    weights = np.zeros((stats.DRAWS, len(group)), dtype=np.int64)
    for g in range(group.max() + 1):
        own = np.flatnonzero(group == g)
        weights[:, own] = stats.multiplicities(len(own), rng, stats.DRAWS)
    draws = [stats.auc(rank, same, w[one] * w[two]) for w in weights]
    low, high = stats.percentiles(np.array(draws))
    return Clustering(
        observed, float(low), float(high), (1 + at_least) / (1 + PERMUTATIONS), float(cosine[same].mean()),
        float(cosine[~same].mean()),
    )  # fmt: skip


def similarity(
    embeddings: Float[np.ndarray, "token width"], member: Bool[np.ndarray, "token terminal"], names: tuple[str, ...]
) -> pl.DataFrame:
    """Return the mean cosine between tokens of each two memberships.

    Args:
        embeddings: of each token.
        member: from `bags`.
        names: of the hidden terminals.

    Returns:
        One row for each ordered pair of memberships: `one` and `two`, the names of the bags with a space between,
        `cosine` without that of a token and itself (null without pairs), and the number of `pairs`.
    """
    found, group = np.unique(member, axis=0, return_inverse=True)
    group, order = group.ravel(), sorted(range(len(found)), key=lambda g: (found[g].sum(), *(~found[g]).tolist()))
    labels = [" ".join(name for name, has in zip(names, row, strict=True) if has) for row in found]
    cosine, rows = cosines(embeddings), []
    for one in order:
        for two in order:
            part = cosine[np.ix_(group == one, group == two)]
            pairs = part.size - (len(part) if one == two else 0)
            total = part.sum() - (np.trace(part) if one == two else 0.0)
            rows.append((labels[one], labels[two], total / pairs if pairs else None, pairs))
    schema = {"one": pl.String, "two": pl.String, "cosine": pl.Float64, "pairs": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")
