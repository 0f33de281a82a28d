"""What takes minutes: the benchmarks, and the quickstart as a newcomer runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from nextstate.analysis.predict.statistics import pooled
from tests.runs import frame

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["grammar", "patching", "replay", "response", "roads", "stepping", "textworld"])
def test_a_benchmark_agrees_with_its_peers_and_ends_in_json(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["results"]
    assert all(r["max_difference"] < 1e-4 for r in record["results"])
    assert json.loads(next(tmp_path.glob(f"*-{name}.json")).read_text()) == record
    assert {"python", "nextstate"} <= record["versions"].keys()


def test_the_quickstart_has_ceilings_that_its_ideal_reader_reaches(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nextstate.cli", "run", "configs/quickstart.yaml", "--out", str(tmp_path / "run")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = frame(tmp_path / "run")
    assert rows["setting"].n_unique() >= 30
    cells = pooled(rows, ("agent", "game", "variant", "size")).filter(subset="all")
    assert {"nextstate/tiny", "ideal", "chance", "shortcut:last_mention"} <= set(cells["agent"])
    for column in ("accuracy", "accuracy_low", "accuracy_high", "ceiling", "chance", "n"):
        assert cells[column].is_not_null().all(), column
    ideal = rows.filter(agent="ideal")
    by_cell = ideal.group_by("game", "variant", "size", "step").agg(
        n=pl.len(),
        off=pl.col("greedy_correct").mean() - pl.col("ceiling").mean(),
        variance=(pl.col("ceiling") * (1 - pl.col("ceiling"))).mean(),
    )
    settled = by_cell.filter(pl.col("variance") == 0)
    assert (settled["off"] == 0).all()
    open_cells = by_cell.filter(pl.col("variance") > 0).with_columns(
        z=pl.col("off") / (pl.col("variance") / pl.col("n")).sqrt()
    )
    assert open_cells["z"].abs().max() < 5  # type: ignore[operator]
    assert 0.8 < open_cells["z"].std() < 1.2  # type: ignore[operator]


def test_the_grammar_quickstart_teaches_what_it_says(tmp_path: Path) -> None:
    models = "models=[{architecture: rotary}, {architecture: absolute}, {architecture: rotary, untrained: true}]"
    command = [sys.executable, "-m", "nextstate.cli", "grammar", "configs/grammar/quickstart.yaml", models]
    command += ["writing.kinds=[nothing]", "writing.temperatures=[1.0]", "--out", str(tmp_path / "run")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    written = pl.read_parquet(tmp_path / "run" / "generation.parquet")
    rotary, absolute = (written.filter(name=name).row(0, named=True) for name in ("rotary", "absolute"))
    assert rotary["accuracy"] > 0.95
    assert absolute["high"] < rotary["low"]
    probes = pl.read_parquet(tmp_path / "run" / "probes.parquet").filter(target="ancestor", where="all", shuffled=False)
    for reach, apart in (("full", 0.1), ("diagonal", 0.05)):
        for level in (2, 3):
            own, random = (
                probes.filter(name=name, reach=reach, level=level).row(0, named=True) for name in ("rotary", "random")
            )
            assert own["low"] > random["high"] + apart, (reach, level)
