"""The folder of a run: what it holds, whether it may be gone on with, and how a killed run never leaves half a file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import polars as pl
from pydantic import Field

from nextstate.agents.agent import AgentError
from nextstate.agents.config import Strict
from nextstate.agents.failures import guarded, one_line
from nextstate.envs.game import GameError

T = TypeVar("T")
ALL = "everything"  # what is left out where the only model of a run fails
_PACKAGES = ("nextstate", "torch", "transformers", "nnsight", "gymnasium", "numpy", "polars", "wandb")


class ExperimentError(RuntimeError):
    """An experiment cannot be run as asked; the message says what stands in the way."""


class ModelFailed(ExperimentError):
    """The models of a run cannot be loaded or asked; the message is one line that says why."""


class RunConfig(Strict):
    """What every config says: how its run is called, what seeds it, and whether W&B mirrors it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, le=10**9)
    wandb: Literal["offline", "online", "disabled"] = "offline"


class Progress:
    """Told what goes on; the command line draws it, a library user need not."""

    def begin(self, questions: int) -> None:
        """There are so many questions to answer in all."""

    def on(self, what: str) -> None:
        """We are at `what` now."""

    def advance(self, questions: int) -> None:
        """So many more were answered."""

    def warn(self, message: str) -> None:
        """Something was left out, or should be known."""

    def failed(self, error: BaseException) -> None:
        """An agent raised this; what it says comes as a warning too."""


def slugify(name: str) -> str:
    """Return a file name for an agent; names that need changing get a hash, so that no two fall together."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    return slug if slug == name else f"{slug[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def begin(config: RunConfig, settings: list[dict[str, Any]], out: Path, command: str) -> dict[str, Any]:
    """Write `run.json` of a run, or return the one that is there.

    Args:
        config: decides everything about the run.
        settings: what `run.json` says of each cell of its grid.
        out: the run's folder.
        command: that began it.

    Raises:
        ExperimentError: `out` belongs to another config, or holds something else.
    """
    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()
    path = out / "run.json"
    if path.exists():
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ExperimentError(
                f"{path} cannot be read ({error}); remove the folder or give another --out"
            ) from error
        if record.get("config_hash") != digest:
            changed = _changes(record.get("config", {}), config.model_dump(mode="json"))
            raise ExperimentError(
                f"{out} holds a run of another config (different: {', '.join(changed) or 'version'}); "
                "give another --out, or remove the folder"
            )
        return record
    if out.exists() and any(out.iterdir()):
        raise ExperimentError(f"{out} is not empty and holds no run; give another --out")
    record = {
        "name": config.name,
        "config": config.model_dump(mode="json"),
        "config_hash": digest,
        "seed": config.seed,
        "command": command,
        "started": now(),
        "finished": None,
        "seconds": 0.0,
        "versions": {p: importlib.metadata.version(p) for p in _PACKAGES} | {"python": platform.python_version()},
        "hardware": hardware(),
        "agents": [],
        "settings": settings,
        "left_out": [],
        "remarks": [],
    }
    write_json(path, record)
    return record


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))


def hardware() -> dict[str, Any]:
    """Return what a run ran on."""
    out: dict[str, Any] = {"platform": platform.platform(), "machine": platform.machine(), "cores": os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        out["cpu"] = found.group(1) if found else platform.processor()
    if "torch" in sys.modules:
        import torch

        out["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return out


def now() -> str:
    """Return the time, as `run.json` writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def remembered(agents: list[dict[str, Any]], now: dict[str, Any]) -> dict[str, Any]:
    """Return what an agent says of itself now, with what was proved of it before in the same run.

    Args:
        agents: those of `run.json`.
        now: of the agent, as `Agent.describe` returns it. A certificate of it takes the place of earlier ones of the
            same road that hold for no larger trees.
    """
    earlier = next((a for a in agents if a["name"] == now["name"]), {}).get("certificates", [])
    new = now.get("certificates", [])
    kept = [c for c in earlier if not any(_covers(other, c) for other in new)]
    return now | {"certificates": [*kept, *new]} if kept else now


def _covers(one: dict[str, Any], other: dict[str, Any]) -> bool:
    alike = all(one.get(key) == other.get(key) for key in ("road", "live", "attention", "dtype"))
    return alike and all(one[key] >= other[key] for key in ("depth", "columns"))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a file beside its place and rename it, so that there is never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
    beside.replace(path)


def write_parquet(path: Path, frame: pl.DataFrame) -> None:
    """Write a table beside its place and rename it, so that there is never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    frame.write_parquet(beside)
    beside.replace(path)


def of_one_model(do: Callable[[], T], name: str, out: Path, record: dict[str, Any], *also: type[Exception]) -> T:
    """Do what asks one model; where that fails, say why in `run.json`.

    Args:
        do: the run.
        name: of the model.
        out: the run's folder.
        record: what `run.json` says, which `do` may change.
        also: exceptions by which the project itself says that a model cannot be used.

    Raises:
        ModelFailed: the model cannot be loaded, or failed, however that was.
    """
    ours: tuple[type[Exception], ...] = (AgentError, *also)
    record["left_out"] = [x for x in record["left_out"] if x["setting"] != ALL]
    try:
        return guarded(
            do,
            lambda error: f"{name} failed: {one_line(error)}",
            (GameError, ExperimentError, *ours),
        )
    except ours as error:
        reason = " ".join(str(error).split())
        record["left_out"].append({"agent": name, "setting": ALL, "reason": reason, "failed": True})
        write_json(out / "run.json", record)
        raise ModelFailed(reason) from error


def left_out(out: Path) -> list[dict[str, Any]]:
    """Return what a run left out: agent, setting, reason, and `failed` where a model failed."""
    found: list[dict[str, Any]] = json.loads((out / "run.json").read_text(encoding="utf-8"))["left_out"]
    return found


def answered(out: Path, agent: str) -> bool:
    """Tell whether an agent answered or played anything in a run."""
    return any(any((out / part / slugify(agent)).glob("*.parquet")) for part in ("rows", "plays"))
