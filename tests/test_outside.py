"""Packages of other authors, used through the command line: a game, an agent and a study, each of them one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
import yaml

from tests.outside import GAME, NGRAM, STUDY, write_game, write_package
from tests.pages import shown

GAMES = [{"game": "Cups", "game_args": {"cups": 2}, "steps": 6, "episodes": 8}]
ASKED: dict[str, Any] = {"name": "cups", "games": GAMES, "agents": ["ideal"], "wandb": "disabled"}
TRAINING: dict[str, Any] = {
    "name": "cups", "rows": 8, "row_tokens": 128, "steps": 240, "warmup": 20, "learning_rate": 3e-3, "threads": 1,
    "model": {"hidden_size": 64, "layers": 2, "heads": 4, "intermediate_size": 128, "vocabulary": 300, "context": 256},
    "evaluate_every": 240, "evaluation_episodes": 4, "save_every": 240, "curriculum": {"start": 2, "most": 2},
    "stages": [{"mixture": {"Cups": 1}}],
}  # fmt: skip
PATCHING: dict[str, Any] = {
    "name": "heads", "game": "Cups", "steps": 4, "pairs": 12, "kinds": ["state"], "directions": ["denoise"],
    "sites": ["head"], "resamples": 100, "wandb": "disabled",
}  # fmt: skip
AGREEING: dict[str, Any] = {"name": "agreeing", "games": ["Cups", "Cycle"], "wandb": "disabled"}


class Done(NamedTuple):
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return " ".join((self.out + self.err).split())


class Site(NamedTuple):
    """A folder in which commands run, with the packages that they find."""

    path: Path
    packages: Path

    def python(self, *arguments: str) -> Done:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(self.packages), *filter(None, sys.path)])}
        environment |= {"COLUMNS": "200", "WANDB_MODE": "disabled"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.path, env=environment, capture_output=True, text=True
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def nextstate(self, *arguments: str) -> Done:
        return self.python("-m", "nextstate.cli", *arguments)

    def config(self, name: str, config: Mapping[str, Any], **more: Any) -> str:
        (self.path / name).write_text(yaml.safe_dump({**config, **more}), encoding="utf-8")
        return name

    def record(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / run / "run.json").read_text(encoding="utf-8"))
        return found


def installed(path: Path) -> Site:
    packages = path / "packages"
    write_game(packages)
    write_package(packages, "ngrams", NGRAM, "nextstate.agents", {"ngram": "ngrams:NGram"})
    write_package(packages, "agreements", STUDY, "nextstate.studies", {"agreement": "agreements:Agreement"})
    return Site(path, packages)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return installed(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site with a model that was trained on the game of cups."""
    site = installed(tmp_path_factory.mktemp("trained"))
    done = site.nextstate("train", site.config("train.yaml", TRAINING), "--out", "cups")
    assert done.code == 0, done.err
    return site


def one_line(done: Done, *parts: str, code: int = 2) -> None:
    """Hold a command to an error of one line without a traceback."""
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert done.code == code, done
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def test_a_game_is_listed_and_keeps_the_laws(site: Site) -> None:
    done = site.nextstate("list", "games")
    assert done.code == 0, done.err
    assert "Cups predict nextstate/Cups-v0" in done.text
    assert "cups int = 3 2 to 8: number of cups" in done.text
    done = site.python("-c", "from nextstate.envs import check_game; check_game('Cups', seeds=range(4))")
    assert done.code == 0, done.err


def test_a_model_learns_a_game_answers_about_it_and_its_heads_are_swept(trained: Site) -> None:
    config = trained.config("run.yaml", ASKED, agents=["cups/model", "ideal", "chance"])
    done = trained.nextstate("run", config, "--out", "asked")
    assert done.code == 0, done.err
    page = shown((trained.path / "asked" / "report.html").read_text(encoding="utf-8"))
    assert "in Cups" in page
    table = pl.read_parquet(trained.path / "asked" / "summary" / "by_game.parquet").filter(subset="all")
    accuracy = dict(table.select("agent", "accuracy").iter_rows())
    assert accuracy["ideal"] == 1
    assert accuracy["cups/model"] > 0.8 > accuracy["chance"]

    patching = trained.config("patch.yaml", PATCHING, model="cups/model", game_args={"cups": 2})
    done = trained.nextstate("patch", patching, "--out", "heads")
    assert done.code == 0, done.err
    (counts,) = pl.read_parquet(trained.path / "heads" / "summary" / "counts.parquet").rows(named=True)
    assert counts["kept"] > 0.5 * counts["drawn"]
    sweep = pl.read_parquet(trained.path / "heads" / "summary" / "sweeps.parquet")
    assert set(sweep.select("layer", "head").iter_rows()) == {(layer, head) for layer in (0, 1) for head in range(4)}
    assert "cups/model in Cups" in shown((trained.path / "heads" / "report.html").read_text(encoding="utf-8"))


