"""What all benchmarks share: ours and its peers in turn, CPU time, medians, a table, and a record as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

from nextstate.analysis.run import hardware

T = TypeVar("T")
Kind = Literal["strongest", "usual", "before"]
ROUNDS, QUICK_ROUNDS = 5, 2


class Result(NamedTuple):
    """One comparison. `ratio` is the peer's median CPU time over ours: above 1 we are faster."""

    name: str  # of the job
    shape: str  # of the model, "" without one
    peer: str
    kind: Kind
    ratio: float
    ours_s: float
    peer_s: float
    max_difference: float
    repeats: int
    measured: float  # share of the peer's work that was run; `peer_s` is its time divided by this share


class Timed(NamedTuple, Generic[T]):
    """An answer with its CPU seconds, returned by work that measures itself, as in another process."""

    answer: T
    seconds: float


class Peer(NamedTuple, Generic[T]):
    """A program to compare with.

    `kind` is "strongest" for the best that we could write, "usual" for what is in use today, "before" for an earlier
    version of this package. A slow peer may do a part
    of the job, of which all parts take equally long; `measured` is the share that it does.
    """

    name: str
    kind: Kind
    work: Callable[[], T | Timed[T]]
    measured: float = 1.0


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the processes that it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process_time() + children.ru_utime + children.ru_stime


def timed(work: Callable[[], T | Timed[T]]) -> Timed[T]:
    """Do the work and return its answer with the CPU seconds that it took."""
    begun = cpu_seconds()
    answer = work()
    return answer if isinstance(answer, Timed) else Timed(answer, cpu_seconds() - begun)


def compare(
    name: str,
    ours: Callable[[], T | Timed[T]],
    peers: Sequence[Peer[T]],
    difference: Callable[[T, T], float],
    repeats: int,
    shape: object = "",
) -> list[Result]:
    """Run ours and all peers in turn, once to warm up and then `repeats` times for the clock.

    Args:
        name: of the job, in the table and the record.
        ours: does the job and returns its answer.
        peers: the programs that do the same job.
        difference: of our answer and a peer's; checked in every round.
        repeats: rounds that count.
        shape: of the model.
    """
    works = (ours, *(peer.work for peer in peers))
    seconds: list[list[float]] = [[] for _ in works]
    worst = [0.0] * len(peers)
    for number in range(repeats + 1):
        print(f"{name} {shape}".rstrip() + f": round {number} of {repeats}", file=sys.stderr, flush=True)
        mine, *others = (timed(work) for work in works)
        worst = [max(w, difference(mine.answer, peer.answer)) for w, peer in zip(worst, others, strict=True)]
        if number:
            for column, run in zip(seconds, (mine, *others), strict=True):
                column.append(run.seconds)
    own, *times = map(median, seconds)
    return [
        Result(name, str(shape), peer.name, peer.kind, taken / peer.measured / own, own, taken / peer.measured, off,
               repeats, peer.measured)
        for peer, taken, off in zip(peers, times, worst, strict=True)
    ]  # fmt: skip


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
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and few repeats: 60 seconds on two cores")
    parser.add_argument("--repeats", type=int, help=f"rounds that count; default {ROUNDS}, or {QUICK_ROUNDS}")
    parser.add_argument(
        "--out", help="write the record (JSON); NAME.json or a folder, where the file is DATE-NAME.json"
    )
    for name, help_text in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=help_text)
    args = parser.parse_args()
    args.load = os.getloadavg()[0]
    args.repeats = args.repeats or (QUICK_ROUNDS if args.quick else ROUNDS)
    return args


def finish(
    args: argparse.Namespace,
    name: str,
    results: Sequence[Result],
    packages: Iterable[str],
    rates: Mapping[str, float] | None = None,
) -> None:
    """Print the table, write the record where `--out` asks for it, and print it as one line of JSON.

    Args:
        args: the command line, from `parse`.
        name: of the benchmark, as in `python -m benchmarks.NAME`.
        results: the comparisons.
        packages: whose versions are recorded.
        rates: further numbers, by a name that ends in their unit.
    """
    load = {"before": args.load, "after": os.getloadavg()[0]}
    table = Table(title=f"benchmarks.{name}: CPU time; load {load['before']:.2f} before, {load['after']:.2f} after")
    for column in ("job", "model", "peer", "ratio", "ours (s)", "peer (s)", "max difference", "repeats"):
        table.add_column(column, justify="left" if column in ("job", "model", "peer") else "right")
    for r in results:
        numbers = (f"{r.ratio:.2f}", f"{r.ours_s:.4f}", f"{r.peer_s:.4f}", f"{r.max_difference:.2g}", str(r.repeats))
        table.add_row(r.name, r.shape, f"{r.peer} ({r.kind})", *numbers)
    console = Console(width=160)
    console.print(table)
    for what, rate in (rates or {}).items():
        console.print(f"{what}: {rate:,.3g}" if rate < 100 else f"{what}: {rate:,.0f}")
    record: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": f"python -m benchmarks.{name}" + " --quick" * args.quick,
        "clock": "CPU seconds; models on one thread, float32",
        "load": load,
        "hardware": hardware(),
        "versions": versions(packages),
        "results": [r._asdict() for r in results],
        "rates": dict(rates or {}),
    }
    if args.out:
        path = Path(args.out)
        if path.is_dir():
            path /= f"{record['date']}-{name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
