"""The command line as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


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


def test_a_person_may_stop() -> None:
    code, out, err = nextstate("play", "Cycle", "--seed", "1", stdin="a\n")
    assert code == 130
    assert "Stopped." in out
    assert "Traceback" not in err


def test_the_ideal_reader_plays_without_a_mistake() -> None:
    code, out, _ = nextstate("play", "FruitStore", "people=3", "--agent", "ideal", "--seed", "5")
    assert code == 0
    assert "Score: 2 of 2" in out


@pytest.mark.parametrize("what", ["games", "models", "configs"])
def test_lists(what: str) -> None:
    code, out, _ = nextstate("list", what)
    assert code == 0
    assert {"games": "nextstate/FruitStorePlay-v0", "models": "nextstate/tiny", "configs": "configs/paper/dfa.yaml"}[
        what
    ] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["play", "Bxo"], "did you mean 'Box'?"),
        (["play", "DFA", "states=27"], "states=27 is not possible: expected a whole number from 2 to 26"),
        (["play", "Box", "--agent", "shortcut:guess"], "expected one of shortcut:last_mention"),
        (["play", "Box", "--agent", "./nowhere"], "is no model"),
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
    games = 'games=[{"game": "Cycle", "over": {"period": [2, 3]}, "steps": 5, "episodes": 4}]'
    code, out, err = nextstate("run", "quickstart", "agents=[ideal,chance]", games, cwd=tmp_path)
    assert code == 0, err
    page = tmp_path / "runs" / "quickstart" / "report.html"
    first = page.stat().st_mtime_ns
    assert "report.html" in out
    assert "ideal" in out
    code, _, _ = nextstate("report", str(page.parent))
    assert code == 0
    assert page.stat().st_mtime_ns > first
