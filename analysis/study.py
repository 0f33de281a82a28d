"""A study: jobs that each make one table, statistics over these tables, a headline and a page. `go` runs one.

To add a study, write one subclass of `Study` and list it in `analysis/studies.py`, in the entry points
`nextstate.studies` of a package of your own, or in a YAML file as `study: pkg.module:Name`.
"""

from __future__ import annotations

import socket
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple

import numpy as np
import polars as pl
from pydantic import ValidationError

from nextstate.agents.agent import AgentError
from nextstate.agents.failures import Broken, guarded, one_line
from nextstate.analysis.executors import Event, Executor, Lost, Refused, Schedule, executor
from nextstate.analysis.lock import locked
from nextstate.analysis.progress import Progress
from nextstate.analysis.run import C, ModelFailed, Run, RunConfig, RunError, check_key, now, open_record, read_record
from nextstate.analysis.studies import GROUP, STUDIES
from nextstate.analysis.table import DECISIVE, Damaged, Packed, Table, code_digest, difference, read_about, versions
from nextstate.envs import plugins
from nextstate.envs.files import PathError, file_digest
from nextstate.envs.game import GameError

if TYPE_CHECKING:
    from nextstate.analysis.page.page import Page


class Job(NamedTuple):
    """One unit of a study's work. It makes the table `key`, which is kept in the run's folder.

    Attributes:
        key: such as "answers/ideal/Box-boxes=4": parts of letters, digits and =._+-, joined by /.
        title: what is shown while it runs, and where it is left out.
        cost: in units of the progress bar.
        given: what `Study.do` needs to know.
        needs: keys of earlier jobs whose tables it reads.
        agent: which agent it asks; after one that cannot be used, its other jobs are left out.
        repeatable: whether `nextstate verify` may do it again (not a training of hours).
    """

    key: str
    title: str
    cost: int = 1
    given: Any = None
    needs: tuple[str, ...] = ()
    agent: str = ""
    repeatable: bool = True


class Skip(Exception):
    """Raised by `Study.do` if a job cannot be done; the message is the reason."""


class Study(ABC, Generic[C]):
    """A kind of run.

    Attributes:
        name: the name of the study, as `STUDIES` or the entry point has it.
        config: the class of its configs.
    """

    name: ClassVar[str]
    config: ClassVar[type[RunConfig]]

    @abstractmethod
    def jobs(self, config: C) -> Sequence[Job]:
        """Return all jobs, in order of execution. Must not import torch or write anything.

        Raises:
            RunError, GameError, ConfigError: the config is not possible.
        """

    def identity(self, job: Job, run: Run[C]) -> dict[str, Any]:
        """Return everything besides config, code, versions and needed tables that determines the job's table.

        As JSON, for example `{"model": model_identity(entry)}`. Must not import torch.
        """
        return {}

    def stale(self, job: Job, run: Run[C]) -> str:
        """Return why a finished table may not be used although its identity matches; "" if it may.

        For tables about other files of the run, such as a trained model. Must not import torch.
        """
        return ""

    @abstractmethod
    def do(self, job: Job, run: Run[C]) -> Table | Mapping[str, pl.DataFrame]:
        """Do a job; return its table, or several by key, including `job.key`.

        A table may be lazy (from `nextstate.analysis.table.Spool`), if it is too large for memory.
        It may be called in another process, where `run` has only the tables that `job.needs` names and those made with
        them, and again if that process dies.

        Raises:
            Skip: the job cannot be done; the run records this and continues.
            AgentError: its agent failed.
        """

    def metrics(self, job: Job, frame: Any) -> dict[str, float | None]:
        """Return the numbers to log to W&B when a job is done; `frame` is the table that `do` returned for it."""
        return {}

    @abstractmethod
    def summarise(self, run: Run[C]) -> Mapping[str, pl.DataFrame]:
        """Return all statistics, as tables by name; they are stored in `summary/`."""

    @abstractmethod
    def headline(self, run: Run[C]) -> pl.DataFrame:
        """Return the main results, for the terminal and the W&B summary; reads `summary/` only.

        Text columns name the row. `x_low` and `x_high` are shown as the interval of column `x`.
        """

    @abstractmethod
    def page(self, run: Run[C]) -> Page:
        """Return the report page; reads `summary/` and `run.json` only, and computes no statistics."""

    def worker(self, config: C, out: Path) -> None:
        """Do the work of an additional process started by torchrun (`RANK` above 0)."""
        raise RunError(f"the study {self.name!r} runs in one process: start it without torchrun")


