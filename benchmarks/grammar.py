"""Strings a second under a grammar: membership and exact next tokens, against a plain CYK parser, string by string.

Peer: the textbook's chart (Cocke, Younger, Kasami) in pure Python, rules made binary by one item for each beginning of
a body, empty cells skipped; the prefix probabilities of next tokens are read from the same chart. Answers are compared
string by string. Then, without a peer: all published grammars, and the cost against the length of the strings, for a
published grammar and for the worst there is, in which every symbol becomes every string.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from time import process_time
from typing import Any

import numpy as np

from benchmarks.common import Peer, Result, compare, finish, parse
from nextstate.envs.grammar.derivation import sample
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.inside import member, next_tokens
from nextstate.envs.grammar.reading import Posterior
from nextstate.envs.grammar.sources import PUBLISHED, published

Chart = list[list[dict[Any, float]]]
PAIRS = ("r", "12", "34", "56", "78", "9c", "ab")  # levels of a grammar in which every symbol becomes every string
WORST = [
    f"{a} -> {' | '.join(map(' '.join, [*product(below, repeat=2), *product(below, repeat=3)]))}"
    for above, below in pairwise(PAIRS)
    for a in above
]


def chart(grammar: Grammar, string: Sequence[int]) -> Chart:
    """Return for each pair of places the probability of each symbol, and beginning of a body, between them."""
    pairs: dict[tuple[Any, int], list[tuple[Any, float]]] = defaultdict(list)
    alone: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for a, expansions in enumerate(grammar.expansions):
        for right, p in expansions:
            if len(right) == 1:
                alone[right[0]].append((a, p))
            for k in range(1, len(right)):
                left = right[0] if k == 1 else right[:k]
                made = (a, p) if k == len(right) - 1 else (right[: k + 1], 1.0)
                if made not in pairs[left, right[k]] or k == len(right) - 1:
                    pairs[left, right[k]].append(made)
    n = len(string)
    cells: Chart = [[{} for _ in range(n + 1)] for _ in range(n + 1)]
    for j in range(1, n + 1):
        for i in range(j - 1, -1, -1):
            cell: dict[Any, float] = cells[i][j]
            if i == j - 1:
                cell[grammar.first[-1] + string[i]] = 1.0
            for m in range(i + 1, j):
                left_cell, right_cell = cells[i][m], cells[m][j]
                if not left_cell or not right_cell:
                    continue
                for left, p in left_cell.items():
                    for right, q in right_cell.items():
                        for whole, share in pairs.get((left, right), ()):
                            cell[whole] = cell.get(whole, 0.0) + share * p * q
            for symbol in range(len(grammar.symbols) - 1, -1, -1):  # children before parents
                if symbol in cell and symbol in alone:
                    for whole, share in alone[symbol]:
                        cell[whole] = cell.get(whole, 0.0) + share * cell[symbol]
    return cells


def plain_member(grammar: Grammar, strings: Sequence[Sequence[int]]) -> list[bool]:
    """Tell of each string whether it is one, by its chart."""
    return [0 in chart(grammar, string)[0][len(string)] for string in strings]


def plain_next(grammar: Grammar, strings: Sequence[Sequence[int]]) -> list[list[list[float]]]:
    """Return what follows each prefix of each string, by its chart."""
    out = []
    for string in strings:
        cells, n = chart(grammar, string), len(string)
        begun = [[0.0] * (n + 1) for _ in grammar.symbols]
        begun[0][0] = 1.0
        for a, expansions in enumerate(grammar.expansions):
            for right, p in expansions:
                reached = [p * v for v in begun[a]]
                for child in right:
                    after = [0.0] * (n + 1)
                    for i, v in enumerate(reached):
                        if v:
                            begun[child][i] += v
                            for j in range(i + 1, n + 1):
                                if child in cells[i][j]:
                                    after[j] += v * cells[i][j][child]
                    reached = after
        rows = []
        for k in range(n + 1):
            row = [*[begun[grammar.first[-1] + t][k] for t in range(len(grammar.terminals))], cells[0][k].get(0, 0.0)]
            rows.append([p / sum(row) for p in row])
        out.append(rows)
    return out


def against_plain(name: str, many: int, repeats: int) -> list[Result]:
    """Compare on `many` strings of a published grammar; half of those asked about for membership are perturbed."""
    grammar, rng = published(name), np.random.default_rng(0)
    strings = [each.tokens.tolist() for each in sample(grammar, rng, many)]
    mixed = [list(string) for string in strings]
    for string in mixed[::2]:
        at = int(rng.integers(len(string)))
        string[at] = (string[at] + 1) % len(grammar.terminals)
    told = f"{name}, {many} strings"
    parsed: Peer[Any] = Peer("a plain CYK parser", "usual", lambda: plain_member(grammar, mixed))
    charted: Peer[Any] = Peer("a plain CYK parser", "usual", lambda: plain_next(grammar, strings))

    def apart(a: list[list[list[float]]], b: list[list[list[float]]]) -> float:
        return max(float(np.abs(np.array(x) - np.array(y)).max()) for x, y in zip(a, b, strict=True))

    return [
        *compare(f"membership, {told}", lambda: member(grammar, mixed).tolist(), [parsed],
                 lambda a, b: float(a != b), repeats),
        *compare(f"next tokens, {told}", lambda: [after.p.tolist() for after in next_tokens(grammar, strings)],
                 [charted], apart, repeats),
    ]  # fmt: skip


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the least processor time that `work` takes."""
    taken = []
    for _ in range(repeats):
        begun = process_time()
        work()
        taken.append(process_time() - begun)
    return min(taken)


