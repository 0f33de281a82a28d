"""Executors: workers that each do one job at a time, in this process, in processes of this machine, or on Ray.

This module knows nothing of studies. A *factory* is a picklable function that is called once in each worker and returns
the function that does its tasks; tasks and answers are pickled too. `nextstate.analysis.study` is the only user.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from nextstate.agents.failures import Broken, guarded, one_line
from nextstate.agents.identity import visible_gpus
from nextstate.analysis.run import ExecutorConfig, RunError

Work = Callable[[Any], Any]
Factory = Callable[[], Work]
CONNECT_S = 10  # to reach a Ray cluster
STOP_S = 3  # for a process to end before it is killed
MOST = 200  # characters of an error of Ray that are shown
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from nextstate.analysis.executors import serve; serve(int(sys.argv[2]))"
)
_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # sends nothing to anybody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers without GPUs of their own see all
}


class Ready(NamedTuple):
    """A worker has started."""


class Lost(NamedTuple):
    """A worker died."""

    reason: str


class Refused(NamedTuple):
    """A worker cannot do what it was asked, and no other would."""

    reason: str


Event = Ready | Lost | Refused | Any  # anything else is the answer to a task


class Executor(ABC):
    """Slots 0 to `size` - 1, each with at most one worker, which does one task at a time.

    After `start`, `wait` returns `Ready` for the slot; after `send`, the answer or `Lost`. A slot whose worker was lost
    can be started again.
    """

    size: int

    @abstractmethod
    def start(self, slot: int) -> None:
        """Start the worker of a slot; returns at once."""

    @abstractmethod
    def send(self, slot: int, task: Any) -> None:
        """Give a task to a worker that is ready; returns at once."""

    @abstractmethod
    def wait(self) -> tuple[int, Event]:
        """Wait until something happens; return the slot and what happened."""

    @abstractmethod
    def close(self) -> None:
        """Stop all workers, also in the middle of their tasks."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def executor(config: ExecutorConfig, factory: Factory, most: int) -> Executor:
    """Return the executor that a config asks for; workers start when they are needed.

    Args:
        config: the kind of executor and its resources.
        factory: called in each worker, unless the kind is serial: then once, here.
        most: number of jobs; there are not more workers.

    Raises:
        RunError: it asks for what there is not, Ray is not installed, or the cluster cannot be reached.
    """
    if config.kind == "serial":
        return Serial(factory)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(f"executor: {config.kind} cannot be combined with torchrun; use one of them")
    return (Local if config.kind == "local" else Ray)(config, factory, most)


def perform(work: Callable[[], Any]) -> Event:
    """Return the answer of a worker; an error becomes `Refused`, with its message in one line."""
    try:
        return guarded(work, passing=(RunError,))
    except (Broken, RunError) as error:
        return Refused(" ".join(str(error).split()))


class Serial(Executor):
    """Does each task in this process, when it is waited for; exceptions are not changed."""

    size = 1

    def __init__(self, factory: Factory) -> None:
        self.factory = factory
        self.work: Work | None = None
        self.task: Any = None

    def start(self, slot: int) -> None:
        pass

    def send(self, slot: int, task: Any) -> None:
        self.task = task

    def wait(self) -> tuple[int, Event]:
        if self.work is None:
            self.work = self.factory()
            return 0, Ready()
        return 0, self.work(self.task)

    def close(self) -> None:
        pass


# --- processes of this machine