# --- finding studies


def find_study(name: str) -> Study[Any]:
    """Return a study by its name, by that of an entry point, or by `pkg.module:Name`.

    Raises:
        RunError: there is none.
    """
    try:
        if name in STUDIES:
            plugins.check_unique(GROUP, name, STUDIES)
            module, _, attribute = STUDIES[name].path.partition(":")
            found: Any = getattr(import_module(module), attribute)
        else:
            found = plugins.load(GROUP, name, STUDIES)
    except plugins.PluginError as error:
        raise RunError(str(error)) from error
    if not (isinstance(found, type) and issubclass(found, Study)):
        raise RunError(f"{name} is not a study: expected a subclass of nextstate.analysis.study.Study")
    missing = sorted(found.__abstractmethods__) + [x for x in ("name", "config") if not hasattr(found, x)]
    if missing:
        raise RunError(f"the study {name} is not complete: it does not define {', '.join(missing)}")
    study: Study[Any] = found()
    return study


def reference(study: Study[Any]) -> str:
    """Return what `find_study` finds a study by: the name under which it is listed or installed, or pkg.module:Name."""
    path = f"{type(study).__module__}:{type(study).__qualname__}"
    known = {name: listed.path for name, listed in STUDIES.items()}
    known |= {name: entry.value for name, entry in plugins.names(GROUP).items() if name not in known}
    return next((name for name, value in known.items() if value == path), path)


# --- running one


def go(
    study: Study[C],
    config: C,
    out: Path,
    *,
    progress: Progress | None = None,
    command: str = "",
    model: Any = None,
    accept_mixed: bool = False,
    wait: bool = False,
) -> Run[C]:
    """Run a study, or finish the run in `out`; write its page and return the run.

    Args:
        study: the study.
        config: config of the run.
        out: folder of the run.
        progress: receives progress.
        command: command that started the run, for `run.json`.
        model: a loaded `LanguageModel` to use instead of loading the one that the config names.
        accept_mixed: also use finished tables made with another model, version or device, and report that on the page.
        wait: wait for another process that uses this folder instead of raising.

    Raises:
        RunError: `out` belongs to another run or is in use, or the study has invalid jobs.
        ModelFailed: no job could be done; the message is the reason.
        GameError, ConfigError: the config is not possible.
    """
    progress = progress or Progress()
    jobs = checked(study, config)  # before anything is written
    with locked(out, command, wait, progress):
        record = open_record(reference(study), config, out, command, progress)
        run = Run(out, config, record, progress, saved=True)
        run.given = model
        progress.begin(sum(job.cost for job in jobs))
        mirror = _Mirror(study, run)
        try:
            _Driver(study, run, jobs, accept_mixed, mirror).go()
            if not any(run.has(job.key) for job in jobs):
                left_out = run.record["left_out"]
                reasons = dict.fromkeys(x["reason"] for x in [x for x in left_out if x.get("failed")] or left_out)
                raise ModelFailed("; ".join(reasons) or "the study has no jobs")
            new = _summarise(study, run, jobs)
            if new or mirror.used or not (out / "report.html").is_file() or not run.record["finished"]:
                progress.on("page")
                run.update(finished=now())
                mirror.finish(write_page(study, run))
        finally:
            mirror.close()
    return run


