"""16 equal cells in one process, against two processes and a Ray cluster of two nodes with one core each.

Wall-clock time from the command to the finished page, with the start of the workers but not of the cluster. Needs two
free cores. In the last row a node of the cluster is killed in the middle.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import polars as pl

from benchmarks.common import parse, versions
from nextstate.agents.reference import Reference
from nextstate.agents.rollout import episodes_of, prompts_of, seeds_for
from nextstate.analysis.page.page import Page, Section
from nextstate.analysis.run import Run, RunConfig, hardware
from nextstate.analysis.study import Job, Study, find_study, go
from nextstate.analysis.table import read_about
from nextstate.envs.games import make_game

CELLS, STEPS = 16, 50


class EqualConfig(RunConfig):
    """Cells with the same number of episodes each."""

    episodes: int = 100


class Equal(Study[EqualConfig]):
    """The ideal reader on automata of six states; the cells differ in their seeds alone."""

    name = "benchmarks.executors:Equal"
    config = EqualConfig

    def jobs(self, config: EqualConfig) -> list[Job]:
        return [Job(f"cells/{i}", f"cell {i}", given=i) for i in range(CELLS)]

    def do(self, job: Job, run: Run[EqualConfig]) -> pl.DataFrame:
        return cell(job.given, run.config.episodes)

    def summarise(self, run: Run[EqualConfig]) -> dict[str, pl.DataFrame]:
        return {"accuracy": pl.concat([x.select(pl.col("right").mean()) for x in run.tables("cells/*").values()])}

    def headline(self, run: Run[EqualConfig]) -> pl.DataFrame:
        return run.summary("accuracy").mean()

    def page(self, run: Run[EqualConfig]) -> Page:
        return Page("Equal cells", [], [Section("Cells", table=run.summary("accuracy"))])


def cell(number: int, episodes: int) -> pl.DataFrame:
    """Return the answers of the ideal reader on the episodes of a cell."""
    found = episodes_of(make_game("DFA", states=6), seeds_for(number, episodes), STEPS)
    prompts = [prompt for episode in found for prompt in prompts_of(episode)]
    right = [
        answer.greedy in prompt.asked.accepted
        for prompt, answer in zip(prompts, Reference("ideal").predict(prompts), strict=True)
    ]
    return pl.DataFrame({"episode": [prompt.episode.seed for prompt in prompts], "right": right})


class Measured(NamedTuple):
    """Wall-clock seconds of an executor, the ratio to one process, and whether no table is missing or different."""

    name: str
    seconds: float
    ratio: float
    equal: bool


def timed(executor: Any, episodes: int, folder: Path) -> tuple[float, dict[str, str]]:
    """Run the study; return its wall-clock seconds and the digests of the rows of its tables."""
    study = find_study(Equal.name)  # not the class of this module, which may be the script that was started
    config = study.config(name="equal", wandb="disabled", episodes=episodes, executor=executor)  # type: ignore[call-arg]
    begun = time.perf_counter()
    go(study, config, folder)
    seconds = time.perf_counter() - begun
    return seconds, {path.stem: read_about(path)["content"] for path in sorted((folder / "cells").glob("*.parquet"))}


def on_cluster(episodes: int, folder: Path, killed: bool) -> tuple[float, dict[str, str]]:
    """Run the study on two nodes of one core; with `killed`, one of them dies once a quarter of the cells is done."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)

    def kill() -> None:
        while len(list((folder / "cells").glob("*.parquet"))) < CELLS // 4:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    if killed:
        threading.Thread(target=kill, daemon=True).start()
    try:
        return timed({"kind": "ray", "address": cluster.address}, episodes, folder)
    finally:
        cluster.shutdown()


def main() -> None:
    """Print the table and the record."""
    given = parse(__doc__ or "")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    begun = time.process_time()
    cell(0, 20)
    episodes = max(1, round(20 * (0.5 if given.quick else 4.0) / (time.process_time() - begun)))
    print(f"{CELLS} cells of {episodes} episodes; load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores")
    ways: dict[str, Callable[[Path], tuple[float, dict[str, str]]]] = {
        "one process": lambda folder: timed("serial", episodes, folder),
        "two processes": lambda folder: timed({"kind": "local", "workers": 2}, episodes, folder),
        "Ray, two nodes": lambda folder: on_cluster(episodes, folder, False),
        "Ray, two nodes, one killed": lambda folder: on_cluster(episodes, folder, True),
    }
    found: dict[str, list[tuple[float, dict[str, str]]]] = {name: [] for name in ways}
    for _ in range(1 if given.quick else 3):  # in turn, so that a change of load meets all
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(way(Path(folder) / "run"))
    seconds = {name: median(each for each, _ in runs) for name, runs in found.items()}
    expected = found["one process"][0][1]
    results = [
        Measured(name, round(taken, 2), round(seconds["one process"] / taken, 3),
                 len(expected) == CELLS and all(tables == expected for _, tables in found[name]))
        for name, taken in seconds.items()
    ]  # fmt: skip
    for result in results:
        tables = "all tables equal" if result.equal else "TABLES DIFFER"
        print(f"{result.name:28} {result.seconds:8.1f} s   {result.ratio:5.2f}x   {tables}")
    record = {
        "cells": CELLS, "episodes": episodes, "results": [result._asdict() for result in results],
        "hardware": {**hardware(), "load": os.getloadavg()[0]}, "versions": versions(("ray", "polars")),
    }  # fmt: skip
    print(json.dumps(record))
    if given.out:
        Path(given.out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
