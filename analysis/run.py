"""The folder of a run: its record and its tables, each with the identity of what made it.

Each table is a Parquet file whose metadata holds a digest of the file and the *identity* of what made it: config, code,
package versions, device kind, models, and the digests of the tables that it was computed from. A table is reused
only if both match the present ones; any other is moved to `set-aside/`, with the reason in `run.json`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from nextstate.agents.agent import AgentError
from nextstate.agents.config import AgentConfig, Strict
from nextstate.agents.identity import device_kind, model_identity
from nextstate.analysis.progress import Progress
from nextstate.analysis.table import (
    Damaged,
    Packed,
    Table,
    difference,
    pack,
    read_about,
    versions,
    weights_digest,
    write_packed,
)
from nextstate.envs.files import digest, path_error, write_json

LAYOUT = 2  # version of the folder layout; the first one has no such entry in `run.json`
_NEEDED = (
    "study", "name", "config", "config_digest", "command", "agents", "left_out", "warnings", "set_aside", "mixed",
)  # fmt: skip
_NO_EFFECT = ("wandb", "study", "executor")  # keys of a config that do not change its tables
_ADDED_TO = ("agents", "warnings", "left_out", "set_aside")  # lists of the record
_PART = re.compile(r"[A-Za-z0-9=._+-]+")
T = TypeVar("T")


class RunError(RuntimeError):
    """A run cannot be started, continued or read; the message gives the reason and what to do."""


class ModelFailed(RunError):
    """No model of a run could be used; the message is one line with the reason."""


class ExecutorConfig(Strict):
    """Where the jobs of a study are done; a plain string is its kind. It does not change what is done."""

    kind: Literal["serial", "local", "ray"] = Field(
        default="serial", description="serial: in this process; local: in processes of this machine; ray: on a cluster"
    )
    workers: int | None = Field(
        default=None, ge=1, description="jobs at a time; by default as many as there is room for"
    )
    cpus: int | None = Field(
        default=None,
        ge=1,
        description="cores of a worker; by default 1 with ray, else the machine's divided by the workers",
    )
    gpus: int | None = Field(
        default=None,
        ge=0,
        description="GPUs of a worker; by default 1 where there are any; with 0 all workers see all GPUs",
    )
    retries: int = Field(default=3, ge=0, description="how often a job is done again whose worker died")
    address: str | None = Field(
        default=None,
        description="of a Ray cluster: host:port, or auto for that of this machine; by default one is started here",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_kind(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _fits(self) -> ExecutorConfig:
        given = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        unused = [name for name in given if name != "kind" and (self.kind == "serial" or name == "address")]
        if unused and self.kind != "ray":
            expected = "kind: ray" if unused == ["address"] else "kind: local or kind: ray"
            raise ValueError(f"{unused[0]} has no effect with kind: {self.kind}; give {expected}, or leave it out")
        return self


class RunConfig(Strict):
    """The part of a config that all studies share."""

    study: str = Field(default="", description="the study of this config; by default that of the command")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run; its folder is runs/NAME by default"
    )
    seed: int = Field(default=0, ge=0, le=10**9, description="decides everything that is drawn at random")
    wandb: Literal["offline", "online", "disabled"] = Field(default="offline", description="how it is logged to W&B")
    executor: ExecutorConfig = Field(
        default=ExecutorConfig(),
        description="where its jobs are done: serial (the default), local, ray, or keys and values",
    )


class ModelRunConfig(RunConfig):
    """The part of a config that all studies of one language model share."""

    model: str | AgentConfig = Field(description="a language model")

    @property
    def agent(self) -> str:
        """The name of the model."""
        return AgentConfig.of(self.model).name


C = TypeVar("C", bound=RunConfig)


def now() -> str:
    """Return the current time in UTC, in the format of `run.json`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def hardware() -> dict[str, Any]:
    """Return a description of the hardware."""
    out: dict[str, Any] = {"platform": platform.platform(), "machine": platform.machine(), "cores": os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        out["cpu"] = found.group(1) if found else platform.processor()
    if "torch" in sys.modules:
        import torch

        out["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return out


# --- the run


def _no_summary(record: Mapping[str, Any], name: str) -> str:
    made = ", ".join(map(repr, record.get("summary", ()))) or "none"
    return f"the study {record['study']!r} reads the summary {name!r}, but its `summarise` returned {made}"


class _Summaries(dict[str, pl.DataFrame]):
    def __init__(self, record: Mapping[str, Any], tables: Mapping[str, pl.DataFrame]) -> None:
        super().__init__(tables)
        self._record = record

    def __missing__(self, name: str) -> pl.DataFrame:
        raise RunError(_no_summary(self._record, name))


class Run(Generic[C]):
    """A run's folder while a study works on it, or while it is read.

    Args:
        path: the folder.
        config: config of the run.
        record: content of `run.json`.
        progress: receives progress.
        saved: whether changes of the record are written to `run.json`.
    """

    def __init__(
        self, path: Path, config: C, record: dict[str, Any], progress: Progress | None = None, saved: bool = False
    ) -> None:
        self.path, self.config, self.record = path, config, record
        self.progress = progress or Progress()
        self.about: dict[str, dict[str, Any]] = {}  # metadata of each usable table, by key
        self.given: Any = None  # a loaded model, used instead of loading one
        self.loading = False  # an agent is being loaded, or could not be
        self._agent: tuple[str, Any] | None = None
        self._unloadable: dict[str, str] = {}  # agents, and why
        self._left = 0  # of the current job
        self._saved, self._memory = saved, dict[Any, Any]()
        self._began, self._before = time.monotonic(), float(record.get("seconds", 0.0))

    def rng(self, *names: str) -> np.random.Generator:
        """Return a random generator for a tuple of names, seeded by these and by the config."""
        return np.random.default_rng([self.config.seed, *(zlib.crc32(name.encode()) for name in names)])

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return `make()`, which is called only the first time in this process for each `key`."""
        if key not in self._memory:
            self._memory[key] = make()
        found: T = self._memory[key]
        return found

    def forget(self, *keys: Any) -> None:
        """Free what `once` has kept."""
        for key in keys:
            self._memory.pop(key, None)

    # --- the record

    def update(self, **changes: Any) -> None:
        """Change entries of `run.json`."""
        self.record.update(changes, seconds=round(self._before + time.monotonic() - self._began, 1))
        if self._saved:
            write_json(self.path / "run.json", self.record)

    def warn(self, text: str) -> None:
        """Show a warning and record it in `run.json` and on the page; each line once."""
        for line in text.splitlines():
            if line not in self.record["warnings"]:
                self.progress.warn(line)
                self.update(warnings=[*self.record["warnings"], line])

    def describe(self, agent: Mapping[str, Any]) -> None:
        """Record the description of an agent (`Agent.describe()`), together with its known certificates."""
        found = with_certificates(self.record["agents"], dict(agent))
        if found not in self.record["agents"]:
            by_name = {a["name"]: a for a in self.record["agents"]} | {found["name"]: found}
            self.update(agents=list(by_name.values()))

    def asks(self, entry: Any) -> dict[str, Any]:
        """Return the part of an identity that depends on a language model: its files, loading options and device kind.

        Args:
            entry: a name or an `AgentConfig`.
        """
        config = AgentConfig.of(entry)

        def find() -> dict[str, Any]:
            found = model_identity(config)
            if self.given is not None:  # its weights may differ from the files
                found["files"] = weights_digest(self.given.model)
            return {"model": found, "device": device_kind(config)}

        return self.once(("asks", config.name), find)

    def describe_model(self, model: Any) -> None:
        """Record the description of a language model, with its numbers of layers and heads and its certificates."""
        sites = model.sites
        size = {"layers": sites.layers, "heads": sites.heads, "layers_with_heads": len(sites.layers_with("head"))}
        self.describe(model.describe() | size)

    def load(self, name: str, make: Callable[[], T]) -> T:
        """Return an agent, made by `make` the first time; only the last one is kept in memory.

        Raises:
            AgentError: it cannot be loaded. This is tried once; `go` then skips the other jobs of the agent.
        """
        if self._agent is None or self._agent[0] != name:
            self._agent, self.loading = None, True  # frees the memory of the previous agent
            if name in self._unloadable:
                raise AgentError(self._unloadable[name])
            self.progress.on(f"loading {name}")
            try:
                self._agent = name, make()
            except AgentError as error:
                self._unloadable[name] = str(error)
                raise
            self.loading = False
        found: T = self._agent[1]
        return found

    def model(self, entry: Any) -> Any:
        """Return the `LanguageModel` that a config names, loaded once and described in `run.json`.

        Raises:
            AgentError: it cannot be loaded.
        """
        from nextstate.agents.registry import load_model  # imports torch

        def make() -> Any:
            found = self.given if self.given is not None else load_model(entry)
            self.describe_model(found)
            self.warn("\n".join(found.warnings()))
            return found

        return self.load(AgentConfig.of(entry).name, make)

    def advance(self, done: int) -> None:
        """Move the progress bar within the current job, at most to the end of it."""
        done = min(done, self._left)
        self._left -= done
        self.progress.advance(done)

    def begin(self, cost: int) -> None:
        """Begin a job of this cost."""
        self._left, self.loading = cost, False

    def end(self) -> None:
        """End the current job."""
        self.advance(self._left)

    def left_out(self, agent: str, what: str, reason: str, failed: bool = False) -> None:
        """Record in `run.json` that something was left out.

        Args:
            agent: agent concerned.
            what: what was left out.
            reason: the reason.
            failed: whether the model failed, which makes the exit code of the run 1.
        """
        kept = [x for x in self.record["left_out"] if (x["agent"], x["what"]) != (agent, what)]
        more = {"failed": True} if failed else {}
        self.update(left_out=[*kept, {"agent": agent, "what": what, "reason": reason, **more}])

    def entries(self) -> dict[str, list[Any]]:
        """Return the lists of the record that a job may add to."""
        return {name: list(self.record[name]) for name in _ADDED_TO}

    def adopt(self, found: Mapping[str, Sequence[Any]]) -> None:
        """Record what a job added to these lists, perhaps in another process; nothing is recorded twice."""
        for agent in found["agents"]:
            self.describe(agent)
        for line in found["warnings"]:
            self.warn(line)
        for entry in found["left_out"]:
            if entry not in self.record["left_out"]:
                self.left_out(**entry)
        if new := [x for x in found["set_aside"] if x not in self.record["set_aside"]]:
            self.update(set_aside=[*self.record["set_aside"], *new])

    # --- tables

    def file(self, key: str) -> Path:
        """Return the file of a table."""
        return self.path / f"{key}.parquet"

    def has(self, key: str) -> bool:
        """Return whether a table exists and is usable."""
        return key in self.about

    def keys(self, pattern: str = "*") -> list[str]:
        """Return the keys of usable tables that match a pattern such as `sweeps/*`, in order of creation."""
        return [key for key in self.about if fnmatchcase(key, pattern)]

    def table(self, key: str) -> pl.DataFrame:
        """Return a table of the run.

        Raises:
            RunError: it is missing or damaged.
        """
        if key not in self.about:
            raise RunError(f"{self.file(key)} is missing: run `{self.record['command']}` again")
        try:
            return pl.read_parquet(self.file(key))
        except (OSError, pl.exceptions.PolarsError) as error:
            raise RunError(
                f"{self.file(key)} cannot be read ({error}): run `{self.record['command']}` again"
            ) from error

    def tables(self, pattern: str) -> dict[str, pl.DataFrame]:
        """Return all tables that match a pattern such as `sweeps/*`, by the part of their key after the last `/`."""
        return {key.rpartition("/")[2]: self.table(key) for key in self.keys(pattern)}

    def summary(self, name: str) -> pl.DataFrame:
        """Return a table of `summary/`.

        Raises:
            RunError: the study did not make it.
        """
        if name not in self.record.get("summary", [name]):
            raise RunError(_no_summary(self.record, name))
        return self.table(f"summary/{name}")

    def summaries(self) -> dict[str, pl.DataFrame]:
        """Return all tables of `summary/`, by name; one that the study did not make raises `RunError`."""
        return _Summaries(self.record, self.tables("summary/*"))

    def pack(
        self, key: str, found: Table | Mapping[str, pl.DataFrame], identity: Mapping[str, Any], agent: str = ""
    ) -> dict[str, Packed]:
        """Return the files of one or several new tables; nothing is written.

        Args:
            key: key of the table.
            found: the table, or several by key including this one, which comes last.
            identity: identity of what made it.
            agent: agent whose description in `run.json` is stored with the table.
        """
        tables: dict[str, Table] = dict(found) if isinstance(found, Mapping) else {key: found}
        if key not in tables:
            raise RunError(f"the job {key!r} made {', '.join(map(repr, tables)) or 'nothing'}, but not its own table")
        others, out = sorted(tables.keys() - {key}), {}
        for name in [*others, key]:
            check_key(name)
            notes: dict[str, Any] = {"agents": [a for a in self.record["agents"] if a["name"] == agent]}
            notes |= {"with": others} if others and name == key else {}
            out[name] = pack(tables[name], identity, {k: v for k, v in notes.items() if v})
        return out

    def write(self, packed: Mapping[str, Packed]) -> None:
        """Write the files of new tables."""
        for name, table in packed.items():
            self.about[name] = write_packed(self.file(name), table)
        if mixed := [x for x in self.record["mixed"] if x["table"] in packed]:
            self.update(mixed=[x for x in self.record["mixed"] if x not in mixed])

    def keep(
        self, key: str, found: Table | Mapping[str, pl.DataFrame], identity: Mapping[str, Any], agent: str = ""
    ) -> None:
        """Write one or several new tables; the arguments are those of `pack`."""
        self.write(self.pack(key, found, identity, agent))

    def check(self, key: str, identity: Mapping[str, Any], accept_mixed: bool) -> bool:
        """Return whether a finished table exists and may be used; set it aside if it may not.

        Args:
            key: key of the table.
            identity: identity of what would make it now.
            accept_mixed: also use a table with another identity, and record that in `run.json` (never a damaged one).
        """
        path = self.file(key)
        if not path.is_file():
            return False
        try:
            about = read_about(path)
        except Damaged as error:
            self.set_aside(key, str(error))
            return False
        if reason := difference(about["identity"], identity):
            if not accept_mixed:
                self.set_aside(key, reason)
                return False
            self.update(
                mixed=[*(x for x in self.record["mixed"] if x["table"] != key), {"table": key, "reason": reason}]
            )
        self.about[key] = about
        for agent in about["notes"].get("agents", []):  # restores a lost record from the tables
            if agent["name"] not in {a["name"] for a in self.record["agents"]}:
                self.describe(agent)
        return True

    def fits(self, key: str, identity: Mapping[str, Any]) -> bool:
        """Return whether an undamaged table with this identity exists; if so it becomes usable."""
        try:
            about = read_about(self.file(key))
        except Damaged:
            return False
        if not difference(about["identity"], identity):
            self.about[key] = about
        return key in self.about

    def set_aside(self, key: str, reason: str, suffix: str = ".parquet") -> None:
        """Move a table, or with suffix "" a folder, to `set-aside/`, and record the reason in `run.json`."""
        path, count = self.path / f"{key}{suffix}", 1
        while (to := self.path / "set-aside" / f"{key}.{count}{suffix}").exists():
            count += 1
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            path.replace(to)
        except OSError as error:
            raise path_error(error, to) from error
        self.about.pop(key, None)
        self.progress.warn(f"{key} is set aside: {reason}")
        entry = {"table": key, "reason": reason, "when": now()}
        self.update(
            set_aside=[*self.record["set_aside"], entry],
            mixed=[x for x in self.record["mixed"] if x["table"] != key],
        )


def with_certificates(agents: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    """Return the description of an agent, together with its earlier certificates.

    Args:
        agents: the descriptions in `run.json`.
        found: the result of `Agent.describe`. Its certificates replace earlier ones of the same kind for smaller
            trees.
    """
    earlier = next((a for a in agents if a["name"] == found["name"]), {}).get("certificates", [])
    new = found.get("certificates", [])
    kept = [c for c in earlier if not any(_covers(other, c) for other in new)]
    more = [c for c in new if not any(_covers(other, c) for other in kept)]
    return found | {"certificates": [*kept, *more]} if kept else found


def _covers(one: dict[str, Any], other: dict[str, Any]) -> bool:
    alike = all(one.get(key) == other.get(key) for key in ("road", "live", "attention", "dtype"))
    return alike and all(one[key] >= other[key] for key in ("depth", "columns"))


def config_digest(study: str, config: RunConfig) -> str:
    """Return the digest of a config, without what does not change its tables."""
    return digest(study + config.model_dump_json(exclude={*_NO_EFFECT}))


def open_record(study: str, config: RunConfig, out: Path, command: str, progress: Progress) -> dict[str, Any]:
    """Return the record of a run in `out`: a new one, or that of an earlier run of the same config.

    A missing or damaged `run.json` is created again if the folder has tables made from this config.

    Raises:
        RunError: the folder holds a run of another config, of another study or of an older version, or other files.
    """
    path, wanted = out / "run.json", config_digest(study, config)
    fresh = {
        "layout": LAYOUT, "study": study, "name": config.name, "config": config.model_dump(mode="json"),
        "config_digest": wanted, "seed": config.seed, "command": command, "started": now(), "finished": None,
        "seconds": 0.0, "versions": versions() | {"python": platform.python_version()}, "hardware": hardware(),
        "agents": [], "left_out": [], "warnings": [], "set_aside": [], "mixed": [],
    }  # fmt: skip
    try:
        record = read_record(out) if path.exists() else None
    except RunError as error:
        if not any(_made_by(p) == wanted for p in out.rglob("*.parquet")):
            raise
        progress.warn(f"{error}; it is created again, since the folder has tables of this config")
        record = None
    if record is not None:
        if (record["study"], record["config_digest"]) != (study, wanted):
            raise RunError(f"{out} holds {_other(record, study, config)}; give another --out, or remove the folder")
        now_here = {
            "command": command or record["command"],
            "versions": fresh["versions"],
            "hardware": fresh["hardware"],
        }
        return record | now_here | {"config": fresh["config"]}
    if out.exists():
        tables = [p for p in out.rglob("*.parquet") if "set-aside" not in p.parts]
        made_by = {_made_by(p) for p in tables}
        others = [p for p in out.iterdir() if p.name not in (".lock", "lock.json", "run.json")]
        if others and wanted not in made_by:
            raise RunError(f"{out} is not empty and holds no run of this config; give another --out")
    write_json(path, fresh)
    return fresh


def _made_by(path: Path) -> str:
    try:
        found = read_about(path)["identity"].get("config", "")
    except Damaged:
        return ""
    return str(found)


def _other(record: Mapping[str, Any], study: str, config: RunConfig) -> str:
    if record["study"] != study:
        return f"a run of the study {record['study']!r}, not {study!r}"
    old, new = record["config"], config.model_dump(mode="json")
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and k not in _NO_EFFECT)
    return f"a run of another config (different: {', '.join(changed) or 'version'})"


def read_record(folder: Path) -> dict[str, Any]:
    """Read `run.json`.

    Raises:
        RunError: it is missing, damaged or of an older layout.
    """
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{folder} is not the folder of a run: it has no run.json") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path} is not JSON ({error}); run the same config again to replace it") from error
    if not isinstance(record, dict) or record.get("layout") != LAYOUT:
        raise RunError(
            f"{folder} was written by another version of nextstate, whose layout is not read: run its config again "
            "into another folder"
        )
    if missing := [key for key in _NEEDED if key not in record]:
        raise RunError(f"{path} has no {missing[0]!r}: it was changed by hand; run the same config again")
    return record


def check_key(key: str) -> None:
    """Raise `RunError` if a table's key is not a safe relative path."""
    if not key or not all(_PART.fullmatch(part) and part.strip(".") for part in key.split("/")):
        raise RunError(
            f"the key {key!r} of a job is not a safe file name: use parts of letters, digits and =._+-, joined by /"
        )