def checked(study: Study[C], config: C) -> list[Job]:
    """Return the jobs of a study.

    Raises:
        RunError: two jobs have the same key, a key is not a file name, or a job needs a table of no earlier job.
    """
    jobs = list(study.jobs(config))
    seen: set[str] = set()
    for job in jobs:
        check_key(job.key)
        if job.key in seen:
            raise RunError(f"two jobs of the study {study.name!r} have the key {job.key!r}: keys must be unique")
        if missing := [key for key in job.needs if key not in seen]:
            raise RunError(
                f"the job {job.key!r} of the study {study.name!r} needs {missing[0]!r}, which is no earlier job"
            )
        seen.add(job.key)
    return jobs


def identity_of(study: Study[C], job: Job, run: Run[C]) -> dict[str, Any]:
    """Return the present identity of a job's table."""
    found = {
        "config": run.record["config_digest"], "code": code_digest(),
        "versions": run.once("versions", partial(versions, DECISIVE)),
    }  # fmt: skip
    inputs = {key: run.about[key]["content"] for key in job.needs}
    more = {"inputs": inputs, "study": run.once("source", partial(plugins.source_digest, type(study)))}
    return found | {key: value for key, value in more.items() if value} | study.identity(job, run)


# --- doing jobs


class Task(NamedTuple):
    """What a worker needs to know to do a job.

    Attributes:
        key: key of the job.
        identity: identity of its table.
        about: metadata of the tables that it reads, by key.
        agents: the descriptions of agents in `run.json`.
    """

    key: str
    identity: dict[str, Any]
    about: dict[str, dict[str, Any]]
    agents: list[dict[str, Any]]


class Outcome(NamedTuple):
    """What a worker has done.

    Attributes:
        tables: files of the tables, for the driver to write; empty if the job could not be done.
        metrics: numbers for W&B.
        unusable: why the job's agent cannot be used at all, or "".
        added: what was added to the lists of `run.json`; see `Run.adopt`.
        shown: calls of a `Progress` that are still to be made: names of its methods with their arguments.
    """

    tables: dict[str, Packed]
    metrics: dict[str, float | None]
    unusable: str
    added: dict[str, list[Any]]
    shown: list[tuple[str, Any]]


class Worker(Generic[C]):
    """Does the jobs of a study, one at a time. It writes no tables.

    Args:
        study: the study.
        run: the run, which keeps what is in memory between jobs.
        jobs: all jobs of the study.
    """

    def __init__(self, study: Study[C], run: Run[C], jobs: Sequence[Job]) -> None:
        self.study, self.run, self.jobs = study, run, {job.key: job for job in jobs}

    def __call__(self, task: Task) -> Outcome:
        """Do a job.

        Raises:
            RunError: the run cannot go on.
        """
        study, run, job = self.study, self.run, self.jobs[task.key]
        before, tables, metrics, unusable = run.entries(), dict[str, Packed](), dict[str, float | None](), ""
        run.begin(job.cost)
        try:
            found = guarded(
                lambda: study.do(job, run),
                lambda error: f"{job.agent or job.title} failed: {one_line(error)}",
                (AgentError, GameError, RunError, Skip, PathError),
            )
        except Skip as error:
            run.left_out(job.agent, job.title, _line(error))
            run.progress.warn(f"{job.title}: {_line(error)}")
        except (AgentError, GameError) as error:
            reason, failed = _line(error), not isinstance(error, GameError)
            run.progress.warn(reason)
            run.progress.failed(error)
            run.left_out(job.agent, job.title, reason, failed)
            if job.agent and (isinstance(error, Broken) or run.loading):
                unusable = reason
        else:
            tables = run.pack(job.key, found, task.identity, job.agent)
            metrics = dict(study.metrics(job, _own(job, found)))
        run.end()
        added = {name: [x for x in now if x not in before[name]] for name, now in run.entries().items()}
        return Outcome(tables, metrics, unusable, added, [])


