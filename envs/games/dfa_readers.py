"""Exact posteriors of the next state in the DFA game, for readers that know how automata are drawn.

Such a reader sums over all that the text leaves open: the order of the states and their targets in our automata, the
sink and the targets in the published ones. What was shown of a state is one `Shown`: how often the walk left it, and
where its edges lead. Which letters its actions have says nothing more, since they are drawn independently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from math import comb, exp, inf, log, perm
from typing import Any, NamedTuple

import numpy as np

MOST_STATES = 20  # of our automata: the sums are over 2^18 sets of states then, and take up to 0.3 s a question
Array = np.ndarray[Any, np.dtype[Any]]
Posterior = tuple[float, ...]  # for each state the probability that it is right


class Shown(NamedTuple):
    """What was shown of a state: how often the walk left it, and the target of each edge taken, in ascending order."""

    visits: int = 0
    targets: tuple[int, ...] = ()

    def grown(self, target: int, visits: int) -> Shown:
        """Return the row with another edge, to `target`, and `visits` more visits."""
        return Shown(self.visits + visits, tuple(sorted((*self.targets, target))))


def degrees_of(states: int, edges: int) -> tuple[int, ...]:
    """Return the number of edges of each state but the sink in our generator, in its order."""
    each, more = divmod(edges - 1, states - 1)
    return tuple([each + (i < more) for i in range(states - 1)])


@lru_cache(maxsize=1 << 16)
def default_posterior(states: int, edges: int, rows: tuple[Shown, ...], at: int, shown: bool) -> Posterior | None:
    """Return the probability of each state to be right after a new edge of `at`, for automata of our generator.

    Hidden are the order of the states, of which only the first is known (the start), and the targets. The sum over
    orders is a dynamic program over the sets of visited states that come first in the order and the number of unvisited
    ones among them, which are exchangeable. If i states come before a state, among them b of the k targets shown, and
    it has d edges and was left m times, what was shown of it has the likelihood d^-m (d)_k / (L)_k where
    d <= L = states - 1 - i (0 if b > 0), and d^-m (d - L)_b / (i)_b elsewhere; (x)_k is a falling factorial. The last
    state has one edge, to the start.

    Args:
        states: number of states.
        edges: number of edges.
        rows: what was shown of the states visited so far, numbered from 0, the start; the targets of a row differ.
        at: the current state, one of these.
        shown: whether actions are shown. If they are, the next edge is one that was not shown, and the probability is
            that of leading there. If not, no successor of `at` was shown, and it is that of being a successor.

    Returns:
        Probabilities of the visited states, followed by that of each single unvisited one if there are any. None if our
        generator cannot draw such an automaton (minimal pairs have others).
    """
    n, seen = states, len(rows)
    others, known = n - seen, rows[at].targets
    if any(s in row.targets or len(set(row.targets)) < len(row.targets) for s, row in enumerate(rows)):
        return None
    if at == 0:  # the targets of the start come later, and all later states are alike
        degree, free = degrees_of(n, edges)[0], n - 1 - len(known)
        if len(known) >= degree:
            return None
        p = 1 / free if shown else degree / free
        return tuple([0.0 if t == 0 or t in known else p for t in range(seen + (others > 0))])
    right, total = _sum_over_orders(_weights(n, edges, rows, at, shown), n, rows, at)
    right[[at, *known]] = 0.0
    total = right[:seen].sum() + others * right[seen:].sum() if shown else total
    return tuple((right / total).tolist()) if total > 0 else None


class _Weights(NamedTuple):
    """Likelihoods of what was shown of states, relative to places with the fewest edges.

    All by the number of earlier targets and by place in the order; those of the last place are relative to the largest.
    """

    rows: Array  # (visited states but the start, earlier targets, place)
    late: Array  # of the current state if its new target comes later: (earlier targets, place)
    early: Array  # ... if it comes earlier
    unvisited: float  # of an unvisited state in the last place


def _weights(n: int, edges: int, rows: tuple[Shown, ...], at: int, shown: bool) -> _Weights:
    fewest = min(degrees_of(n, edges))
    asked = Shown(rows[at].visits + shown, rows[at].targets)
    weighed = [asked if s == at else row for s, row in enumerate(rows)][1:]
    wide = max(len(row.targets) for row in weighed) + 2

    # The last state has one edge, to the start: of a state that was often left, this is by far the likeliest place.
    logs = {s: row.visits * log(fewest) for s, row in enumerate(weighed) if row.targets in ((), (0,))}
    if shown and asked.targets:
        logs.pop(at - 1, None)  # its next edge is another one
    top = max([0.0, *logs.values()])
    table = np.array([_weighed(n, edges, wide, len(row.targets), row.visits) for row in weighed])
    more = _weighed(n, edges, wide, len(asked.targets) + 1, asked.visits)
    for s, value in logs.items():
        table[s, :, -1] = exp(value - top)
    return _Weights(table, more, np.roll(more, -1, axis=0), exp(-top))


@lru_cache(maxsize=4096)
def _weighed(n: int, edges: int, wide: int, k: int, visits: int) -> Array:
    """Return the likelihoods of k targets and of visits, by the number of earlier targets (below `wide`) and by place.

    The array is shared: it must not be changed.
    """
    degrees = np.array([*degrees_of(n, edges), 1])
    table, some = np.zeros((wide, n)), _likelihoods(n, edges, k)
    table[: len(some)] = some * (degrees[:-1].min() / degrees) ** float(visits)
    return table


@lru_cache(maxsize=4096)
def _likelihoods(n: int, edges: int, k: int) -> Array:
    """Return the probability of k targets, by how many of them come earlier (0 to k) and by place but the last."""
    table = np.zeros((k + 1, n))
    for i, d in enumerate(degrees_of(n, edges)):
        later = n - 1 - i
        if d <= later:
            table[0, i] = perm(d, k) / perm(later, k) if k <= later else 0.0
        else:
            for b in range(min(i, k) + 1):
                table[b, i] = perm(d - later, b) / perm(i, b)
    return table


def _sum_over_orders(weights: _Weights, n: int, rows: tuple[Shown, ...], at: int) -> tuple[Array, float]:
    """Sum over orders the weights of being right, by visited state and for an unvisited one, and of everything.

    The sums run over the sets (bit masks) of visited states placed, without the start and the current state, and the
    number of unvisited states placed: forward up to the current state, and backward from the last state to it.
    """
    rest = [s for s in range(1, len(rows)) if s != at]
    others, count, wide = n - len(rows), len(rest), weights.rows.shape[1]
    targets = np.array([sum(1 << i for i, t in enumerate(rest) if t in rows[s].targets) for s in rest], dtype=np.int64)
    home = np.array([0 in rows[s].targets for s in rest], dtype=np.int64)
    home += wide * np.arange(count)  # flat indices of tables
    back = home + np.array([at in rows[s].targets for s in rest], dtype=np.int64)
    tables = weights.rows[[s - 1 for s in rest]].reshape(count * wide, n)
    layers = _subsets(count)
    forward = np.empty((1 << count, others + 1))
    backward = np.empty_like(forward)
    forward[0] = 1.0
    for c in range(1, count + 1):
        sets, members, fewer, _, _ = layers[c]
        index = np.bitwise_count(fewer & targets[members]) + home[members]
        arrived = (forward[fewer] * tables[:, c : c + 1 + others][index]).sum(axis=1)
        forward[sets] = arrived.cumsum(axis=1)  # unvisited states follow
    backward[-1] = weights.unvisited
    backward[-1, -1] = 1.0
    for c in range(count - 1, -1, -1):
        sets, _, _, members, more = layers[c]
        index = np.bitwise_count(sets[:, None] & targets[members]) + back[members]
        ahead = (backward[more] * tables[:, c + 2 : c + 3 + others][index]).sum(axis=1)
        backward[sets] = ahead[:, ::-1].cumsum(axis=1)[:, ::-1]
    every, sizes, placed = _sets(count)
    asked = np.uint64(sum(1 << i for i, s in enumerate(rest) if s in rows[at].targets))
    earlier = np.bitwise_count(every & asked).astype(np.int64) + (0 in rows[at].targets)
    places = sizes[:, None] + 1 + np.arange(others + 1)
    flow = forward * backward
    late, early = (flow * table[earlier[:, None], places] for table in (weights.late, weights.early))
    own = flow * weights.rows[at - 1][earlier[:, None], places]
    last = float(own[-1, -1])
    right = np.zeros(len(rows) + (others > 0))
    right[rest] = early.sum(axis=1) @ placed + late.sum(axis=1) @ ~placed
    right[0] = early.sum() + last
    if others:
        before = np.arange(others + 1) / others  # the probability that an unvisited state is among those placed
        right[-1] = (early * before + late * (1 - before)).sum()
    return right, float(own.sum())


@cache
def _sets(count: int) -> tuple[Array, Array, Array]:
    """Return all subsets of `count` things as bit masks, their sizes, and whether each thing is in each of them."""
    every = np.arange(1 << count, dtype=np.uint64)
    inside = (every[:, None] >> np.arange(count, dtype=np.uint64) & np.uint64(1)).astype(np.bool_)
    return every, inside.sum(axis=1), inside


@cache
def _subsets(count: int) -> list[tuple[Array, Array, Array, Array, Array]]:
    """Return for each size the subsets of `count` things, as bit masks.

    After the subsets follow the members of each and the subsets without one of them, then the others and the subsets
    with one of these.
    """
    every, sizes, placed = _sets(count)
    single = np.left_shift(np.uint64(1), np.arange(count, dtype=np.uint64))
    out = []
    for size in range(count + 1):
        sets, inside = every[sizes == size], placed[sizes == size]
        members = inside.nonzero()[1].astype(np.uint8).reshape(len(sets), size)
        absent = (~inside).nonzero()[1].astype(np.uint8).reshape(len(sets), count - size)
        fewer, more = sets[:, None] ^ single[members], sets[:, None] | single[absent]
        out.append((sets.astype(np.int64), members, fewer.astype(np.int64), absent, more.astype(np.int64)))
    return out


@lru_cache(maxsize=1 << 14)
def paper_posterior(
    slots: tuple[int, ...], rows: tuple[Shown, ...], start: int, at: int, shown: bool
) -> Posterior | None:
    """Return the probability of each state to be right after a new edge of `at`, for automata as published.

    Hidden are the sink, which is any state but the start with equal probability, and the targets. Given the sink, the
    place of a state in the list decides its number of edges d, and states are independent. Let L states come later in
    the list, let k edges of a state be shown, of which c_t lead to a later state t, and let it have been left m times.
    With actions, the likelihood is d^-m (d)_k / (L)_k where d <= L (0 if a target is earlier or was shown twice), and
    d^-m sum_x e_x(c) (d - L)_(k - x) (Q - 1)^-(k - x) elsewhere, with the elementary symmetric polynomials e_x and
    falling factorials (x)_k. Without actions, targets are a set, and the walk is even over its members: where d > L,
    these are the later states and those that d - L draws from all other states add to them.

    Args:
        slots: numbers of edges dealt to the states but the sink, in listing order.
        rows: what was shown of each state, in listing order.
        start: the state in which the walk began.
        at: the current state.
        shown: as for `default_posterior`.

    Returns:
        Probabilities in listing order; None if the published generator cannot draw such an automaton.
    """
    n = len(rows)
    if any(i in row.targets for i, row in enumerate(rows)):
        return None

    def weigh(place: int, row: Shown, sink: int) -> float:
        """Return the log-likelihood of a row if the sink is listed after (1), before (-1) or is (0) its state."""
        if sink == 0:
            return 0.0 if row.targets in ((), (start,)) else -inf
        slot = place if sink > 0 else place - 1
        return _log_likelihood(n, place, slots[slot], row, shown) if 0 <= slot < n - 1 else -inf

    def weigh_others(sink: int) -> list[float]:
        return [0.0 if i == at else weigh(i, row, sink) for i, row in enumerate(rows)]

    first = [*accumulate(weigh_others(1), initial=0.0)]
    last = [*accumulate(reversed(weigh_others(-1)), initial=0.0)][::-1]
    sinks = [first[z] + w + last[z + 1] for z, w in enumerate(weigh_others(0))]
    sinks[start] = -inf
    # Of the current state the likelihoods are the same for all sinks listed after it, and for all before it.
    sides = {1: _log_sum(sinks[at + 1 :]), -1: _log_sum(sinks[:at]), 0: sinks[at]}

    def total(row: Shown) -> float:
        return _log_sum([weight + weigh(at, row, side) for side, weight in sides.items()])

    asked = rows[at]
    counts = Counter(asked.targets)
    alike: dict[tuple[bool, int], float] = {}  # targets that are as often shown are equally likely
    right = []
    for t in range(n):
        kind = (t > at, counts[t]) if t != start else (t > at, -1)
        if t != at and kind not in alike:
            alike[kind] = total(asked.grown(t, int(shown)))
        right.append(-inf if t == at else alike[kind])
    whole = _log_sum(right) if shown else total(asked)
    return tuple([exp(p - whole) for p in right]) if whole > -inf else None


def _log_sum(logs: Sequence[float]) -> float:
    top = max(logs, default=-inf)
    return top + log(sum(exp(x - top) for x in logs)) if top > -inf else -inf


@lru_cache(maxsize=1 << 16)
def _log_likelihood(n: int, place: int, d: int, row: Shown, shown: bool) -> float:
    """Return the log-likelihood of what was shown of a state with `d` edges that is not the sink."""
    later, k = n - 1 - place, len(row.targets)
    counts = Counter(row.targets)
    ahead = [count for t, count in counts.items() if t > place]
    if d <= later:
        possible = sum(ahead) == k <= d and len(counts) == k
        return log(perm(d, k)) - log(perm(later, k)) - row.visits * log(d) if possible else -inf
    draws = d - later
    if not shown:
        behind = k - len(ahead)
        logs = [
            log(comb(place - behind, more - behind) * ways) - row.visits * log(later + more)
            for more, ways in enumerate(_ways(draws, later, place))
            if more >= behind and ways
        ]
        return _log_sum(logs) - draws * log(n - 1)
    sums = [1]  # e_x
    for count in ahead:
        sums = [a + count * b for a, b in zip([*sums, 0], [0, *sums], strict=True)]
    ways = sum(e * perm(draws, k - x) * (n - 1) ** x for x, e in enumerate(sums) if 0 <= k - x <= draws)
    return log(ways) - k * log(n - 1) - row.visits * log(d) if ways else -inf


@lru_cache(maxsize=1 << 14)
def _ways(draws: int, later: int, earlier: int) -> tuple[int, ...]:
    """Return the number of ways in which draws from all states hit `more` given earlier ones, and no other earlier one.

    By inclusion and exclusion, for more = 0, 1, ... .
    """
    return tuple(
        [
            sum((-1) ** a * comb(more, a) * (later + more - a) ** draws for a in range(more + 1))
            for more in range(min(draws, earlier) + 1)
        ]
    )
