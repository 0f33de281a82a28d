"""The playing part of an experiment, end to end: rows, resuming, what is left out, and its place in the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import scipy.stats
from corridor import register
from polars.testing import assert_frame_equal

from nextstate.agents.config import ConfigError, read_config
from nextstate.analysis.play import statistics as plays
from nextstate.analysis.play.config import play_cells
from nextstate.analysis.play.tables import PLAYS
from nextstate.analysis.predict.config import PredictConfig
from nextstate.analysis.predict.study import Predict
from nextstate.analysis.run import RunError
from nextstate.analysis.study import checked, open_run, write_page
from nextstate.envs.game import GameError
from tests.runs import answered, left_out, make, opened, page_of, record

BOX = {"game": "Box", "grid": {"boxes": [2, 3]}, "steps": 5, "episodes": 20}
SMALL: dict[str, Any] = {
    "name": "played",
    "agents": ["ideal"],
    "play": [
        BOX,
        {"game": "DFA", "grid": {"states": [3, 5]}, "game_args": {"density": "min"}, "steps": 9, "episodes": 20},
    ],
    "wandb": "disabled",
}


def played(folder: Path) -> pl.DataFrame:
    files = sorted((folder / "plays").glob("*/*.parquet"))
    return pl.concat([pl.read_parquet(f) for f in files]).sort("agent", "setting", "episode")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of play alone."""
    folder = tmp_path_factory.mktemp("played") / "run"
    make(SMALL, folder)
    return folder


def test_every_episode_played_is_a_row(run: Path) -> None:
    table = played(run)
    assert dict(table.schema) == {k: v() if isinstance(v, type) else v for k, v in PLAYS.items()}
    assert table.height == 2 * 4 * 20
    assert set(table["agent"]) == {"random", "walkthrough"}
    assert opened(run).summary("grid").filter("played")["slug"].to_list() == [
        "Box-boxes=2", "Box-boxes=3", "DFA-density=min-states=3", "DFA-density=min-states=5",
    ]  # fmt: skip
    assert record(run)["finished"]
    assert not list(run.rglob("*.partial"))
    known = table.filter(agent="walkthrough")
    assert known["success"].all()
    assert (known["steps"] == known["optimum"]).all()
    assert (table["success"] == (table["score"] == 1)).all()
    assert set(table.filter(game="Box")["states"]) == {4, 27}


def test_resuming_makes_what_is_missing_again_and_nothing_else(run: Path, tmp_path: Path) -> None:
    config = SMALL
    make(config, tmp_path / "run")
    files = sorted((tmp_path / "run" / "plays").glob("*/*.parquet"))
    before = {f: f.stat().st_mtime_ns for f in files}
    whole = played(tmp_path / "run")
    assert_frame_equal(whole, played(run))
    files[1].unlink()
    files[-1].unlink()
    make(config, tmp_path / "run")
    assert_frame_equal(played(tmp_path / "run"), whole)
    assert [f for f in files if f.stat().st_mtime_ns != before[f]] == [files[1], files[-1]]


