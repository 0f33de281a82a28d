"""The study loop and the folder of a run: what is kept, what is used again, what is set aside and made anew."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from nextstate.agents.agent import AgentError
from nextstate.analysis import table as table_files
from nextstate.analysis.page.page import Page, Section
from nextstate.analysis.progress import Progress
from nextstate.analysis.run import ModelFailed, Run, RunConfig, RunError, read_record
from nextstate.analysis.study import Job, Skip, Study, go, open_run, verify, write_page
from nextstate.analysis.table import Damaged, read_about


class WalkConfig(RunConfig):
    walks: int = 4
    steps: int = 50
    broken: list[int] = []
    skipped: list[int] = []
    unusable: bool = False
    unknown_table: bool = False


class Walk(Study[WalkConfig]):
    """Random walks, and their ends: a study without a model, whose jobs are counted."""

    name = f"{__name__}:Walk"
    config = WalkConfig
    done: list[str] = []
    weights = "one"
    offset = 0.0

    def jobs(self, config: WalkConfig) -> list[Job]:
        walks = [Job(f"walks/{i}", f"walk {i}", 10, i, agent="walker") for i in range(config.walks)]
        ends = [Job(f"ends/{i}", f"end of walk {i}", 1, i, (f"walks/{i}",)) for i in range(config.walks)]
        return walks + ends

    def identity(self, job: Job, run: Run[WalkConfig]) -> dict[str, Any]:
        return {"model": {"weights": self.weights}} if job.agent else {}

    def do(self, job: Job, run: Run[WalkConfig]) -> pl.DataFrame | Mapping[str, pl.DataFrame]:
        Walk.done.append(job.key)
        if job.key.startswith("ends/"):
            return run.table(f"walks/{job.given}").tail(1)
        if run.config.unusable:
            run.load("walker", self._fail)
        if job.given in run.config.broken:
            raise AgentError(f"walker stumbles on {job.given}")
        if job.given in run.config.skipped:
            raise Skip("there is no way")
        at = run.rng("walk", str(job.given)).standard_normal(run.config.steps).cumsum() + Walk.offset
        path = pl.DataFrame({"step": range(run.config.steps), "at": at})
        return {job.key: path, f"turns/{job.given}": path.filter(pl.col("at") < 0)}

    @staticmethod
    def _fail() -> None:
        raise AgentError("walker has no legs")

    def summarise(self, run: Run[WalkConfig]) -> dict[str, pl.DataFrame]:
        ends = run.tables("ends/*")
        return {"ends": pl.concat(table.with_columns(walk=pl.lit(name)) for name, table in ends.items())}

    def headline(self, run: Run[WalkConfig]) -> pl.DataFrame:
        return run.summary("ends").select("walk", "at")

    def page(self, run: Run[WalkConfig]) -> Page:
        table = run.summary("starts" if run.config.unknown_table else "ends")
        return Page("Walks", ["Where walks end."], [Section("Ends", "One row a walk.", table=table)])


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Walk, "done", [])


def config(**more: Any) -> WalkConfig:
    return WalkConfig(name="walks", wandb="disabled", **more)


def tables(out: Path) -> dict[str, pl.DataFrame]:
    found = {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("*.parquet")) if "set-aside" not in p.parts}
    return {key: pl.read_parquet(path) for key, path in found.items()}


def same(a: dict[str, pl.DataFrame], b: dict[str, pl.DataFrame]) -> bool:
    return a.keys() == b.keys() and all(a[key].equals(b[key]) for key in a)


@pytest.fixture
def done(tmp_path: Path) -> tuple[Path, dict[str, pl.DataFrame]]:
    go(Walk(), config(), tmp_path / "run")
    Walk.done.clear()
    return tmp_path / "run", tables(tmp_path / "run")


def again(out: Path, **more: Any) -> Run[WalkConfig]:
    return go(Walk(), config(), out, **more)


def test_every_job_makes_its_table_once_and_a_second_run_does_nothing(done: tuple[Path, Any]) -> None:
    out, first = done
    assert [k for k in first if "walks/" in k] == [f"walks/{i}.parquet" for i in range(4)]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and "lock" not in p.name}
    again(out)
    assert Walk.done == []
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert (out / "report.html").read_text().count("Where walks end.") == 1


def test_tables_know_what_made_them(done: tuple[Path, Any]) -> None:
    out, _ = done
    walk, end = read_about(out / "walks/1.parquet"), read_about(out / "ends/1.parquet")
    assert walk["identity"]["model"] == {"weights": "one"}
    assert walk["identity"]["config"] == read_record(out)["config_digest"]
    assert set(walk["identity"]["versions"]) == set(table_files.DECISIVE)
    assert end["identity"]["inputs"] == {"walks/1": walk["content"]}


@pytest.mark.parametrize("gone", ["walks/2", "ends/2", "turns/2", "summary/ends"])
def test_what_is_missing_is_made_again_and_nothing_else(done: tuple[Path, Any], gone: str) -> None:
    out, first = done
    (out / f"{gone}.parquet").unlink()
    again(out)
    assert same(tables(out), first)
    assert set(Walk.done) <= {"walks/2", "ends/2"}


def test_flipped_bits_at_two_hundred_places_are_always_noticed(done: tuple[Path, Any]) -> None:
    out, first = done
    rng, files = np.random.default_rng(0), sorted(p for p in out.rglob("*.parquet"))
    for _ in range(200):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(Damaged):
            read_about(path)
        path.write_bytes(whole)
    for path in files:  # and so they are made again, every one
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    again(out)
    assert same(tables(out), first)
    assert {x["table"].split("/")[0] for x in read_record(out)["set_aside"]} == {"walks", "ends"}
    assert len(list((out / "set-aside").rglob("*.parquet"))) == len(read_record(out)["set_aside"]) == 8


def test_what_another_model_made_is_set_aside_with_the_reason(
    done: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = done
    monkeypatch.setattr(Walk, "weights", "two")
    again(out)
    assert same(tables(out), first)
    assert Walk.done == [f"walks/{i}" for i in range(4)]  # ends are of the same walks
    reasons = {x["table"]: x["reason"] for x in read_record(out)["set_aside"]}
    assert reasons["walks/0"] == "made with weights one, now two"


def test_where_an_input_changes_what_was_made_of_it_is_made_again(
    done: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = done
    monkeypatch.setattr(Walk, "offset", 1.0)
    (out / "walks/3.parquet").unlink()
    again(out)
    assert Walk.done == ["walks/3", "ends/3"]
    changed = tables(out)
    assert changed["summary/ends.parquet"]["at"].to_list()[3] == first["summary/ends.parquet"]["at"].to_list()[3] + 1


@pytest.mark.parametrize("package", table_files.DECISIVE)
def test_another_version_of_a_package_makes_everything_again(
    done: tuple[Path, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = done
    found = table_files.importlib.metadata.version
    monkeypatch.setattr(table_files.importlib.metadata, "version", lambda p: "0.0.1" if p == package else found(p))
    again(out)
    assert len(Walk.done) == 8
    assert f"{package} {found(package)}, now 0.0.1" in read_record(out)["set_aside"][0]["reason"]


def test_mixed_tables_are_kept_when_asked_for_and_the_page_says_so(
    done: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = done
    monkeypatch.setattr(Walk, "weights", "two")
    (out / "walks/0.parquet").unlink()
    again(out, accept_mixed=True)
    assert Walk.done == ["walks/0"]
    assert same(tables(out), first)
    mixed = read_record(out)["mixed"]
    assert {x["table"] for x in mixed} >= {"walks/1", "walks/2", "walks/3"}
    assert "made with weights one, now two" in (out / "report.html").read_text()
    again(out)  # without the flag they are made anew, and the warning goes
    assert read_record(out)["mixed"] == []


def test_damaged_tables_are_never_accepted(done: tuple[Path, Any]) -> None:
    out, first = done
    path = out / "walks/1.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    again(out, accept_mixed=True)
    assert same(tables(out), first)


@pytest.mark.parametrize("spoil", [lambda p: p.unlink(), lambda p: p.write_text("{"), lambda p: p.write_text("[]")])
def test_run_json_is_not_the_only_key_to_finished_tables(done: tuple[Path, Any], spoil: Callable[[Path], Any]) -> None:
    out, first = done
    spoil(out / "run.json")
    again(out)
    assert Walk.done == []
    assert same(tables(out), first)
    assert read_record(out)["config"]["walks"] == 4


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"not empty and holds no run of this config; give another --out"):
        again(out)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_another_config_another_study_and_an_older_layout_are_refused(done: tuple[Path, Any]) -> None:
    out, _ = done
    with pytest.raises(RunError, match=r"another config \(different: walks\)"):
        go(Walk(), config(walks=5), out)
    path = out / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"study": "patch"}))
    with pytest.raises(RunError, match=r"a run of the study 'patch'"):
        again(out)
    path.write_text(json.dumps({"name": "old", "config_hash": "1"}))
    for p in out.rglob("*.parquet"):
        p.unlink()
    with pytest.raises(RunError, match=r"another version of nextstate.*run its config again"):
        again(out)


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([Job("a", "a"), Job("a", "b")], "two jobs .* have the key 'a'"),
        ([Job("../a", "a")], "not a safe file name"),
        ([Job("/a", "a")], "not a safe file name"),
        ([Job("a/..", "a")], "not a safe file name"),
        ([Job("a b", "a")], "not a safe file name"),
        ([Job("", "a")], "not a safe file name"),
        ([Job("a", "a", needs=("b",)), Job("b", "b")], "needs 'b', which is no earlier job"),
    ],
)
def test_studies_that_are_not_sound_are_refused_before_anything_is_written(
    tmp_path: Path, jobs: list[Job], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Walk, "jobs", lambda self, config: jobs)
    with pytest.raises(RunError, match=message):
        again(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_page_that_reads_what_summarise_did_not_make_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"reads the summary .starts., but its `summarise` returned .ends.$"):
        go(Walk(), config(unknown_table=True), tmp_path / "run")


def test_what_fails_or_is_skipped_is_left_out_and_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    run = go(Walk(), config(broken=[1], skipped=[2]), tmp_path / "run")
    assert sorted(run.keys("ends/*")) == ["ends/0", "ends/3"]
    left_out = {x["what"]: x for x in run.record["left_out"]}
    assert left_out["walk 1"] == {
        "agent": "walker", "what": "walk 1", "reason": "walker stumbles on 1", "failed": True
    }  # fmt: skip
    assert "failed" not in left_out["walk 2"]
    assert left_out["end of walk 1"]["reason"] == "it needs walks/1, which was left out"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "walker stumbles on 1" in page
    assert "there is no way" in page


def test_an_agent_that_cannot_be_loaded_is_tried_once(tmp_path: Path) -> None:
    with pytest.raises(ModelFailed, match="walker has no legs"):
        go(Walk(), config(unusable=True), tmp_path / "run")
    assert Walk.done == ["walks/0"]
    assert len(read_record(tmp_path / "run")["left_out"]) == 8


def test_a_page_needs_the_summary_alone(done: tuple[Path, Any]) -> None:
    out, _ = done
    whole = (out / "report.html").read_text()
    for path in out.rglob("*.parquet"):
        if "summary" not in path.parts:
            path.unlink()
    (out / "report.html").unlink()
    write_page(Walk(), open_run_of(out))
    assert (out / "report.html").read_text() == whole


def open_run_of(out: Path) -> Run[Any]:
    return open_run(out)[1]


# --- verify


def test_verify_finds_every_table_equal_and_writes_nothing(done: tuple[Path, Any]) -> None:
    out, _ = done
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    found = verify(out, 8)
    assert len(found) == 8
    assert all((x.made, x.found) == ("", "") for x in found)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert [x.key for x in verify(out, 3, seed=1)] == [x.key for x in verify(out, 3, seed=1)]


def test_verify_says_what_differs_and_why(done: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    out, first = done
    about = read_about(out / "walks/2.parquet")
    wrong = first["walks/2.parquet"].with_columns(pl.col("at") + pl.when(pl.col("step") == 7).then(5.0).otherwise(0.0))
    table_files.write_packed(out / "walks/2.parquet", table_files.pack(wrong, about["identity"], about["notes"]))
    monkeypatch.setattr(Walk, "weights", "two")
    found = {x.key: x for x in verify(out, 8)}
    assert found["walks/2"].found == "at: by up to 5"
    assert found["walks/1"].found == ""
    assert found["walks/1"].made == "made with weights one, now two"


# --- the lock

HOLDER = """
import sys, time
from pathlib import Path
from nextstate.analysis.progress import Progress
from nextstate.analysis.lock import locked
with locked(Path(sys.argv[1]), "nextstate run long.yaml", False, Progress()):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def hold(out: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(out), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout is not None
        assert held.stdout.readline() == "held\n"
        try:
            yield held
        finally:
            held.kill()


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    said = r"in use by process {} on host .+ since 20.+long\.yaml"
    with hold(tmp_path / "run", 60) as held, pytest.raises(RunError, match=said.format(held.pid)):
        again(tmp_path / "run")


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up(tmp_path: Path) -> None:
    with hold(tmp_path / "run", 60) as held:
        held.send_signal(signal.SIGKILL)
        held.wait()
    assert (tmp_path / "run" / "lock.json").exists()
    again(tmp_path / "run")
    assert len(Walk.done) == 8
    assert not (tmp_path / "run" / "lock.json").exists()


def test_a_second_process_can_wait(tmp_path: Path) -> None:
    seen: list[str] = []

    class Listener(Progress):
        def on(self, what: str) -> None:
            seen.append(what)

    with hold(tmp_path / "run", 1.0) as held:
        again(tmp_path / "run", wait=True, progress=Listener())
    assert seen[0].startswith(f"waiting for process {held.pid}")
    assert len(Walk.done) == 8
