"""The documentation holds what it promises: its code runs, its commands parse, and what it names exists."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from docs import hooks
from nextstate.agents.config import read_config
from nextstate.analysis.studies import STUDIES
from nextstate.analysis.study import Study, find_study
from nextstate.cli import app
from nextstate.envs.games import GAMES, make_game
from tests.documents import PAGES, ROOT, blocks, file, files, read

EXTENDING = ROOT / "docs" / "extending.md"
TEXTS = {str(path.relative_to(ROOT)): hooks.filled(read(path)) for path in PAGES}
TEXTS["CHANGELOG.md"] = TEXTS["CHANGELOG.md"].partition("\n## 0.1.0")[0]  # older entries are about the past
EXAMPLES = [(path, i) for path in PAGES for i in range(len(blocks(path, "python")))]


def commands() -> list[tuple[str, str]]:
    """Return every command that a page shows, with its page; those in running text have only capital placeholders."""
    found = []
    for page, text in TEXTS.items():
        lines = re.findall(r"^(?:    )?(nextstate (?:--)?[a-z].*)$", text, flags=re.MULTILINE)
        found += [(page, line) for line in [*lines, *re.findall(r"`(nextstate (?:--)?[a-z][^`]*)`", text)]]
    return sorted(set(found))


# --- code


@pytest.mark.parametrize(("path", "number"), EXAMPLES, ids=[f"{p.name}-{i}" for p, i in EXAMPLES])
def test_the_python_examples_run(path: Path, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks(path, "python")[number], f"{path.name} {number}", "exec"), {"__name__": "example"})
    if path.name != "run-folder.md":  # a function that needs a run
        assert capsys.readouterr().out.count("\n") >= 3


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder with the files of docs/extending.md, from which modules can be imported."""
    for name, text in files(EXTENDING).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("nextstate.envs.games._referenced", {})  # which keeps classes after their modules are gone
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_extensions_run(extensions: Path) -> None:
    runpy.run_path("check.py")
    shown = [line for block in blocks(EXTENDING, "console") for line in block.splitlines()]
    assert len(shown) > 6
    for line in shown:
        _, command, *arguments = shlex.split(line)
        if command == "patch":  # its model is on the hub; drawing the pairs shows whether the game has some
            study = find_study(command)
            assert study.jobs(read_config(arguments[0], [], study.config))
            continue
        done = CliRunner().invoke(app, [command, *arguments, *(["wandb=disabled"] if command == "run" else [])])
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
    for name in ("cups", "ngrams", "recency"):
        assert (extensions / "runs" / name / "report.html").is_file()
    summary = read_table(extensions / "runs" / "recency" / "summary" / "games.parquet")
    assert summary["never_mentioned"].to_list()[:3] == [0, 0, 0]  # Box names every box at the beginning


def read_table(path: Path) -> Any:
    import polars as pl

    return pl.read_parquet(path)


def test_the_package_of_the_extensions_names_what_there_is(extensions: Path) -> None:
    project = tomllib.loads(file("pyproject.toml"))
    groups = project["project"]["entry-points"]
    assert set(groups) == {"nextstate.games", "nextstate.agents", "nextstate.studies"}
    for entries in groups.values():
        for target in entries.values():
            assert resolve_name(target).__module__ in project["tool"]["setuptools"]["py-modules"]
    assert issubclass(resolve_name(groups["nextstate.studies"]["recency"]), Study)


# --- commands


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda text: text[:60])
def test_the_commands_parse_and_their_configs_are_valid(page: str, line: str) -> None:
    _, *arguments = shlex.split(line, comments=True)
    if arguments[0] == "--debug":
        del arguments[0]
    if not arguments:
        return
    if arguments[0].startswith("--"):  # such as --version
        assert any(arguments[0] in option.opts for option in get_command(app).params)
        return
    if page == "docs/extending.md" and arguments[0] not in STUDIES.keys() | {"play", "verify", "report"}:
        assert arguments == ["recency"]  # the command of that page's own study
        return
    command = get_command(app).commands[arguments[0]]  # type: ignore[attr-defined]
    if len(arguments) == 1:  # a command by its name alone
        return
    given = command.make_context(arguments[0], list(arguments[1:])).params
    if arguments[0] == "play" and given["game"] in GAMES:
        pairs = (x.split("=") for x in given["settings"] or [])
        make_game(given["game"], **{key: yaml.safe_load(value) for key, value in pairs})
    if arguments[0] in STUDIES and given["config"] != "CONFIG":
        if (local := files(EXTENDING).get(given["config"])) is not None:
            assert yaml.safe_load(local)["name"]
            return
        read_config(str(ROOT / given["config"]), given["overrides"] or [], find_study(arguments[0]).config)


@pytest.mark.parametrize(
    "target",
    sorted(
        {t for text in TEXTS.values() for t in re.findall(r"`?make (demo|test|docs|[a-z]+-[a-z]+|lint|clean)\b", text)}
    ),
)
def test_each_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", read(ROOT / "Makefile"), flags=re.MULTILINE)


@pytest.mark.parametrize(
    "name", sorted({n for t in TEXTS.values() for n in re.findall(r"python -m (benchmarks\.[a-z_]+)", t)})
)
def test_each_benchmark_can_be_asked_for_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    assert ("--quick" in capsys.readouterr().out) == (name not in ("benchmarks.page", "benchmarks.gpu"))


