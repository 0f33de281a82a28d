"""Attention of heads by distance, and around the ends of constituents of a grammar's strings.

"Physics of Language Models: Part 1" (arXiv 2305.13673), Results 6 to 9. A weight goes from a query, token i, which
attends, to a key, token j, which is attended to; their distance is p = i - j, so that in a causal model i is the later
one, or i = j. The paper writes A_{l,h,j->i} with its j our query and its i our key. Tokens are those of the
string: the row and column of the begin token are dropped, and weights are not normalised again.

b#(i) is the highest level (nearest to the root) of which a constituent ends at token i; p_l(i) is the number of
constituents of level l that begin up to token i (`nextstate.envs.grammar.derivation`). Levels are those between the
root and the terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextstate.agents.generation import TokenMap
from nextstate.analysis import stats
from nextstate.analysis.grammar.probe import padded, room
from nextstate.envs.game import GameError, require, require_whole
from nextstate.envs.grammar.derivation import Derivation

NEAR = (-2, -1, 0, 1, 2)  # Result 7: offsets of the attended token from an end
NEXT = (-1, 0, 1)  # Result 8: offsets of both tokens from their ends
APART = (0, 1, 2, 3, 4)  # Result 9: distances between two ends, in constituents
_MEAN = 0  # no level; stands for their mean
_EVEN = 1e-12  # a head whose weights vary by less, relative to their squares, attends evenly
GROUPS = 20  # of strings at most, which the jackknife leaves out one at a time


@dataclass(frozen=True, eq=False)
class Measure:
    """Mean weights over the pairs of tokens of each cell; NaN for cells without pairs.

    Args:
        axes: names and values of the axes that define the cells.
        value: means of each head; shape [layer head *axes].
        pairs: number of pairs of tokens in all strings; shape [*axes].
        own: sum over the pairs of each string, averaged over heads; shape [string layer cell].
        own_pairs: number of pairs of each string; shape [string cell].
    """

    axes: dict[str, tuple[int, ...]]
    value: Float[np.ndarray, "layer head ..."]
    pairs: Int[np.ndarray, ...]
    own: Float[np.ndarray, "string layer cell"]
    own_pairs: Int[np.ndarray, "string cell"]

    @property
    def cells(self) -> dict[str, Int[np.ndarray, " cell"]]:
        """Value of each axis at each cell."""
        grid = np.meshgrid(*self.axes.values(), indexing="ij")
        return {name: values.ravel() for name, values in zip(self.axes, grid, strict=True)}


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of weights A by distance, in disjoint groups of strings.

    Args:
        distance: distance, in tokens, of each place of the last axis of `weights`.
        weights: sum of A; shape [group layer head distance].
        squares: sum of A squared over all distances; shape [group layer head].
        pairs: number of pairs of tokens; shape [group distance].
    """

    distance: Int[np.ndarray, " distance"]
    weights: Float[np.ndarray, "group layer head distance"]
    squares: Float[np.ndarray, "group layer head"]
    pairs: Int[np.ndarray, "group distance"]

    def without(self, group: int | None) -> Sums:
        """Return the sums over all groups but one, or over all of them, as one group."""
        kept = [k for k in range(len(self.pairs)) if k != group]
        return Sums(self.distance, *(x[kept].sum(0, keepdims=True) for x in (self.weights, self.squares, self.pairs)))


class Constituents(NamedTuple):
    """Statistics of attention. B = A - `profile` is a weight A minus the mean of its head at the same distance."""

    profile: Measure  # Result 6, mean A; axis distance
    to_end: Measure  # Result 7, mean B over keys j with b#(j + delta) = level; axes level, delta
    between_ends: Measure  # Result 8, mean B over b#(i + query_delta) = b#(j + key_delta) = level; axes level and both
    adjacent: Measure  # Result 9, mean B over b#(i) = query_level, b#(j) = key_level, p_l(i) - p_l(j) = apart
    # with l = key_level; in a causal model, apart = 0 is a token and itself.
    scales: Scales  # Result 6


