"""Experiments end to end: configs, folders, resuming after a kill, what is left out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from nextstate.patching import PatchConfig
from nextstate.responding import ResponseConfig
from polars.testing import assert_frame_equal

from nextstate import experiment, patching
from nextstate.agents.agent import AgentError
from nextstate.agents.config import ConfigError, find_config, packaged_configs, read_config
from nextstate.agents.training import TrainConfig
from nextstate.analysis.grammar.config import GrammarConfig
from nextstate.envs.game import GameError
from nextstate.experiment import Config
from nextstate.folder import ExperimentError, answered, left_out, remembered, slugify

SMALL: dict[str, Any] = {
    "name": "small",
    "agents": ["ideal", "chance", "shortcuts"],
    "games": [
        {"game": "Box", "over": {"boxes": [2, 3]}, "steps": 4, "episodes": 70},
        {"game": "DFA", "over": {"density": ["min", "max"], "states": [3]}, "steps": 5, "episodes": 20},
        {"game": "FruitStore", "over": {"people": [2, 4]}, "steps": 9, "episodes": 20},
    ],
    "wandb": "disabled",
}


def rows(folder: Path) -> pl.DataFrame:
    files = sorted((folder / "rows").glob("*/*.parquet"))
    return pl.concat([pl.read_parquet(f) for f in files]).sort("agent", "setting", "episode", "step", "question")


def test_a_run_is_a_folder_with_every_question_as_a_row(tmp_path: Path) -> None:
    page = experiment.run(Config(**SMALL), tmp_path / "run")
    assert page == tmp_path / "run" / "report.html"
    assert page.stat().st_size > 10_000
    table = rows(tmp_path / "run")
    per_agent = 2 * 70 * 4 + 2 * 20 * 5 + 20 * (1 + 3)
    assert table.filter(agent="ideal").height == table.filter(agent="chance").height == per_agent
    ideal = table.filter(agent="ideal")
    assert ideal.filter(determined=True)["greedy_correct"].all()
    assert abs(ideal["greedy_correct"].mean() - ideal["ceiling"].mean()) < 0.03  # type: ignore[operator]
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["finished"]
    assert len(info["settings"]) == 6
    assert not list((tmp_path / "run").rglob("*.partial"))
    transcript = pl.read_parquet(tmp_path / "run" / "transcripts" / "Box-boxes=2.parquet")
    assert transcript.height == 70


def test_the_same_command_again_changes_nothing(tmp_path: Path) -> None:
    experiment.run(Config(**SMALL), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("*.parquet")}
    experiment.run(Config(**SMALL), tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("*.parquet")}


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    experiment.run(Config(**SMALL), tmp_path)
    with pytest.raises(ExperimentError, match=r"another config \(different: seed\)"):
        experiment.run(Config(**SMALL | {"seed": 7}), tmp_path)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ExperimentError, match="is not empty and holds no run"):
        experiment.run(Config(**SMALL), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_cells_are_drawn_one_by_one_and_asked_at_their_last_step(tmp_path: Path) -> None:
    games = [
        {"game": "DFA", "over": {"states": [3]}, "steps": [1, 4], "episodes": 10},
        {"game": "FruitStore", "over": {"people": [3]}, "steps": [1, 2, 3, 9], "episodes": 5},
    ]
    experiment.run(Config(**SMALL | {"games": games, "grid": "cells"}), tmp_path)
    table = rows(tmp_path).filter(agent="ideal")
    assert sorted(set(table.select("setting", "step").iter_rows())) == [
        ("DFA-states=3-steps=1", 1), ("DFA-states=3-steps=4", 4),
        ("FruitStore-people=3-steps=1", 1), ("FruitStore-people=3-steps=2", 2),
    ]  # fmt: skip
    assert table["episode"].n_unique() == table.height


def test_killed_in_the_middle_a_run_resumes_to_the_same_rows(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = str(folders["gpt2"])
    config = SMALL | {"agents": [model, "ideal"], "games": SMALL["games"][:2], "wandb": "offline"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "nextstate.cli", "run", str(tmp_path / "config.yaml"), "--out"]
    environment = os.environ | {"WANDB_SILENT": "true"}
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("rows/*/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    survivors = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("rows/*/*.parquet")}
    assert 0 < len(survivors) < 8
    for name in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / name)], env=environment, check=True, stdout=subprocess.DEVNULL)
    for path, written in survivors.items():
        assert path.stat().st_mtime_ns == written
    assert_frame_equal(rows(tmp_path / "killed"), rows(tmp_path / "whole"))


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path, folders: dict[str, Path]) -> None:
    games = [{"game": "DFA", "over": {"states": [4]}, "steps": 60, "episodes": 3}]
    config = Config(**SMALL | {"agents": [str(folders["llama"]), "ideal"], "games": games})
    experiment.run(config, tmp_path)
    (left,) = left_out(tmp_path)
    assert "too many" in left["reason"]
    table = rows(tmp_path)
    assert 0 < table.filter(pl.col("agent") != "ideal").height < table.filter(agent="ideal").height


def proofs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    agents = json.loads((folder / "run.json").read_text())["agents"]
    return {a["name"]: a["certificates"] for a in agents if a["kind"] == "model"}


def test_what_was_proved_of_each_model_is_recorded_and_kept(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = str(folders["gpt2"])
    games = [{"game": "DFA", "over": {"states": [3, 4]}, "steps": 12, "episodes": 3}]
    play = [{"game": "Cycle", "settings": {"period": 3}, "steps": 3, "episodes": 3}]
    config = Config(**SMALL | {"agents": [model], "games": games, "play": play, "intervene": {"heads": [[0, 1]]}})
    page = experiment.run(config, tmp_path)
    found = proofs(tmp_path)
    assert list(found) == [model, f"{model} [without 0.1]"]
    longest = rows(tmp_path)["prompt_tokens"].max()
    for certificates in found.values():
        assert [(c["road"], c["live"]) for c in certificates] == [("tree", False), ("tree", True)]
        assert all(c["error"] <= c["tolerance"] and c["seconds"] > 0 for c in certificates)
        assert certificates[0]["depth"] >= longest  # of the last cell, not of the first
    assert page.read_text().count("<strong>tree</strong> <small>live</small>") == 2
    experiment.run(config, tmp_path)  # nothing is left to ask
    assert proofs(tmp_path) == found
    (tmp_path / "plays" / slugify(model) / "Cycle-period=3.parquet").unlink()
    experiment.run(config, tmp_path)  # replay is not proved again, and its proof stays
    assert [c["live"] for c in proofs(tmp_path)[model]] == [False, True]
    assert proofs(tmp_path)[model][0] == found[model][0]
    assert list(proofs(tmp_path)) == list(found)


def test_live_runs_record_what_was_proved_of_sessions(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = str(folders["gpt2"])
    games = [{"game": "DFA", "over": {"states": [3]}, "steps": 4, "episodes": 3}]
    experiment.run(Config(**SMALL | {"agents": [model], "games": games, "road": "live"}), tmp_path)
    assert [(c["road"], c["live"]) for c in proofs(tmp_path)[model]] == [("tree", True)]


def test_certificates_give_way_to_those_that_hold_for_more() -> None:
    def proof(road: str, depth: int, live: bool = False) -> dict[str, Any]:
        return {"road": road, "live": live, "attention": "sdpa", "depth": depth, "columns": 2 * depth}

    def after(*old: dict[str, Any], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
        told = remembered([{"name": "b"}, {"name": "a", "certificates": list(old)}], {"name": "a", "certificates": new})
        return list(told["certificates"])

    small, large, fork, live = proof("tree", 10), proof("tree", 20), proof("fork", 20), proof("tree", 20, live=True)
    assert after(small, new=[large]) == [large]
    assert after(large, new=[small]) == [large, small]
    assert after(small, live, new=[fork]) == [small, live, fork]
    assert after(small, new=[]) == [small]
    assert remembered([], {"name": "a"}) == {"name": "a"}


def test_tokens_that_differ_from_those_of_the_whole_text_are_remarked(tmp_path: Path, folders: dict[str, Path]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "model"
    shutil.copytree(folders["gpt2"], folder)
    tokenizer = Tokenizer(models.BPE())  # no split at spaces: tokens cross the borders of pieces
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a b. Take action A, go to state b. Take action A, go to state b."] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    games = [{"game": "DFA", "over": {"states": [2]}, "steps": 4, "episodes": 2}]
    page = experiment.run(Config(**SMALL | {"agents": [str(folder)], "games": games}), tmp_path / "run")
    (remark,) = json.loads((tmp_path / "run" / "run.json").read_text())["remarks"]
    assert "other tokens than its pieces" in remark
    assert "other tokens than its pieces" in page.read_text()


def test_a_model_that_cannot_be_loaded_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    experiment.run(Config(**SMALL | {"agents": [missing, "ideal"]}), tmp_path / "run")
    left = left_out(tmp_path / "run")
    assert len(left) == 6
    assert all("is no model" in x["reason"] for x in left)
    assert not answered(tmp_path / "run", missing)
    assert answered(tmp_path / "run", "ideal")


def test_live_and_replay_write_the_same_rows(tmp_path: Path, folders: dict[str, Path]) -> None:
    config = SMALL | {"agents": [str(folders["gpt_neox"]), "chance"], "games": SMALL["games"][1:]}
    experiment.run(Config(**config), tmp_path / "replay")
    experiment.run(Config(**config | {"road": "live"}), tmp_path / "live")
    one, two = rows(tmp_path / "replay"), rows(tmp_path / "live")
    loose = ["logprobs", "p_accepted"]
    assert_frame_equal(one.drop(loose), two.drop(loose))
    assert_frame_equal(one.select(loose), two.select(loose), abs_tol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"game": [1]}, "unknown key 'game'.*did you mean 'games'"),
        ({"games": [{"gaem": "Box"}]}, "unknown key 'gaem'.*did you mean 'game'"),
        ({"games": [{"game": "Box", "steps": [1, 2]}]}, "does not fit grid=episodes"),
        ({"agents": []}, "at least 1"),
        ({"agents": [{"name": "x", "modules": {"bloks": "h"}}]}, "unknown key 'bloks'.*did you mean 'blocks'"),
        ({"agents": [{"name": "x", "modules": {"blocks": "h"}}]}, r"modules\.projection: Field required"),
        ({"games": []}, "`games` and `play` are both empty"),
        ({"name": "../../etc"}, "should match pattern"),
        ({"road": "live", "games": [{"game": "Box", "ask": "all"}]}, "live road asks one question"),
    ],
)
def test_wrong_configs_are_told_what_is_right(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(SMALL | change))
    with pytest.raises(ConfigError, match=message):
        read_config(str(tmp_path / "c.yaml"), [], Config)


@pytest.mark.parametrize(
    ("games", "message"),
    [
        ([{"game": "Bxo"}], "unknown game 'Bxo'.*did you mean 'Box'"),
        ([{"game": "Box", "settings": {"boxs": 3}}], "unknown setting 'boxs'.*did you mean 'boxes'"),
        (
            [{"game": "DFA", "over": {"states": [27]}}],
            "states=27 is not possible: expected a whole number from 2 to 26",
        ),
        ([{"game": "DFA", "over": {"states": [4], "edges": [99]}}], "edges=99 is not possible.*4 to 7"),
        ([{"game": "Box", "steps": 0}], "steps=0"),
    ],
)
def test_impossible_games_are_refused_before_anything_is_written(tmp_path: Path, games: Any, message: str) -> None:
    with pytest.raises(GameError, match=message):
        experiment.run(Config(**SMALL | {"games": games}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_shortcut_that_no_game_has(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match=r"'shortcut:guess'.*last_mention"):
        experiment.run(Config(**SMALL | {"agents": ["shortcut:guess"]}), tmp_path / "run")


def test_overrides(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(SMALL))
    read = read_config(str(tmp_path / "c.yaml"), ["seed=3", "games.1.episodes=5", "agents=[ideal]"], Config)
    assert (read.seed, read.games[1].episodes, read.agents) == (3, 5, ["ideal"])
    for wrong, message in [
        ("seed", "key=value"),
        ("games.9.episodes=1", "no place in a list of 3"),
        ("name.x=1", "nothing to enter"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_config(str(tmp_path / "c.yaml"), [wrong], Config)


def test_yaml_never_makes_objects(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    (tmp_path / "c.yaml").write_text(f"name: !!python/object/apply:os.system ['touch {touched}']")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_config(str(tmp_path / "c.yaml"), [], Config)
    assert not touched.exists()


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_reads_and_names_its_command(name: str) -> None:
    verbs: dict[str, tuple[str, Any]] = {
        "train": ("train", TrainConfig), "heads": ("patch", PatchConfig), "response": ("response", ResponseConfig),
        "grammar": ("grammar", GrammarConfig),
    }  # fmt: skip
    verb, kind = verbs.get(name.split("/")[1], ("run", Config))
    assert find_config(name).read_text().splitlines()[0] == f"# nextstate {verb} {name}"
    read = read_config(name, [], kind)
    if isinstance(read, Config):
        assert experiment.settings_of(read) or read.play
    if isinstance(read, PatchConfig):
        assert patching.count_sweeps(read)


def test_the_quickstart_has_at_least_thirty_cells() -> None:
    assert len(experiment.settings_of(read_config("configs/quickstart.yaml", [], Config))) >= 30


def test_a_config_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'configs/quickstart\.yaml'"):
        find_config("configs/quickstrat.yaml")
    with pytest.raises(ConfigError, match="there is no config"):
        find_config("../pyproject")


def test_a_game_that_cannot_be_made_leaves_out_its_cells_and_no_other(tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt.json"
    corrupt.write_text('{"version": 1, "KB": ')
    out = tmp_path / "run"
    config = Config(
        name="broken", agents=["ideal", "chance"], wandb="disabled",
        games=[
            {"game": "TextWorld", "settings": {"file": str(corrupt)}, "steps": 3, "episodes": 2},
            {"game": "Box", "steps": 3, "episodes": 2},
        ],
    )  # fmt: skip
    page = experiment.run(config, out)
    info = json.loads((out / "run.json").read_text())
    assert {x["agent"] for x in info["left_out"]} == {"ideal", "chance"}
    assert all("corrupt.json" in x["reason"] and "TextWorld" in x["setting"] for x in info["left_out"])
    assert len(list(out.glob("rows/*/Box*.parquet"))) == 2
    assert "corrupt.json" in page.read_text()
    alone = Config(
        name="broken",
        agents=["ideal"],
        wandb="disabled",
        games=[{"game": "TextWorld", "settings": {"file": str(corrupt)}}],
    )
    with pytest.raises(GameError, match=r"corrupt\.json"):
        experiment.run(alone, tmp_path / "alone")
