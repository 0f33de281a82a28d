from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nextstate.analysis.log import Log
from nextstate.analysis.predict.study import Predict
from nextstate.analysis.study import checked
from tests.analysis.conftest import MODEL
from tests.runs import opened

NAME = MODEL.replace(":", "-")


def mirror(path: Path, folder: Path, mode: Any) -> dict[str, float | None]:
    study, run, log = Predict(), opened(path), Log(mode)
    log.start(folder, run.config.name, {"seed": 0})
    metrics: dict[str, float | None] = {}
    for job in [job for job in checked(study, run.config) if job.agent in ("", MODEL)][:12]:
        found = study.metrics(job, run.table(job.key))
        metrics |= found
        log.job(found)
    log.finish(study.headline(run), study.page(run), run.record)
    log.close()
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
    assert "Box/boxes=2/ceiling" in metrics
    assert any(name.startswith("Box/boxes=2/") and name.endswith("/accuracy") for name in metrics)
    for name in (*metrics, f"summary/Box/{NAME}/accuracy", f"summary/Box/{NAME}/accuracy_low", "figures/"):
        assert name in found, name
    assert [summary[f"certificate/{NAME}/{how}/road"] for how in ("replay", "live")] == ["fork", "step"]
    proved = {"error": 1.2e-05, "tolerance": 0.00026, "depth": 1253, "columns": 1277, "seconds": 0.29}
    assert {key: summary[f"certificate/{NAME}/replay/{key}"] for key in proved} == proved
    names = [p.name for p in tmp_path.glob("wandb/offline-run-*/files/media/*/**/*") if p.is_file()]
    for table in ("headline", "cells", "shown_questions", "shown_answers"):
        assert any(n.startswith(table) for n in names), table
    assert sum(n.endswith("plotly.json") for n in names) == 5 * (2 + 3) + 1 + 2  # |Q| of Box


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
    log.job({"a": 1.0})
    run = opened(run_path)
    log.finish(Predict().headline(run), Predict().page(run), run.record)
    log.close()
    assert "service is gone" in caplog.text


def test_modes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"mode='on' is not possible: expected one of online, offline, disabled"):
        Log("on")  # type: ignore[arg-type]
