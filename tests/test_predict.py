"""The study of predictions end to end: configs, tables, resuming after a kill, what is left out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from nextstate.agents.agent import AgentError
from nextstate.agents.config import ConfigError, find_config, packaged_configs, read_config
from nextstate.agents.training import TrainConfig
from nextstate.analysis.predict.config import PredictConfig, asked_cells
from nextstate.analysis.predict.study import Predict
from nextstate.analysis.run import ModelFailed, RunError, with_certificates
from nextstate.analysis.studies import STUDIES
from nextstate.analysis.study import find_study, identity_of, verify
from nextstate.envs.files import PathError, slug
from nextstate.envs.game import GameError, unroll
from nextstate.envs.games.box import Box
from tests.outside import GAME, NGRAM
from tests.runs import answered, frame, left_out, make, opened, page_of, record

SMALL: dict[str, Any] = {
    "name": "small",
    "agents": ["ideal", "chance", "shortcuts"],
    "games": [
        {"game": "Box", "grid": {"boxes": [2, 3]}, "steps": 4, "episodes": 70},
        {"game": "DFA", "grid": {"density": ["min", "max"], "states": [3]}, "steps": 5, "episodes": 20},
        {"game": "FruitStore", "grid": {"people": [2, 4]}, "steps": 9, "episodes": 20},
    ],
    "wandb": "disabled",
}


def test_a_run_is_a_folder_with_every_question_and_every_answer_as_a_row(tmp_path: Path) -> None:
    make(SMALL, tmp_path / "run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    table = frame(tmp_path / "run")
    per_agent = 2 * 70 * 4 + 2 * 20 * 5 + 20 * (1 + 3)
    assert table.filter(agent="ideal").height == table.filter(agent="chance").height == per_agent
    ideal = table.filter(agent="ideal")
    assert ideal.filter(determined=True)["greedy_correct"].all()
    assert abs(ideal["greedy_correct"].mean() - ideal["ceiling"].mean()) < 0.03  # type: ignore[operator]
    assert record(tmp_path / "run")["finished"]
    run = opened(tmp_path / "run")
    assert len(run.keys("questions/*")) == len(run.summary("grid")) == 6
    assert not list((tmp_path / "run").rglob("*.partial"))
    questions = run.table("questions/Box-boxes=2")
    assert questions.height == 70 * 4
    cell = asked_cells(run.config)[0]
    for row in questions.sample(9, seed=0).iter_rows(named=True):
        episode = unroll(cell.game, row["episode"], cell.steps)
        assert row["prompt"] == episode.prompt(row["step"] - 1, row["question"])
        assert row["prompt"].endswith(row["stem"])
        assert row["states"] == cell.game.size_of(episode.start)


def test_every_episode_is_unrolled_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counted_ngram.py").write_text(NGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    begun, read = Counter[int](), Counter[int]()
    initial, reader = Box.initial, Box.reader

    def counted(self: Box, rng: Any) -> Any:
        begun[self.boxes] += 1
        return initial(self, rng)

    def counted_reader(self: Box, state: Any) -> Any:
        read[self.boxes] += 1
        return reader(self, state)

    monkeypatch.setattr(Box, "initial", counted)
    monkeypatch.setattr(Box, "reader", counted_reader)
    agents = ["counted_ngram:NGram", {"kind": "counted_ngram:NGram", "n": 3}, "ideal", "chance", "shortcuts"]
    make(SMALL | {"agents": agents, "games": SMALL["games"][:1]}, tmp_path / "run")
    assert begun == read == {2: 70, 3: 70}  # one reader for all beliefs and ceilings of an episode


def test_beyond_the_bound_episodes_are_unrolled_again_and_the_answers_stay_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SMALL | {"agents": ["ideal", "chance"], "games": SMALL["games"][:1]}
    make(config, tmp_path / "kept")
    for bound in (0, 600):  # no cell is kept; the first one is
        monkeypatch.setattr("nextstate.analysis.predict.study.KEPT", bound)
        make(config, tmp_path / str(bound))
        assert_frame_equal(frame(tmp_path / str(bound)), frame(tmp_path / "kept"))


def test_rows_beyond_the_memory_wait_in_files_and_make_the_same_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(SMALL, tmp_path / "kept")
    waiting = tmp_path / "waiting"
    waiting.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(waiting))
    monkeypatch.setattr("nextstate.analysis.table.SPOOL", 4000)
    monkeypatch.setattr("nextstate.analysis.predict.study.MANY", 20)
    made = list[Path]()
    scan = pl.scan_parquet

    def watched(source: Any, **how: Any) -> pl.LazyFrame:
        made.extend(p for p in (source if isinstance(source, list) else ()) if p.is_relative_to(waiting))
        return scan(source, **how)

    monkeypatch.setattr(pl, "scan_parquet", watched)
    run = make(SMALL, tmp_path / "spooled")
    assert len(made) > 10
    assert not list(waiting.iterdir())
    assert_frame_equal(frame(tmp_path / "spooled"), frame(tmp_path / "kept"))
    for name, table in opened(tmp_path / "kept").summaries().items():
        assert_frame_equal(table, run.summary(name))
    assert [x.found for x in verify(tmp_path / "spooled", 4)] == [""] * 4


def test_a_full_disk_while_rows_wait_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    monkeypatch.setattr(tempfile, "tempdir", str(gone))  # there is no such folder
    monkeypatch.setattr("nextstate.analysis.table.SPOOL", 100)
    with pytest.raises(PathError, match="gone"):
        make(SMALL, tmp_path / "run")


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Ten times the episodes of one cell take less than 200 bytes more for each further row of a table."""
    script = f"""
import json, resource, sys
from pathlib import Path
from nextstate.analysis import table
from nextstate.analysis.predict import study
from nextstate.analysis.predict.config import PredictConfig
from nextstate.analysis.study import go
table.SPOOL, study.MANY, study.KEPT = 1 << 20, 2000, 2000
game = {{"game": "Box", "grid": {{"boxes": [4]}}, "steps": 10, "episodes": int(sys.argv[1])}}
config = {{**json.loads({json.dumps(json.dumps(SMALL))}), "agents": ["ideal", "chance"], "games": [game]}}
go(study.Predict(), PredictConfig.model_validate(config), Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    peaks = []
    for episodes in (500, 5000):
        command = [sys.executable, "-c", script, str(episodes), f"run{episodes}"]
        peaks.append(int(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 200 * 45_000 * 3  # three tables


def tables_of(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet") if "set-aside" not in p.parts}


def test_the_same_command_again_changes_nothing_and_imports_no_torch(tmp_path: Path) -> None:
    make(SMALL, tmp_path / "run")
    before = tables_of(tmp_path)
    page = (tmp_path / "run" / "report.html").stat().st_mtime_ns
    script = f"""
