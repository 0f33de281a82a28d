"""What all benchmarks share: us and the peer in turn, medians, a table, and one line of JSON at the end."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from time import perf_counter
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

from nextstate.analysis.run import hardware

T = TypeVar("T")


class Result(NamedTuple):
    """One comparison. `ratio` is the peer's median time over ours: above 1 we are faster."""

    name: str
    ratio: float
    ours_s: float
    peer_s: float
    max_difference: float
    repeats: int


def compare(
    name: str, ours: Callable[[], T], peer: Callable[[], T], difference: Callable[[T, T], float], repeats: int
) -> Result:
    """Run `ours` and `peer` in turn, once to warm up and `repeats` times for the clock.

    Args:
        name: of the comparison, in the table and the JSON.
        ours: does the work and returns its answer.
        peer: the same work, done by the peer.
        difference: how far the two answers are apart; checked in every round.
        repeats: rounds that count.
    """
    times: tuple[list[float], list[float]] = ([], [])
    worst = difference(ours(), peer())
    for _ in range(repeats):
        answers = []
        for work, taken in zip((ours, peer), times, strict=True):
            begun = perf_counter()
            answers.append(work())
            taken.append(perf_counter() - begun)
        worst = max(worst, difference(*answers))
    mine, theirs = median(times[0]), median(times[1])
    return Result(name, theirs / mine, mine, theirs, worst, repeats)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the version of Python, of this package, and of each of `packages` that is installed."""
    found = {"python": platform.python_version()}
    for package in ("nextstate", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def parse(description: str, **options: str) -> argparse.Namespace:
    """Read the command line that all benchmarks have; `.quick` asks for a run within 60 seconds.

    Args:
        description: what `--help` says.
        options: further ones that take a text, with their help.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: fits in 60 seconds on two cores")
    for name, told in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=told)
    return parser.parse_args()


def finish(
    title: str, results: Sequence[Result], packages: Iterable[str], rates: Mapping[str, float] | None = None
) -> None:
    """Print the table, then everything as one line of JSON.

    Args:
        title: above the table.
        results: the comparisons.
        packages: whose versions matter.
        rates: other numbers worth telling, by a name that ends in their unit.
    """
    table = Table(title=title)
    for column in ("what", "ratio", "ours (s)", "peer (s)", "max difference", "repeats"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for r in results:
        row = (f"{r.ratio:.2f}", f"{r.ours_s:.4f}", f"{r.peer_s:.4f}", f"{r.max_difference:.2g}", str(r.repeats))
        table.add_row(r.name, *row)
    console = Console(width=120)
    console.print(table)
    for name, rate in (rates or {}).items():
        console.print(f"{name}: {rate:,.3g}" if rate < 100 else f"{name}: {rate:,.0f}")
    machine = {**hardware(), "load": os.getloadavg()[0]}
    record = {"results": [r._asdict() for r in results], "hardware": machine, "versions": versions(packages)}
    print(json.dumps({**record, "rates": dict(rates or {})}))
