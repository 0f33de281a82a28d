"""Executors: the same tables and the same record wherever jobs are done, also where workers are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextstate import cli
from nextstate.agents.config import ConfigError, read_config
from nextstate.analysis import run as run_module
from nextstate.analysis.executors import Local, Schedule, blocks
from nextstate.analysis.predict.config import PredictConfig
from nextstate.analysis.predict.study import Predict
from nextstate.analysis.progress import Progress
from nextstate.analysis.run import ExecutorConfig, ModelFailed, Run, RunError, read_record
from nextstate.analysis.study import Job, Task, find_study, go, remote_worker, verify
from tests.cells import Cells, CellsConfig, config, content, noted
from tests.outside import STUDY, write_package

LOCAL = {"kind": "local", "workers": 2}
RECORDED = ("agents", "warnings", "left_out", "set_aside", "mixed", "summary", "config_digest", "study", "seed")


def cells(out: Path, executor: Any = "serial", progress: Progress | None = None, **more: Any) -> Run[CellsConfig]:
    return go(Cells(), config(executor=executor, **more), out, progress=progress)


def record(out: Path) -> dict[str, Any]:
    """Return what `run.json` says of the results, without an order."""
    found = read_record(out)
    return {key: sorted(x, key=str) if isinstance(x := found[key], list) else x for key in RECORDED}


def kill_worker_of(given: CellsConfig, title: str) -> threading.Thread:
    """Kill from outside the process that does a job, once it has begun."""

    def kill() -> None:
        while not (found := noted(given, title)):
            time.sleep(0.01)
        os.kill(int(found[0].name.split(".")[1]), signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each table is written by this process."""
    counted, write = Counter[str](), run_module.write_packed

    def counting(path: Path, packed: Any) -> Any:
        counted[f"{path.parent.name}/{path.stem}"] += 1
        return write(path, packed)

    monkeypatch.setattr(run_module, "write_packed", counting)
    return counted


class Listener(Progress):
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.total = self.done = 0

    def begin(self, total: int) -> None:
        self.total = total

    def on(self, what: str) -> None:
        self.heard.append(what)

    def warn(self, message: str) -> None:
        self.heard.append(message)

    def advance(self, done: int) -> None:
        self.done += done


# --- which job is next


def drawn(rng: np.random.Generator, n: int) -> list[Job]:
    """Draw jobs with agents and needs."""
    out: list[Job] = []
    for i in range(n):
        needs = rng.choice(i, size=rng.integers(0, min(i, 2) + 1), replace=False) if i else []
        out.append(Job(f"t/{i}", f"{i}", needs=tuple(f"t/{j}" for j in needs), agent=str(rng.choice(["", "a", "b"]))))
    return out


def test_one_worker_does_all_jobs_in_their_order() -> None:
    for seed in range(50):
        jobs = drawn(np.random.default_rng(seed), 30)
        schedule, found = Schedule(jobs), []
        while job := schedule.take(0):
            found.append(job)
            schedule.settle(job)
        assert found == jobs
        assert not schedule.open


def test_every_job_is_done_after_what_it_needs_and_once_unless_its_worker_dies() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        jobs, workers = drawn(rng, 40), int(rng.integers(1, 6))
        schedule, busy, finished, deaths = Schedule(jobs), dict[int, Job](), list[str](), 0
        while schedule.open:
            for slot in range(workers):
                if slot not in busy and (job := schedule.take(slot)):
                    assert {*job.needs} <= {*finished}
                    busy[slot] = job
            assert len({job.key for job in busy.values()}) == len(busy)
            slot = int(rng.choice([*busy]))
            job = busy.pop(slot)
            if rng.random() < 0.2:
                deaths += 1
                schedule.put_back(job, slot)
            else:
                finished.append(job.key)
                schedule.settle(job)
        assert Counter(finished) == Counter(job.key for job in jobs)
        assert deaths


