"""One model never takes the others with it: broken folders, an unreachable hub, one line for each, exit code 1."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from nextstate import cli
from nextstate.agents.agent import Agent
from nextstate.analysis.run import ModelFailed
from nextstate.analysis.study import find_study, go
from tests.checkpoints import Tensors, build, edit_tensors, save
from tests.runs import answered, frame, left_out, make, page_of, record
from tests.test_playing import played

SMALL: dict[str, Any] = {
    "name": "small",
    "games": [{"game": "Cycle", "grid": {"period": [2, 3]}, "steps": 3, "episodes": 4}],
    "wandb": "disabled",
}


def nextstate(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "nextstate.cli", *arguments],
        capture_output=True, text=True, cwd=cwd, env=os.environ | environment,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def without_layer(folder: Path) -> Path:
    edit_tensors(save("llama", folder), lambda t: {k: v for k, v in t.items() if ".layers.1." not in k})
    return folder


def speechless(folder: Path) -> Path:
    """A whole model with a tokenizer that knows no letter of any game; it fails when it is asked."""
    build("llama").save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"♠": 0, "♥": 1}, []))).save_pretrained(folder)
    return folder


def overflowing(folder: Path) -> Path:
    def spoil(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": tensors["lm_head.weight"].sign() * 3e38}

    edit_tensors(save("llama", folder), spoil)
    return folder


def agents_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {agent["name"]: agent for agent in record(folder)["agents"]}


def test_broken_models_are_left_out_in_a_line_each_and_the_others_are_answered(tmp_path: Path) -> None:
    good, broken, mute = (
        save("gpt2", tmp_path / "good"),
        without_layer(tmp_path / "broken"),
        speechless(tmp_path / "mute"),
    )
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(SMALL | {"agents": ["./broken", "./mute", "./good", "ideal"]}))
    code, out, err = nextstate("run", str(config), "--out", "run", cwd=tmp_path)
    assert code == 1
    assert "Traceback" not in out + err
    last = err.strip().splitlines()[-2:]
    assert last[0].startswith(
        "cannot load ./broken: the checkpoint does not fit its config.json: 9 tensors are missing"
    )
    assert last[1].startswith("./mute failed: the opening ")
    folder = tmp_path / "run"
    assert [answered(folder, a) for a in ("./broken", "./mute", "./good", "ideal")] == [False, False, True, True]
    assert {(x["agent"], x["what"], x["failed"]) for x in left_out(folder)} == {
        (agent, f"Cycle-period={n}", True) for agent in ("./broken", "./mute") for n in (2, 3)
    }
    assert record(folder)["finished"]
    assert "9 tensors are missing" in page_of(folder)
    # With --debug the traceback is there too, and once the models are mended the same command finishes the run.
    code, out, err = nextstate("--debug", "run", str(config), "--out", "run", cwd=tmp_path)
    assert code == 1
    assert out.count("Traceback (most recent call last)") >= 2
    assert "TokenizerError" in out
    for name in (broken, mute):
        shutil.rmtree(name)
        shutil.copytree(good, name)
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        make(json.loads(config.read_text()), folder)
    finally:
        os.chdir(before)
    assert left_out(folder) == []


def test_a_model_that_cannot_answer_one_cell_may_answer_another(tmp_path: Path) -> None:
    good, bad = save("gpt2", tmp_path / "good"), overflowing(tmp_path / "bad")
    games = [
        {"game": "Cycle", "grid": {"period": [2]}, "steps": 3, "episodes": 4},
        {"game": "DFA", "grid": {"states": [9]}, "steps": 8, "episodes": 1},  # too long to be read
    ]
    make(SMALL | {"games": games, "agents": [str(bad), str(good)]}, tmp_path / "run")
    reasons = {(x["agent"], x["what"].split("-")[0]): x for x in left_out(tmp_path / "run")}
    assert "not finite" in reasons[str(bad), "Cycle"]["reason"]
    assert reasons[str(bad), "Cycle"]["failed"]
    assert "too long" in reasons[str(good), "DFA"]["reason"]
    assert "failed" not in reasons[str(good), "DFA"]
    assert answered(tmp_path / "run", str(good))


def test_after_something_unforeseen_a_model_is_asked_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def warn(self: Agent, episode: Any) -> str:
        asked.append(self.name)
        if self.name == "chance":
            raise ZeroDivisionError("nobody foresaw this\nand this")
        return ""

    monkeypatch.setattr(Agent, "episode_warnings", warn)
    make(SMALL | {"agents": ["chance", "ideal"]}, tmp_path / "run")
    assert asked == ["chance", "ideal", "ideal"]
    assert {x["reason"] for x in left_out(tmp_path / "run")} == {
        "chance failed: ZeroDivisionError: nobody foresaw this"
    }
    assert len(left_out(tmp_path / "run")) == 2

    def stop(self: Agent, episode: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Agent, "episode_warnings", stop)
    with pytest.raises(KeyboardInterrupt):
        make(SMALL | {"agents": ["ideal"]}, tmp_path / "stopped")


def test_where_every_agent_fails_the_last_line_says_why(tmp_path: Path) -> None:
    without_layer(tmp_path / "broken")
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(SMALL | {"agents": ["./broken", "./nowhere"]}))
    code, out, err = nextstate("run", str(config), cwd=tmp_path)
    assert code == 1
    (last,) = err.strip().splitlines()
    assert "tensors are missing" in last
    assert "./nowhere is not a model" in last
    assert "has not got that far" not in out + err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("patch", {"pairs": 2, "game_args": {"states": 3}, "steps": 5, "kinds": ["state"], "resamples": 100}),
        ("response", {"block": 3, "prompts": 2, "window_prompts": 1}),
    ],
)
def test_runs_of_one_model_say_why_it_failed(tmp_path: Path, what: str, given: dict[str, Any]) -> None:
    folder = str(without_layer(tmp_path / "broken"))
    config = {"name": "one", "wandb": "disabled", "model": folder, **given}
    study = find_study(what)
    with pytest.raises(ModelFailed, match="9 tensors are missing"):
        go(study, study.config.model_validate(config), tmp_path / "run")
    left = left_out(tmp_path / "run")
    assert {x["agent"] for x in left} == {folder}
    assert all(x["failed"] for x in left if "9 tensors are missing" in x["reason"])
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    refused = CliRunner().invoke(cli.app, [what, str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")])
    assert isinstance(refused.exception, ModelFailed)


def test_wrong_names_of_modules_are_one_line_of_the_command_line(tmp_path: Path) -> None:
    save("gpt2", tmp_path / "good")
    modules = {"blocks": "transformer.h", "attention": "attn", "projection": "o_proj", "mlp": "mlp"}
    entry = {"name": "./good", "modules": modules}
    run = SMALL | {"agents": [entry]}
    patch = {"name": "one", "wandb": "disabled", "model": entry, "pairs": 2, "game_args": {"states": 4}, "steps": 5}
    for command, config in (("run", run), ("patch", patch)):
        (tmp_path / f"{command}.yaml").write_text(json.dumps(config))
        code, out, err = nextstate(command, f"{command}.yaml", "--out", command, cwd=tmp_path)
        assert code == 1
        (line,) = err.strip().splitlines()
        assert "./good: GPT2Attention has no module 'o_proj': it holds c_attn, c_proj" in line
        assert "Traceback" not in out + err


def test_incomplete_models_are_marked_in_every_row_and_on_the_page(tmp_path: Path) -> None:
    broken = str(without_layer(tmp_path / "broken"))
    agents = [{"name": broken, "allow_incomplete": True}, "ideal"]
    play = [{"game": "Cycle", "game_args": {"period": 3}, "steps": 3, "episodes": 3}]
    make(SMALL | {"agents": agents, "play": play}, tmp_path / "run")
    for table in (frame(tmp_path / "run"), played(tmp_path / "run")):
        marked = dict(table.group_by("agent").agg(pl.col("incomplete").all()).iter_rows())
        assert {agent: value for agent, value in marked.items() if value} == {broken: True}
    (warning,) = record(tmp_path / "run")["warnings"]
    assert "incomplete checkpoint (9 tensors are missing" in warning
    assert "<strong>Incomplete checkpoint.</strong>" in page_of(tmp_path / "run")
    assert "9 tensors are missing" in agents_of(tmp_path / "run")[broken]["incomplete"]


class _Hub(http.server.BaseHTTPRequestHandler):
    asked: Counter[str] = Counter()

    def _answer(self) -> None:
        _Hub.asked[self.path] += 1
        self.send_response(503)
        self.end_headers()

    do_HEAD = do_GET = _answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub that is down."""
    _Hub.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_hub_that_is_down_is_asked_once_and_models_kept_here_load(tmp_path: Path, hub: str) -> None:
    kept = tmp_path / "cache" / "models--someone--kept"
    save("gpt2", kept / "snapshots" / ("a" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    config = tmp_path / "c.yaml"
    agents = ["someone/missing", "someone/kept", "chance"]
    config.write_text(json.dumps(SMALL | {"agents": agents, "intervene": {"heads": [[0, 1]]}}))
    given = {"HF_ENDPOINT": hub, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    code, out, err = nextstate("run", str(config), "--out", "run", cwd=tmp_path, **given)
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert "cannot load someone/missing: there is no such folder, it is not in the local cache" in last
    assert "503" in last
    assert "Traceback" not in out + err
    folder = tmp_path / "run"
    names = ("someone/missing", "someone/kept", "someone/kept [without 0.1]", "chance")
    assert [answered(folder, name) for name in names] == [False, True, True, True]
    # Asked for once, though the model is wanted with its heads and without; no other file is asked for.
    assert _Hub.asked["/someone/missing/resolve/main/config.json"] == 1
    found = {path for path in _Hub.asked if "someone" in path}
    assert found == {f"/someone/{name}/resolve/main/config.json" for name in ("missing", "kept")}
    assert agents_of(folder)["someone/kept"]["revision"] == "a" * 40
