"""The statistics of questions and answers, against plain Python and against what intervals promise."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from nextstate.analysis import stats
from nextstate.analysis.predict import statistics
from nextstate.analysis.predict.config import asked_cells
from nextstate.analysis.predict.sums import blocks_of
from nextstate.analysis.predict.tables import CELL, QUESTION, ROWS, rows
from tests.analysis.conftest import MODEL
from tests.runs import frame, make, opened


@pytest.mark.parametrize("which", ["run_path", "many_path"])
def test_cells_agree_with_plain_python(which: str, request: pytest.FixtureRequest) -> None:
    rows = frame(request.getfixturevalue(which))
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows.iter_rows(named=True):
        for subset in ("all", "determined" if row["determined"] else "undetermined"):
            groups[row["agent"], row["game"], row["variant"], row["size"], row["step"], subset].append(row)
    cells = statistics.cells(rows)
    assert len(cells) == len(groups)
    for cell in cells.iter_rows(named=True):
        mine = groups[tuple(cell[k] for k in ("agent", "game", "variant", "size", "step", "subset"))]
        n = len(mine)
        assert (cell["n"], cell["episodes"]) == (n, len({r["episode"] for r in mine}))
        for column, name in statistics.MEANS.items():
            assert cell[name] == pytest.approx(sum(r[column] for r in mine) / n)
        assert cell["over_ceiling"] == pytest.approx(
            sum(r["greedy_correct"] for r in mine) / sum(r["ceiling"] for r in mine)
        )
        assert cell["few"] == (cell["episodes"] < 10)
        each: dict[int, list[float]] = defaultdict(lambda: [0.0] * 5)
        for r in mine:
            values = (1, r["greedy_correct"], r["choice_correct"], r["ceiling"], r["ceiling"] ** 2)
            for k, value in enumerate(values):
                each[r["episode"]][k] += value
        trials, greedy, choice, ceilings, squares = np.array([*each.values()]).T[:, :, None]
        expected = {
            "accuracy": stats.accuracy(greedy, trials), "choice": stats.accuracy(choice, trials),
            "over_ceiling": stats.over_ceiling(greedy, trials, ceilings, squares),
        }  # fmt: skip
        for name, (value, ends) in expected.items():
            assert cell[name] == pytest.approx(value[0])
            found = [cell[f"{name}_low"], cell[f"{name}_high"]]
            assert found == (pytest.approx(ends[:, 0].tolist()) if len(each) >= 5 else [None, None])


def test_curves_pool_over_the_other_axis(run_path: Path) -> None:
    rows = frame(run_path)
    curves = statistics.curves(rows)
    mine = rows.filter((pl.col("agent") == MODEL) & (pl.col("game") == "DFA") & (pl.col("variant") == "density=min"))
    for axis in ("size", "step"):
        found = curves.filter(
            (pl.col("axis") == axis) & (pl.col("agent") == MODEL) & (pl.col("game") == "DFA")
            & (pl.col("variant") == "density=min") & (pl.col("subset") == "all")
        )  # fmt: skip
        expected = mine.group_by(axis).agg(pl.col("greedy_correct").mean()).sort(axis)
        assert found.sort("at")["at"].to_list() == expected[axis].to_list()
        assert found.sort("at")["accuracy"].to_list() == pytest.approx(expected["greedy_correct"].to_list())


def test_ideal_reader_is_right_on_every_determined_question(run_path: Path) -> None:
    cells = statistics.cells(frame(run_path)).filter((pl.col("agent") == "ideal") & (pl.col("subset") == "determined"))
    assert cells["accuracy"].to_list() == [1.0] * len(cells)
    assert cells["over_ceiling"].min() == 1.0


def test_hard_questions_are_those_the_shortcut_gets_wrong(run_path: Path) -> None:
    rows = frame(run_path)
    table = statistics.on_hard(rows)
    by_key = {tuple(r[k] for k in (*QUESTION, "agent")): r for r in rows.iter_rows(named=True)}
    for line in table.filter(pl.col("agent") == MODEL).iter_rows(named=True):
        hits, seen = [], 0
        for key, row in by_key.items():
            if (
                key[-1] == line["shortcut"]
                and row["determined"]
                and (row["game"], row["variant"]) == (line["game"], line["variant"])
            ):
                seen += 1
                if not row["greedy_correct"]:
                    hits.append(by_key[(*key[:-1], MODEL)]["greedy_correct"])
        assert line["n"] == len(hits)
        assert line["share"] == pytest.approx(len(hits) / seen)
        assert line["accuracy"] == (pytest.approx(sum(hits) / len(hits)) if hits else None)
    box = table.filter((pl.col("game") == "Box") & (pl.col("shortcut") == "shortcut:last_mention"))
    assert box["n"].to_list() == [0] * len(box)


def test_a_copier_of_the_shortcut_is_found_out(run_path: Path) -> None:
    rows = frame(run_path)
    copier = rows.filter(pl.col("agent") == "shortcut:action_only").with_columns(agent=pl.lit("copier"))
    table = statistics.on_hard(pl.concat([rows, copier])).filter(pl.col("agent") == "copier")
    mine = table.filter((pl.col("shortcut") == "shortcut:action_only") & (pl.col("n") > 0))
    assert len(mine)
    assert mine["accuracy"].to_list() == [0.0] * len(mine)


def test_paired_is_the_difference_of_two_accuracies_on_the_same_questions(run_path: Path) -> None:
    rows = frame(run_path)
    for row in statistics.paired(rows, MODEL, "chance").iter_rows(named=True):
        by: dict[str, dict[tuple[Any, ...], bool]] = {}
        for agent in (MODEL, "chance"):
            asked = rows.filter(agent=agent, game=row["game"], variant=row["variant"])
            if row["subset"] != "all":
                asked = asked.filter(determined=row["subset"] == "determined")
            by[agent] = {tuple(r[k] for k in QUESTION): r["greedy_correct"] for r in asked.iter_rows(named=True)}
        totals: dict[int, int] = defaultdict(int)
        for key, right in by[MODEL].items():
            totals[key[1]] += int(right) - int(by["chance"][key])
        n = len(by[MODEL])
        assert (row["n"], row["episodes"], row["few"]) == (n, len(totals), len(totals) < 10)
        assert row["accuracy"] == pytest.approx(sum(by[MODEL].values()) / n)
        assert row["theirs"] == pytest.approx(sum(by["chance"].values()) / n)
        assert row["difference"] == pytest.approx(sum(totals.values()) / n)
        assert row["p"] == pytest.approx(stats.sign_flip(np.array([*totals.values()])))
        if row["episodes"] >= 5:
            assert row["low"] <= row["difference"] <= row["high"]
    determined = statistics.paired(rows, MODEL, "chance").filter(subset="determined")
    assert determined["difference"].min() > 0.2  # type: ignore[operator]
    assert statistics.paired(rows, MODEL).filter(subset="determined")["difference"].max() <= 0  # type: ignore[operator]


def test_an_agent_paired_with_itself_differs_by_nothing(run_path: Path) -> None:
    same = statistics.paired(frame(run_path), MODEL, MODEL)
    assert same["difference"].to_list() == [0] * len(same)
    assert same["p"].to_list() == [1] * len(same)


def clustered(rng: np.random.Generator, agent: str, episodes: int = 50, asked: int = 8) -> pl.DataFrame:
    """Questions that hang together: each episode has its own probability, 0.6 on average."""
    p = rng.beta(1.8, 1.2, size=episodes)
    hit = rng.random((episodes, asked)) < p[:, None]
    episode, question = np.indices(hit.shape)
    base = {"agent": agent, "game": "G", "setting": "s", "size": 1, "variant": "", "step": 1, "determined": True}
    rest = {"lookup": 1.0, "ceiling": 1.0, "chance": 0.5, "p_accepted": 0.5, "rank": 1, "states": 1}
    flat = {c: hit.ravel() for c in ("greedy_correct", "choice_correct", "choice_token_correct", "choice_byte_correct")}
    data = {"episode": episode.ravel(), "question": question.ravel(), **flat}
    return pl.DataFrame(data).with_columns(**{k: pl.lit(v) for k, v in (base | rest).items()})


def test_intervals_over_episodes_cover() -> None:
    rng = np.random.default_rng(1)
    rows = pl.concat([clustered(rng, f"agent {i}") for i in range(400)])
    cells = statistics.cells(rows).filter(pl.col("subset") == "all")
    covered = ((cells["accuracy_low"] <= 0.6) & (cells["accuracy_high"] >= 0.6)).mean()
    assert float(covered) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400)  # type: ignore[arg-type]
    # Wilson's with n questions would be far too narrow here.
    low, high = stats.wilson((cells["accuracy"] * cells["n"]).to_numpy(), cells["n"].to_numpy().astype(float))
    assert float(((low <= 0.6) & (high >= 0.6)).mean()) < 0.85


def test_few_episodes_are_marked_and_very_few_have_no_interval() -> None:
    rng = np.random.default_rng(2)
    for episodes, few, known in ((4, True, False), (5, True, True), (9, True, True), (10, False, True)):
        row = statistics.cells(clustered(rng, "a", episodes)).row(0, named=True)
        ends = [row[f"{name}_{end}"] for name in statistics.BOUNDED for end in ("low", "high")]
        assert (row["episodes"], row["few"], None not in ends) == (episodes, few, known)
        assert known or ends == [None] * 6


def test_settings_with_the_same_seeds_are_no_new_evidence() -> None:
    one = clustered(np.random.default_rng(4), "a", asked=1)
    copies = [one.with_columns(size=pl.lit(s), setting=pl.lit(f"s{s}")) for s in range(9)]
    apart = [c.with_columns(episode=pl.col("episode") + 1000 * s) for s, c in enumerate(copies)]
    by = ("agent", "game", "variant", "step")
    alone, shared, separate = (statistics.pooled(pl.concat(x), by).row(0, named=True) for x in ([one], copies, apart))
    width = {k: r["accuracy_high"] - r["accuracy_low"] for k, r in (("1", alone), ("9", shared), ("9 apart", separate))}
    assert (shared["episodes"], separate["episodes"]) == (50, 450)
    assert width["9"] == pytest.approx(width["1"], rel=0.2)
    assert width["9 apart"] == pytest.approx(width["1"] / 3, rel=0.2)


def test_all_right_still_has_an_interval(many_path: Path) -> None:
    cells = statistics.cells(frame(many_path)).filter((pl.col("agent") == "ideal") & (pl.col("game") == "Box"))
    assert cells["accuracy"].min() == 1
    assert cells["few"].all()
    assert 0.4 < cells["accuracy_low"].max() < 1  # type: ignore[operator]


def test_rows_join_answers_with_their_questions_and_read_only_what_is_selected(run_path: Path) -> None:
    run = opened(run_path)
    found = frame(run_path)
    assert dict(found.schema) == {name: kind() if isinstance(kind, type) else kind for name, kind in ROWS.items()}
    keys = run.keys("answers/*")
    assert len(found) == sum(len(run.table(key)) for key in keys) > 0
    assert {k: found[k].n_unique() for k in ("setting", "agent")} == {
        "setting": len(run.keys("questions/*")), "agent": len({key.split("/")[1] for key in keys}),
    }  # fmt: skip
    right = found.filter(pl.col("greedy") == pl.col("truth"))
    assert right["greedy_correct"].all()
    plan = rows(run).select("agent", "greedy_correct", *CELL).explain()
    assert "prompt" not in plan
    assert "logprobs" not in plan


def test_ranks_are_places_in_the_sorted_list(run_path: Path) -> None:
    ranks = set()
    for row in frame(run_path).filter(agent=MODEL).iter_rows(named=True):
        best = max(
            x for x, text in zip(row["logprobs"], row["choices"], strict=True) if text.strip() in row["accepted"]
        )
        assert row["rank"] == sorted(row["logprobs"], reverse=True).index(best) + 1
        ranks.add(row["rank"])
    assert {1, 2} < ranks


def test_agents_are_in_a_readers_order(run_path: Path) -> None:
    agents = opened(run_path).summary("agents")["agent"].to_list()
    assert agents[:3] == [MODEL, "ideal", "chance"]
    assert all(a.startswith("shortcut:") for a in agents[3:])
    assert math.isclose(float(frame(run_path)["ceiling"].max()), 1)  # type: ignore[arg-type]


def brute(rows: pl.DataFrame, by: tuple[str, ...]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the averages of each group and subset, from a dictionary for each row."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows.iter_rows(named=True):
        for subset in ("all", "determined" if row["determined"] else "undetermined"):
            groups[(*(row[k] for k in by), subset)].append(row)
    out = {}
    for key, mine in groups.items():
        each: dict[int, list[float]] = defaultdict(lambda: [0.0] * 5)
        for r in mine:
            values = (1, r["greedy_correct"], r["choice_correct"], r["ceiling"], r["ceiling"] ** 2)
            each[r["episode"]] = [a + b for a, b in zip(each[r["episode"]], values, strict=True)]
        trials, greedy, choice, ceilings, squares = np.array([*each.values()]).T[:, :, None]
        row = {"n": len(mine), "episodes": len(each), "few": len(each) < 10}
        row |= {name: sum(r[column] for r in mine) / len(mine) for column, name in statistics.MEANS.items()}
        row["over_ceiling"] = sum(r["greedy_correct"] for r in mine) / sum(r["ceiling"] for r in mine)
        ends = {
            "accuracy": stats.accuracy(greedy, trials)[1], "choice": stats.accuracy(choice, trials)[1],
            "over_ceiling": stats.over_ceiling(greedy, trials, ceilings, squares)[1],
        }  # fmt: skip
        for name, (low, high) in ends.items():
            row |= {f"{name}_low": low[0], f"{name}_high": high[0]} if len(each) >= 5 else {}
        out[key] = row
    return out


def agrees(found: pl.DataFrame, by: tuple[str, ...], rows: pl.DataFrame) -> None:
    expected = brute(rows, by)
    assert len(found) == len(expected) > 0
    assert found.sort(*by, "subset").equals(found)
    for row in found.iter_rows(named=True):
        mine = expected[tuple(row[k] for k in (*by, "subset"))]
        for name in set(row) - {*by, "subset"}:
            assert row[name] == (pytest.approx(mine[name], rel=1e-9) if name in mine else None), (row, name)


PLACE = ("agent", "game", "variant")


def agree(found: dict[str, pl.DataFrame], rows: pl.DataFrame) -> None:
    agrees(found["cells"], (*PLACE, "size", "step"), rows)
    agrees(found["totals"], PLACE, rows)
    agrees(found["by_game"], PLACE[:2], rows)
    agrees(found["by_size"], (*PLACE[:2], "size"), rows)
    for axis in ("size", "step"):
        curve = found["curves"].filter(axis=axis).drop("axis").rename({"at": axis})
        agrees(curve, (*PLACE, axis), rows)


@pytest.mark.parametrize("grid", ["episodes", "cells"])
def test_the_summary_agrees_with_plain_python(grid: str, tmp_path: Path) -> None:
    """Settings share their seeds (episodes) or not (cells); an agent does not answer every question."""
    steps = {"episodes": (4, 5), "cells": ([1, 4], [2, 5])}[grid]
    games = [
        {"game": "Box", "grid": {"boxes": [2, 4]}, "steps": steps[0], "episodes": 6},
        {"game": "DFA", "grid": {"density": ["min", "max"], "states": [3, 5]}, "steps": steps[1], "episodes": 12},
    ]
    config = {"name": "x", "agents": [MODEL, "ideal", "shortcuts"], "games": games, "grid": grid, "wandb": "disabled"}
    run = make(config, tmp_path / "run")
    agree(run.summaries(), frame(tmp_path / "run"))
    some = frame(tmp_path / "run").filter((pl.col("agent") != MODEL) | (pl.col("episode") % 3 > 0))
    part = statistics.summed(statistics.in_memory(some))
    agree(part, some)
    assert part["hard"].filter(agent=MODEL)["n"].sum() < run.summary("hard").filter(agent=MODEL)["n"].sum()


def test_answers_in_files_are_summed_as_those_in_memory(many_path: Path, tmp_path: Path) -> None:
    shutil.copytree(many_path, tmp_path / "run")
    run = opened(tmp_path / "run")
    from_files = statistics.summed(blocks_of(run, asked_cells(run.config)))
    in_memory = statistics.summed(statistics.in_memory(frame(many_path)))
    for name, table in in_memory.items():
        assert_frame_equal(table, from_files[name], rel_tol=1e-12)
    key = next(key for key in run.keys("answers/*") if "ideal" in key)
    answers = run.table(key).sort("step", "question", descending=True).filter(pl.col("episode") % 2 == 0)
    run.keep(key, answers, {})  # in another order, and with gaps
    less = statistics.summed(blocks_of(run, asked_cells(run.config)))
    run.keep(key, answers.sort("episode", "step", "question"), {})
    for name, table in statistics.summed(blocks_of(run, asked_cells(run.config))).items():
        assert_frame_equal(table, less[name], rel_tol=1e-12)
    assert less["totals"]["n"].sum() == in_memory["totals"]["n"].sum() - 2 * len(answers)
