"""Agents from other packages and kinds by name: one agent by several ways, and one line for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from polars.testing import assert_frame_equal

from nextstate.agents import registry
from nextstate.agents.agent import AgentError, Prompt
from nextstate.agents.config import ConfigError, KindConfig, read_config
from nextstate.agents.reference import Reference
from nextstate.agents.registry import kind_of, spec_of, specs_of
from nextstate.agents.rollout import episodes_of
from nextstate.analysis.predict.config import PredictConfig, participants
from nextstate.analysis.run import RunError
from nextstate.envs.games import make_game
from tests.outside import NGRAM, write_package
from tests.runs import frame

GAMES = [{"game": "DFA", "game_args": {"states": 3}, "steps": 6, "episodes": 5}]
BROKEN = """
from nextstate.agents.agent import Agent
THREE = 3
class Plain: pass
class Unfinished(Agent): pass
def three(): return 3
def failing(): raise OSError("no room left\\non this disk")
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on `sys.path` with a working and a broken package; imports from it are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    write_package(tmp_path, "ngrams", NGRAM, registry.GROUP, {"ngram": "ngrams:NGram"})
    write_package(tmp_path, "wrong", BROKEN, registry.GROUP, {"plain": "wrong:Plain"})
    write_package(tmp_path, "crashing", "raise OSError('no screen')", registry.GROUP, {"crash": "crashing:A"})
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_module_entry_point_and_mapping_give_the_same_rows_in_a_run(site: Path) -> None:
    agents: list[Any] = ["ngram", "ngrams:NGram", {"kind": "ngram", "n": 2}, {"kind": "ngrams:NGram", "n": 1}, "ideal"]
    play = [{"game": "DFA", "game_args": {"states": 3}, "steps": 3, "episodes": 2}]
    config = {"name": "outside", "agents": agents, "games": GAMES, "play": play, "players": [], "wandb": "disabled"}
    (site / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "nextstate.cli", "run", str(site / "config.yaml"), "--out", str(site / "run")]
    path = os.pathsep.join([str(site), *sys.path])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    by_name = {name: rows.drop("agent") for (name,), rows in frame(site / "run").group_by("agent")}
    bigram = by_name["ngram"]
    assert_frame_equal(by_name["ngrams:NGram"], bigram)
    assert_frame_equal(by_name["ngram(n=2)"], bigram)
    assert by_name["ngrams:NGram(n=1)"]["logprobs"].to_list() != bigram["logprobs"].to_list()
    played = pl.concat([pl.read_parquet(f) for f in (site / "run" / "plays").glob("*/*.parquet")])
    assert set(played["agent"]) == set(by_name) - {"ideal"}
    described = json.loads((site / "run" / "run.json").read_text())["agents"]
    assert {(a["name"], a["kind"]) for a in described} == {
        ("ngram", "ngram"), ("ngrams:NGram", "ngrams:NGram"), ("ngram(n=2)", "ngram"),
        ("ngrams:NGram(n=1)", "ngrams:NGram"), ("ideal", "ideal"),
    }  # fmt: skip
    agent = spec_of("ngram").make()
    episodes = episodes_of(make_game("DFA", states=3), range(5), 6)
    prompts = [Prompt(e, t) for e in episodes for t in range(6)]
    assert isinstance(agent, registry.Agent)
    assert [p.answer for p in agent.predict(prompts)] == bigram["greedy"].to_list()


def test_the_package_is_imported_when_it_is_used_and_torch_when_a_model_is() -> None:
    code = (
        "import sys\nfrom nextstate.agents import registry\n"
        "registry.spec_of('ideal').make(); registry.spec_of('nextstate/tiny'); registry.kind_of('gpt2')\n"
        "print(sorted({'torch', 'transformers', 'ngrams'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"kind": "ngarm"}, "there is no agent 'ngarm'; did you mean 'ngram'?"),
        ({"kind": "shrotcut"}, "did you mean 'shortcut'?"),
        ({"kind": "ngram", "smothing": 1}, "ngram has no argument 'smothing'; did you mean 'smoothing'?"),
        ({"kind": "ngram", "x": 1}, "ngram has no argument 'x'; expected one of n, smoothing"),
        ({"kind": "ideal", "n": 1}, "ideal has no argument 'n'; it has none"),
        ({"kind": "shortcut"}, "shortcut needs name: give {kind: shortcut, name: ...}"),
        ("crash", "'crash' of the package crashing (crashing:A) cannot be imported: OSError: no screen"),
        ("crashing:A", "crashing:A cannot be imported: OSError: no screen"),
        ("nowhere:Agent", "No module named 'nowhere'; install its package, or add its folder to PYTHONPATH"),
        ("ngrams:Bigram", "module 'ngrams' has no attribute 'Bigram'"),
        ("plain", "plain is not an agent: expected a subclass of nextstate.agents.agent.Agent or a function"),
        ("wrong:THREE", "but it is an object of type int"),
        ("wrong:Plain", "but it is the class Plain"),
        ("wrong:Unfinished", "it does not define predict"),
        ("wrong:three", "wrong:three returned int, expected a nextstate.agents.agent.Agent"),
        ("wrong:failing", "wrong:failing cannot be created: OSError: no room left"),
        ("human", "human is available in the terminal only: use `nextstate play`"),
        ("shortcut:guess", "no game of this run has 'shortcut:guess': expected one of shortcut:last_mention"),
    ],
)
def test_each_mistake_is_one_line(site: Path, entry: Any, said: str) -> None:
    read = KindConfig(**entry) if isinstance(entry, dict) else entry
    with pytest.raises(AgentError) as caught:
        spec_of(read, [make_game("DFA")]).make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert spec_of("ngram").make().name == "ngram"


