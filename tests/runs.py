"""Runs of the study of predictions: made, opened and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from nextstate.analysis.predict.config import PredictConfig
from nextstate.analysis.predict.study import Predict
from nextstate.analysis.predict.tables import rows
from nextstate.analysis.run import Run
from nextstate.analysis.study import go, open_run
from nextstate.envs.files import slug


def make(config: Mapping[str, Any], folder: Path) -> Run[PredictConfig]:
    return go(Predict(), PredictConfig.model_validate(config), folder, command="nextstate run x.yaml")


def opened(folder: Path) -> Run[PredictConfig]:
    """Return a run with all its tables."""
    return open_run(folder, "")[1]


def frame(folder: Path) -> pl.DataFrame:
    """Return all answers of a run, in one order."""
    return rows(opened(folder)).collect().sort("agent", "setting", "episode", "step", "question")


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def record(folder: Path) -> dict[str, Any]:
    """Return what `run.json` holds."""
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


def left_out(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = record(folder)["left_out"]
    return found


def answered(folder: Path, agent: str) -> bool:
    """Return whether an agent answered or played anything."""
    run = opened(folder)
    keys = [*run.keys(f"answers/{slug(agent)}/*"), *run.keys(f"plays/{slug(agent)}/*")]
    return any(len(run.table(key)) for key in keys)
