"""A grammar study is a folder: it resumes, notices changed models, and gives the same whatever was interrupted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError

from nextstate.agents.config import ConfigError, packaged_configs, read_config
from nextstate.agents.identity import files_digest
from nextstate.analysis.grammar.config import GrammarConfig
from nextstate.analysis.grammar.study import GrammarStudy, model_folder, prefixes
from nextstate.analysis.grammar.tables import SCHEMAS, describe
from nextstate.analysis.progress import Progress
from nextstate.analysis.run import Run, RunError, open_record
from nextstate.analysis.study import go, open_run, verify, write_page
from nextstate.envs import GameError
from nextstate.envs.games.grammar import CFG
from nextstate.envs.grammar.sources import published

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
SMALL = TINY | {"models": [{"architecture": "rotary"}], "probes": None, "attention": None, "wandb": "disabled"}
NAMES = ["rotary", "masked", "rotary, 0.5 with token 0.1", "random"]  # in the order of the page


def start(out: Path, config: dict[str, Any] = SMALL, **options: Any) -> Run[GrammarConfig]:
    return go(GrammarStudy(), GrammarConfig(**config), out, **options)


def tables(run: Run[GrammarConfig]) -> dict[str, pl.DataFrame]:
    """Return all tables that do not depend on the speed of the computer."""
    return {key: run.table(key) for key in run.keys("*") if not key.startswith(("speed/", "summary/models"))}


def equal(one: Run[GrammarConfig], two: Run[GrammarConfig]) -> bool:
    a, b = tables(one), tables(two)
    return a.keys() == b.keys() and all(a[key].equals(b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run[GrammarConfig]:
    return start(tmp_path_factory.mktemp("grammar") / "run", TINY, command="nextstate grammar")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run[GrammarConfig]:
    return start(tmp_path_factory.mktemp("small") / "run")


@pytest.fixture
def copied(small: Run[GrammarConfig], tmp_path: Path) -> Path:
    return Path(shutil.copytree(small.path, tmp_path / "run"))


def test_a_study_makes_all_its_tables(whole: Run[GrammarConfig]) -> None:
    of_hidden_terminals = {"embeddings", "similarity"}
    assert {key.partition("/")[0] for key in whole.keys("*")} == {*SCHEMAS, "summary"} - of_hidden_terminals
    for part, schema in SCHEMAS.items():
        for key in whole.keys(f"{part}/*"):
            assert whole.table(key).schema == pl.Schema(schema), key
    assert whole.summary("models")["name"].to_list() == NAMES
    generation = whole.summary("generation")
    assert generation["name"].unique(maintain_order=True).to_list() == [NAMES[0], NAMES[2]]
    assert len(generation) == 2 * 3 * 2
    assert (generation["accuracy"] == generation["right"] / 20).all()
    assert ((generation["low"] <= generation["accuracy"]) & (generation["accuracy"] <= generation["high"])).all()
    assert set(generation.filter("nearest")["temperature"]) == {1.0}
    probes = whole.summary("probes")
    assert probes["name"].unique(maintain_order=True).to_list() == NAMES
    assert set(zip(probes["reach"], probes["shuffled"], strict=True)) == {
        ("full", False), ("tridiagonal", False), ("diagonal", False), ("full", True),
    }  # fmt: skip
    curve = whole.summary("curve")
    written = curve.filter(pl.col("accuracy").is_not_null())["name"].unique(maintain_order=True)
    assert written.to_list() == [NAMES[0], NAMES[2]]
    assert whole.record["finished"]
    assert whole.summary("grammar")["levels"].to_list() == [[1, 3, 3]]
    assert NAMES[2] in (whole.path / "report.html").read_text()
    for name, key in (("rotary", "rotary"), ("random", "random")):
        folder = whole.path / "models" / name / "model"
        assert whole.table(f"training/{key}")["weights"][0] == files_digest(str(folder))


def test_embeddings_are_measured_where_terminals_are_hidden(tmp_path: Path) -> None:
    grammar = {"levels": 3, "distinct_symbols": True, "vocabulary": 9}
    run = start(tmp_path, SMALL | {"grammar": grammar, "models": [{"untrained": True}]})
    for part in ("embeddings", "similarity"):
        assert run.table(f"{part}/random").schema == pl.Schema(SCHEMAS[part])
    (found,) = run.table("embeddings/random").rows(named=True)
    assert found["tokens"] == 9
    assert found["low"] <= found["auc"] <= found["high"]
    assert run.table("similarity/random")["pairs"].sum() == 9 * 8
    assert "The terminals of this grammar are hidden" in (run.path / "report.html").read_text()


def test_a_finished_run_is_left_alone_and_needs_no_torch(small: Run[GrammarConfig]) -> None:
    kept = {path: path.stat().st_mtime_ns for path in small.path.rglob("*") if path.is_file()}
    code = f"""