def published_rates(many: int) -> dict[str, float]:
    """Return strings (and, while reading, tokens) a second of processor time, for each published grammar."""
    rates: dict[str, float] = {}
    for name in PUBLISHED:
        grammar = published(name)
        strings = [each.tokens for each in sample(grammar, np.random.default_rng(0), many)]
        rates[f"{name}: sampled strings/s"] = many / seconds(
            lambda g=grammar: sample(g, np.random.default_rng(0), many)
        )  # type: ignore[misc]
        rates[f"{name}: membership strings/s"] = many / seconds(lambda g=grammar, x=strings: member(g, x))  # type: ignore[misc]
        rates[f"{name}: next tokens strings/s"] = many / seconds(lambda g=grammar, x=strings: next_tokens(g, x))  # type: ignore[misc]
        few = strings[:3]
        rates[f"{name}: read tokens/s"] = sum(map(len, few)) / seconds(lambda g=grammar, x=few: read_all(g, x))  # type: ignore[misc]
    return rates


def read_all(grammar: Grammar, strings: Sequence[np.ndarray]) -> None:
    """Read strings token by token, as the game's ideal reader does."""
    for string in strings:
        now = Posterior.start(grammar)
        for token in string.tolist():
            now = now.read(token)


def cost_of_length(told: str, grammar: Grammar, strings: dict[int, list[np.ndarray]]) -> dict[str, float]:
    """Return milliseconds a string by length, the exponent fitted to them, and the constant of the longest, cubed."""
    cost = {n: seconds(lambda x=x: next_tokens(grammar, x)) / len(x) for n, x in strings.items()}  # type: ignore[misc]
    slope = np.polyfit(np.log(list(cost)), np.log(list(cost.values())), 1)[0]
    longest = max(cost)
    out = {f"next tokens, {told}, length {n}: ms/string": 1e3 * s for n, s in cost.items()}
    out[f"next tokens, {told}: exponent of length"] = float(slope)
    out[f"next tokens, {told}: ns/rule/length^3"] = 1e9 * cost[longest] / len(grammar.rules) / longest**3
    return out


def by_length(quick: bool) -> dict[str, float]:
    """Return the cost against length, for cfg3j and for the worst."""
    grammar, rng = published("cfg3j"), np.random.default_rng(0)
    drawn = sorted([each.tokens for each in sample(grammar, rng, 4000)], key=len)
    lengths = [len(x) for x in drawn]
    picked = {}
    for target in (300, 450, 600, 750, 900):
        at = int(np.searchsorted(lengths, target))
        picked[target] = drawn[at : at + 16]
    rates = cost_of_length("cfg3j", grammar, picked)
    worst = Grammar.read("\n".join(WORST))
    targets = (160, 226, 320, 452) if quick else (160, 226, 320, 452, 640)
    many = {n: [rng.integers(2, size=n) for _ in range(2)] for n in targets}
    return {**rates, **cost_of_length("every string", worst, many)}


def main() -> None:
    """Measure and print."""
    args = parse(__doc__ or "")
    quick = args.quick
    results = [
        result for name in ("cfg3b", "cfg3f") for result in against_plain(name, 12 if quick else 40, args.repeats)
    ]
    rates = published_rates(40 if quick else 400)
    finish(args, "grammar", results, ("numpy", "scipy"), {**rates, **by_length(quick)})


if __name__ == "__main__":
    main()
