"""Whole commands of this checkout against another one: CPU seconds and peak memory.

    python -m benchmarks.pipeline --before PATH [--quick] [--out FILE]

`PATH` is a checkout of an earlier version (`git worktree add --detach PATH COMMIT`). Three commands run in turn, each
in a process of its own: `nextstate run` on the quickstart, `nextstate patch` on the quickstart of heads, and `nextstate
run` with reference agents alone, which write 2 million answers; the last one also a second time in the finished
folder, where nothing is left to do. Processes that a command starts and waits for count too. Tables that both versions
write must agree. Without `--before`, the commands of this checkout are timed alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from benchmarks.common import Peer, Result, Timed, compare, finish, parse

ROOT = Path(__file__).parent.parent
ROWS = ("agents=[ideal,lookup,chance,shortcuts]", "wandb=disabled", "name=rows")
GAMES = (
    "games=[{{game: Box, grid: {{boxes: [4, 8]}}, steps: 10, episodes: {box}}}, "
    "{{game: DFA, grid: {{states: [4, 8]}}, steps: 40, episodes: {dfa}}}]"
)  # 7 agents answer each question of Box, 8 each of DFA


class Command(NamedTuple):
    """A command of `nextstate`."""

    name: str
    words: tuple[str, ...]
    small: tuple[str, ...] = ()  # further words that make it small, for `--quick`
    large: tuple[str, ...] = ()  # ... for a full run


COMMANDS = (
    Command("nextstate run, quickstart", ("run", "configs/quickstart.yaml"),
            ("games=[{game: Box, grid: {boxes: [4]}, episodes: 5}]",)),
    Command("nextstate patch, quickstart", ("patch", "configs/heads/quickstart.yaml"),
            ("pairs=4", "kinds=[state]", "directions=[denoise]")),
)  # fmt: skip
REFERENCES = Command("2 million rows of reference agents", ("run", "configs/quickstart.yaml", *ROWS),
                     (GAMES.format(box=50, dfa=20),), (GAMES.format(box=5000, dfa=2000),))  # fmt: skip


class Runner:
    """Runs a command of a checkout and measures it.

    Args:
        root: the checkout.
        words: of the command.
        folder: where run folders are made.
        again: use the folder of the first run, in which nothing is left to do; by default a new one each time.
    """

    def __init__(self, root: Path, words: Sequence[str], folder: Path, again: bool = False) -> None:
        self.root, self.words, self.folder, self.again = root, words, folder, again
        self.runs, self.peak = 0, 0.0

    def __call__(self) -> Timed[Path]:
        """Run the command; raises `RuntimeError` if it fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder, log = self.folder / str(0 if self.again else self.runs), self.folder / "log.txt"
        self.runs += 1
        command = [sys.executable, "-m", "nextstate.cli", *self.words, "--out", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        with log.open("w") as out:
            process = subprocess.Popen(command, cwd=self.root, env=environment, stdout=out, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} in {self.root} failed:\n{log.read_text()[-2000:]}")
        self.peak = max(self.peak, used.ru_maxrss / 1024)
        return Timed(folder, used.ru_utime + used.ru_stime)


def difference(one: Path, two: Path) -> float:
    """Return the largest difference of a number in the tables that both wrote; infinite where they do not fit."""
    worst, shared = 0.0, 0
    for path in sorted(one.rglob("*.parquet")):
        other = two / path.relative_to(one)
        if "summary" in path.parts or not other.exists():
            continue
        mine, theirs = pl.read_parquet(path), pl.read_parquet(other)
        shared += 1
        if len(mine) != len(theirs):
            return float("inf")
        for column in set(mine.columns) & set(theirs.columns):
            if mine[column].dtype.is_numeric() or mine[column].dtype == pl.Boolean:
                gap = (mine[column].cast(pl.Float64) - theirs[column].cast(pl.Float64)).abs().fill_nan(0).max()
                worst = max(worst, float(gap or 0))  # type: ignore[arg-type]
    return worst if shared else float("inf")


def measure(
    command: Command, name: str, sides: Mapping[str, Path], folder: Path, quick: bool, repeats: int, again: bool = False
) -> tuple[list[Result], dict[str, float]]:
    """Return the comparison of a command with itself in other checkouts, and the peak memory of each."""
    words = (*command.words, *(command.small if quick else command.large))
    runners = {side: Runner(root, words, folder / side, again) for side, root in sides.items()}
    ours, *others = runners.values()
    peers: list[Peer[Path]] = [Peer("the version before", "before", runner) for runner in others]
    results = compare(name, ours, peers, difference, repeats)
    return results, {f"{name}: peak memory {side}, MB": runner.peak for side, runner in runners.items()}


def main() -> None:
    """Measure and print."""
    args = parse(__doc__ or "", before="checkout of an earlier version")
    repeats = 1 if args.quick else args.repeats
    sides = {"now": ROOT} | ({"before": Path(args.before).resolve()} if args.before else {})
    results: list[Result] = []
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (command, again) in enumerate([*((c, False) for c in (*COMMANDS, REFERENCES)), (REFERENCES, True)]):
            name = command.name + ", again in the finished folder" * again
            folder = Path(temporary, str(min(number, len(COMMANDS))))
            found, peaks = measure(command, name, sides, folder, args.quick, repeats, again)
            results += found
            rates |= peaks
    finish(args, "pipeline", results, ("torch", "polars"), rates)


if __name__ == "__main__":
    main()
