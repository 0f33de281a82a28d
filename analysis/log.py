"""Weights & Biases mirrors a run: the files are the truth, and no trouble with W&B ever costs one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import polars as pl

from nextstate.analysis import figures, page, plays, tables
from nextstate.analysis.tables import Run

Mode = Literal["offline", "online", "disabled"]
FALLBACKS: dict[Mode, tuple[Literal["offline", "online"], ...]] = {
    "online": ("online", "offline"),
    "offline": ("offline",),
    "disabled": (),
}
QUESTIONS = 2000  # rows of the questions table
CELLS = 10_000  # rows of the cells table
_log = logging.getLogger(__name__)


class _Sink(Protocol):
    """What is used of a W&B run."""

    def log(self, data: dict[str, Any]) -> None: ...
    def define_metric(self, name: str, *, step_metric: str) -> Any: ...
    def finish(self) -> None: ...


class _Nowhere:
    """The null twin of a W&B run."""

    def log(self, data: dict[str, Any]) -> None:
        """Forget `data`."""

    def define_metric(self, name: str, *, step_metric: str) -> None:
        """Forget the metric."""

    def finish(self) -> None:
        """Do nothing."""


class Log:
    """Mirrors a run to W&B: `start`, `cell` as each cell is done, `finish` with tables and figures.

    Everything lands in the run folder's `wandb/`. What W&B cannot do is warned of through `logging`, never raised:
    online falls back to offline, and offline to nothing.

    Args:
        mode: "offline" (`wandb sync` sends it later), "online", or "disabled" (W&B is not even imported).
        project: the W&B project.
    """

    def __init__(self, mode: Mode = "offline", project: str = "nextstate") -> None:
        if mode not in FALLBACKS:
            raise ValueError(f"mode={mode!r} is not possible: expected one of {', '.join(FALLBACKS)}")
        self.mode, self.project = mode, project
        self._sink: _Sink = _Nowhere()
        self._done = 0

    def start(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        """Open the W&B run `name`; `config` must be JSON."""
        for mode in FALLBACKS[self.mode]:
            try:
                self._sink = _open(mode, run_dir, self.project, name, config)
            except _troubles() as error:
                _log.warning("W&B cannot start %s (%s); the files of %s are not affected", mode, error, run_dir)
            else:
                break
        self._try(lambda: self._sink.define_metric("cells_done", step_metric="cells_done"))
        self._try(lambda: self._sink.define_metric("*", step_metric="cells_done"))

    def cell(self, metrics: Mapping[str, float | int | None]) -> None:
        """Log the metrics of a cell that is done, named as `cell_metrics` names them; null ones are left out."""
        self._done += 1
        data = {key: value for key, value in metrics.items() if value is not None}
        self._send({**data, "cells_done": self._done})

    def finish(self, run: Run | Path) -> None:
        """Log summary metrics, curves, figures, the cells table and a sample of the questions, and close the run.

        Raises:
            RunError: where the run's files cannot be read; W&B is closed all the same.
        """
        if isinstance(self._sink, _Nowhere):
            return
        try:
            loaded = run if isinstance(run, Run) else tables.load(run)
            self._send(proved(loaded.info))
            answers, played = tables.narrow(loaded.rows), plays.load(loaded)
            drawn = plays.every(loaded, played)
            if len(answers):
                cells = tables.cells(answers)
                totals = tables.pooled(answers, ("agent", "game", "variant"))
                self._send(_summary(totals))
                self._steps(cells)
                self._send(_tables(loaded, cells))
                drawn |= figures.every(loaded, answers, cells, totals)
            self._send({f"figures/{slug(key)}": figure for key, figure in drawn.items()})
        finally:
            self._try(self._sink.finish)
            self._sink = _Nowhere()

    def close(self, data: Mapping[str, Any]) -> None:
        """Log metrics and plotly figures, and close the run; for runs that are not made of questions."""
        self._send(dict(data))
        self._try(self._sink.finish)
        self._sink = _Nowhere()

    def _steps(self, cells: pl.DataFrame) -> None:
        # Their own axis: the game's steps, where everything else goes by the cells that are done.
        self._try(lambda: self._sink.define_metric("by_step/*", step_metric="step"))
        for step, rows in cells.filter(pl.col("subset") == "all").sort("step").group_by("step", maintain_order=True):
            data: dict[str, Any] = {"step": step[0]}
            for row in rows.iter_rows(named=True):
                where = [row["game"], f"size={row['size']}", row["variant"], row["agent"], "accuracy"]
                data["/".join(["by_step", *filter(None, map(slug, where))])] = row["accuracy"]
            self._send(data)

    def _send(self, data: dict[str, Any]) -> None:
        self._try(lambda: self._sink.log(data))

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except _troubles() as error:
            _log.warning("W&B failed (%s); the run's own files are not affected", error)


def cell_metrics(setting: Mapping[str, Any], agent: str, rows: pl.DataFrame) -> dict[str, float | None]:
    """Return the metrics of one agent on one setting (an entry of run.json's `settings`) from its rows.

    Names are like `DFA/states=6/density=min/nextstate-tiny/accuracy`; also determined_accuracy, ceiling, chance.
    """
    means = {
        "accuracy": rows["greedy_correct"].mean(),
        "choice_accuracy": rows["choice_correct"].mean(),
        "determined_accuracy": rows.filter("determined")["greedy_correct"].mean(),
        "ceiling": rows["ceiling"].mean(),
        "chance": rows["chance"].mean(),
    }
    named = head(setting, agent)
    return {f"{named}/{key}": None if value is None else float(value) for key, value in means.items()}  # type: ignore[arg-type]


def play_metrics(setting: Mapping[str, Any], agent: str, rows: pl.DataFrame) -> dict[str, float | None]:
    """Return the metrics of one player on one setting (an entry of run.json's `plays`) from its rows.

    Names are like `play/DFA/states=6/random/success`; also score (share of the maximum), steps_over and illegal.
    """
    (row,) = plays.table(rows.select(plays.PLAYS.keys()).with_columns(agent=pl.lit(agent))).to_dicts()
    names = {"success": "success", "score": "score", "over": "steps_over", "illegal": "illegal"}
    return {f"play/{head(setting, agent)}/{name}": row[key] for key, name in names.items()}


def proved(info: Mapping[str, Any]) -> dict[str, float | int | str]:
    """Return what `run.json` says of how each model was run, under names like `certificate/nextstate-tiny/replay/road`.

    A copy in another precision has that in its name; of several certificates of one name the last is told.
    """
    out: dict[str, float | int | str] = {}
    for found in page.certificates(info):
        where = [slug(found["model"]), found["dtype"], "live" if found["live"] else "replay"]
        named = "/".join(["certificate", *filter(None, where)])
        out |= {f"{named}/{key}": found[key] for key in ("road", "error", "tolerance", "depth", "columns", "seconds")}
    return out


def head(setting: Mapping[str, Any], agent: str) -> str:
    """Return what the names of a cell's metrics begin with."""
    size = f"{setting.get('size_name', 'size')}={setting['size']}"
    return "/".join(filter(None, map(slug, [setting["game"], size, setting["variant"], agent])))


def slug(name: str) -> str:
    """Return a name as a part of a W&B key, and of a file name."""
    return re.sub(r"[^\w=.,+-]+", "-", name)


def _troubles() -> tuple[type[Exception], ...]:
    # ConnectionError, BrokenPipeError and TimeoutError are OSErrors: the service process is reached through a socket.
    from wandb.errors import Error

    return (Error, OSError)


def _open(
    mode: Literal["offline", "online"], run_dir: Path, project: str, name: str, config: Mapping[str, Any]
) -> _Sink:
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", save_code=False, disable_code=True, disable_git=True, disable_job_creation=True,
        x_disable_stats=True, x_save_requirements=False, init_timeout=20, finish_timeout=120,
    )  # fmt: skip
    run: _Sink = wandb.init(
        mode=mode,
        dir=str(run_dir),
        project=project,
        name=name,
        config=dict(config),
        settings=settings,
        reinit="create_new",
    )
    return run


def _summary(totals: pl.DataFrame) -> dict[str, float]:
    out: dict[str, float] = {}
    for row in totals.iter_rows(named=True):
        head = "/".join(filter(None, map(slug, ["summary", row["game"], row["variant"], row["agent"], row["subset"]])))
        found = {key: row[key] for key in ("accuracy", "choice", "over_ceiling", "ceiling", "chance", "n")}
        out |= {f"{head}/{key}": value for key, value in found.items() if value is not None}
    return out


def _tables(run: Run, cells: pl.DataFrame) -> dict[str, Any]:
    import wandb

    columns = ["agent", "game", "setting", "episode", "step", "stem", "truth", "greedy", "greedy_correct"]
    columns += ["choice", "choice_correct", "p_accepted", "ceiling", "determined", "chance"]
    rows = (
        run.rows.filter(pl.col("agent").is_in(run.focus))
        .select(columns)
        .sort("agent", "setting", "episode", "step")
        .collect()
    )
    questions = rows.gather_every(max(1, -(-len(rows) // QUESTIONS)))
    shown = cells if len(cells) <= CELLS else cells.filter(pl.col("subset") == "all").head(CELLS)
    return {
        "questions": wandb.Table(columns=columns, data=[list(row) for row in questions.iter_rows()]),
        "cells": wandb.Table(columns=shown.columns, data=[list(row) for row in shown.iter_rows()]),
    }