def test_a_model_is_asked_and_plays_the_same_settings(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = str(folders["gpt2"])
    games = [{"game": "Box", "grid": {"boxes": [2, 3]}, "steps": 4, "episodes": 6}]
    entries = [{**BOX, "episodes": 6}, {**BOX, "episodes": 6, "writes": True}]
    config = SMALL | {"agents": [model, "ideal"], "games": games, "play": entries}
    folder = tmp_path / "run"
    make(config | {"wandb": "offline"}, folder)
    table = played(folder)
    assert set(table["setting"]) == {f"Box-boxes={n}{end}" for n in (2, 3) for end in ("", "-writes")}
    mine = table.filter(agent=model)
    assert mine.filter(~pl.col("setting").str.ends_with("writes"))["illegal"].sum() == 0
    assert mine.filter(pl.col("setting").str.ends_with("writes"))["illegal"].sum() > 0
    assert not left_out(folder)
    text = page_of(folder)
    assert text.count("Next-state accuracy against boxes") == 2 * 2  # caption and label, for the picked and the written
    assert "generates a line of text" in text
    make(config | {"name": "alone", "play": entries[:1], "games": []}, tmp_path / "alone")
    drawn = [p.name for p in folder.glob("wandb/offline-run-*/files/media/**/*.plotly.json")]
    assert sum("success-in-play" in name for name in drawn) == 2 * 2  # against boxes and |Q|
    picked = mine.filter(~pl.col("setting").str.ends_with("writes"))
    assert_frame_equal(played(tmp_path / "alone").filter(agent=model), picked)


def test_heads_are_left_out_of_play_too(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = str(folders["llama"])
    base = SMALL | {"agents": [model], "players": [], "play": [BOX]}
    make(base | {"intervene": {"heads": [[0, 1], [1, 2]]}}, tmp_path / "zero")
    commands = played(tmp_path / "zero").group_by("agent", maintain_order=True).agg("commands")
    assert commands.height == 2
    assert commands["commands"][0].to_list() != commands["commands"][1].to_list()
    make(base | {"intervene": {"heads": [[0, 1]], "mode": "mean"}}, tmp_path / "mean")
    assert {x["what"] for x in left_out(tmp_path / "mean")} == {
        "Box-boxes=2 (play)", "Box-boxes=3 (play)",
    }  # fmt: skip
    assert all("does not play" in x["reason"] for x in left_out(tmp_path / "mean"))


def test_a_transcript_that_is_too_long_ends_its_episode_and_it_is_said(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    entry = {"game": "DFA", "grid": {"states": [4]}, "steps": 60, "episodes": 3, "writes": True}
    config = SMALL | {"agents": [str(folders["gpt2"])], "players": [], "play": [entry]}
    make(config, tmp_path)
    (left,) = left_out(tmp_path)
    assert left["what"] == "DFA-states=4-writes (play)"
    assert "played until the transcript was too long" in left["reason"]
    (row,) = plays.table(played(tmp_path)).to_dicts()
    assert (row["success"], row["cut"], row["over"]) == (0.0, 3, None)
    assert "(3 cut)" in page_of(tmp_path)


def test_what_cannot_be_played_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch)
    missing = str(tmp_path / "nothing")
    entry = {"game": "Corridor", "grid": {"rooms": [4, 6]}, "steps": 20, "episodes": 8, "max_states": 4}
    make(SMALL | {"agents": [missing], "play": [entry]}, tmp_path / "run")
    reasons = {(x["agent"], x["what"]): x["reason"] for x in left_out(tmp_path / "run")}
    assert "is not a model" in reasons[missing, "Corridor-rooms=4 (play)"]
    assert "max_states=4 is too small" in reasons["walkthrough", "Corridor-rooms=6 (play)"]
    assert not answered(tmp_path / "run", missing)
    assert answered(tmp_path / "run", "random")
    table = played(tmp_path / "run")
    assert set(table["agent"]) == {"random"}
    assert table["optimum"].null_count() == table["steps_over"].null_count() == table.height
    assert set(table["max_score"]) == {2.0}


def test_seeds_are_those_of_the_questions(run: Path) -> None:
    seeds = {tuple(p.cell.seeds) for p in play_cells(PredictConfig(**SMALL).play, 0)}
    assert seeds == {tuple(range(20))}
    other = play_cells(PredictConfig(**SMALL).play, 3)
    assert other[0].cell.seeds == range(3 * 10**9, 3 * 10**9 + 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"play": []}, "`games` and `play` are both empty"),
        ({"play": [{"game": "Box", "stpes": 3}]}, "unknown key 'stpes'.*did you mean 'steps'"),
        ({"play": [{"game": "Box", "steps": 0}]}, "greater than or equal to 1"),
        ({"players": ["ideal"]}, "'random' or 'walkthrough'"),
    ],
)
def test_wrong_configs_are_told_what_is_right(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(SMALL | change))
    with pytest.raises(ConfigError, match=message):
        read_config(str(tmp_path / "c.yaml"), [], PredictConfig)