import sys
from pathlib import Path
from nextstate.analysis.grammar.study import GrammarStudy
from nextstate.analysis.study import go
go(GrammarStudy(), GrammarStudy.config(**{SMALL!r}), Path({str(small.path)!r}))
assert not {{"torch", "transformers", "plotly"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    changed = {p.name for p, when in kept.items() if p.stat().st_mtime_ns != when}
    assert not changed - {"run.json", ".lock"}


def lose(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    found = bytearray(path.read_bytes())
    found[len(found) // 3] ^= 1
    path.write_bytes(found)


@pytest.mark.parametrize("damage", [lose, flip])
@pytest.mark.parametrize("table", ["training", "curve", "speed", "generation", "diversity", "summary"])
def test_a_lost_or_damaged_table_is_made_again(
    small: Run[GrammarConfig], copied: Path, table: str, damage: Callable[[Path], None]
) -> None:
    damage(next(copied.glob(f"{table}/*.parquet")))
    weights = copied / "models" / "rotary" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert equal(start(copied), small)
    assert weights.stat().st_mtime_ns == before  # the model is still there, and is not trained again


def edit_weights(folder: Path) -> None:
    flip(folder / "model" / "model.safetensors")


def remove_model(folder: Path) -> None:
    shutil.rmtree(folder / "model")


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def retrain(folder: Path) -> None:
    """Replace the model by another, with a history that fits it."""
    edit_weights(folder)
    history = json.loads((folder / "history.json").read_text())
    digest = files_digest(str(folder / "model"))
    (folder / "history.json").write_text(json.dumps(history | {"weights": digest}))


@pytest.mark.parametrize("change", [edit_weights, remove_model, remove_folder, retrain])
def test_a_changed_model_is_trained_again_and_its_tables_stay_true(
    small: Run[GrammarConfig], copied: Path, change: Callable[[Path], None]
) -> None:
    change(copied / "models" / "rotary")
    (found,) = verify(copied, cells=1)
    assert "after training" in found.found
    run = start(copied)
    if change is not retrain:
        assert equal(run, small)
    reason, moved = run.record["set_aside"][0]["reason"], [x["table"] for x in run.record["set_aside"]]
    assert reason.endswith(("model was changed after training", "model was removed after training"))
    assert (copied / "set-aside" / "training" / "rotary.1.parquet").exists()
    assert (copied / "set-aside" / "models" / "rotary.1").exists() == (change in (edit_weights, remove_model))
    weights = run.table("training/rotary")["weights"][0]
    assert weights == files_digest(str(copied / "models" / "rotary" / "model"))
    if change is retrain:  # a complete training of these very versions: it is used, and what depends on it is redone
        assert weights != small.table("training/rotary")["weights"][0]
        assert moved[:3] == ["training/rotary", "generation/rotary", "diversity/rotary"]
        assert run.about["generation/rotary"]["identity"] != small.about["generation/rotary"]["identity"]


def test_a_training_of_other_versions_is_not_continued(small: Run[GrammarConfig], copied: Path) -> None:
    folder = copied / "models" / "rotary"
    identity = json.loads((folder / "identity.json").read_text())
    (folder / "identity.json").write_text(json.dumps(identity | {"code": "0" * 64}))
    (copied / "training" / "rotary.parquet").unlink()
    run = start(copied)
    assert equal(run, small)
    assert "other settings, code, versions or devices" in run.record["set_aside"][0]["reason"]
    assert json.loads((folder / "identity.json").read_text()) == identity


def test_an_interrupted_training_goes_on_from_its_checkpoint(small: Run[GrammarConfig], copied: Path) -> None:
    folder = copied / "models" / "rotary"
    (folder / "history.json").unlink()
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    (copied / "training" / "rotary.parquet").unlink()
    run = start(copied)
    assert not run.record["set_aside"]
    weights = [r.table("training/rotary")["weights"][0] for r in (small, run)]
    assert weights[0] == weights[1]
    assert run.table("generation/rotary").equals(small.table("generation/rotary"))


def test_under_torchrun_a_changed_model_is_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_weights(copied / "models" / "rotary")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="cannot be used: the trained model was changed or removed; remove it, and run"):
        start(copied)


def test_the_page_needs_the_summary_alone(whole: Run[GrammarConfig], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole.path, tmp_path / "run"))
    page = (copy / "report.html").read_text()
    for folder in [*(copy / part for part in SCHEMAS), copy / "models", copy / "figures"]:
        shutil.rmtree(folder, ignore_errors=True)
    (copy / "report.html").unlink()
    write_page(*open_run(copy))
    assert (copy / "report.html").read_text() == page


def test_every_model_is_trained_with_every_seed(tmp_path: Path) -> None:
    models = [{"architecture": "rotary"}, {"architecture": "rotary", "untrained": True}]
    given = SMALL | {"models": models, "seeds": 2, "attention": {"strings": 5, "models": ["rotary"]}}
    run = start(tmp_path / "two", given | {"seed": 4})
    found = run.summary("models")
    assert found["name"].to_list() == ["rotary, seed 4", "rotary, seed 5", "random, seed 4", "random, seed 5"]
    assert found["family"].to_list() == ["rotary", "rotary", "random", "random"]
    assert found["seed"].to_list() == [4, 5, 4, 5]
    assert found["weights"].n_unique() == 4
    assert len(run.keys("attention-ends/*")) == 2
    alone = start(tmp_path / "one", SMALL | {"seed": 5})
    assert alone.summary("models")["weights"][0] == found["weights"][1]
    assert alone.summary("models").select("name", "family", "seed").row(0) == ("rotary", "rotary", 5)


def test_models_of_another_run_are_measured_again(small: Run[GrammarConfig], tmp_path: Path) -> None:
    probes = {"heads": 2, "dim": 4, "steps": 3, "rows": 4, "strings": 6}
    again = SMALL | {"models_of": str(small.path), "probes": probes, "name": "again"}
    run = start(tmp_path / "again", again | {"models": [{}, {"untrained": True}]})  # only the second one is made
    assert run.summary("models")["steps"].to_list() == [4, 0]
    assert run.table("training/rotary").equals(small.table("training/rotary"))
    assert run.table("speed/rotary").equals(small.table("speed/rotary"))
    assert run.table("diversity/rotary").equals(small.table("diversity/rotary"))
    assert len(run.summary("probes"))
    other = again | {"training": TINY["training"] | {"steps": 5}}
    with pytest.raises(RunError, match=r"models_of cannot use .*rotary: its training was begun with other settings"):
        start(tmp_path / "other", other)
    with pytest.raises(RunError, match="no model was trained there; name a finished run with the same grammar"):
        start(tmp_path / "none", again | {"models_of": str(tmp_path / "nowhere")})


def test_measurements_use_the_number_of_threads_of_the_training(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        start(tmp_path / "run", SMALL | {"training": TINY["training"] | {"threads": 2}})
        torch.set_num_threads(1)
        lose(next(tmp_path.glob("run/generation/*.parquet")))
        start(tmp_path / "run", SMALL | {"training": TINY["training"] | {"threads": 2}})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_same_numbers_come_out_again(whole: Run[GrammarConfig]) -> None:
    found = verify(whole.path, cells=12, seed=1)
    assert len(found) == 12
    assert not any(key.startswith("training/") for key, *_ in found)
    assert [(x.key, x.made, x.found) for x in found if x.made or x.found] == []


def test_every_model_and_the_study_are_mirrored_to_wandb(whole: Run[GrammarConfig]) -> None:
    for name in ("rotary", "masked"):
        assert len(list((whole.path / "models" / name).glob("wandb/offline-run-*/*.wandb"))) == 1
    (file,) = whole.path.glob("wandb/offline-run-*/*.wandb")
    tool = Path(sys.executable).parent / "wandb"
    command = [str(tool), "leet", "inspect", "--summary", "--json", str(file)]
    sent = json.dumps(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    for key in ("summary/rotary/from_nothing", "summary/rotary/kl", "diversity/rotary/kl", "figures/generated-strings"):
        assert key in sent, key


def test_processes_train_together_and_the_first_one_measures(whole: Run[GrammarConfig], tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(json.dumps(TINY | {"wandb": "disabled"}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29531"]
    command += ["-m", "nextstate.cli", "grammar", str(config), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    two = open_run(out)[1].summary("diversity")["kl"]
    assert (whole.summary("diversity")["kl"] - two).abs().max() < 1e-3  # type: ignore[operator]


def test_what_follows_a_corrupted_prefix_is_judged_after_the_right_one(tmp_path: Path) -> None:
    config = GrammarConfig(**TINY | {"writing": {"strings": 50, "prefix": 3, "corruption": 0.5}})
    run = Run(tmp_path, config, open_record("grammar", config, tmp_path, "", Progress()))
    clean, corrupted, nothing = (prefixes(run, kind) for kind in ("clean", "corrupted", "nothing"))
    for one, other, shown in zip(clean[0], corrupted[0], clean[1], strict=True):
        assert one.tolist() == other.tolist() == shown.tolist()
        assert len(one) == 3
    assert all((a != b).any() for a, b in zip(corrupted[0], corrupted[1], strict=True))
    assert all(len(a) == len(b) for a, b in zip(corrupted[0], corrupted[1], strict=True))
    assert [len(x) for x in nothing[0]] == [0] * 50
    draws = [np.concatenate(prefixes(run, "corrupted")[1]).tolist() for _ in range(2)]
    assert draws[0] == draws[1]  # at every temperature the same


def test_an_out_of_another_config_is_refused(small: Run[GrammarConfig]) -> None:
    with pytest.raises(RunError, match=r"another config \(different: seed\)"):
        start(small.path, SMALL | {"seed": 1})


@pytest.mark.parametrize("name", [c for c in packaged_configs() if c.startswith("configs/grammar/")])
def test_packaged_studies_can_be_read_and_fit_their_window(name: str, tmp_path: Path) -> None:
    config = read_config(name, [], GrammarConfig)
    jobs = GrammarStudy().jobs(config)
    assert len({job.key for job in jobs}) == len(jobs)
    assert describe(CFG(**config.grammar))["length_max"][0] + 2 <= config.training.window
    assert len({model_folder(tmp_path, spec) for spec in config.models}) == len(config.models)


def test_what_is_said_of_a_published_grammar() -> None:
    (found,) = describe(CFG(grammar="cfg3b")).rows(named=True)
    assert (found["name"], found["length_min"], found["length_max"]) == ("cfg3b", 138, 432)
    assert found["strings"] is None
    assert int(found["states"]) > 2**63
    assert found["rules"] == str(published("cfg3b"))


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="models has rotary more than once"):
        GrammarConfig(name="x", models=[{"architecture": "rotary"}, {"architecture": "rotary"}])  # type: ignore[list-item]
    with pytest.raises(ValidationError, match=r"seeds=2 trains all models with several seeds: remove the seed of rot"):
        GrammarConfig(name="x", seeds=2, models=[{"architecture": "rotary", "seed": 3}])  # type: ignore[list-item]
    with pytest.raises(ValidationError, match=r"attention\.models names rope: expected some of rotary"):
        GrammarConfig(name="x", attention={"models": ["rope"]})  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"temperatures=.* names one twice"):
        GrammarConfig(name="x", writing={"temperatures": [1.0, 1.0]})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="window=24 is shorter than a string"):
        start(tmp_path / "a", SMALL | {"grammar": {"levels": 5}})
    with pytest.raises(GameError, match="grammar='cfg3z' is not possible"):
        start(tmp_path / "b", SMALL | {"grammar": {"grammar": "cfg3z"}})
    assert not list(tmp_path.iterdir()), "nothing is written before all of it is checked"