def test_an_agent_by_name_by_reference_and_with_arguments_is_on_the_page(site: Site) -> None:
    agents: list[Any] = ["ideal", "ngram", "ngrams:NGram", {"kind": "ngram", "n": 1}]
    done = site.nextstate("run", site.config("run.yaml", ASKED, agents=agents), "--out", "asked")
    assert done.code == 0, done.err
    page = shown((site.path / "asked" / "report.html").read_text(encoding="utf-8"))
    for name in ("ngram", "ngrams:NGram", "ngram(n=1)"):
        assert f"{name}, Cups" in page or f"{name} answered 48 questions" in page
    assert {a["kind"] for a in site.record("asked")["agents"]} == {"ideal", "ngram", "ngrams:NGram"}


def test_a_study_is_a_command_and_a_reference_in_a_config(site: Site) -> None:
    assert "agreement agreements:Agreement" in site.nextstate("list", "studies").text
    by_name = site.nextstate("agreement", site.config("a.yaml", AGREEING), "--out", "a")
    reference = site.config("b.yaml", AGREEING, study="agreements:Agreement")
    by_reference = site.nextstate("run", reference, "--out", "b")
    assert (by_name.code, by_reference.code) == (0, 0), by_name.err + by_reference.err
    assert "game same (95 %)" in by_name.text
    tables = [pl.read_parquet(site.path / run / "answers" / "Cups.parquet") for run in "ab"]
    assert tables[0].equals(tables[1])
    page = site.path / "a" / "report.html"
    written = page.read_text(encoding="utf-8")
    assert "How often nextstate/tiny answers as the reader ideal does." in shown(written)
    page.unlink()
    assert site.nextstate("report", "a").code == 0
    assert page.read_text(encoding="utf-8") == written
    done = site.nextstate("verify", "b")
    assert (done.code, "2 of 2 tables equal the recomputed ones" in done.text) == (0, True), done


def test_a_study_of_a_package_without_entry_points_is_found_again(site: Site) -> None:
    (site.packages / "agreements-1.0.dist-info" / "entry_points.txt").unlink()
    config = site.config("run.yaml", AGREEING, study="agreements:Agreement", games=["Cycle"])
    assert site.nextstate("run", config, "--out", "run").code == 0
    assert site.record("run")["study"] == "agreements:Agreement"
    assert [site.nextstate(command, "run").code for command in ("report", "verify")] == [0, 0]


def test_what_edited_code_made_is_made_anew(site: Site) -> None:
    run = site.config("run.yaml", ASKED, agents=["ngram", "ideal"])
    study = site.config("study.yaml", AGREEING, games=["Cycle"])
    commands = (("run", run, "--out", "asked"), ("agreement", study, "--out", "agreeing"))
    for command in commands:
        assert site.nextstate(*command).code == 0
    for command in commands:
        assert "set aside" not in site.nextstate(*command).text
    with (site.packages / "ngrams.py").open("a") as file:
        file.write("# edited\n")
    with (site.packages / "agreements.py").open("a") as file:
        file.write("# edited\n")
    for command in commands:
        assert "set aside" in site.nextstate(*command).text
    (asked,), (agreeing,) = ([x for x in site.record(name)["set_aside"] if "summary" not in x["table"]]
                             for name in ("asked", "agreeing"))  # fmt: skip
    assert asked["table"].startswith("answers/ngram/")
    assert asked["reason"].startswith("made with agent ")
    assert agreeing["reason"].startswith("made with study ")
    with (site.packages / "cups_pkg" / "game.py").open("a") as file:
        file.write("# edited\n")
    assert site.nextstate(*commands[0]).code == 0
    reasons = [x["reason"] for x in site.record("asked")["set_aside"]]
    assert any(reason.startswith("made with game ") for reason in reasons)