class RemoteError(Exception):
    """An exception of another process; the message is its traceback."""


class Recorded(Progress):
    """Keeps the calls for another process; what is going on is not kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def advance(self, done: int) -> None:
        self.calls.append(("advance", done))

    def warn(self, message: str) -> None:
        self.calls.append(("warn", message))

    def failed(self, error: BaseException) -> None:
        self.calls.append(("failed", RemoteError("".join(traceback.format_exception(error)).rstrip())))


def remote_worker(record: dict[str, Any], folder: Path, token: str) -> Callable[[Task], Outcome]:
    """Return what does the jobs of a run in another process.

    Args:
        record: content of `run.json`.
        folder: folder of the run.
        token: digest of the file that shows that this process sees the same folder.

    Raises:
        RunError: the study is not installed here, or its jobs read tables and this process does not see the folder.
    """
    study = find_study(record["study"])
    run: Run[Any] = Run(folder, study.config.model_validate(record["config"]), dict(record), Recorded())
    worker = Worker(study, run, checked(study, run.config))
    host = socket.gethostname()
    if any(job.needs for job in worker.jobs.values()) and _token(folder) != token:
        raise RunError(
            f"the worker on {host} does not see {folder}, whose tables it would read; give an --out that all machines "
            "of the cluster share"
        )

    def work(task: Task) -> Outcome:
        job, calls = worker.jobs[task.key], Recorded()
        run.progress, run.about = calls, dict(task.about)
        run.record.update({name: [] for name in run.entries()}, agents=task.agents)
        if reason := difference(task.identity, identity_of(study, job, run)):
            raise RunError(
                f"the worker on {host} differs from this process: {job.key} would be {reason}; start the command on a "
                "machine like those of the workers, with the same packages"
            )
        outcome = worker(task)
        repeated = {("warn", line) for line in outcome.added["warnings"]}  # `Run.adopt` shows these
        return outcome._replace(shown=[call for call in calls.calls if call not in repeated])

    return work


def _token(folder: Path) -> str:
    try:
        return file_digest(folder / "lock.json")
    except OSError:
        return ""


class _Driver(Generic[C]):
    """Gives the jobs of a run to workers, and writes what they make: no other process does."""

    def __init__(self, study: Study[C], run: Run[C], jobs: list[Job], accept_mixed: bool, mirror: _Mirror) -> None:
        self.study, self.run, self.jobs, self.accept_mixed, self.mirror = study, run, jobs, accept_mixed, mirror
        self.schedule, self.retries = Schedule(jobs), run.config.executor.retries
        self.unusable: dict[str, str] = {}  # agents and the reasons
        self.deaths: Counter[str] = Counter()  # of workers, by job; "" while they start
        self.idle, self.starting = set[int](), set[int]()  # slots
        self.busy: dict[int, Job] = {}

    def go(self) -> None:
        """Do all jobs that are not done."""
        with executor(self.run.config.executor, self._factory(), len(self.jobs)) as workers:
            while True:
                self._give(workers)
                self._start(workers)
                if not self.schedule.open:
                    break
                if not self.busy and self.run.config.executor.kind != "serial":
                    self.run.progress.on("waiting for a worker")
                self._take(*workers.wait())
        self._in_order()

    def _in_order(self) -> None:
        """Put tables and agents in the order of the jobs, whichever was done first."""
        run, jobs = self.run, list(enumerate(self.jobs))
        tables = {key: i for i, job in jobs for key in (job.key, *self._with(job.key))}
        agents = {job.agent: i for i, job in reversed(jobs)}
        run.about = dict(sorted(run.about.items(), key=lambda item: tables.get(item[0], len(jobs))))
        found = sorted(run.record["agents"], key=lambda agent: agents.get(agent["name"], len(jobs)))
        if found != run.record["agents"]:
            run.update(agents=found)

    def _factory(self) -> Callable[[], Callable[[Task], Outcome]]:
        run, kind = self.run, self.run.config.executor.kind
        if kind == "serial":
            return lambda: Worker(self.study, run, self.jobs)
        if run.given is not None:
            raise RunError(f"a model that is given in memory cannot be used by executor: {kind}; use serial")
        if type(self.study).__module__ == "__main__":
            raise RunError(f"executor: {kind} cannot import {type(self.study).__name__}: move the study to a module")
        record = run.record | {name: [] for name in run.entries()}
        return partial(remote_worker, record, run.path.resolve(), _token(run.path))

    def _give(self, workers: Executor) -> None:
        for slot in sorted(self.idle):
            if (next_one := self._next(slot)) is None:
                break  # there is none for the others either
            (job, identity), run = next_one, self.run
            run.progress.on(job.title)
            self.mirror.start()
            kept = [x for x in run.record["left_out"] if (x["agent"], x["what"]) != (job.agent, job.title)]
            run.update(left_out=kept, finished=None)
            needs = {key: run.about[key] for need in job.needs for key in (need, *self._with(need))}
            workers.send(slot, Task(job.key, identity, needs, run.record["agents"]))
            self.idle.remove(slot)
            self.busy[slot] = job

    def _start(self, workers: Executor) -> None:
        """Start as many workers as have something to do."""
        if self.idle:
            return
        free = [*sorted(self.starting), *(x for x in range(workers.size) if x not in {*self.starting, *self.busy})]
        found = []
        for slot in free:
            if (next_one := self._next(slot)) is None:
                break
            found.append((next_one[0], slot))
            if slot not in self.starting:
                self.starting.add(slot)
                workers.start(slot)
        for job, slot in reversed(found):
            self.schedule.put_back(job, slot)

    def _next(self, slot: int) -> tuple[Job, dict[str, Any]] | None:
        """Return a job to do and the identity of its table; those that need not or cannot be done are settled."""
        run = self.run
        while job := self.schedule.take(slot):
            missing = [key for key in job.needs if not run.has(key)]
            if missing:
                run.left_out(job.agent, job.title, f"it needs {missing[0]}, which was left out")
            elif job.agent in self.unusable:
                run.left_out(job.agent, job.title, self.unusable[job.agent], failed=True)
            else:
                identity = identity_of(self.study, job, run)
                if not _finished(self.study, run, job, identity, self.accept_mixed):
                    return job, identity
            self.schedule.settle(job)
            run.progress.advance(job.cost)
        return None

    def _take(self, slot: int, found: Event) -> None:
        """Note what a worker answered, or what became of it."""
        self.starting.discard(slot)
        job = self.busy.pop(slot, None)
        if isinstance(found, Refused):
            raise RunError(found.reason)
        if isinstance(found, Lost):
            self._lost(slot, job, found.reason)
            return
        self.idle.add(slot)
        if job is None:
            self.deaths.pop("", None)
            return
        assert isinstance(found, Outcome)
        for name, argument in found.shown:
            getattr(self.run.progress, name)(argument)
        self.run.adopt(found.added)
        if found.unusable:
            self.unusable[job.agent] = found.unusable
        if found.tables:
            self.run.write(found.tables)
            self.mirror.job(found.metrics)
        self.schedule.settle(job)

    def _lost(self, slot: int, job: Job | None, reason: str) -> None:
        key, run = job.key if job else "", self.run
        self.deaths[key] += 1
        again = self.deaths[key] <= self.retries
        if job is None:
            if not again:
                raise RunError(f"workers cannot be started: the last of {self.deaths[key]} {reason}")
            run.progress.warn(f"a worker {reason} while it started; another is started")
        elif again:
            run.progress.warn(f"{job.title}: its worker {reason}; it is done again")
            self.schedule.put_back(job, slot)
        else:
            reason = f"its worker {reason}, {self.deaths[key]} times"
            run.progress.warn(f"{job.title}: {reason}")
            run.left_out(job.agent, job.title, reason, failed=True)
            if job.agent:
                self.unusable[job.agent] = reason
            self.schedule.settle(job)
            run.progress.advance(job.cost)

    def _with(self, key: str) -> list[str]:
        """Return the tables that a job made beside its own."""
        found: list[str] = self.run.about[key]["notes"].get("with", []) if self.run.has(key) else []
        return found


def _finished(study: Study[C], run: Run[C], job: Job, identity: dict[str, Any], accept_mixed: bool) -> bool:
    if not run.check(job.key, identity, accept_mixed):
        return False
    others = run.about[job.key]["notes"].get("with", [])
    if not all([run.check(other, identity, accept_mixed) for other in others]):
        reason = "a table that was made with it is missing or set aside"
    elif not (reason := study.stale(job, run)):
        return True
    run.set_aside(job.key, reason)
    return False


def _own(job: Job, found: Table | Mapping[str, pl.DataFrame]) -> Table:
    """Return the job's own table among those that it made."""
    return found[job.key] if isinstance(found, Mapping) else found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _summarise(study: Study[C], run: Run[C], jobs: Sequence[Job]) -> bool:
    """Compute `summary/` unless it matches the tables; return whether it was computed."""
    inputs = {job.key: run.about[job.key]["content"] for job in jobs if run.has(job.key)}
    identity = {
        "config": run.record["config_digest"], "code": code_digest(),
        "versions": versions(("numpy", "polars", "scipy")), "inputs": inputs,
    }  # fmt: skip
    names = run.record.get("summary", [])
    if names and all([run.fits(f"summary/{name}", identity) for name in names]):
        return False
    run.progress.on("statistics")
    made = guarded(lambda: dict(study.summarise(run)), passing=(RunError, AgentError, GameError))
    for name, frame in made.items():
        check_key(name)
        run.keep(f"summary/{name}", frame, identity)
    run.update(summary=sorted(made))
    for path in sorted((run.path / "summary").glob("*.parquet")):
        if path.stem not in made:
            path.unlink()  # of an earlier state of this run
    return True