def constituents(
    model: Any, codes: TokenMap, strings: Sequence[Derivation], causal: bool = True, batch: int = 8
) -> Constituents:
    """Measure the attention of a model on strings, Results 6 to 9 of the paper, in one pass over them.

    Only sums are kept in memory, not the weights. Strings longer than the model's context are truncated, with the
    labels of the whole string. Pairs with shifted tokens outside the string are not counted.

    Args:
        model: a transformers model with attn_implementation="eager", in evaluation mode, on any device.
        codes: its mapping of terminals to tokens.
        strings: strings of one grammar with their derivations.
        causal: use only pairs with j <= i; otherwise all pairs, with negative distances and `apart` too.
        batch: number of strings per forward pass, whose weights are all in memory.

    Raises:
        GameError: there are no strings or no intermediate levels, the model is in training mode, returns no weights,
            or attends to later tokens although `causal` is set.
    """
    require(not model.training, "model.training", True, "a model in evaluation mode: call model.eval()")
    require_whole("batch", batch, 1, 1_000_000)
    require(len(strings) > 0, "strings", len(strings), "one or more")
    require(len(strings[0].symbols) > 2, "levels", len(strings[0].symbols), "3 or more, so that some are between")
    plan = _Plan.of(strings, room(model), causal)
    total, own = np.zeros(0), np.zeros(0)
    groups = min(GROUPS, len(strings))
    by_group, squares = np.zeros(0), np.zeros(0)
    for low in range(0, len(strings), batch):
        some = strings[low : low + batch]
        weights = _weights(model, codes, [x.tokens[: plan.longest] for x in some])
        if not low:
            layers, heads = len(weights), weights[0].shape[1]
            total = np.zeros((layers, heads, plan.cells))
            own = np.zeros((len(strings), layers, plan.cells))
            by_group = np.zeros((groups, layers, heads, plan.distances))
            squares = np.zeros((groups, layers, heads))
        for k, string in enumerate(some):
            cells, pairs = plan.pairs(string)
            n = min(len(string.tokens), plan.longest)
            for layer, every in enumerate(weights):
                of_string = every[k, :, 1 : n + 1, 1 : n + 1].double()
                if causal and bool(of_string.triu(1).any()):
                    raise GameError("the model attends to later tokens: measure it with causal=False")
                sums = _summed(of_string, cells, pairs, plan.cells)
                total[layer] += sums
                own[low + k, layer] = sums.mean(0)
                by_group[(low + k) % groups, layer] += sums[:, : plan.distances]
                squares[(low + k) % groups, layer] += (of_string**2).sum((1, 2)).cpu().numpy()
    group = np.arange(len(strings)) % groups
    pairs_of = plan.pairs_by_distance(strings)
    pairs_in = np.stack([pairs_of[group == g].sum(0) for g in range(groups)])
    sums_in = Sums(np.array(plan.axes[0]["distance"]), by_group, squares, pairs_in)
    return _residual(plan, strings, total, own, sums_in)


def rows(measure: Measure) -> pl.DataFrame:
    """Return one row for each layer, head and cell: its axes, `value` (null without pairs), and `pairs`."""
    layers, heads = measure.value.shape[:2]
    at = np.indices((layers, heads, measure.pairs.size)).reshape(3, -1)
    columns = {"layer": at[0], "head": at[1], **{name: x[at[2]] for name, x in measure.cells.items()}}
    return pl.DataFrame({**columns, "value": measure.value.ravel(), "pairs": measure.pairs.ravel()[at[2]]}).fill_nan(
        None
    )


def means(measure: Measure, rng: np.random.Generator) -> pl.DataFrame:
    """Return means over heads, of each layer and of all (null), with 95 % intervals by bootstrap over strings.

    The intervals include the uncertainty of the mean at each distance, to first order.

    Returns:
        One row for each layer and cell: its axes, `value`, `low`, `high` (null without pairs), `pairs`.
    """
    draws = _draws(measure, rng)
    return _table(draws[0], stats.percentiles(draws[1:]), measure.cells, measure.pairs.ravel())


def peaks(measure: Measure, rng: np.random.Generator) -> pl.DataFrame:
    """Return the excess of attention at ends over that beside them: Results 7 and 8 at offset 0 minus the rest's mean.

    Args:
        measure: `to_end` or `between_ends`, by level and one or two offsets, all 0 at ends.
        rng: for the intervals.

    Returns:
        One row for each layer (null: mean of all) and level (null: mean over levels): `value`, `low`, `high` as in
        `means`, `pairs` (at offset 0).
    """
    levels, *offsets = measure.axes.values()
    middle = int(np.ravel_multi_index([axis.index(0) for axis in offsets], [len(axis) for axis in offsets]))
    draws = _draws(measure, rng)
    draws = draws.reshape(*draws.shape[:2], len(levels), -1)
    excess = draws[..., middle] - np.delete(draws, middle, axis=-1).mean(-1)
    pairs = measure.pairs.reshape(len(levels), -1)[:, middle]
    return _with_mean(excess, np.array(levels), pairs)