def test_neighbours_that_share_an_agent_or_a_table_stay_together() -> None:
    who = [Job(f"{agent}/{i}", "", agent=agent, needs=(f"q/{i}",)) for agent in ("m", "n") for i in range(3)]
    jobs = [*(Job(f"q/{i}", "") for i in range(3)), *who]
    assert [[job.key for job in block] for block in blocks(jobs)] == [
        ["q/0"], ["q/1"], ["q/2"], ["m/0", "m/1", "m/2"], ["n/0", "n/1", "n/2"],
    ]  # fmt: skip
    schedule, order = Schedule(jobs), {0: "", 1: ""}
    for _ in range(5):  # both workers in step: each takes one model, and none loads what the other has
        taken = [(slot, schedule.take(slot)) for slot in order]
        for slot, job in taken:
            if job:
                order[slot] += job.key[0]
                schedule.settle(job)
    assert order == {0: "qqnnn", 1: "qmmm"}


# --- the same results


def test_two_processes_make_the_tables_and_the_record_of_one(tmp_path: Path, writes: Counter[str]) -> None:
    given = {
        "agents": ["a", "b", "c"], "cells": 3, "broken": ["a 1"], "skipped": ["b 0"], "unloadable": ["c"],
    }  # fmt: skip
    cells(tmp_path / "serial", **given)
    writes.clear()
    listener = Listener()
    run = cells(tmp_path / "local", LOCAL, listener, **given)
    assert content(tmp_path / "local") == content(tmp_path / "serial")
    assert {*writes.values()} == {1}
    assert record(tmp_path / "local") == record(tmp_path / "serial")
    assert [x["name"] for x in run.record["agents"]] == ["a", "b"]
    assert (listener.done, listener.total) == (listener.total, sum(job.cost for job in Cells().jobs(run.config)))
    assert listener.heard.count("a is only a test") == listener.heard.count("a stumbles") == 1
    assert "c has no legs" in listener.heard
    assert all(not x.made and not x.found for x in verify(tmp_path / "local"))


def test_a_finished_run_starts_no_worker_whatever_the_executor(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    given = {"notes": str(tmp_path / "notes")}
    cells(tmp_path / "run", **given)
    (tmp_path / "run/report.html").unlink()
    before, listener = noted(config(**given)), Listener()
    cells(tmp_path / "run", LOCAL, listener, **given)
    assert noted(config(**given)) == before
    assert listener.heard == ["page"]


@pytest.mark.slow
@pytest.mark.parametrize("executor", [LOCAL, {"kind": "ray", "workers": 2}], ids=["local", "ray"])
def test_a_model_reference_agents_and_play_give_equal_tables(tmp_path: Path, executor: dict[str, Any]) -> None:
    given = {
        "name": "x", "wandb": "disabled", "agents": ["nextstate/tiny", "ideal", "shortcuts", "missing/model"],
        "games": [{"game": "DFA", "grid": {"states": [3, 4]}, "steps": 5, "episodes": 8}],
        "play": [{"game": "Box", "game_args": {"boxes": 2}, "steps": 4, "episodes": 2}],
    }  # fmt: skip
    for name, kind in (("serial", "serial"), ("many", executor)):
        go(Predict(), PredictConfig.model_validate(given | {"executor": kind}), tmp_path / name)
    assert content(tmp_path / "many") == content(tmp_path / "serial")
    one, two = (record(tmp_path / name) for name in ("serial", "many"))
    assert one["left_out"] == two["left_out"]
    assert one["warnings"] == two["warnings"]
    assert [x["name"] for x in one["agents"]] == [x["name"] for x in two["agents"]]


@pytest.mark.slow
def test_a_study_of_another_package_works_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"agreement": "agreement_many:Agreement"}
    monkeypatch.syspath_prepend(write_package(tmp_path / "site", "agreement_many", STUDY, "nextstate.studies", entries))
    study = find_study("agreement")
    given = {"name": "x", "wandb": "disabled", "games": ["Box", "DFA"], "episodes": 2, "steps": 2}
    for name, executor in (("serial", "serial"), ("local", LOCAL)):
        go(study, study.config.model_validate(given | {"executor": executor}), tmp_path / name)
    assert content(tmp_path / "local") == content(tmp_path / "serial")


