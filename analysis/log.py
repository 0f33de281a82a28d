"""Logging of runs to Weights & Biases. A run is complete without it, and failures of W&B never stop a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import polars as pl

from nextstate.analysis.page.page import Page, certificates

Mode = Literal["offline", "online", "disabled"]
FALLBACKS: dict[Mode, tuple[Literal["offline", "online"], ...]] = {
    "online": ("online", "offline"),
    "offline": ("offline",),
    "disabled": (),
}
ROWS = 10_000  # most rows of a table that is sent
_log = logging.getLogger(__name__)


class _Sink(Protocol):
    """The methods of a W&B run that are used."""

    def log(self, data: dict[str, Any]) -> None: ...
    def define_metric(self, name: str, *, step_metric: str) -> Any: ...
    def finish(self) -> None: ...


class _Nowhere:
    """Stands in for a W&B run if there is none."""

    def log(self, data: dict[str, Any]) -> None:
        """Ignore `data`."""

    def define_metric(self, name: str, *, step_metric: str) -> None:
        """Ignore the metric."""

    def finish(self) -> None:
        """Do nothing."""


class Log:
    """Mirrors a run to W&B: `start`, `job` as each job is done, `finish` with headline, figures and tables, `close`.

    Everything is written below the run folder's `wandb/`. Errors of W&B become warnings of `logging` and are never
    raised: online falls back to offline, and offline to nothing.

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

    def start(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        """Open the W&B run `name`; `config` must be JSON."""
        for mode in FALLBACKS[self.mode]:
            try:
                self._sink = _open(mode, folder, self.project, name, config)
            except _troubles() as error:
                _log.warning("W&B cannot start %s (%s); the files of %s are not affected", mode, error, folder)
            else:
                break
        self._try(lambda: self._sink.define_metric("jobs_done", step_metric="jobs_done"))
        self._try(lambda: self._sink.define_metric("*", step_metric="jobs_done"))

    def job(self, metrics: Mapping[str, float | int | None]) -> None:
        """Log the metrics of a job that is done; those that are None are left out."""
        self._done += 1
        data = {key: value for key, value in metrics.items() if value is not None}
        self._send({**data, "jobs_done": self._done})

    def finish(self, headline: pl.DataFrame, page: Page, record: Mapping[str, Any]) -> None:
        """Log the headline as summary metrics and as a table, every figure and table of the page, and certificates."""
        if isinstance(self._sink, _Nowhere):
            return
        self._send(proved(record))
        self._send(summary(headline))
        self._try(lambda: self._sink.log({"headline": table(headline)}))
        for section in page.sections:
            if section.table is not None:
                self._try(lambda s=section: self._sink.log({f"tables/{part(s.title)}": table(s.table)}))  # type: ignore[misc]
        self._send({f"figures/{name}": figure for name, figure in page.figures.figures.items()})

    def close(self) -> None:
        """Close the W&B run."""
        self._try(self._sink.finish)
        self._sink = _Nowhere()

    def _send(self, data: dict[str, Any]) -> None:
        if data:
            self._try(lambda: self._sink.log(data))

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except _troubles() as error:
            _log.warning("W&B failed (%s); the run's own files are not affected", error)


def summary(headline: pl.DataFrame) -> dict[str, float | int]:
    """Return the numbers of a headline by name: `summary/`, the row's texts, then the column, joined by `/`."""
    names = [c for c, kind in headline.schema.items() if kind == pl.String]
    out: dict[str, float | int] = {}
    for row in headline.iter_rows(named=True):
        where = [part(row[c]) for c in names if row[c]]
        numbers = {c: row[c] for c in headline.columns if c not in names and row[c] is not None}
        out |= {"/".join(["summary", *where, column]): value for column, value in numbers.items()}
    return out


def proved(record: Mapping[str, Any]) -> dict[str, float | int | str]:
    """Return the certificates of `run.json` as metrics, with names like `certificate/nextstate-tiny/replay/road`.

    The name of a certificate of a copy in another precision contains that precision. Of several with one name the last
    counts.
    """
    out: dict[str, float | int | str] = {}
    for found in certificates(record):
        where = [part(found["model"]), found["dtype"], "live" if found["live"] else "replay"]
        named = "/".join(["certificate", *filter(None, where)])
        out |= {f"{named}/{key}": found[key] for key in ("road", "error", "tolerance", "depth", "columns", "seconds")}
    return out


def part(name: str) -> str:
    """Return a name as one part of a W&B key."""
    return re.sub(r"[^\w=.,+-]+", "-", name)


def table(frame: pl.DataFrame) -> Any:
    """Return a W&B table of the first rows."""
    import wandb

    some = frame.head(ROWS)
    known = [some[name].drop_nulls().head(1).to_list() or [None] for name in some.columns]
    found = wandb.Table(columns=some.columns, data=[[values[0] for values in known]])
    # Rows are set afterwards: W&B would infer the types of columns again for each row, which takes seconds.
    found.data = [list(row) for row in some.iter_rows()]
    return found


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
