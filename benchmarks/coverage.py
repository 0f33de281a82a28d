"""How often the intervals of `nextstate.analysis.stats` contain the true value, by simulation.

Accuracies: episodes have an effect of their own. Given the intraclass correlation (ICC) of the right answers within an
episode, its probability of a right answer is drawn from a beta distribution, or takes one of two values. The same
interval without regard to episodes (Wilson's on all questions) stands beside ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console
from rich.table import Table

from benchmarks.common import parse, versions
from nextstate.analysis import stats

EPISODES = (5, 10, 20, 50, 100)
ICC = (0.0, 0.1, 0.5)
SHARES = (0.03, 0.5, 0.9, 0.97, 0.99, 1.0)
PAIRS = ((0.5, 0.3), (0.9, 0.8), (0.97, 0.9), (0.99, 0.95), (1.0, 0.98))  # accuracies of two agents
DETERMINED = (0.5, 0.9, 0.98, 1.0)  # share of the questions whose ceiling is 1
RATIOS = (0.5, 0.9, 0.97, 1.0)  # accuracy over ceiling
LOW = 0.25  # ceiling of the other questions
QUESTIONS = 10  # an episode
DRAWS, QUICK_DRAWS = 4000, 500
WANTED = 0.93  # least coverage of an interval of 95 %

Mixture = Literal["beta", "two values"]
Values = Float[np.ndarray, "episode draw"]
Ends = Float[np.ndarray, "2 draw"]


class Cell(NamedTuple):
    """One simulated setting: the share of draws whose interval contains the true value, and the mean width."""

    setting: Mapping[str, Any]
    coverage: float
    width: float


# --- what is drawn


def probabilities(
    rng: np.random.Generator, p: float, icc: float, shape: tuple[int, int], mixture: Mixture = "beta"
) -> Values:
    """Draw the probability of a right answer of each episode; they have mean `p` and variance icc * p * (1 - p)."""
    if icc == 0 or p in (0, 1):
        return np.full(shape, p)
    if mixture == "beta":
        return rng.beta(p * (1 / icc - 1), (1 - p) * (1 / icc - 1), size=shape)
    return _two_values(rng.random(shape), p, icc)


def _two_values(uniform: Values, p: float, icc: float) -> Values:
    return p + np.sqrt(icc) * np.where(uniform < p, 1 - p, -p)


def sizes(rng: np.random.Generator, questions: int, shape: tuple[int, int], uneven: bool) -> Values:
    """Return the number of questions of each episode: always `questions`, or from 1 to twice as many but one."""
    return (rng.integers(1, 2 * questions, shape) if uneven else np.full(shape, questions)).astype(float)


# --- cells of the grids


def accuracies(
    rng: np.random.Generator,
    draws: int,
    *,
    questions: int = QUESTIONS,
    mixture: Mixture = "beta",
    uneven: bool = False,
    interval: Callable[[Values, Values], Ends] = lambda hits, trials: stats.accuracy(hits, trials)[1],
) -> Iterator[Cell]:
    """Yield the coverage of the interval of an accuracy, for each number of episodes, ICC and accuracy."""
    for episodes, icc, p in product(EPISODES, ICC, SHARES):
        trials = sizes(rng, questions, (episodes, draws), uneven)
        hits = rng.binomial(trials.astype(int), probabilities(rng, p, icc, trials.shape, mixture)).astype(float)
        ends = interval(hits, trials)
        yield _cell({"episodes": episodes, "icc": icc, "p": p}, ends, p)


def ratios(rng: np.random.Generator, draws: int, *, questions: int = QUESTIONS) -> Iterator[Cell]:
    """Yield the coverage of the interval of accuracy over ceiling; episodes differ in both."""
    for episodes, icc, determined, ratio in product(EPISODES, ICC, DETERMINED, RATIOS):
        shape = (episodes, draws)
        share, p = probabilities(rng, determined, icc, shape), probabilities(rng, ratio, icc, shape)
        hits, ceilings, squares = np.zeros((3, *shape))
        for _ in range(questions):
            ceiling = np.where(rng.random(shape) < share, 1.0, LOW)
            hits += rng.random(shape) < p * ceiling
            ceilings += ceiling
            squares += ceiling**2
        _, ends = stats.over_ceiling(hits, np.full(shape, float(questions)), ceilings, squares)
        setting = {"episodes": episodes, "icc": icc, "determined": determined, "ratio": ratio}
        yield _cell(setting, ends, ratio)


def differences(rng: np.random.Generator, draws: int, *, shared: bool, questions: int = QUESTIONS) -> Iterator[Cell]:
    """Yield the coverage of the interval of a difference of two agents.

    With `shared`, the same episodes and questions are hard for both agents; otherwise their errors are independent.
    """
    for episodes, icc, (one, two) in product(EPISODES, ICC, PAIRS):
        shape, hits = (episodes, draws), []
        effect, luck = rng.random(shape), rng.random((questions, *shape))
        for p in (one, two):
            if shared:
                chances = _two_values(effect, p, icc)
                hits.append((luck < chances).sum(0).astype(float))
            else:
                hits.append(rng.binomial(questions, probabilities(rng, p, icc, shape)).astype(float))
        _, ends = stats.paired_difference(hits[0] - hits[1], np.full(shape, float(questions)))
        yield _cell({"episodes": episodes, "icc": icc, "p": (one, two)}, ends, one - two)


def _pooled(hits: Values, trials: Values) -> Ends:
    return stats.wilson(hits.sum(0), trials.sum(0))


def _cell(setting: Mapping[str, Any], ends: Ends, truth: float) -> Cell:
    inside: Bool[np.ndarray, " draw"] = (ends[0] <= truth + 1e-12) & (truth - 1e-12 <= ends[1])
    return Cell(setting, float(inside.mean()), float((ends[1] - ends[0]).mean()))


ACCURACIES: dict[str, Callable[[np.random.Generator, int], Iterator[Cell]]] = {
    "accuracy, 10 questions": accuracies,
    "accuracy, 10 questions, two values": lambda rng, n: accuracies(rng, n, mixture="two values"),
    "accuracy, 2 questions": lambda rng, n: accuracies(rng, n, questions=2),
    "accuracy, 1 to 9 questions": lambda rng, n: accuracies(rng, n, questions=5, uneven=True),
    "accuracy, 1 question": lambda rng, n: accuracies(rng, n, questions=1),
    "over ceiling, 10 questions": ratios,
    "over ceiling, 1 question": lambda rng, n: ratios(rng, n, questions=1),
    "difference, shared errors, two values": lambda rng, n: differences(rng, n, shared=True),
    "difference, independent errors": lambda rng, n: differences(rng, n, shared=False),
    "difference, 1 question": lambda rng, n: differences(rng, n, shared=False, questions=1),
    "for comparison: Wilson on all of 10 questions": lambda rng, n: accuracies(rng, n, interval=_pooled),
}


def simulate(parts: Iterable[str] = ACCURACIES, draws: int = DRAWS, seed: int = 0) -> dict[str, list[Cell]]:
    """Return the cells of some parts; each has random numbers of its own, so that it does not depend on the others."""
    order = list(ACCURACIES)
    return {part: list(ACCURACIES[part](np.random.default_rng([seed, order.index(part)]), draws)) for part in parts}


# --- the table


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the number of cells, the lowest and the mean coverage, how many are below `WANTED`, and mean widths."""
    coverage = [cell.coverage for cell in cells]
    worst = min(cells, key=lambda cell: cell.coverage)
    widths = {e: float(np.mean([c.width for c in cells if c.setting["episodes"] == e])) for e in EPISODES}
    return {"cells": len(cells), "lowest": min(coverage), "mean": float(np.mean(coverage)), "worst": worst.setting,
            "below": sum(c < WANTED for c in coverage), "widths": widths}  # fmt: skip


def main() -> None:
    """Print the table and one line of JSON."""
    given = parse(__doc__ or "")
    draws = QUICK_DRAWS if given.quick else DRAWS
    found = {part: summary(cells) for part, cells in simulate(draws=draws).items()}
    table = Table(title=f"Coverage of 95 % intervals, {draws} draws a cell (E: episodes)")
    for k, name in enumerate(
        ("what", "cells", "lowest", "mean", f"below {WANTED}", *(f"width at E={e}" for e in EPISODES))
    ):
        table.add_column(name, justify="right" if k else "left")
    for part, row in found.items():
        widths = (f"{width:.3f}" for width in row["widths"].values())
        table.add_row(part, str(row["cells"]), f"{row['lowest']:.3f}", f"{row['mean']:.3f}", str(row["below"]), *widths)
    Console(width=150).print(table)
    record = json.dumps({"draws": draws, "results": found, "versions": versions(("numpy", "scipy"))})
    if given.out:
        Path(given.out).write_text(record + "\n")
    print(record)


if __name__ == "__main__":
    main()