# --- workers that die


def test_a_killed_worker_loses_nothing_and_every_table_is_written_once(tmp_path: Path, writes: Counter[str]) -> None:
    (tmp_path / "notes").mkdir()
    given = config(executor=LOCAL, agents=["a", "b"], seconds=0.3, notes=str(tmp_path / "notes"))
    thread, listener = kill_worker_of(given, "b 2"), Listener()
    go(Cells(), given, tmp_path / "local", progress=listener)
    thread.join()
    assert {*writes.values()} == {1}
    assert Counter(path.name.split(".")[0] for path in noted(given)) == Counter(
        [job.title for job in Cells().jobs(given)] + ["b 2"]
    )
    assert any(line.startswith("b 2: its worker ended by signal 9") for line in listener.heard)
    assert read_record(tmp_path / "local")["left_out"] == [
        {"agent": agent, "what": f"a part of {agent} 1", "reason": "it was too long"} for agent in ("a", "b")
    ]
    quick = given.model_dump(mode="json") | {"executor": "serial", "notes": "", "seconds": 0}
    go(Cells(), config(**quick), tmp_path / "serial")
    assert content(tmp_path / "local") == content(tmp_path / "serial")


def test_a_job_that_kills_every_worker_is_left_out_and_the_rest_is_done(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    run = cells(
        tmp_path / "run", LOCAL | {"retries": 1}, agents=["a", "b"], cells=2, notes=str(tmp_path / "notes"),
        deadly={"a 0": 2, "b 1": 1},
    )  # fmt: skip
    assert {"walks/b-0", "walks/b-1", "ends/b-0", "ends/b-1"} <= {*run.keys()}
    left_out = {x["what"]: x for x in run.record["left_out"]}
    assert left_out["a 0"]["reason"] == "its worker ended by signal 9, as when memory runs out, 2 times"
    assert left_out["a 0"]["failed"]
    assert left_out["end of a 0"]["reason"] == "it needs walks/a-0, which was left out"


DRIVER = """
import sys
from pathlib import Path
from nextstate.analysis.study import go
from tests.cells import Cells, config
go(Cells(), config(executor={"kind": "local", "workers": 2}, agents=["a", "b"], seconds=%s, notes=sys.argv[2]),
   Path(sys.argv[1]))
"""


def interrupted(tmp_path: Path, how: int, seconds: float, begun: int) -> tuple[int, list[int], CellsConfig]:
    """Signal a run's process group, as a terminal does, once some jobs have begun; return its exit code and workers."""
    notes = tmp_path / "notes"
    notes.mkdir()
    given = config(notes=str(notes), agents=["a", "b"], seconds=seconds)
    command = [sys.executable, "-c", DRIVER % seconds, str(tmp_path / "run"), str(notes)]
    errors = tmp_path / "errors.txt"
    with errors.open("w") as file, subprocess.Popen(command, stderr=file, start_new_session=True) as driver:
        while len(noted(given)) < begun:
            time.sleep(0.02)
        os.killpg(driver.pid, how)
        code = driver.wait(20)
    return code, sorted({int(path.name.split(".")[1]) for path in noted(given)}), given


@pytest.mark.slow
def test_ctrl_c_stops_the_workers_and_keeps_what_is_finished(tmp_path: Path) -> None:
    code, workers, given = interrupted(tmp_path, signal.SIGINT, 0.5, 4)
    assert code == -signal.SIGINT
    assert (tmp_path / "errors.txt").read_text().count("KeyboardInterrupt") == 1  # of the driver; workers say nothing
    assert len(workers) == 2
    assert all(gone(pid, 1) for pid in workers)
    assert len(content(tmp_path / "run")) >= 4  # walks and turns of the first two
    before = len(noted(given))
    go(Cells(), given, tmp_path / "run")
    done = Counter(path.name.split(".")[0] for path in noted(given))
    assert len(noted(given)) - before == len(Cells().jobs(given)) - (before - 2)
    assert sum(n - 1 for n in done.values()) == 2  # those that were going on are done again


@pytest.mark.slow
def test_workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    _, workers, _ = interrupted(tmp_path, signal.SIGKILL, 60, 2)
    assert len(workers) == 2
    assert all(gone(pid) for pid in workers)


# --- Ray


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes with one core each on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_loses_nothing(tmp_path: Path, cluster: Any, writes: Counter[str]) -> None:
    (tmp_path / "notes").mkdir()
    executor = {"kind": "ray", "address": cluster.address}
    given = config(executor=executor, agents=["a", "b"], seconds=0.5, notes=str(tmp_path / "notes"))

    def kill() -> None:
        while len(noted(given)) < 5:
            time.sleep(0.05)
        cluster.remove_node(next(x for x in cluster.list_all_nodes() if not x.head), allow_graceful=False)

    thread, listener = threading.Thread(target=kill, daemon=True), Listener()
    thread.start()
    go(Cells(), given, tmp_path / "ray", progress=listener)
    thread.join()
    assert {*writes.values()} == {1}
    assert len({path.name.split(".")[1] for path in noted(given)}) == 2  # both nodes have done some
    assert len(noted(given)) == len(Cells().jobs(given)) + 1  # what the lost node was doing was done again
    assert sum("its worker was lost" in line for line in listener.heard) == 1
    go(Cells(), config(agents=["a", "b"]), tmp_path / "serial")
    made, expected = content(tmp_path / "ray"), content(tmp_path / "serial")
    assert made == expected


@pytest.mark.slow
def test_a_killed_ray_worker_loses_nothing(tmp_path: Path, cluster: Any, writes: Counter[str]) -> None:
    (tmp_path / "notes").mkdir()
    executor = {"kind": "ray", "address": cluster.address, "workers": 1, "retries": 1}
    given = config(executor=executor, cells=3, seconds=0.3, notes=str(tmp_path / "notes"))
    thread = kill_worker_of(given, "walker 1")
    go(Cells(), given, tmp_path / "ray")
    thread.join()
    assert {*writes.values()} == {1}
    assert len(noted(given, "walker 1")) == 2
    go(Cells(), config(cells=3), tmp_path / "serial")
    assert content(tmp_path / "ray") == content(tmp_path / "serial")


# --- errors


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        ({"kind": "local", "gpus": 2}, "asks for 1 workers with 2 GPUs each, but this machine has 0 GPUs"),
        ({"kind": "local", "gpus": 1, "workers": 8}, "asks for 8 workers with 1 GPUs each, .* has 0 GPUs"),
        ({"kind": "ray", "address": "127.0.0.1:1"}, "no Ray cluster answers at 127.0.0.1:1 .*`ray start --head`"),
        ({"kind": "ray", "address": "head"}, "'head' is not an address: expected host:port"),
        ({"kind": "ray", "address": "ray://head:1"}, "'ray://head:1' is not an address: expected host:port"),
        ({"kind": "ray", "address": "auto"}, "auto, but no Ray cluster was started on this machine"),
    ],
)
def test_what_there_is_not_is_said_in_one_line(
    tmp_path: Path, executor: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RunError, match=message) as error:
        cells(tmp_path / "run", executor)
    assert "\n" not in str(error.value)


