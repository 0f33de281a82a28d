"""The command line as a user types it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from nextstate import terminal
from nextstate.envs import make_game


def nextstate(*arguments: str, stdin: str = "", cwd: Path | None = None) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "nextstate.cli", *arguments], input=stdin, capture_output=True, text=True, cwd=cwd
    )
    return done.returncode, done.stdout, done.stderr


def test_a_person_plays_is_told_the_truth_and_gets_a_score() -> None:
    code, out, _ = nextstate("play", "Box", "boxes=2", "--steps", "3", "--seed", "1", stdin="x\nA\nb\nA\n")
    assert code == 0
    assert "Box A contains the hat. Box B contains the glove." in out
    assert "'x' is none of: A, B" in out
    assert out.count("✓ right") + out.count("✗ no") == 3
    assert f"Score: {out.count('✓ right')} of 3; the best possible reader expects 3.0." in out
    assert "nextstate play Box boxes=2 --steps 3 --seed 1" in out


@pytest.mark.parametrize("last", ["q\n", "quit\n", ""])
def test_a_person_may_stop_and_gets_the_score_so_far(last: str) -> None:
    code, out, err = nextstate("play", "Box", "boxes=2", "--predictions", "--seed", "1", stdin=f"A\n{last}")
    assert (code, err) == (0, "")
    assert out.startswith("Box  style=paper, feedback=branch, boxes=2, objects=2\n")
    assert "q or Ctrl-D quits." in out
    assert "Stopped after 1 of 10 questions." in out
    assert f"Score: {out.count('✓ right')} of 1; the best possible reader expects 1.0." in out


def test_where_q_is_an_answer_quit_quits() -> None:
    code, out, _ = nextstate("play", "Cycle", "--predictions", "--seed", "1", stdin="q\nquit\n")
    assert code == 0
    assert "quit or Ctrl-D quits." in out
    assert "Stopped after 1 of 10 questions." in out


def test_ctrl_c_quits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    for play in (terminal.predict, terminal.command):
        written = Console(file=StringIO())
        monkeypatch.setattr(written, "input", interrupted)
        given = (terminal.Terminal(written), make_game("Box"), "human", 3, 1)
        play(*given, False) if play is terminal.command else play(*given)
        out = written.file.getvalue()  # type: ignore[attr-defined]
        assert "Stopped after 0" in out
        assert "Score: 0 of " in out


def test_the_ideal_reader_plays_without_a_mistake() -> None:
    code, out, _ = nextstate("play", "FruitStore", "people=3", "--agent", "ideal", "--seed", "5")
    assert code == 0
    assert "Score: 2 of 2" in out


def test_a_person_gives_commands_and_is_asked_what_they_lead_to() -> None:
    typed = "?\nmove\n5\nC\nmove the hat\nmove the hat into box a\nB\nquit\n"
    code, out, err = nextstate("play", "Box", "boxes=3", "--questions", "--seed", "8", stdin=typed)
    assert code == 0, err
    assert out.startswith("Box  style=paper, feedback=branch, boxes=3, objects=3\n")
    assert "? lists them, q or Ctrl-D quits." in out
    assert "\nGoal: " in out
    assert "1  move the " in out
    assert "Which one: move the " in out
    assert out.count("✓ right") + out.count("✗ no") == out.count("Move the ") > 0
    assert "Stopped after" in out or "Won after" in out
    assert "; the shortest solution takes 1." in out
    assert "the best possible reader expects" in out
    assert "nextstate play Box boxes=3 --commands --questions --steps 10 --seed 8" in out


def test_a_person_may_win() -> None:
    code, out, _ = nextstate("play", "Cycle", "period=3", "--commands", "--seed", "1", stdin="\nn\nnext\n")
    assert code == 0
    assert "Won after" in out
    assert "Score: 1 of 1." in out


@pytest.mark.parametrize(("agent", "won"), [("walkthrough", True), ("random", False)])
def test_players_are_watched(agent: str, won: bool) -> None:
    code, out, _ = nextstate("play", "Box", "boxes=20", "--agent", agent, "--seed", "5")
    assert code == 0
    assert ("Won after 1 command; the shortest solution takes 1." in out) == won
    assert ("Out of time after 10 commands; the shortest solution takes 1." in out) != won
    assert out.count("> move the ") == (1 if won else 10)


def test_a_model_plays_and_answers() -> None:
    arguments = ("DFA", "states=4", "--agent", "nextstate/tiny", "--questions", "--steps", "4", "--seed", "1")
    code, out, err = nextstate("play", *arguments)
    assert code == 0, err
    assert out.count("> take action ") == out.count("✓ right") + out.count("✗ no") >= 1
    assert "Questions: " in out


def test_the_version_and_how_to_get_completion_are_told() -> None:
    assert nextstate("--version")[:2] == (0, f"nextstate {version('nextstate')}\n")
    _, out, _ = nextstate("--help")
    assert "--version" in out
    assert "--install-completion" in out


@pytest.mark.parametrize("what", ["games", "models", "configs"])
def test_lists(what: str) -> None:
    code, out, _ = nextstate("list", what)
    assert code == 0
    assert {"games": "nextstate/FruitStorePlay-v0", "models": "nextstate/tiny", "configs": "configs/paper/dfa.yaml"}[
        what
    ] in out


@pytest.mark.parametrize("columns", [80, 120])
def test_the_settings_of_games_are_told(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = nextstate("list", "games")
    assert max(map(len, out.splitlines())) <= columns
    told = [" ".join(line.split()) for line in out.splitlines()]
    for line in (
        "boxes int = 4 2 to 26: number of boxes",
        "period int = 4 2 to 26: length of the pattern",
        "people int = 4 2 to 21: number of people and fruits",
        "distinct_symbols bool = false true or false: no symbol twice in a rule",
    ):
        assert line in told
    assert any(line.startswith('density str = "middle" min, middle, max: ') for line in told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["play", "Bxo"], "did you mean 'Box'?"),
        (["play", "DFA", "states=27"], "states=27 is not possible: expected a whole number from 2 to 26"),
        (["play", "Box", "--agent", "shortcut:guess"], "expected one of shortcut:last_mention"),
        (["play", "Box", "--agent", "./nowhere"], "is not a model"),
        (["play", "Box", "--agent", "ideal", "--commands"], "ideal answers questions but cannot give commands"),
        (["play", "Box", "--agent", "random", "--predictions"], "random gives commands but cannot answer questions"),
        (["play", "Box", "--agent", "random", "--questions"], "leave out --questions"),
        (["run", "configs/quickstrat.yaml"], "did you mean 'configs/quickstart.yaml'?"),
        (["run", "quickstart", "sed=3"], "unknown key 'sed'"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_message_and_no_traceback(arguments: list[str], message: str) -> None:
    code, _, err = nextstate(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_run_and_report(tmp_path: Path) -> None:
    games = 'games=[{"game": "Cycle", "grid": {"period": [2, 3]}, "steps": 5, "episodes": 4}]'
    code, out, err = nextstate("run", "quickstart", "agents=[ideal,chance]", games, cwd=tmp_path)
    assert code == 0, err
    page = tmp_path / "runs" / "quickstart" / "report.html"
    first = page.stat().st_mtime_ns
    assert "report.html" in out
    assert "ideal" in out
    code, _, _ = nextstate("report", str(page.parent))
    assert code == 0
    assert page.stat().st_mtime_ns > first


def test_files_in_the_way_are_named_with_what_to_do(tmp_path: Path) -> None:
    games = 'games=[{"game": "Cycle", "grid": {"period": [2]}, "steps": 3, "episodes": 2}]'
    given = ("run", "quickstart", "agents=[ideal]", "wandb=disabled", games, "--out")
    assert nextstate(*given, str(tmp_path / "run"))[0] == 0
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run" / "report.html").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, named, advice in (
        (("report", str(tmp_path / "run")), tmp_path / "run" / "report.html", "a folder is where a file should be"),
        ((*given, str(tmp_path / "file" / "run")), tmp_path / "file" / "run", "a file is where a folder should be"),
    ):
        code, _, err = nextstate(*arguments)
        assert code == 2
        assert err.startswith(f"error: {named}")
        assert advice in err
        assert len(err.splitlines()) == 1
        assert "Traceback" in nextstate("--debug", *arguments)[2]