class Scales(NamedTuple):
    """Result 6 in numbers; each with the ends of its 95 % interval: value, low, high.

    Intervals are over groups of strings, by the jackknife; NaN for a single string.
    """

    reach: Float[np.ndarray, "3 layer head"]  # mean distance that a head attends to, in tokens
    spread: Float[np.ndarray, " 3"]  # 1 + reach of the farthest head, over 1 + that of the nearest one
    explained: Float[np.ndarray, "3 layer head"]  # share of the variance of A that distance explains
    mean: Float[np.ndarray, " 3"]  # `explained`, averaged over heads


def measure_scales(sums: Sums) -> Scales:
    """Return how far each head attends, how much heads differ in that, and how much distance alone explains.

    The reach of a head is the mean of |i - j|, weighted by A; 1 + reach counts the token itself. `spread` is 1 if all
    heads attend equally far; its interval is for the two heads that have the extreme reaches in all strings.
    `explained` is the variance of A between distances, as a share of its variance over all pairs: 1 if A is a function
    of distance.
    """

    def reach(one: Sums) -> Float[np.ndarray, "layer head"]:
        weights = one.weights[0]
        return np.asarray((weights @ np.abs(one.distance)) / weights.sum(-1))

    def explained(one: Sums) -> Float[np.ndarray, "layer head"]:
        weights, squares, pairs = one.weights[0], one.squares[0], one.pairs[0]
        middle = weights.sum(-1) ** 2 / pairs.sum()
        between = (weights**2 / np.maximum(pairs, 1)).sum(-1) - middle
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(squares - middle > _EVEN * squares, between / (squares - middle), 1.0))

    whole, many = sums.without(None), len(sums.pairs)
    parts = [sums.without(k) for k in range(many)] if many > 1 else []
    far = reach(whole)
    nearest, farthest = (np.unravel_index(k, far.shape) for k in (far.argmin(), far.argmax()))

    def octaves(one: Sums) -> Float[np.ndarray, ""]:
        found = reach(one)
        return np.asarray(np.log((1 + found[farthest]) / (1 + found[nearest])))

    def with_ends(measure: Callable[[Sums], Any]) -> Float[np.ndarray, "3 ..."]:
        value = np.asarray(measure(whole))
        return np.stack([value, *stats.jackknife(value, np.array([measure(part) for part in parts]))])

    shares = with_ends(explained), with_ends(lambda one: explained(one).mean())
    return Scales(with_ends(reach), np.exp(with_ends(octaves)), *shares)


def heads(scales: Scales) -> pl.DataFrame:
    """Return one row for each layer and head: `reach` with `low` and `high`, and `explained`."""
    layers, many = scales.reach.shape[1:]
    layer, head = (x.ravel() for x in np.indices((layers, many)))
    numbers = dict(zip(("reach", "low", "high"), scales.reach.reshape(3, -1), strict=True))
    return pl.DataFrame({"layer": layer, "head": head, **numbers, "explained": scales.explained[0].ravel()}).fill_nan(
        None
    )


def spread(scales: Scales) -> pl.DataFrame:
    """Return one row: `nearest` and `farthest`, reaches of heads, and `spread` and `explained` with their intervals."""
    reach = scales.reach[0]
    row = {"nearest": float(reach.min()), "farthest": float(reach.max())}
    for name, numbers in (("spread", scales.spread), ("explained", scales.mean)):
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), numbers.tolist(), strict=True))
    return pl.DataFrame([row]).fill_nan(None)


def falls(adjacent: Measure, rng: np.random.Generator) -> pl.DataFrame:
    """Return how much attention falls with distance between ends of the same level: Result 9.

    Returns:
        One row for each layer (null: mean of all) and level (null: mean over levels): `value`, the mean at r = 1 minus
        that at the r > 1 that occur, `low`, `high` as in `means`, `pairs` (at r = 1).
    """
    levels, apart = adjacent.axes["query_level"], np.array(adjacent.axes["apart"])
    draws = _draws(adjacent, rng)
    draws = draws.reshape(*draws.shape[:2], len(levels), len(levels), len(apart))
    same = np.moveaxis(np.diagonal(draws, axis1=2, axis2=3), -1, 2)  # [draw layer level apart]
    near, rest = same[..., apart == 1][..., 0], same[..., apart > 1]
    known = ~np.isnan(rest)
    with np.errstate(invalid="ignore", divide="ignore"):
        far = np.where(known, rest, 0).sum(-1) / known.sum(-1)
    pairs = np.diagonal(adjacent.pairs)[np.flatnonzero(apart == 1)[0]]
    return _with_mean(near - far, np.array(levels), pairs)