class Local(Executor):
    """A process for each worker, with its share of the cores and its own GPUs.

    These are new interpreters, not forks, since CUDA does not survive a fork and reads its environment only once.
    """

    def __init__(self, config: ExecutorConfig, factory: Factory, most: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cards = visible_gpus()
        self.gpus = min(1, len(cards)) if config.gpus is None else config.gpus
        room = len(cards) // self.gpus if self.gpus else max(1, cores // (config.cpus or 1))
        wanted = config.workers or room
        if self.gpus and (wanted > room or not room):
            raise RunError(
                f"executor asks for {max(1, wanted)} workers with {self.gpus} GPUs each, but this machine has "
                f"{len(cards)} GPUs; give fewer workers or gpus"
            )
        self.size = max(1, min(wanted, most))
        self.threads, self.cards = config.cpus or max(1, cores // self.size), cards
        self.factory = pickle.dumps(factory)
        self.running: dict[int, tuple[subprocess.Popen[bytes], Connection]] = {}

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment of a worker."""
        out = {"OMP_NUM_THREADS": str(self.threads)} | os.environ
        if self.gpus:
            out["CUDA_VISIBLE_DEVICES"] = ",".join(self.cards[slot * self.gpus : (slot + 1) * self.gpus])
        return out

    def start(self, slot: int) -> None:
        here, there = Pipe()
        command = [sys.executable, "-c", _START, json.dumps([str(x) for x in sys.path]), str(there.fileno())]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[there.fileno()], env=self.environment(slot),
            start_new_session=True,  # Ctrl-C stops this process, which stops the workers
        )  # fmt: skip
        there.close()  # so that the end of the worker is the end of the pipe
        self.running[slot] = process, here
        self._put(slot, self.factory)

    def send(self, slot: int, task: Any) -> None:
        self._put(slot, pickle.dumps(task))

    def wait(self) -> tuple[int, Event]:
        ends = {connection: slot for slot, (_, connection) in self.running.items()}
        first = wait_for([*ends])[0]
        assert isinstance(first, Connection)
        slot = ends[first]
        self.running[slot] = self.running.pop(slot)  # last in line, so that a fast worker does not hold up the others
        try:
            return slot, pickle.loads(first.recv_bytes())
        except (EOFError, OSError):  # also in the middle of an answer
            first.close()
            return slot, Lost(_ended(self.running.pop(slot)[0]))

    def close(self) -> None:
        processes = [process for process, _ in self.running.values()]
        for process in processes:
            process.terminate()
        end = time.monotonic() + STOP_S
        for process, connection in self.running.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            connection.close()
        self.running.clear()

    def _put(self, slot: int, data: bytes) -> None:
        with suppress(OSError):  # if it died, `wait` says so
            self.running[slot][1].send_bytes(data)


def _ended(process: subprocess.Popen[bytes]) -> str:
    """Return how a process ended."""
    try:
        code = process.wait(STOP_S)
    except subprocess.TimeoutExpired:  # it closed its pipe and does not end
        process.kill()
        code = process.wait()
    hint = ", as when memory runs out" if code == -9 else ""
    return f"ended by signal {-code}{hint}" if code < 0 else f"ended with exit code {code}"


def serve(descriptor: int) -> None:
    """Be a worker of `Local`: read a factory, then tasks, from a pipe, and write the answers to it."""
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    connection = Connection(descriptor)
    works: list[Work] = []

    def begin() -> Ready:
        works.append(pickle.loads(connection.recv_bytes())())
        return Ready()

    connection.send_bytes(pickle.dumps(perform(begin)))
    while True:
        try:
            task = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(perform(lambda task=task: works[0](task))))  # type: ignore[misc]


def _end_with(parent: int) -> None:
    """End this process soon after its parent has ended, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# --- Ray


class Ray(Executor):
    """An actor for each worker, on whichever node has room; every call of it makes one answer.

    A worker whose node is gone waits for room elsewhere, while the others do its jobs.
    """

    def __init__(self, config: ExecutorConfig, factory: Factory, most: int) -> None:
        for name, value in _RAY_SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError as error:
            raise RunError("executor: ray needs the package ray: pip install 'nextstate[ray]'") from error
        self.ray: Any = ray
        self.factory, self.begun = pickle.dumps(factory), False
        self.actors: dict[int, Any] = {}
        self.calls: dict[Any, int] = {}  # references of unfinished calls, and their slots
        self._connect(config.address)
        try:
            self._plan(config, most)
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str | None) -> None:
        if self.ray.is_initialized():
            return
        found = None if address is None else _reached(address)
        here = {} if found else {"include_dashboard": False}
        try:
            self.ray.init(address=found or "local", log_to_driver=False, logging_level="ERROR", **here)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            what = f"the Ray cluster at {found} cannot be used" if found else "Ray cannot be started here"
            raise RunError(f"{what}: {' '.join(str(error).split())}") from error
        self.begun = True

    def _plan(self, config: ExecutorConfig, most: int) -> None:
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        has = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
        cpus = config.cpus or 1
        gpus = min(1, int(max((b for _, b in has), default=0))) if config.gpus is None else config.gpus
        room = sum(int(min(a // cpus, b // gpus if gpus else a // cpus)) for a, b in has)
        if not room:
            nodes_have = ", ".join(f"{a:g} cores and {b:g} GPUs" for a, b in has) or "nothing"
            raise RunError(
                f"executor asks for workers with {cpus} cores and {gpus} GPUs, but no node of the Ray cluster has them "
                f"(its nodes have {nodes_have}); give fewer cpus or gpus"
            )
        self.size = max(1, min(config.workers or room, most))
        threads = os.environ.get("OMP_NUM_THREADS", str(cpus))
        remote = self.ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Actor)
        self.make: Callable[[], Any] = lambda: remote.remote([str(x) for x in sys.path], str(Path.cwd()), threads)

    def start(self, slot: int) -> None:
        self.actors[slot] = self.make()
        self.calls[self.actors[slot].begin.remote(self.factory)] = slot

    def send(self, slot: int, task: Any) -> None:
        self.calls[self.actors[slot].do.remote(pickle.dumps(task))] = slot

    def wait(self) -> tuple[int, Event]:
        (call,), _ = self.ray.wait([*self.calls], num_returns=1)
        slot, errors = self.calls.pop(call), self.ray.exceptions
        try:
            return slot, pickle.loads(self.ray.get(call))
        except errors.RayTaskError as error:
            return slot, Refused(" ".join(str(error).splitlines()[-1:]))
        except errors.RayError as error:
            self._stop(self.actors.pop(slot))
            return slot, Lost(f"was lost ({one_line(error)[:MOST]})")

    def close(self) -> None:
        for actor in self.actors.values():
            self._stop(actor)
        self.actors.clear()
        if self.begun:
            self.ray.shutdown()

    def _stop(self, actor: Any) -> None:
        with suppress(self.ray.exceptions.RayError, ValueError):  # it may be gone already
            self.ray.kill(actor)


class Actor:
    """A worker of `Ray`.

    Args:
        path: `sys.path` of the driver; what exists here is searched too.
        folder: working directory of the driver, which becomes that of this process if it exists here.
        threads: of numerical libraries.
    """

    def __init__(self, path: Sequence[str], folder: str, threads: str) -> None:
        os.environ["OMP_NUM_THREADS"] = threads
        if Path(folder).is_dir():
            os.chdir(folder)
        sys.path += [part for part in path if part not in sys.path and Path(part).exists()]
        self.work: Work | None = None

    def begin(self, factory: bytes) -> bytes:
        """Make the function that does the tasks."""

        def begin() -> Ready:
            self.work = pickle.loads(factory)()
            return Ready()

        return pickle.dumps(perform(begin))

    def do(self, task: bytes) -> bytes:
        """Do a task."""
        assert self.work is not None
        work = self.work
        return pickle.dumps(perform(lambda: work(pickle.loads(task))))


def _reached(address: str) -> str:
    """Return the address of a cluster at which something answers; Ray itself would try for minutes."""
    hint = "start a cluster with `ray start --head`, or correct executor.address"
    if address == "auto":
        note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"  # `ray start` writes it
        address = os.environ.get("RAY_ADDRESS") or (note.read_text().strip() if note.is_file() else "")
        if not address:
            raise RunError(f"executor.address: auto, but no Ray cluster was started on this machine; {hint}")
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise RunError(f"executor.address {address!r} is not an address: expected host:port or auto")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise RunError(f"no Ray cluster answers at {address} ({error.strerror or error}); {hint}") from error
    return address


# --- which job is next


class Needing(Protocol):
    """What a schedule reads of a job; see `nextstate.analysis.study.Job`."""

    @property
    def key(self) -> str: ...
    @property
    def agent(self) -> str: ...
    @property
    def needs(self) -> tuple[str, ...]: ...


J = TypeVar("J", bound=Needing)


def blocks(jobs: Sequence[J]) -> list[list[J]]:
    """Divide jobs, in their order, into blocks of neighbours that share an agent or a table.

    Neighbours in a study's order share what is in memory, so a worker should do a whole block.
    """
    out: list[list[J]] = []
    for job in jobs:
        last = out[-1][-1] if out else None
        if last and (job.agent == last.agent != "" or {last.key, *last.needs} & {*job.needs}):
            out[-1].append(job)
        else:
            out.append([job])
    return out


class Schedule(Generic[J]):
    """Which job a worker does next: the first one of its block that is ready, else of a block where no other worker is,
    else of any. One worker alone does all jobs in their order.

    Args:
        jobs: in their order; each needs only earlier ones.
    """

    def __init__(self, jobs: Sequence[J]) -> None:
        divided = blocks(jobs)
        self.block = {job.key: i for i, block in enumerate(divided) for job in block}
        self.todo = {i: {job.key: job for job in block} for i, block in enumerate(divided)}
        self.open = set(self.block)  # jobs whose tables are still to come
        self.place: dict[int, int] = {}  # block of each worker

    def take(self, slot: int) -> J | None:
        """Return a job for a worker, None if none is ready."""
        own = self.place.pop(slot, -1)
        taken = {*self.place.values()}
        free = (i for i in self.todo if i != own and i not in taken)
        for i in chain([own] if own in self.todo else [], free, sorted(taken & self.todo.keys())):
            for job in self.todo[i].values():
                if self.open.isdisjoint(job.needs):
                    del self.todo[i][job.key]
                    if not self.todo[i]:
                        del self.todo[i]
                    self.place[slot] = i
                    return job
        return None

    def put_back(self, job: J, slot: int) -> None:
        """Take a job from a worker that will not do it."""
        self.place.pop(slot, None)
        i = self.block[job.key]
        self.todo[i] = {job.key: job} | self.todo.get(i, {})
        self.todo = dict(sorted(self.todo.items()))

    def settle(self, job: J) -> None:
        """Note that a job is finished, or left out for good."""
        self.open.discard(job.key)