@pytest.mark.parametrize(("rival", "name"), [("ngram", "the package ngrams"), ("ideal", "nextstate itself")])
def test_two_agents_of_one_name_are_both_named(site: Path, rival: str, name: str) -> None:
    write_package(site, "rivals", NGRAM, registry.GROUP, {rival: "rivals:NGram"})
    with pytest.raises(AgentError) as caught:
        spec_of(rival)
    assert name in str(caught.value)
    assert "the package rivals (rivals:NGram)" in str(caught.value)
    assert spec_of("rivals:NGram").make().name == "rivals:NGram"


@pytest.mark.parametrize(
    ("agents", "said"),
    [
        ("[{name: gpt2, dtpye: float16}]", "did you mean 'dtype'?"),
        ("[{kind: model, nam: gpt2}]", "did you mean 'name'?"),
        ("[3]", "agents.0: expected the name of an agent, or keys and values"),
        ("[{kind: 3}]", "kind: Input should be a valid string"),
    ],
)
def test_an_entry_of_the_wrong_form_is_refused_with_the_config(tmp_path: Path, agents: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "x", "agents": ["ideal"], "games": GAMES}))
    with pytest.raises(ConfigError) as caught:
        read_config(str(tmp_path / "config.yaml"), [f"agents={agents}"], PredictConfig)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_can_be_written_as_names_or_as_mappings() -> None:
    names = ["ideal", "chance", "shortcut:stay", "nextstate/tiny"]
    mappings = [{"kind": "ideal"}, {"kind": "chance"}, {"kind": "shortcut", "name": "stay"}, {"name": "nextstate/tiny"}]
    mappings_of_kind = [*mappings[:3], {"kind": "model", "name": "nextstate/tiny"}]
    read = [PredictConfig(name="x", games=GAMES, agents=agents) for agents in (names, mappings, mappings_of_kind)]  # type: ignore[arg-type]
    one, two, three = ([spec for spec in specs_of(config.agents, [])] for config in read)
    assert one == two == three
    assert [s.name for s in one] == names
    assert [s.kind for s in one] == ["ideal", "chance", "shortcut", "model"] == [kind_of(a) for a in read[1].agents]
    assert read[1].model_dump_json() == read[2].model_dump_json()
    assert PredictConfig.model_validate_json(read[1].model_dump_json()) == read[1]


def test_shortcuts_are_those_of_the_games_and_asked_where_they_are() -> None:
    games = [make_game("DFA", states=3), make_game("FruitStore", people=2)]
    specs = list(specs_of(["shortcuts"], games))
    assert {s.name for s in specs} == {f"shortcut:{name}" for game in games for name in game.shortcuts}
    for spec in specs:
        agent = spec.make()
        assert isinstance(agent, Reference)
        assert (agent.name, agent.describe()["kind"]) == (spec.name, "shortcut")
        assert [spec.answers(g) for g in games] == [agent.belief in g.shortcuts for g in games]


def test_a_run_refuses_names_that_would_share_a_table_and_players_that_answer_nothing() -> None:
    with pytest.raises(RunError, match="gpt2 is given twice"):
        participants(PredictConfig(name="x", games=GAMES, agents=["gpt2", "ideal", "gpt2"]), [], [])
    with pytest.raises(RunError, match=r"random gives commands .* put it under `players`"):
        participants(PredictConfig(name="x", games=GAMES, agents=["random"]), [], [])
