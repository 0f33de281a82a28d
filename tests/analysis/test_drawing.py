"""Pages are drawn from summaries alone: with no statistics, no random numbers, no game, no model and no other table."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextstate.agents.language import LanguageModel
from nextstate.analysis import stats
from nextstate.analysis.heads.study import Heads
from nextstate.analysis.page.page import render
from nextstate.analysis.study import go, open_run
from nextstate.envs import games
from tests.analysis.test_grammar_page import make as make_grammar_run
from tests.analysis.test_heads import built, narrow
from tests.analysis.test_response_run import built as responding
from tests.analysis.test_response_run import respond


@pytest.fixture(scope="module")
def folders_of(run_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("drawing")
    go(Heads(), narrow(directions=["denoise", "zero"]), out / "patch", model=built("DFA", 1).agent)
    respond(
        out / "response", responding("Cycle").agent, bridge=[{"game": "Cycle", "game_args": {"period": 5}, "pairs": 3}]
    )
    return {"run": run_path, "patch": out / "patch", "response": out / "response"}


@pytest.mark.parametrize("name", ["run", "patch", "response"])
def test_drawing_never_measures(name: str, folders_of: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    study, run = open_run(folders_of[name])
    before = render(study.page(run), run.record)
    assert set(run.about) == {f"summary/{key}" for key in run.record["summary"]}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a page measures")

    for key, function in inspect.getmembers(stats, inspect.isfunction):
        if function.__module__ == stats.__name__:
            monkeypatch.setattr(stats, key, refuse)
    monkeypatch.setattr(np.random, "default_rng", refuse)
    monkeypatch.setattr(LanguageModel, "__init__", refuse)
    monkeypatch.setattr(games, "make_game", refuse)
    study, run = open_run(folders_of[name])
    assert render(study.page(run), run.record) == before


def test_drawing_a_grammar_never_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nextstate.analysis.grammar.study import GrammarStudy

    run = make_grammar_run(tmp_path / "run")
    monkeypatch.setattr(np.random, "default_rng", None)
    for key, function in inspect.getmembers(stats, inspect.isfunction):
        if function.__module__ == stats.__name__:
            monkeypatch.setattr(stats, key, None)
    run.about = {key: about for key, about in run.about.items() if key.startswith("summary/")}
    assert "From nothing" in render(GrammarStudy().page(run), run.record)