def _with_mean(
    draws: Float[np.ndarray, "draw layer level"], levels: Int[np.ndarray, " level"], pairs: Int[np.ndarray, " level"]
) -> pl.DataFrame:
    """Return the table of the first draw with intervals from the others, and a level (null) for the mean of levels."""
    counted = ~np.isnan(draws[0]).any(0)
    mean = draws[..., counted].mean(-1, keepdims=True) if counted.any() else draws[..., :1] * np.nan
    draws = np.concatenate([draws, mean], axis=-1)
    cells = {"level": np.append(levels, _MEAN)}
    table = _table(draws[0], stats.percentiles(draws[1:]), cells, np.append(pairs, pairs[counted].sum()))
    return table.with_columns(level=pl.col("level").replace(_MEAN, None))


@dataclass(frozen=True)
class _Plan:
    """The cells of all measures, numbered consecutively."""

    axes: tuple[dict[str, tuple[int, ...]], ...]  # of Results 6 to 9
    longest: int
    causal: bool

    @classmethod
    def of(cls, strings: Sequence[Derivation], most: int, causal: bool) -> _Plan:
        longest = min(max(len(x.tokens) for x in strings), most)
        levels = tuple(range(2, len(strings[0].symbols)))
        apart = APART if causal else (*[-r for r in APART[:0:-1]], *APART)
        axes = (
            {"distance": tuple(range(0 if causal else 1 - longest, longest))},
            {"level": levels, "delta": NEAR},
            {"level": levels, "query_delta": NEXT, "key_delta": NEXT},
            {"query_level": levels, "key_level": levels, "apart": apart},
        )
        return cls(axes, longest, causal)

    @property
    def sizes(self) -> list[int]:
        return [prod(map(len, axes.values())) for axes in self.axes]

    @property
    def cells(self) -> int:
        return sum(self.sizes)

    @property
    def distances(self) -> int:
        return self.sizes[0]

    def pairs_by_distance(self, strings: Sequence[Derivation]) -> Int[np.ndarray, "string distance"]:
        """Return the number of pairs of tokens at each distance in each string."""
        lengths = np.array([min(len(x.tokens), self.longest) for x in strings])
        return np.asarray(np.maximum(lengths[:, None] - np.abs(self.axes[0]["distance"]), 0))

    def pairs(self, string: Derivation) -> tuple[Int[np.ndarray, " entry"], Int[np.ndarray, " entry"]]:
        """Return the cells and the pairs, i * n + j, of all entries; each pair has at least one."""
        highest, index = string.highest[: self.longest], string.index[:, : self.longest]
        n, levels = len(highest), len(string.symbols) - 2
        i, j = np.indices((n, n))
        allowed = (j <= i) if self.causal else np.ones((n, n), dtype=bool)
        first = np.cumsum([0, *self.sizes])
        found = [np.where(allowed, i - j - self.axes[0]["distance"][0], -1)]

        def shifted(delta: int) -> Int[np.ndarray, " token"]:
            """Return the level, from 0, of the constituent that ends `delta` tokens later; -1 if none does."""
            out, here = np.full(n, -1), np.arange(max(0, -delta), min(n, n - delta))
            out[here] = highest[here + delta] - 2
            return np.where(out < levels, out, -1)

        for d, delta in enumerate(NEAR):
            key = shifted(delta)[None]
            found.append(np.where(allowed & (key >= 0), first[1] + key * len(NEAR) + d, -1))
        for d, (one, two) in enumerate(product(NEXT, NEXT)):
            query, key = shifted(one)[:, None], shifted(two)[None]
            found.append(np.where(allowed & (key >= 0) & (query == key), first[2] + key * len(NEXT) ** 2 + d, -1))
        query, key, apart = shifted(0)[:, None], shifted(0)[None], self.axes[3]["apart"]
        at_level = index[highest - 1]  # [key token]: p of each token at the level of the key
        between = (at_level - np.diagonal(at_level)[:, None]).T - apart[0]
        ok = allowed & (query >= 0) & (key >= 0) & (between >= 0) & (between < len(apart))
        found.append(np.where(ok, first[3] + (query * levels + key) * len(apart) + between, -1))
        flat = [np.flatnonzero(x >= 0) for x in found]
        return np.concatenate([x.ravel()[at] for x, at in zip(found, flat, strict=True)]), np.concatenate(flat)

    def by_distance(self, string: Derivation) -> Int[np.ndarray, "cell distance"]:
        """Return how many pairs of each distance there are in each cell of Results 7 to 9."""
        cells, pairs = self.pairs(string)
        rest, p, n = cells >= self.distances, self.distances, min(len(string.tokens), self.longest)
        distance = pairs[rest] // n - pairs[rest] % n - self.axes[0]["distance"][0]
        size = (self.cells - p) * p
        return np.bincount((cells[rest] - p) * p + distance, minlength=size).reshape(-1, p)