def write_page(study: Study[C], run: Run[C]) -> Page:
    """Write `report.html` and `figures/`, from `summary/` and `run.json` alone.

    Raises:
        RunError: the page reads a table that `summarise` did not make.
        PathError: the folder cannot be written.
    """
    from nextstate.analysis.page.page import write

    page = study.page(run)
    write(page, run.record, run.path)
    return page


# --- reading one


def open_run(folder: Path, keys: str = "summary/") -> tuple[Study[Any], Run[Any]]:
    """Open a run for reading; return its study and the run.

    Args:
        folder: folder of the run.
        keys: prefix of the keys of tables to open; "" for all.

    Raises:
        RunError: the folder is not a run, or its study or config is unknown.
    """
    record = read_record(folder)
    study = find_study(record["study"])
    try:
        config = study.config.model_validate(record["config"])
    except ValidationError as error:
        raise RunError(f"{folder / 'run.json'} has a config that is not valid ({error.errors()[0]['msg']})") from error
    run: Run[Any] = Run(folder, config, record)
    for path in sorted(folder.rglob("*.parquet")):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key.startswith(keys) and not key.startswith(("set-aside/", "models/")):
            try:
                run.about[key] = read_about(path)
            except Damaged as error:
                run.progress.warn(f"{path}: {error}")
    return study, run