import json, sys
from pathlib import Path
from nextstate.analysis.predict.config import PredictConfig
from nextstate.analysis.predict.study import Predict
from nextstate.analysis.study import go
import polars
polars.read_parquet = polars.scan_parquet = None  # no rows are read
run = go(Predict(), PredictConfig.model_validate(json.loads({json.dumps(json.dumps(SMALL))})), Path("run"))
assert not {{"torch", "plotly", "scipy", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert before == tables_of(tmp_path)
    assert page == (tmp_path / "run" / "report.html").stat().st_mtime_ns


def test_tables_that_are_missing_or_damaged_are_made_again_with_what_was_computed_from_them(tmp_path: Path) -> None:
    out = tmp_path / "run"
    make(SMALL, out)
    whole, before = frame(out), tables_of(out)
    lost = out / "answers" / "ideal" / "Box-boxes=2.parquet"
    lost.unlink()
    broken = out / "questions" / "DFA-density=max-states=3.parquet"
    data = bytearray(broken.read_bytes())
    data[len(data) // 3] ^= 1
    broken.write_bytes(data)
    make(SMALL, out)
    assert_frame_equal(frame(out), whole)
    changed = {p.relative_to(out) for p, at in tables_of(out).items() if before[p] != at}
    # The questions are the same as before, and so are the digests of what was computed from them.
    assert {p for p in changed if p.parts[0] != "summary"} == {lost.relative_to(out), broken.relative_to(out)}
    assert [x["table"] for x in record(out)["set_aside"]] == ["questions/DFA-density=max-states=3"]


def test_agents_and_games_from_outside_are_known_by_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    game = GAME.replace("Cups", "Mugs")  # other tests of this process may know a game named Cups
    for name, source in (("ngram", NGRAM), ("mugs", game)):
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    games = [{"game": "mugs:Mugs", "steps": 3, "episodes": 4}, {"game": "Cycle", "steps": 3, "episodes": 4}]
    run = make(SMALL | {"agents": ["ngram:NGram", "ideal"], "games": games}, tmp_path / "run")
    jobs = {job.key: job for job in Predict().jobs(run.config)}
    (own,) = {key.split("/")[1] for key in jobs if "NGram" in key}
    cups = next(key.removeprefix("questions/") for key in jobs if "Mugs" in key)
    cycle = next(key.removeprefix("questions/") for key in jobs if "Cycle" in key)

    def identities() -> dict[str, Any]:
        return {key: identity_of(Predict(), job, run) for key, job in jobs.items()}

    before = identities()
    assert "agent" not in before[f"answers/ideal/{cups}"]
    (tmp_path / "ngram.py").write_text(NGRAM + "# changed")
    (tmp_path / "mugs.py").write_text(game + "# changed")
    changed = {key for key, identity in identities().items() if identity != before[key]}
    assert changed == {f"questions/{cups}", f"answers/ideal/{cups}", f"answers/{own}/{cups}", f"answers/{own}/{cycle}"}


def test_a_changed_checkpoint_answers_anew(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["gpt2"], folder)
    config = SMALL | {"agents": [str(folder), "ideal"], "games": SMALL["games"][1:2]}
    make(config, tmp_path / "run")
    before = tables_of(tmp_path / "run")
    shutil.rmtree(folder)
    shutil.copytree(folders["llama"], folder)
    make(config, tmp_path / "run")
    changed = {p.parent.name for p, at in tables_of(tmp_path / "run").items() if before[p] != at}
    assert changed == {"summary", slug(str(folder))}
    make(config | {"name": "fresh"}, tmp_path / "fresh")
    assert_frame_equal(frame(tmp_path / "run"), frame(tmp_path / "fresh"))
    assert "files" in record(tmp_path / "run")["set_aside"][0]["reason"]


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    make(SMALL, tmp_path)
    with pytest.raises(RunError, match=r"another config \(different: seed\)"):
        make(SMALL | {"seed": 7}, tmp_path)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        make(SMALL, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.txt", ".lock"}


def test_cells_are_drawn_one_by_one_and_asked_at_their_last_step(tmp_path: Path) -> None:
    games = [
        {"game": "DFA", "grid": {"states": [3]}, "steps": [1, 4], "episodes": 10},
        {"game": "FruitStore", "grid": {"people": [3]}, "steps": [1, 2, 3, 9], "episodes": 5},
    ]
    make(SMALL | {"games": games, "grid": "cells"}, tmp_path)
    table = frame(tmp_path).filter(agent="ideal")
    assert sorted(set(table.select("setting", "step").iter_rows())) == [
        ("DFA-states=3-steps=1", 1), ("DFA-states=3-steps=4", 4),
        ("FruitStore-people=3-steps=1", 1), ("FruitStore-people=3-steps=2", 2),
    ]  # fmt: skip
    assert table["episode"].n_unique() == table.height


def test_killed_in_the_middle_a_run_resumes_to_the_same_rows(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = str(folders["gpt2"])
    config = SMALL | {"agents": [model, "ideal"], "games": SMALL["games"][:1]}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "nextstate.cli", "run", str(tmp_path / "config.yaml"), "--out"]
    environment = os.environ | {"WANDB_SILENT": "true"}
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("answers/*/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    survivors = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("answers/*/*.parquet")}
    assert 0 < len(survivors) < 4
    for name in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / name)], env=environment, check=True, stdout=subprocess.DEVNULL)
    for path, written in survivors.items():
        assert path.stat().st_mtime_ns == written
    assert_frame_equal(frame(tmp_path / "killed"), frame(tmp_path / "whole"))


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path, folders: dict[str, Path]) -> None:
    games = [{"game": "DFA", "grid": {"states": [4]}, "steps": 60, "episodes": 3}]
    config = SMALL | {"agents": [str(folders["llama"]), "ideal"], "games": games}
    make(config, tmp_path)
    (left,) = left_out(tmp_path)
    assert "too many" in left["reason"]
    table = frame(tmp_path)
    assert 0 < table.filter(pl.col("agent") != "ideal").height < table.filter(agent="ideal").height


def proofs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    agents = record(folder)["agents"]
    return {a["name"]: a["certificates"] for a in agents if a["kind"] == "model"}


def test_what_was_proved_of_each_model_is_recorded_and_kept(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = str(folders["gpt2"])
    games = [{"game": "DFA", "grid": {"states": [3, 4]}, "steps": 12, "episodes": 3}]
    play = [{"game": "Cycle", "game_args": {"period": 3}, "steps": 3, "episodes": 3}]
    config = SMALL | {"agents": [model], "games": games, "play": play, "intervene": {"heads": [[0, 1]]}}
    make(config, tmp_path)
    found = proofs(tmp_path)
    assert list(found) == [model, f"{model} [without 0.1]"]
    longest = frame(tmp_path)["prompt_tokens"].max()
    for certificates in found.values():
        assert [(c["road"], c["live"]) for c in certificates] == [("tree", False), ("tree", True)]
        assert all(c["error"] <= c["tolerance"] and c["seconds"] > 0 for c in certificates)
        assert certificates[0]["depth"] >= longest  # of the last cell, not of the first
    assert page_of(tmp_path).count("<strong>tree</strong> <small>live</small>") == 2
    make(config, tmp_path)  # nothing is left to ask
    assert proofs(tmp_path) == found
    (tmp_path / "plays" / slug(model) / "Cycle-period=3.parquet").unlink()
    make(config, tmp_path)  # replay is not proved again, and its proof stays
    assert [c["live"] for c in proofs(tmp_path)[model]] == [False, True]
    assert proofs(tmp_path)[model][0] == found[model][0]
    assert list(proofs(tmp_path)) == list(found)


def test_live_runs_record_what_was_proved_of_sessions(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = str(folders["gpt2"])
    games = [{"game": "DFA", "grid": {"states": [3]}, "steps": 4, "episodes": 3}]
    make(SMALL | {"agents": [model], "games": games, "mode": "live"}, tmp_path)
    assert [(c["road"], c["live"]) for c in proofs(tmp_path)[model]] == [("tree", True)]


def test_certificates_give_way_to_those_that_hold_for_more() -> None:
    def proof(road: str, depth: int, live: bool = False) -> dict[str, Any]:
        return {"road": road, "live": live, "attention": "sdpa", "depth": depth, "columns": 2 * depth}

    def after(*old: dict[str, Any], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
        told = with_certificates(
            [{"name": "b"}, {"name": "a", "certificates": list(old)}], {"name": "a", "certificates": new}
        )
        return list(told["certificates"])

    small, large, fork, live = proof("tree", 10), proof("tree", 20), proof("fork", 20), proof("tree", 20, live=True)
    assert after(small, new=[large]) == [large]
    assert after(large, new=[small]) == [large]
    assert after(small, live, new=[fork]) == [small, live, fork]
    assert after(small, new=[]) == [small]
    assert with_certificates([], {"name": "a"}) == {"name": "a"}


def test_tokens_that_differ_from_those_of_the_whole_text_are_warned_of(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
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
    games = [{"game": "DFA", "grid": {"states": [2]}, "steps": 4, "episodes": 2}]
    make(SMALL | {"agents": [str(folder)], "games": games}, tmp_path / "run")
    (warning,) = record(tmp_path / "run")["warnings"]
    assert "tokenizes a transcript as a whole differently" in warning
    assert "tokenizes a transcript as a whole differently" in page_of(tmp_path / "run")


def test_a_model_that_cannot_be_loaded_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    make(SMALL | {"agents": [missing, "ideal"]}, tmp_path / "run")
    left = left_out(tmp_path / "run")
    assert len(left) == 6
    assert all("is not a model" in x["reason"] for x in left)
    assert not answered(tmp_path / "run", missing)
    assert answered(tmp_path / "run", "ideal")


def test_live_and_replay_write_the_same_rows(tmp_path: Path, folders: dict[str, Path]) -> None:
    config = SMALL | {"agents": [str(folders["gpt_neox"]), "chance"], "games": SMALL["games"][1:]}
    make(config, tmp_path / "replay")
    make(config | {"mode": "live"}, tmp_path / "live")
    one, two = frame(tmp_path / "replay"), frame(tmp_path / "live")
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
        ({"mode": "live", "games": [{"game": "Box", "questions_per_step": "all"}]}, "live mode asks one question"),
    ],
)
def test_wrong_configs_are_told_what_is_right(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(SMALL | change))
    with pytest.raises(ConfigError, match=message):
        read_config(str(tmp_path / "c.yaml"), [], PredictConfig)


@pytest.mark.parametrize(
    ("games", "message"),
    [
        ([{"game": "Bxo"}], "no game 'Bxo'.*did you mean 'Box'"),
        ([{"game": "Box", "game_args": {"boxs": 3}}], "unknown setting 'boxs'.*did you mean 'boxes'"),
        (
            [{"game": "DFA", "grid": {"states": [27]}}],
            "states=27 is not possible: expected a whole number from 2 to 26",
        ),
        ([{"game": "DFA", "grid": {"states": [4], "edges": [99]}}], "edges=99 is not possible.*4 to 7"),
        ([{"game": "Box", "steps": 0}], "steps=0"),
    ],
)
def test_impossible_games_are_refused_before_anything_is_written(tmp_path: Path, games: Any, message: str) -> None:
    with pytest.raises(GameError, match=message):
        make(SMALL | {"games": games}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_shortcut_that_no_game_has(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match=r"'shortcut:guess'.*last_mention"):
        make(SMALL | {"agents": ["shortcut:guess"]}, tmp_path / "run")


def test_overrides(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(SMALL))
    read = read_config(str(tmp_path / "c.yaml"), ["seed=3", "games.1.episodes=5", "agents=[ideal]"], PredictConfig)
    assert (read.seed, read.games[1].episodes, read.agents) == (3, 5, ["ideal"])
    for wrong, message in [
        ("seed", "key=value"),
        ("games.9.episodes=1", "is not an index of a list of 3"),
        ("name.x=1", "has no entries"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_config(str(tmp_path / "c.yaml"), [wrong], PredictConfig)


def test_yaml_never_makes_objects(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    (tmp_path / "c.yaml").write_text(f"name: !!python/object/apply:os.system ['touch {touched}']")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_config(str(tmp_path / "c.yaml"), [], PredictConfig)
    assert not touched.exists()


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_reads_and_names_its_command(name: str) -> None:
    part = name.split("/")[1].removesuffix(".yaml")
    verb = {"heads": "patch"}.get(part, part if part in (*STUDIES, "train") else "run")
    assert find_config(name).read_text().splitlines()[0] == f"# nextstate {verb} {name}"
    if verb == "train":
        read_config(name, [], TrainConfig)
    else:
        study = find_study(verb)
        assert study.jobs(read_config(name, [], study.config))


def test_the_quickstart_has_at_least_thirty_cells() -> None:
    assert len(asked_cells(read_config("configs/quickstart.yaml", [], PredictConfig))) >= 30


def test_a_config_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'configs/quickstart\.yaml'"):
        find_config("configs/quickstrat.yaml")
    with pytest.raises(ConfigError, match="there is no config"):
        find_config("../pyproject")


def test_a_game_that_cannot_be_made_leaves_out_its_cells_and_no_other(tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt.json"
    corrupt.write_text('{"version": 1, "KB": ')
    out = tmp_path / "run"
    games = [
        {"game": "TextWorld", "game_args": {"file": str(corrupt)}, "steps": 3, "episodes": 2},
        {"game": "Box", "steps": 3, "episodes": 2},
    ]
    make(SMALL | {"agents": ["ideal", "chance"], "games": games}, out)
    reasons = {x["agent"]: x["reason"] for x in left_out(out)}
    assert reasons.keys() == {"", "ideal", "chance"}
    assert "corrupt.json" in reasons[""]
    assert all("TextWorld" in x["what"] for x in left_out(out))
    assert len(list(out.glob("answers/*/Box*.parquet"))) == 2
    assert "corrupt.json" in page_of(out)
    with pytest.raises(ModelFailed, match=r"corrupt\.json"):
        make(SMALL | {"agents": ["ideal"], "games": games[:1]}, tmp_path / "alone")