# --- names


@pytest.mark.parametrize("page", TEXTS)
def test_what_a_page_names_exists(page: str) -> None:
    text, folder = TEXTS[page], (ROOT / page).parent
    links = [x.partition("#")[0] for x in re.findall(r"\]\(([^)\s]+)\)", text) if not x.startswith(("http", "#"))]
    missing = [x for x in links if not (folder / x).exists()]
    paths = re.findall(r"`((?:envs|agents|analysis|configs|tests|benchmarks|docs)/[\w./-]*)`", text)
    missing += [x for x in paths if not (ROOT / x).exists()]
    missing += [x for x in re.findall(r"configs/[\w/-]+\.yaml", text) if not (ROOT / x).exists()]
    for name in re.findall(r"`(?::: )?(nextstate\.(?:envs|agents|analysis)[\w.:]*)`", text):
        try:
            resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("page", [p for p in TEXTS if p.startswith("docs/api/")])
def test_each_module_of_the_reference_exists(page: str) -> None:
    for name in re.findall(r"^::: ([\w.]+)$", TEXTS[page], flags=re.MULTILINE):
        assert importlib.import_module(name).__doc__


def test_the_walks_name_files_and_leave_each_room_once() -> None:
    walks = read(ROOT / "docs" / "architecture.md").split("\n## ")[1:]
    assert len(walks) == 2
    for walk in walks:
        steps = re.findall(r"^\d+\. `([\w/.]+)`", walk, flags=re.MULTILINE)
        rooms = [step.split("/")[0] for step in steps]
        assert len(steps) > 10
        assert rooms == sorted(rooms, key=("envs", "agents", "analysis").index)


def test_the_trees_of_the_architecture_name_files() -> None:
    tree = read(ROOT / "docs" / "architecture.md").split("\n    envs/\n")[1].split("\n\n")[0]
    room, named = "envs", []
    for line in ("    envs/\n" + tree).splitlines():
        words = re.split(r"  +|, ", line.strip())
        if line.startswith("    ") and not line.startswith("     "):
            room = words[0].rstrip("/")
        else:
            named += [f"{room}/{word}" for word in re.findall(r"[\w]+(?:\.py|/)", " ".join(words))]
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_games_and_studies_are_all_there() -> None:
    readme = read(ROOT / "README.md")
    assert re.findall(r"^\| (\w+) \|", readme.partition("## Games")[2], flags=re.MULTILINE)[1:] == [*GAMES]
    shown = {line.split()[1] for page, line in commands() if page == "README.md"}
    assert shown >= {*STUDIES, "report", "verify", "play", "train", "list"}
    assert set(re.findall(r"<!-- config: (\w+) -->", read(ROOT / "docs" / "studies.md"))) == {*STUDIES}


# --- what is made from the code


def test_every_column_has_a_meaning_and_every_meaning_a_column() -> None:
    meanings = yaml.safe_load(read(ROOT / "docs" / "columns.yaml"))
    used = set()
    for study in hooks.TABLES:
        for key, columns in hooks.schemas(study).items():
            part = key.split("/")[0]
            for column in columns:
                hooks.meaning(meanings, study, key, column)
                sections = (f"{study} {part}", study, "all")
                used.add(next((s, column) for s in sections if column in meanings.get(s, {})))
    assert {(s, c) for s, columns in meanings.items() for c in columns} - used == set()


def test_a_run_makes_the_tables_that_its_page_lists(tmp_path: Path) -> None:
    from nextstate.analysis.study import go

    study = find_study("run")
    games = [{"game": "Box", "game_args": {"boxes": 2}, "steps": 2, "episodes": 2}]
    given = {"name": "x", "agents": ["ideal"], "wandb": "disabled", "games": games, "play": games}
    run = go(study, study.config.model_validate(given), tmp_path / "run")
    for key, columns in hooks.schemas("run").items():
        made = run.keys(f"{key.split('/')[0]}/*")
        assert made
        assert all(dict(run.table(one).schema) == {k: v for k, v in columns.items()} for one in made)
    keys = re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \|", TEXTS["docs/run-folder.md"].split("## run.json")[1].split("\n## ")[0], re.M
    )
    assert {name for cell in keys for name in re.findall(r"`(\w+)`", cell)} >= run.record.keys() - {"seconds"}


@pytest.mark.parametrize("study", STUDIES)
def test_every_key_of_a_config_has_a_meaning(study: str) -> None:
    for line in hooks.config(study).splitlines():
        if line.startswith("| `"):
            assert not line.endswith("|  |"), f"{study}: {line} has no description"


def test_the_citation_is_valid() -> None:
    found = yaml.safe_load(read(ROOT / "CITATION.cff"))
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    assert found["cff-version"] == "1.2.0"
    assert (found["version"], found["license"], found["title"]) == (project["version"], project["license"], "nextstate")
    assert found["message"]
    assert all({"name"} <= author.keys() or {"family-names"} <= author.keys() for author in found["authors"])


@pytest.mark.slow
def test_the_pages_build_and_load_nothing_from_the_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"([^\"]+)\"|<link[^>]* href=\"([^\"]+)\"", read(page))
        assert [x for pair in loaded for x in pair if x.startswith(("http", "//"))] == []
        assert "<!-- config" not in read(page)
