from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nextstate.analysis import tables
from nextstate.analysis.log import Log, cell_metrics
from tests.analysis.conftest import MODEL


def mirror(run: Path, folder: Path, mode: Any) -> dict[str, float | None]:
    loaded = tables.load(run)
    log = Log(mode)
    log.start(folder, loaded.name, {"seed": 0})
    metrics: dict[str, float | None] = {}
    for setting in loaded.info["settings"][:3]:
        rows = loaded.rows.filter((pl.col("agent") == MODEL) & (pl.col("setting") == setting["slug"])).collect()
        metrics |= cell_metrics(setting, MODEL, rows)
        log.cell(cell_metrics(setting, MODEL, rows))
    log.finish(loaded)
    return metrics


def read_back(run: Path) -> dict[str, Any]:
    tool = Path(sys.executable).parent / "wandb"
    done = subprocess.run(
        [str(tool), "leet", "inspect", "--summary", "--json", str(run)], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def test_offline_files_read_back(run_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metrics = mirror(run_path, tmp_path, "offline")
    assert capfd.readouterr() == ("", "")
    assert [p.name for p in tmp_path.iterdir()] == ["wandb"]
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    told = read_back(file)
    found, summary = json.dumps(told), told["summary"]
    assert "Box/boxes=2/nextstate-tiny/accuracy" in metrics
    for name in (
        *metrics,
        "summary/Box/nextstate-tiny/determined/accuracy",
        "questions",
        "figures/",
        "by_step/DFA/size=3",
    ):
        assert name in found, name
    assert [summary[f"certificate/nextstate-tiny/{how}/road"] for how in ("replay", "live")] == ["fork", "step"]
    proved = {"error": 1.2e-05, "tolerance": 0.00026, "depth": 1253, "columns": 1277, "seconds": 0.29}
    assert {key: summary[f"certificate/nextstate-tiny/replay/{key}"] for key in proved} == proved
    names = [p.name for p in tmp_path.glob("wandb/offline-run-*/files/media/*/**/*") if p.is_file()]
    assert any(n.startswith("questions") for n in names)
    assert any(n.startswith("cells") for n in names)
    assert sum(n.endswith("plotly.json") for n in names) == 5 * (2 + 3) + 2


def test_disabled_writes_nothing(run_path: Path, tmp_path: Path) -> None:
    mirror(run_path, tmp_path, "disabled")
    assert not list(tmp_path.iterdir())


def test_online_without_a_server_falls_back(
    run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    tried = []
    init = wandb.init

    def fail(**kwargs: Any) -> Any:
        tried.append(kwargs["mode"])
        if kwargs["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return init(**kwargs)

    monkeypatch.setattr(wandb, "init", fail)
    mirror(run_path, tmp_path, "online")
    assert tried == ["online", "offline"]
    assert "no route to host" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_failing_service_does_not_stop_the_run(
    run_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def log(self, data: Any) -> None:
            raise BrokenPipeError("service is gone")

        define_metric = finish = lambda self, *a, **k: self.log(None)

    log = Log("offline")
    log._sink = Broken()  # type: ignore[assignment]
    log.cell({"a": 1.0})
    log.finish(run_path)
    assert "service is gone" in caplog.text


def test_modes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"mode='on' is not possible: expected one of online, offline, disabled"):
        Log("on")  # type: ignore[arg-type]