def test_ray_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"needs the package ray: pip install 'nextstate\[ray\]'"):
        cells(tmp_path / "run", "ray")


@pytest.mark.slow
def test_a_ray_cluster_without_gpus_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"with 1 cores and 4 GPUs, but no node of the Ray cluster has them \(its nodes"):
        cells(tmp_path / "run", {"kind": "ray", "gpus": 4})


def test_an_agent_that_no_worker_can_load_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(ModelFailed, match="walker has no legs"):
        cells(tmp_path / "run", LOCAL, unloadable=["walker"])
    assert len(read_record(tmp_path / "run")["left_out"]) == 8


def test_what_cannot_go_to_other_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="given in memory cannot be used by executor: local; use serial"):
        go(Cells(), config(executor="local"), tmp_path / "run", model=object())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="executor: local cannot be combined with torchrun"):
        cells(tmp_path / "run", "local")
    monkeypatch.undo()
    monkeypatch.setattr(Cells, "__module__", "__main__")
    with pytest.raises(RunError, match="cannot import Cells: move the study to a module"):
        cells(tmp_path / "other", "local")


def test_a_worker_that_sees_another_folder_or_would_compute_something_else_is_refused(tmp_path: Path) -> None:
    run = cells(tmp_path / "run")
    with pytest.raises(RunError, match=r"does not see .*/elsewhere.*give an --out that all machines"):
        remote_worker(run.record, tmp_path / "elsewhere", "digest")
    work = remote_worker(run.record, tmp_path / "run", "")
    identity = run.about["walks/walker-0"]["identity"]
    made = work(Task("walks/walker-0", identity, {}, []))
    assert made.tables["walks/walker-0"].about["content"] == run.about["walks/walker-0"]["content"]
    other = identity | {"versions": identity["versions"] | {"torch": "0.1"}}
    with pytest.raises(RunError, match=r"differs from this process: walks/walker-0 would be made with torch 0\.1, now"):
        work(Task("walks/walker-0", other, {}, []))


