"""A study of equal cells for tests of executors: each job computes for a while, and may kill its worker or wait."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import polars as pl

from nextstate.agents.agent import AgentError
from nextstate.analysis.page.page import Page, Section
from nextstate.analysis.run import Run, RunConfig
from nextstate.analysis.study import Job, Skip, Study


class CellsConfig(RunConfig):
    cells: int = 4
    agents: list[str] = ["walker"]
    seconds: float = 0.0  # that each job waits
    notes: str = ""  # folder where each job writes a file, NAME.PID, before it begins
    deadly: dict[str, int] = {}  # how many workers a job kills
    broken: list[str] = []
    skipped: list[str] = []
    unloadable: list[str] = []


class Cells(Study[CellsConfig]):
    """Random walks of agents, and the differences between neighbours."""

    name = f"{__name__}:Cells"
    config = CellsConfig

    def jobs(self, config: CellsConfig) -> list[Job]:
        walks = [Job(f"walks/{a}-{i}", f"{a} {i}", 10, i, agent=a) for a in config.agents for i in range(config.cells)]
        ends = [Job(f"ends/{walk.title.replace(' ', '-')}", f"end of {walk.title}", 1, walk.key, (walk.key,))
                for walk in walks]  # fmt: skip
        return walks + ends

    def do(self, job: Job, run: Run[CellsConfig]) -> pl.DataFrame | dict[str, pl.DataFrame]:
        config = run.config
        before = noted(config, job.title)
        if config.notes:
            (Path(config.notes) / f"{job.title}.{os.getpid()}.{len(before)}").touch()
        if len(before) < config.deadly.get(job.title, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(config.seconds)
        if not job.agent:
            return run.table(job.given).tail(1)
        run.load(job.agent, lambda: self._load(job.agent, run))
        if job.title in config.broken:
            raise AgentError(f"{job.agent} stumbles")
        if job.title in config.skipped:
            raise Skip("there is no way")
        run.warn(f"{job.agent} is only a test")
        run.describe({"name": job.agent, "kind": "walker"})
        if job.given == 1:
            run.left_out(job.agent, f"a part of {job.title}", "it was too long")
        run.advance(3)
        at = run.rng("walk", job.title).standard_normal(50).cumsum()
        path = pl.DataFrame({"step": range(50), "at": at})
        return {job.key: path, f"turns/{job.agent}-{job.given}": path.filter(pl.col("at") < 0)}

    def _load(self, name: str, run: Run[CellsConfig]) -> str:
        if name in run.config.unloadable:
            raise AgentError(f"{name} has no legs")
        return name

    def metrics(self, job: Job, frame: pl.DataFrame) -> dict[str, float | None]:
        return {job.key: float(frame["at"][0])}

    def summarise(self, run: Run[CellsConfig]) -> dict[str, pl.DataFrame]:
        ends = run.tables("ends/*")
        return {"ends": pl.concat(table.with_columns(walk=pl.lit(name)) for name, table in ends.items())}

    def headline(self, run: Run[CellsConfig]) -> pl.DataFrame:
        return run.summary("ends").select("walk", "at")

    def page(self, run: Run[CellsConfig]) -> Page:
        return Page("Walks", ["Where walks end."], [Section("Ends", table=run.summary("ends"))])


def noted(config: CellsConfig, title: str = "*") -> list[Path]:
    """Return the files that jobs with this title have written."""
    return sorted(Path(config.notes).glob(f"{title}.*")) if config.notes else []


def config(**more: Any) -> CellsConfig:
    return CellsConfig.model_validate({"name": "cells", "wandb": "disabled"} | more)


def content(out: Path) -> dict[str, str]:
    """Return the digest of the rows of each table in a folder."""
    from nextstate.analysis.table import read_about

    return {p.relative_to(out).as_posix(): read_about(p)["content"] for p in sorted(out.rglob("*.parquet"))}
