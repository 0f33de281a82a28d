"""A game of another author, in a package of its own, takes part like a built-in one; broken packages are named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from outside import GAME, write_game

from nextstate.envs import GAMES, Automaton, GameError, check_game, game_class, games, make_game, register_environments
from nextstate.envs.contrast import problems, shortcuts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python imports from, empty yet; what was imported from it and registered is forgotten again."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(games, "_referenced", {})
    for name in [n for n in sys.modules if n.partition(".")[0] == "cups_pkg"]:  # imported by another test
        monkeypatch.delitem(sys.modules, name)
    modules, ids = set(sys.modules), set(gym.registry)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if (tmp_path / name.partition(".")[0]).exists():
            del sys.modules[name]
    for name in set(gym.registry) - ids:
        del gym.registry[name]


def test_an_installed_game_takes_part(folder: Path) -> None:
    write_game(folder)
    register_environments()
    assert "cups_pkg" not in sys.modules  # nothing is imported until it is used
    assert games.game_names() == [*GAMES, "Cups"]
    shown, _ = gym.make("nextstate/Cups-v0", cups=4).reset(seed=0)
    assert shown.startswith("The ball is under cup ")
    assert gym.make_vec("nextstate/Cups-v0", num_envs=2, cups=4).reset(seed=0)[0][0] == shown
    env = gym.make("nextstate/CupsPlay-v0")
    _, info = env.reset(seed=1)
    assert info["admissible_commands"][0] == "Swap cup A and cup B"
    env.step("swap cup a and cup b")
    assert make_game("Cups", cups=5) == game_class("Cups")(cups=5)
    check_game("Cups", seeds=range(8))
    with pytest.raises(GameError, match="cups=9 is not possible: expected a whole number from 2 to 8"):
        make_game("Cups", cups=9)
    with pytest.raises(GameError, match=r"unknown setting 'cup' of Cups: .*did you mean 'cups'"):
        make_game("Cups", cup=3)


def test_importing_nextstate_imports_no_game_of_another_package(tmp_path: Path) -> None:
    write_game(tmp_path, "raise RuntimeError('imported')")
    code = """
import sys
import gymnasium as gym, nextstate
gym.make("nextstate/Box-v0").reset()
print("nextstate/Cups-v0" in gym.registry, "cups_pkg" in sys.modules)
"""
    path = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_a_game_by_reference_is_then_known_by_its_name(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write_game(folder)
    (folder / "cups_pkg-1.0.dist-info" / "entry_points.txt").unlink()  # a package that offers nothing
    with pytest.raises(GameError, match="there is no game 'Cups'"):
        make_game("Cups")
    game = make_game("cups_pkg.game:Cups", cups=4)
    assert (game.name, make_game("Cups", cups=4)) == ("Cups", game)
    check_game("cups_pkg.game:Cups", seeds=range(3))
    automaton = Automaton.explore(game)
    assert (automaton.n_states, automaton.diameter) == (4, 1)  # each cup is one swap away
    assert game_class("nextstate.envs.games.box:Box") is GAMES["Box"]


def test_a_game_is_the_same_found_by_name_or_by_reference(folder: Path) -> None:
    write_game(folder)
    assert game_class("cups_pkg.game:Cups") is game_class("Cups")


@pytest.mark.parametrize("kind", ["state", "action"])
def test_it_has_minimal_pairs(folder: Path, kind: str) -> None:
    write_game(folder)
    game, rng = make_game("Cups", cups=4), np.random.default_rng(0)
    for _ in range(20):
        pair = game.contrast(rng, kind, steps=5)
        assert problems(pair) == ()
        assert shortcuts(pair) == {}
        assert {kind, "match", "distractor", "subject", "last"} <= pair.roles.keys()
        last_actions = [side.steps[-1].action for side in pair.sides]
        assert (last_actions[0] == last_actions[1]) == (kind == "state")
        assert (pair.clean.steps[-1].state == pair.corrupted.steps[-1].state) == (kind == "action")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_package.game:Cups", "'?no_such_package.game:Cups'? cannot be imported: ModuleNotFoundError"),
        ("cups_pkg.game:Jars", "cups_pkg.game:Jars.* cannot be imported: AttributeError.*Jars"),
        (
            "cups_pkg.game:LETTERS",
            "'cups_pkg.game:LETTERS' is not a game: expected a class derived from",
        ),
        ("cups_pkg.game:Game", "'cups_pkg.game:Game' is not complete: expected it to define .*initial.*name.*size"),
        ("cups_pkg.game:", "'cups_pkg.game:' is not the name of a game: expected a known name or pkg.module:Name"),
        (":Cups", "':Cups' is not the name of a game: expected"),
        ("Cup", "there is no game 'Cup'; did you mean 'Cups'"),
    ],
)
def test_what_cannot_be_found_is_named_in_one_line(folder: Path, reference: str, message: str) -> None:
    write_game(folder)
    with pytest.raises(GameError, match=message) as raised:
        make_game(reference)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("game", "message"),
    [
        ("import no_such_thing", "the game 'Cups' of the package cups-pkg .* cannot be imported: ModuleNotFoundError"),
        ("raise SystemExit('no\\nmore')", "the game 'Cups' of the package cups-pkg .*: SystemExit: no more$"),
        (GAME.replace('"Cups"', '"Jars"'), "the entry point 'Cups' is a game named 'Jars': expected the same name"),
        (GAME.replace('"Cups"', '"../Cups"'), "has the name '../Cups': expected letters, digits and underscores"),
        (GAME.replace("    def initial", "    def begin"), "the game 'Cups' is not complete: expected .* initial$"),
    ],
)
def test_a_broken_package_is_skipped_and_named(folder: Path, game: str, message: str) -> None:
    write_game(folder, game)
    register_environments()
    with pytest.raises(GameError, match=message) as raised:
        gym.make("nextstate/Cups-v0")
    assert "\n" not in str(raised.value)
    found, problems = games.load_games()
    assert found == GAMES
    assert problems == {"Cups": str(raised.value)}


def test_two_packages_with_one_name_are_both_named(folder: Path) -> None:
    write_game(folder)
    write_game(folder, package="jars_pkg")
    write_game(folder, package="boxes_pkg", game=GAME.replace('"Cups"', '"Box"'), name="Box")
    with pytest.raises(GameError, match=r"the game 'Cups'.*cups-pkg.* and .*jars"):
        make_game("Cups")
    with pytest.raises(GameError, match=r"the game 'Box'.*nextstate.* and .*boxes"):
        make_game("Box")
    found, problems = games.load_games()
    assert set(found) == set(GAMES) - {"Box"}
    assert set(problems) == {"Cups", "Box"}
    with pytest.raises(GameError, match=r"'boxes_pkg.game:Cups' has the name 'Box', which is taken \(built in\)"):
        make_game("boxes_pkg.game:Cups")


def test_two_references_with_one_name(folder: Path) -> None:
    write_game(folder)
    write_game(folder, package="jars_pkg")
    for metadata in folder.glob("*.dist-info"):
        (metadata / "entry_points.txt").unlink()
    make_game("cups_pkg.game:Cups")
    with pytest.raises(GameError, match=r"'jars_pkg.*' has the name 'Cups', which is taken \(cups_pkg.game:Cups\)"):
        make_game("jars_pkg.game:Cups")