def test_workers_get_their_own_gpus_and_their_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")

    def environments(**given: Any) -> list[str]:
        made = Local(ExecutorConfig(kind="local", **given), find_study, 100)
        return [made.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(made.size)]

    assert environments() == ["4", "5", "6", "7", "9"]
    assert environments(gpus=2) == ["4,5", "6,7"]
    assert environments(gpus=2, workers=1) == ["4,5"]
    assert environments(gpus=0, workers=2) == ["4,5,6,7,9"] * 2
    made = Local(ExecutorConfig(kind="local", workers=2, cpus=3), find_study, 100)
    assert made.environment(0)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert made.environment(0)["OMP_NUM_THREADS"] == "7"


# --- configs and the command line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "serial", "workers": 2}, "workers has no effect with kind: serial; give kind: local or kind: ray"),
        ({"kind": "local", "address": "auto"}, "address has no effect with kind: local; give kind: ray"),
        ("lokal", "Input should be 'serial', 'local' or 'ray'"),
        ({"kind": "local", "worker": 2}, "did you mean 'workers'"),
    ],
)
def test_an_executor_that_makes_no_sense_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(executor=given)


def test_a_config_is_read_from_what_run_json_keeps_of_it(tmp_path: Path) -> None:
    for given in ("serial", "local", {"kind": "ray", "workers": 3, "address": "auto"}):
        made = config(executor=given)
        assert CellsConfig.model_validate(made.model_dump(mode="json")) == made


def written(path: Path, executor: str) -> str:
    path.write_text(f"name: x\nagents: [ideal]\ngames: [{{game: Box}}]\nexecutor: {executor}\n")
    return str(path)


@pytest.mark.parametrize(
    ("executor", "options", "expected"),
    [
        ("serial", ("local", None), {"kind": "local"}),
        ("local", (None, 3), {"kind": "local", "workers": 3}),
        ("{kind: ray, address: auto}", ("local", 2), {"kind": "local", "workers": 2}),
        ("{kind: ray, address: auto}", ("ray", 2), {"kind": "ray", "address": "auto", "workers": 2}),
        ("{gpus: 0}", ("local", 2), {"kind": "local", "gpus": 0, "workers": 2}),
        ("{kind: local, workers: 2}", (None, None), {"kind": "local", "workers": 2}),
    ],
)
def test_options_of_the_command_line_change_the_executor(
    tmp_path: Path, executor: str, options: tuple[str | None, int | None], expected: dict[str, Any]
) -> None:
    path = written(tmp_path / "x.yaml", executor)
    read = read_config(path, cli._executor(path, [], *options), PredictConfig)
    assert read.executor == ExecutorConfig(**expected)


def test_workers_without_an_executor_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "x.yaml", "serial")
    with pytest.raises(ConfigError, match="workers has no effect with kind: serial"):
        read_config(path, cli._executor(path, [], None, 2), PredictConfig)
