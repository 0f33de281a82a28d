"""A grammar study is a folder and a page: it goes on where it stopped, keeps to its config, and is mirrored to W&B."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from nextstate import cli, grammars
from nextstate.agents.config import ConfigError, packaged_configs, read_config
from nextstate.analysis.grammar_tables import SCHEMAS, load
from nextstate.envs import GameError
from nextstate.envs.games import make_game
from nextstate.envs.grammar.sources import published
from nextstate.folder import ExperimentError
from nextstate.grammars import GrammarConfig

TINY: dict[str, Any] = {
    "name": "tiny", "grammar": {"levels": 3, "distinct_symbols": True},
    "models": [
        {"architecture": "rotary"}, {"architecture": "masked"}, {"architecture": "rotary", "untrained": True},
        {"architecture": "rotary", "perturbation": {"kind": "token", "fraction": 0.5, "rate": 0.1}},
    ],
    "training": {"hidden_size": 16, "layers": 1, "heads": 2, "window": 24, "rows": 4, "steps": 4, "evaluate_every": 2,
                 "save_every": 2, "evaluation_strings": 5},
    "writing": {"strings": 20, "prefix": 3, "kinds": ["nothing", "clean", "corrupted"], "temperatures": [0.5, 1.0]},
    "probes": {"heads": 2, "dim": 4, "steps": 3, "rows": 4, "strings": 6},
    "attention": {"strings": 5},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grammar") / "run"
    grammars.run(GrammarConfig(**TINY), out, command="nextstate grammar")
    return out


def test_a_study_writes_all_its_tables(folder: Path) -> None:
    run = load(folder)
    assert not run.absent
    assert set(SCHEMAS) == {path.stem for path in folder.glob("*.parquet")}
    names = ["rotary", "masked", "random", "rotary, 0.5 with token 0.1"]
    assert set(run.models) == set(names)
    writers = [names[0], names[3]]
    generation = pl.read_parquet(folder / "generation.parquet")
    assert generation["name"].unique(maintain_order=True).to_list() == writers
    assert len(generation) == 2 * 3 * 2
    assert (generation["accuracy"] == generation["right"] / 20).all()
    assert ((generation["low"] <= generation["accuracy"]) & (generation["accuracy"] <= generation["high"])).all()
    probes = pl.read_parquet(folder / "probes.parquet")
    assert probes["name"].unique(maintain_order=True).to_list() == names
    assert set(zip(probes["reach"], probes["shuffled"], strict=True)) == {
        ("full", False), ("tridiagonal", False), ("diagonal", False), ("full", True),
    }  # fmt: skip
    curve = pl.read_parquet(folder / "curve.parquet")
    assert curve.filter(pl.col("accuracy").is_not_null())["name"].unique(maintain_order=True).to_list() == writers
    told = json.loads((folder / "run.json").read_text())
    assert told["finished"]
    assert told["grammar"]["levels"] == [1, 3, 3]
    assert "rotary, 0.5 with token 0.1" in (folder / "report.html").read_text()


def test_a_study_goes_on_where_it_stopped_and_gives_the_same(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    grammars.run(GrammarConfig(**TINY | {"wandb": "disabled", "name": "tiny"}), other)
    assert not (other / "wandb").exists()
    assert not list((other / "models").rglob("wandb"))
    kept = {path: path.stat().st_mtime_ns for path in (other / "parts").rglob("*.parquet")}
    lost = other / "parts" / "probes" / "masked.parquet"
    lost.unlink()
    (other / "probes.parquet").unlink()
    grammars.run(GrammarConfig(**TINY | {"wandb": "disabled"}), other)
    changed = [path for path in (other / "parts").rglob("*.parquet") if path.stat().st_mtime_ns != kept[path]]
    assert changed == [lost]
    for name in ("generation", "diversity", "probes", "attention-ends"):
        assert pl.read_parquet(folder / f"{name}.parquet").equals(pl.read_parquet(other / f"{name}.parquet")), name


def test_every_model_and_the_study_are_mirrored_to_wandb(folder: Path) -> None:
    for name in ("rotary", "masked"):
        assert len(list((folder / "models" / name).glob("wandb/offline-run-*/*.wandb"))) == 1
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    tool = Path(sys.executable).parent / "wandb"
    command = [str(tool), "leet", "inspect", "--summary", "--json", str(file)]
    told = json.dumps(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    for key in ("summary/rotary/accuracy_nothing", "summary/rotary/kl", "figures/generation"):
        assert key in told, key


def test_processes_train_together_and_the_first_one_measures(folder: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(json.dumps(TINY | {"wandb": "disabled"}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29531"]
    command += ["-m", "nextstate.cli", "grammar", str(config), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not load(out).absent
    one, two = (pl.read_parquet(where / "diversity.parquet")["kl"] for where in (folder, out))
    assert (one - two).abs().max() < 1e-3  # type: ignore[operator]


def test_what_follows_a_corrupted_prefix_is_judged_after_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nextstate.agents import generation

    config = GrammarConfig(**TINY | {"writing": {"strings": 50, "prefix": 3, "corruption": 0.5}})
    study = grammars._Study(config, make_game("CFG", **config.grammar), tmp_path, grammars.Progress(), {"seconds": 0})  # type: ignore[arg-type]
    seen: dict[str, list[np.ndarray]] = {}

    def goes_on(model: Any, codes: Any, shown: list[np.ndarray], *rest: Any) -> list[np.ndarray | None]:
        seen[model] = shown
        return [None if k == 7 else np.append(x, [0, k % 3]) for k, x in enumerate(shown)]

    monkeypatch.setattr(generation, "write", goes_on)
    clean, corrupted = (study.continued(kind, kind, 1.0) for kind in ("clean", "corrupted"))
    assert any((a != b).any() for a, b in zip(seen["clean"], seen["corrupted"], strict=True))
    assert all(len(x) == 3 for x in seen["clean"])
    assert (clean[7], corrupted[7]) == (None, None)
    for one, other in zip(clean, corrupted, strict=True):
        assert one is None or (other is not None and one.tolist() == other.tolist())
    nothing = study.continued("nothing", "nothing", 1.0)
    assert nothing[4] is not None
    assert nothing[4].tolist() == [0, 1]


def test_an_out_of_another_config_is_refused(folder: Path) -> None:
    with pytest.raises(ExperimentError, match=r"another config \(different: seed\)"):
        grammars.run(GrammarConfig(**TINY | {"seed": 1}), folder)


def test_the_command_line_writes_and_reports(tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(json.dumps(TINY | {"models": [{"architecture": "uniform"}], "wandb": "disabled"}))
    done = CliRunner().invoke(cli.app, ["grammar", str(config), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "uniform" in done.output
    assert "after a corrupted one" in done.output
    (out / "report.html").unlink()
    assert CliRunner().invoke(cli.app, ["report", str(out)]).exit_code == 0
    assert (out / "report.html").exists()


@pytest.mark.parametrize("name", [c for c in packaged_configs() if c.startswith("configs/grammar/")])
def test_packaged_studies_can_be_read_and_fit_their_window(name: str) -> None:
    config = read_config(name, [], GrammarConfig)
    game = make_game("CFG", **config.grammar)
    told = grammars.describe(game)  # type: ignore[arg-type]
    assert told["length_max"] + 2 <= config.training.window
    assert len({spec.title for spec in config.models}) == len(config.models)


def test_what_is_said_of_a_published_grammar() -> None:
    told = grammars.describe(make_game("CFG", grammar="cfg3b"))  # type: ignore[arg-type]
    assert (told["name"], told["length_min"], told["length_max"]) == ("cfg3b", 138, 432)
    assert told["strings"] is None
    assert int(told["states"]) > 2**63
    assert told["rules"] == str(published("cfg3b"))


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="models has rotary more than once"):
        GrammarConfig(name="x", models=[{"architecture": "rotary"}, {"architecture": "rotary"}])  # type: ignore[list-item]
    with pytest.raises(ValidationError, match=r"attention\.models names rope: expected some of rotary"):
        GrammarConfig(name="x", attention={"models": ["rope"]})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="window=24 is shorter than a string"):
        grammars.run(GrammarConfig(**TINY | {"grammar": {"levels": 5}, "wandb": "disabled"}), tmp_path / "a")
    with pytest.raises(GameError, match="grammar='cfg3z' is not possible"):
        grammars.run(GrammarConfig(**TINY | {"grammar": {"grammar": "cfg3z"}}), tmp_path / "b")
    assert not list(tmp_path.iterdir()), "nothing is written before all of it is checked"
