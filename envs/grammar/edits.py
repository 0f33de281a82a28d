"""How far a string is from a grammar: the fewest terminals to replace, by recursion over spans in (min, +)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nextstate.envs.game import GameError
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.sizes import bounds

NEVER = 2**29  # more than any string is long, and twice of it is still an int32


class _Costs(NamedTuple):
    """`cost[k, i]` is the fewest replacements that make a symbol of the `low + k` tokens from place i on."""

    low: int
    cost: np.ndarray


def min_edits(grammar: Grammar, string: Sequence[int] | np.ndarray) -> int | None:
    """Return the minimum number of replaced tokens that gives a string of the grammar; None if none has this length.

    Tokens may be any integers; those that are not the index of a terminal must be replaced.
    """
    x = np.asarray(string, dtype=None if len(string) else np.int64)
    if x.ndim != 1 or x.dtype.kind not in "iu":
        raise GameError(
            f"string of type {x.dtype} and shape {x.shape} is not possible: expected whole numbers in a row"
        )
    n, size = len(x), bounds(grammar)
    if not size[0][0] <= n <= size[0][1]:
        return None
    first = grammar.first[-1]
    of: dict[int, _Costs] = {}
    for t in range(len(grammar.terminals)):
        of[first + t] = _Costs(1, np.append(x != t, NEVER).astype(np.int32)[None])
    for a in range(first - 1, 0, -1):
        low, high = size[a][0], min(size[a][1], n)
        if low > n:
            continue
        best = np.full((high - low + 1, n + 1), NEVER, dtype=np.int32)
        for right, _ in grammar.expansions[a]:
            if all(child in of for child in right):
                made = of[right[-1]]
                for child in right[-2::-1]:
                    made = _join(of[child], made, n)
                rows = best[made.low - low : made.low - low + len(made.cost)]
                np.minimum(rows, made.cost[: len(rows)], out=rows)
        of[a] = _Costs(low, best)
    fewest = NEVER
    for right, _ in grammar.expansions[0]:
        if all(child in of for child in right):
            fewest = min(fewest, _whole([of[child] for child in right], n))
    return fewest if fewest < NEVER else None


def _join(left: _Costs, right: _Costs, n: int) -> _Costs:
    """Return the costs of the two after each other."""
    low = left.low + right.low
    high = min(n, low + len(left.cost) + len(right.cost) - 2)
    best = np.full((max(0, high - low + 1), n + 1), NEVER, dtype=np.int32)
    for k, row in enumerate(left.cost[: len(best)]):
        begins = left.low + k  # of the right part, after the start of the left one
        rows = best[k : k + len(right.cost), : n + 1 - begins]
        np.minimum(rows, row[: n + 1 - begins] + right.cost[: len(rows), begins:], out=rows)
    return _Costs(low, np.minimum(best, NEVER, out=best))


def _whole(parts: list[_Costs], n: int) -> int:
    """Return the cost of all of the string made of `parts`."""
    ahead = np.full(n + 1, NEVER, dtype=np.int32)  # from each place to the end, by the parts done so far
    ahead[n] = 0
    for low, cost in parts[::-1]:
        now = np.full(n + 1, NEVER, dtype=np.int32)
        for k, row in enumerate(cost[: n + 1 - low], start=low):
            np.minimum(now[: n + 1 - k], row[: n + 1 - k] + ahead[k:], out=now[: n + 1 - k])
        ahead = now
    return int(ahead[0])