def test_packages_that_raise_when_imported_are_named_and_the_rest_works(site: Site) -> None:
    broken = "raise OSError('no\\nscreen')"
    write_game(site.packages, broken, package="jars_pkg", name="Jars")
    write_package(site.packages, "silent", broken, "nextstate.agents", {"silent": "silent:Agent"})
    write_package(site.packages, "mute", broken, "nextstate.studies", {"mute": "mute:Study"})
    done = site.nextstate("list", "games")
    assert (done.code, "nextstate/Cups-v0" in done.out) == (0, True)
    assert "cannot be used: the game 'Jars' of the package jars-pkg" in done.text
    assert site.nextstate("list", "studies").code == 0
    said = "cannot be imported: OSError: no screen"
    jars = site.config("jars.yaml", ASKED, games=[{"game": "Jars", "steps": 2, "episodes": 2}])
    one_line(site.nextstate("run", jars, "--out", "x"), "the game 'Jars' of the package jars-pkg", said)
    silent = site.config("silent.yaml", ASKED, agents=["silent"])
    one_line(site.nextstate("run", silent, "--out", "x"), "the agent 'silent' of the package silent", said)
    for command, config in (("mute", {"name": "x"}), ("run", {"name": "x", "study": "mute"})):
        done = site.nextstate(command, site.config("mute.yaml", config), "--out", "x")
        one_line(done, "the study 'mute' of the package mute", said)
    assert not (site.path / "x").exists()
    assert site.nextstate("run", site.config("run.yaml", ASKED), "--out", "asked").code == 0


def test_two_packages_with_one_name_are_both_named(site: Site) -> None:
    write_game(site.packages, package="jars_pkg")
    write_package(site.packages, "rivals", NGRAM, "nextstate.agents", {"ngram": "rivals:NGram"})
    write_package(site.packages, "others", STUDY, "nextstate.studies", {"agreement": "others:Agreement"})
    one_line(site.nextstate("run", site.config("game.yaml", ASKED)), "the game 'Cups': ", "cups-pkg", "jars-pkg")
    games = [{"game": "Box", "steps": 2, "episodes": 2}]
    rivals = site.config("agent.yaml", ASKED, games=games, agents=["ngram"])
    one_line(site.nextstate("run", rivals), "the agent 'ngram': ", "the package ngrams", "the package rivals")
    study = site.config("study.yaml", AGREEING)
    one_line(
        site.nextstate("agreement", study), "the study 'agreement': ", "the package agreements", "the package others"
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('Job(f"answers/{game}"', 'Job("answers/all"', "two jobs of the study 'agreement' have the key 'answers/all'"),
        ('Job(f"answers/{game}"', 'Job(f"../{game}"', "the key '../Cups' of a job is not a safe file name"),
        ('{"games": pl', '{"game": pl', "reads the summary 'games', but its `summarise` returned 'game'"),
        ("def headline", "def heading", "the study agreement is not complete: it does not define headline"),
        ("config = AgreementConfig\n", "\n", "the study agreement is not complete: it does not define config"),
        ("(Study[AgreementConfig])", "", "agreement is not a study: expected a subclass of nextstate.analysis.study"),
    ],
)
def test_a_study_that_is_not_sound_is_refused_in_one_line(site: Site, old: str, new: str, said: str) -> None:
    assert old in STUDY
    source = STUDY.replace(old, new)
    write_package(site.packages, "agreements", source, "nextstate.studies", {"agreement": "agreements:Agreement"})
    one_line(site.nextstate("agreement", site.config("study.yaml", AGREEING), "--out", "run"), said)


def test_an_unsound_game_is_refused_in_one_line(site: Site) -> None:
    write_game(site.packages, GAME.replace("    def transition", "    def passage"))
    one_line(site.nextstate("run", site.config("run.yaml", ASKED)), "the game 'Cups' is not complete", "transition")