def test_impossible_play_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for entry, error, message in (
        ({"game": "Bxo"}, GameError, "did you mean 'Box'"),
        ({"game": "DFA", "grid": {"states": [99]}}, GameError, "states=99 is not possible"),
    ):
        with pytest.raises(error, match=message):
            make(SMALL | {"play": [entry]}, tmp_path / "run")
    with pytest.raises(RunError, match="two entries of `play` have the same settings"):
        make(SMALL | {"play": [BOX, BOX]}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- tables and page


def test_the_table_of_play_is_what_can_be_counted_by_hand(run: Path) -> None:
    found = opened(run).summary("plays")
    assert found.height == 2 * 4
    raw = played(run)
    for row in found.iter_rows(named=True):
        mine = raw.filter((pl.col("agent") == row["agent"]) & (pl.col("setting") == row["setting"]))
        assert row["episodes"] == mine.height == 20
        assert row["success"] == pytest.approx(mine["success"].mean())
        assert row["over_n"] == mine["success"].sum()
        assert row["over"] == pytest.approx(mine["steps_over"].mean())
        assert row["states"] == mine["states"].mean()
        assert not row["few"]
        for name, column in (("over", "steps_over"), ("illegal", "illegal")):
            alike = mine[column].n_unique() == 1 or mine[column].count() < 5  # says nothing about how they vary
            assert (row[f"{name}_low"] is None) == alike
        for name in ("success", "score", "over", "illegal"):
            if row[f"{name}_low"] is not None:
                assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert row["success_low"] < row["success_high"]
        assert row["score_low"] < row["score_high"]
    pooled = opened(run).summary("plays_by_game")
    assert pooled["episodes"].to_list() == [40] * 4


def test_a_mean_has_an_interval_where_there_are_enough_episodes() -> None:
    assert plays.mean([]) == plays.share([]) == (None, None, None)
    assert plays.mean([3]) == (3, None, None)
    assert plays.mean([1, 2, 3, 4]) == (2.5, None, None)
    assert plays.mean([2.0] * 10) == (2, None, None)
    values = [0, 1, 2, 3, 4] * 20
    middle, low, high = plays.mean(values)
    expected = scipy.stats.t.interval(0.95, 99, loc=2, scale=scipy.stats.sem(values))
    assert (middle, low, high) == (2, pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert plays.mean([0, 0, 0, 0, 1])[1] == 0  # a number of commands is not below 0
    assert plays.share([1.0] * 4) == (1, None, None)
    exact = scipy.stats.binomtest(10, 10).proportion_ci(0.95)
    assert plays.share([1.0] * 10) == pytest.approx((1.0, exact.low, 1.0))


def test_success_stands_against_size_and_against_the_number_of_states(run: Path) -> None:
    found = opened(run).summary("play_curves")
    box = found.filter((pl.col("game") == "Box") & (pl.col("agent") == "walkthrough"))
    assert sorted(box.filter(axis="size")["at"]) == [2, 3]
    assert sorted(box.filter(axis="states")["at"]) == [4, 27]
    assert found.filter((pl.col("game") == "DFA") & (pl.col("axis") == "states")).is_empty()  # its size is |Q|
    assert (box["accuracy"] == 1).all()


def test_a_page_of_play_alone_has_its_section_and_hides_the_others(run: Path) -> None:
    text = page_of(run)
    assert '<section id="play">' in text
    for section in ("determined", "shortcuts", "episodes", "cells"):
        assert f'<section id="{section}"' not in text
    assert "random wins" in text
    assert "walkthrough wins 100" in text
    assert text.count('<details class="played">') == len(opened(run).summary("shown_plays")) >= 5


def test_a_page_of_questions_alone_has_no_play(tmp_path: Path) -> None:
    games = [{"game": "Cycle", "grid": {"period": [3]}, "steps": 5, "episodes": 4}]
    make({"name": "asked", "agents": ["ideal"], "games": games, "wandb": "disabled"}, tmp_path / "run")
    text = page_of(tmp_path / "run")
    assert 'id="play"' not in text
    assert '<section id="cells">' in text
    assert not (tmp_path / "run" / "plays").exists()


def test_what_was_played_is_text_on_the_page(run: Path, tmp_path: Path) -> None:
    evil = "</details><script>alert(1)</script>"
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    study, found = open_run(copy)
    shown = found.summary("shown_plays")
    told = pl.lit([evil]).repeat_by("steps").list.eval(pl.element().explode())
    evils = shown.with_columns(opening=pl.lit(evil), goal=pl.lit(evil), commands=told, observations=told)
    found.keep("summary/shown_plays", evils, {})
    write_page(study, found)
    text = page_of(copy)
    assert evil not in text
    assert "&lt;/details&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_metrics_of_a_cell_have_names_of_their_own(run: Path) -> None:
    found = opened(run)
    (job,) = (j for j in checked(Predict(), found.config) if j.key == "plays/random/DFA-density=min-states=5")
    metrics = Predict().metrics(job, found.table(job.key))
    head = "play/DFA/states=5/density=min/random"
    assert metrics.keys() == {f"{head}/{key}" for key in ("success", "score", "steps_over", "illegal")}
    assert metrics[f"{head}/success"] == found.table(job.key)["success"].mean()


def test_the_headline_has_play_beside_the_questions(tmp_path: Path) -> None:
    games = [{"game": "Cycle", "grid": {"period": [3]}, "steps": 5, "episodes": 4}]
    run = make(SMALL | {"games": games}, tmp_path / "run")
    headline = Predict().headline(run)
    assert headline.select("game", "agent").rows()[0] == ("Cycle", "ideal")
    assert set(headline.select("game", "agent").rows()[1:]) == {
        (game, player) for game in ("Box", "DFA") for player in ("walkthrough", "random")
    }
    assert headline.filter(agent="walkthrough")["won"].to_list() == [1, 1]
    assert "questions" not in Predict().headline(make(SMALL, tmp_path / "alone")).columns