class Difference(NamedTuple):
    """The result of `verify` for one table."""

    key: str
    rows: int
    made: str  # difference between its identity and the present one, "" if there is none
    found: str  # difference from the recomputed table, "" if there is none


def verify(folder: Path, cells: int = 8, seed: int = 0, tolerance: float = 1e-4, progress: Progress | None = None,
           model: Any = None) -> list[Difference]:  # fmt: skip
    """Repeat a random sample of a run's jobs and compare their tables with those in its folder. Writes nothing.

    Args:
        folder: folder of the run.
        cells: most jobs to repeat.
        seed: seed of the sample.
        tolerance: allowed difference of numbers, relative to the largest in their column (at least 1).
        progress: receives progress.
        model: a loaded `LanguageModel` to use instead of loading the one that the config names.

    Raises:
        RunError: the folder is not a run, or has no table that can be recomputed.
    """
    study, run = open_run(folder, "")
    run.progress = progress or run.progress
    run.given = model
    jobs = checked(study, run.config)
    lost = [Difference(job.key, 0, "", "the table is missing or damaged")
            for job in jobs if run.file(job.key).exists() and not run.has(job.key)]  # fmt: skip
    possible = [job for job in jobs if run.has(job.key) and job.repeatable and all(run.has(key) for key in job.needs)]
    if not possible:
        raise RunError(f"{folder} has no table that could be made again: run `{run.record['command']}` first")
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(len(possible), size=min(cells, len(possible)), replace=False))
    run.progress.begin(len(chosen))
    out = lost
    for job in (possible[i] for i in chosen):
        run.progress.on(job.title)
        made = difference(run.about[job.key]["identity"], identity_of(study, job, run))
        kept = run.table(job.key)
        try:
            passing = (AgentError, GameError, RunError, Skip)
            found = guarded(lambda job=job: study.do(job, run), passing=passing)  # type: ignore[misc]
            differs = compare(kept, _own(job, found).lazy().collect(), tolerance)
        except (AgentError, GameError, RunError, Skip) as error:
            differs = f"it cannot be made again: {_line(error)}"
        out.append(Difference(job.key, len(kept), made, differs))
        run.progress.advance(1)
    return out