@torch.no_grad()
def _weights(
    model: Any, codes: TokenMap, strings: Sequence[np.ndarray]
) -> list[Float[Tensor, "string head query key"]]:
    ids, mask = padded(codes, strings, model.device)
    found = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    if not found or any(x is None for x in found):
        raise GameError('the model gives no attention weights: load it with attn_implementation="eager"')
    return list(found)


def _summed(
    weights: Float[Tensor, "head query key"], cells: Int[np.ndarray, " entry"], pairs: Int[np.ndarray, " entry"], n: int
) -> Float[np.ndarray, "head cell"]:
    """Add up the weights of each cell's pairs."""
    where = torch.from_numpy(np.stack([cells, pairs])).to(weights.device)
    flat = weights.flatten(1).T.contiguous()
    ones = torch.ones(len(cells), dtype=weights.dtype, device=weights.device)
    member = torch.sparse_coo_tensor(where, ones, (n, len(flat)), check_invariants=False)
    out: np.ndarray = torch.sparse.mm(member, flat).T.cpu().numpy()
    return out


def _residual(
    plan: _Plan,
    strings: Sequence[Derivation],
    total: Float[np.ndarray, "layer head cell"],
    own: Float[np.ndarray, "string layer cell"],
    sums: Sums,
) -> Constituents:
    """Turn sums of A into means of A (the profile) and of B (the rest), which is linear: no second pass is needed."""
    p = plan.distances
    own_pairs = np.zeros((len(strings), plan.cells), dtype=np.int64)
    own_pairs[:, :p] = plan.pairs_by_distance(strings)
    at = own_pairs[:, :p].sum(0)
    by_distance = total[..., :p] / at  # the longest string has pairs of every distance
    mean = by_distance.mean(1)  # [layer distance]
    every = np.zeros((plan.cells - p, p), dtype=np.int64)
    for k, string in enumerate(strings):
        counts = plan.by_distance(string)
        every += counts
        own_pairs[k, p:] = counts.sum(1)
        own[k, :, p:] -= mean @ counts.T
    total[..., p:] -= by_distance @ every.T
    # What a string adds to a cell's B depends on the other strings through the profile. To first order, what it moves
    # the profile by goes to each cell by how many pairs of that distance the cell has in all strings.
    own[..., p:] -= (own[..., :p] - mean * own_pairs[:, None, :p]) / at @ every.T
    pairs = own_pairs.sum(0)
    out, first = [], np.cumsum([0, *plan.sizes])
    for axes, low, high in zip(plan.axes, first[:-1], first[1:], strict=True):
        shape, part = tuple(map(len, axes.values())), slice(low, high)
        with np.errstate(invalid="ignore"):
            value = np.where(pairs[part] > 0, total[..., part] / pairs[part], np.nan)
        value = value.reshape(*total.shape[:2], *shape)
        out.append(Measure(axes, value, pairs[part].reshape(shape), own[..., part], own_pairs[:, part]))
    profile, to_end, between_ends, adjacent = out
    return Constituents(profile, to_end, between_ends, adjacent, measure_scales(sums))


def _draws(measure: Measure, rng: np.random.Generator) -> Float[np.ndarray, "draw layer cell"]:
    """Return means over heads, of all strings first and then of each resample; the last layer is the mean of all."""
    own = np.concatenate([measure.own, measure.own.mean(1, keepdims=True)], axis=1)
    both = np.concatenate([own, measure.own_pairs[:, None].astype(np.float64)], axis=1)
    sums = np.concatenate([both.sum(0, keepdims=True), stats.resampled_sums(both, rng)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(sums[:, -1:] > 0, sums[:, :-1] / sums[:, -1:], np.nan))


def _table(
    values: Float[np.ndarray, "layer cell"],
    ends: Float[np.ndarray, "2 layer cell"],
    cells: dict[str, Int[np.ndarray, " cell"]],
    pairs: Int[np.ndarray, " cell"],
) -> pl.DataFrame:
    layers = len(values) - 1
    layer, cell = (x.ravel() for x in np.indices(values.shape))
    columns = {"layer": [int(x) if x < layers else None for x in layer], **{k: v[cell] for k, v in cells.items()}}
    numbers = {"value": values.ravel(), "low": ends[0].ravel(), "high": ends[1].ravel(), "pairs": pairs[cell]}
    return pl.DataFrame({**columns, **numbers}, schema_overrides={"layer": pl.Int64}).fill_nan(None)
