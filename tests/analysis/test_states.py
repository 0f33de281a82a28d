"""Whole states put together from answers, against plain Python; accuracy against the exact number of states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nextstate.analysis.predict import states, statistics
from nextstate.analysis.predict.config import asked_cells
from nextstate.analysis.predict.tables import rows
from nextstate.envs import make_game
from tests.runs import frame, make, opened


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {
        "name": "whole",
        "agents": ["ideal", "chance", "shortcuts"],
        "games": [
            {"game": "TextWorld", "grid": {"objects": [1, 3]}, "game_args": {"games": 3}, "steps": 6, "episodes": 12,
             "questions_per_step": "all"},
            {"game": "Box", "grid": {"boxes": [2, 5]}, "steps": 5, "episodes": 12, "questions_per_step": "all"},
            {"game": "DFA", "grid": {"states": [4]}, "steps": 5, "episodes": 12, "questions_per_step": "all"},
            {"game": "Box", "grid": {"boxes": [3]}, "steps": 4, "episodes": 5},
        ],
        "wandb": "disabled",
    }  # fmt: skip
    out = tmp_path_factory.mktemp("states") / "run"
    make(config, out)
    return out


Answers = dict[str, dict[str, Any]]  # of one step, by variable


def steps_of(path: Path) -> Iterator[tuple[str, str, Answers, Answers]]:
    """Yield (agent, game, answers one step earlier, answers) for every step but the first of each episode."""
    by_step: dict[tuple[str, str, int], dict[int, Answers]] = defaultdict(lambda: defaultdict(dict))
    games = {}
    for row in frame(path).iter_rows(named=True):
        if row["setting"] == "Box-boxes=3":
            continue  # asks one question a step
        by_step[row["agent"], row["setting"], row["episode"]][row["step"]][row["variable"]] = row
        games[row["setting"]] = row["game"]
    for (agent, setting, _), told in by_step.items():
        for step in sorted(told)[1:]:
            yield agent, games[setting], told[step - 1], told[step]


def whole(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    run = opened(path)
    found = states.whole([rows(run, [c]) for c in asked_cells(run.config) if c.questions_per_step == "all"])
    assert found.equals(run.summary("whole"))
    assert found.equals(states.whole([rows(run, [c]) for c in asked_cells(run.config)]))  # with Box of 3 boxes
    return {(r["agent"], r["game"], r["form"]): r for r in found.iter_rows(named=True)}


def test_forms_agree_with_plain_python(path: Path) -> None:
    found = whole(path)
    assert {game for _, game, _ in found} == {"TextWorld", "Box"}  # DFA has one variable: its questions say it all
    sums: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for agent, game, before, now in steps_of(path):
        if game == "DFA":
            continue
        one = sums[agent, game]
        one["n"] += 1
        one["state"] += all(q["greedy_correct"] for q in now.values())
        true = {
            (v, x)
            for v in now
            if now[v]["truth"] != before[v]["truth"]
            for x in ((now[v]["truth"], True), (before[v]["truth"], False))
        }
        said = {
            (v, x)
            for v in now
            if now[v]["greedy"] != before[v]["greedy"]
            for x in ((now[v]["greedy"], True), (before[v]["greedy"], False))
        }
        one["difference"] += true == said
        one["hit"] += 2 * len(true & said)
        one["facts"] += len(true) + len(said)
        for v, q in now.items():
            kind = "changed" if q["truth"] != before[v]["truth"] else "unchanged"
            one[kind] += q["greedy_correct"]
            one[f"asked {kind}"] += 1
            one["right"] += q["greedy_correct"]
            one["asked"] += 1
    for (agent, game), one in sums.items():
        assert found[agent, game, "state"]["exact"] == pytest.approx(one["state"] / one["n"])
        assert found[agent, game, "state"]["by_fact"] == pytest.approx(one["right"] / one["asked"])
        assert found[agent, game, "difference"]["exact"] == pytest.approx(one["difference"] / one["n"])
        assert found[agent, game, "difference"]["by_fact"] == pytest.approx(one["hit"] / one["facts"])
        for kind in ("changed", "unchanged"):
            assert found[agent, game, kind]["by_fact"] == pytest.approx(one[kind] / one[f"asked {kind}"])
    for row in found.values():
        for name in ("exact", "by_fact"):
            if row[name] is not None:
                assert row[f"{name}_low"] <= row[name] + 1e-9
                assert row[name] <= row[f"{name}_high"] + 1e-9


def test_the_ideal_reader_tells_what_the_commands_change(path: Path) -> None:
    found = whole(path)
    assert found["ideal", "Box", "state"]["exact"] == found["ideal", "Box", "difference"]["exact"] == 1
    assert found["ideal", "TextWorld", "changed"]["by_fact"] > found["ideal", "TextWorld", "unchanged"]["by_fact"]
    assert found["ideal", "TextWorld", "state"]["exact"] > found["chance", "TextWorld", "state"]["exact"]


def test_sizes_are_those_of_the_games_played(path: Path) -> None:
    run = opened(path)
    game = make_game("TextWorld", objects=3, games=3)
    mine = run.table("questions/TextWorld-games=3-objects=3")["states"].to_list()
    assert set(mine) <= {w.n_states for w in game.worlds}  # type: ignore[attr-defined]
    assert set(run.table("questions/Box-boxes=5")["states"]) == {5**5}
    curves = statistics.curves(rows(run)).filter(axis="states")
    assert set(curves["game"]) == {"TextWorld", "Box"}  # the size of an automaton is its number of states
    asked = curves.filter((pl.col("agent") == "ideal") & (pl.col("subset") == "all") & (pl.col("game") == "Box"))
    assert sorted(asked["at"].unique()) == [4, 27, 3125]
    page = (path / "report.html").read_text()
    assert "Whole states" in page
    assert "what it did not change" in page
    assert "Accuracy against |Q|" in page