def compare(old: pl.DataFrame, new: pl.DataFrame, tolerance: float) -> str:
    """Return a description of the difference of two tables, "" if they are equal."""
    if old.schema != new.schema:
        names = sorted(set(old.schema.items()) ^ set(new.schema.items()), key=str)
        return f"other columns: {', '.join(f'{name} ({kind})' for name, kind in names)}"
    if len(old) != len(new):
        return f"{len(new)} rows, {len(old)} before"
    out = []
    for name, kind in old.schema.items():
        a, b = old[name], new[name]
        while isinstance(kind, pl.List):
            if not a.list.len().equals(b.list.len()):
                break
            a, b, kind = a.explode(), b.explode(), kind.inner  # type: ignore[assignment]
        if kind.is_float() and len(a) == len(b):
            x, y = a.to_numpy().astype(float), b.to_numpy().astype(float)
            finite = np.isfinite(x) & np.isfinite(y)
            same = (x == y) | (np.isnan(x) & np.isnan(y)) | finite
            largest = float(np.abs(x[finite] - y[finite]).max(initial=0.0))
            if not same.all():
                out.append(f"{name}: {int((~same).sum())} values are finite in only one of the tables")
            elif largest > tolerance * max(1.0, float(np.abs(x[finite]).max(initial=0.0))):
                out.append(f"{name}: by up to {largest:.2g}")
        elif not a.equals(b):
            wrong = len(a) if len(a) != len(b) else int((a.ne_missing(b)).sum())
            out.append(f"{name}: {wrong} of {len(a)} values")
    return "; ".join(out)


class _Mirror:
    """Sends a run to W&B; opened when there is something to send."""

    def __init__(self, study: Study[Any], run: Run[Any]) -> None:
        self.study, self.run, self.used = study, run, False
        self._log: Any = None

    def start(self) -> None:
        self.used = True
        if self._log is None:
            from nextstate.analysis.log import Log

            self._log = Log(self.run.config.wandb)
            self._log.start(self.run.path, self.run.config.name, self.run.record["config"])

    def job(self, metrics: Mapping[str, float | None]) -> None:
        self._log.job(metrics)

    def finish(self, page: Page) -> None:
        self.start()
        self._log.finish(self.study.headline(self.run), page, self.run.record)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
