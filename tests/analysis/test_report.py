from __future__ import annotations

import errno
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from nextstate.analysis import report, tables
from nextstate.analysis.page.formats import percent
from nextstate.analysis.page.page import pack, replace, sha256
from nextstate.analysis.tables import RunError
from nextstate.envs.files import PathError
from tests.analysis.conftest import EVIL, MODEL, SMALL, make_run
from tests.pages import loads_nothing, markup, unpack


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words: list[str] = []
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.open != "style":
            self.words.append(data)

    def data(self, name: str) -> object:
        return unpack(next(text for attrs, text in self.scripts if attrs.get("id") == f"data-{name}"))


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every name is hostile."""
    specs = [(g, s, f"x={EVIL}" if g == "DFA" else v, t) for g, s, v, t in SMALL]
    run = make_run(tmp_path_factory.mktemp("evil") / "run", specs, episodes=3, name=EVIL)
    info = json.loads((run / "run.json").read_text().replace(MODEL, "MODEL"))
    info["agents"][0]["name"] = EVIL
    info["versions"][EVIL] = info["hardware"][EVIL] = info["command"] = EVIL
    info["left_out"] = [{"agent": EVIL, "setting": EVIL, "reason": EVIL}]
    for setting in info["settings"]:
        setting["size_name"] = EVIL
    (run / "run.json").write_text(json.dumps(info))
    for file in run.glob("rows/*/*.parquet"):
        rows = pl.read_parquet(file).with_columns(
            agent=pl.col("agent").replace(MODEL, EVIL), stem=pl.lit(EVIL), truth=pl.lit(EVIL)
        )
        rows.write_parquet(file)
    for file in run.glob("transcripts/*.parquet"):
        pl.read_parquet(file).with_columns(opening=pl.lit(EVIL + "\u2028")).write_parquet(file)
    return run


@pytest.mark.parametrize("which", ["run_path", "evil", "many_path"])
def test_page_is_whole_and_harmless(which: str, request: pytest.FixtureRequest) -> None:
    path = report.write(request.getfixturevalue(which))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.count("</script>") == 5
    assert [attrs.get("type") for attrs, _ in page.scripts] == ["text/plain"] * 3 + [None] * 2
    assert not [tag for tag, _ in page.tags if tag in {"img", "link", "iframe", "object", "embed", "base", "form"}]
    for tag, attrs in page.tags:
        assert not [a for a in attrs if a.startswith("on")], tag
    assert loads_nothing(text)
    assert len(text) < 3_000_000
    for name in ("figures", "cells", "episodes"):
        assert page.data(name)
    if which == "evil":
        assert any(EVIL in word for word in page.words)
        assert "onerror=" not in re.sub(r"&lt;/script&gt;&lt;img.*?&gt;", "", markup(text))


def test_policy_allows_just_the_two_scripts(run_path: Path) -> None:
    page = Page(report.write(run_path).read_text(encoding="utf-8"))
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for attrs, text in page.scripts:
        if not attrs:
            assert f"'sha256-{sha256(text)}'" in policy


def test_every_cell_and_figure_is_there(run_path: Path) -> None:
    page = Page(report.write(run_path).read_text(encoding="utf-8"))
    cells = page.data("cells")
    assert isinstance(cells, dict)
    expected = tables.cells(tables.load(run_path).rows)
    assert len(cells["columns"]["accuracy"]) == len(expected)
    assert cells["columns"]["accuracy"] == pytest.approx(expected["accuracy"].to_list(), abs=6e-4)
    assert pl.read_parquet(run_path / "cells.parquet").equals(expected)
    drawn = page.data("figures")
    assert isinstance(drawn, dict)
    assert {a["data-figure"] for t, a in page.tags if "data-figure" in a} == set(drawn)
    maps = [t for f in drawn.values() for t in f["data"] if t["type"] == "heatmap"]
    assert len(maps) == 5 * 3
    assert {(t["zmin"], t["zmax"]) for t in maps} == {(0, 1)}


def test_each_figure_is_saved_under_a_name_of_its_own(run_path: Path) -> None:
    page = Page(report.write(run_path).read_text(encoding="utf-8"))
    drawn = page.data("figures")
    assert isinstance(drawn, dict)
    slugs = list(drawn)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) for slug in slugs)
    captions = {str(a["data-figure"]): str(a["aria-label"]) for t, a in page.tags if "data-figure" in a}
    for slug, caption in captions.items():
        assert "-".join(re.findall(r"[a-z0-9]+", caption.lower())) in slug
    assert {"box-accuracy-against-boxes-all-steps", "dfa-density-min-accuracy-against-states-all-steps"} < set(slugs)
    files = {file.name for file in (run_path / "figures").iterdir()}
    assert {f"{slug}.{kind}" for slug in slugs for kind in ("svg", "csv")} <= files


def test_viewer_tells_the_story(run_path: Path) -> None:
    page = Page(report.write(run_path).read_text(encoding="utf-8"))
    sample = page.data("episodes")
    assert isinstance(sample, dict)
    assert {s["game"] for s in sample["settings"]} == {"Box", "DFA", "Cycle", "FruitStore"}
    dfa = next(s for s in sample["settings"] if s["game"] == "DFA")["episodes"][0]
    told = dfa["opening"] + "".join(
        s["told"] + q["stem"] + " " + q["truth"] + s["closing"] for s in dfa["steps"] for q in s["asked"]
    )
    assert re.fullmatch(
        r"States: \{.*\}\nActions:\{.*\}\nSequence: Start at state \w\.( Take action \w, go to state \w\.){6}", told
    )
    question = dfa["steps"][0]["asked"][0]
    model = question["by"][str(sample["agents"].index(MODEL))]
    assert len(model["top"]) <= report.TOP
    assert all(0 <= p <= 1 for _, p in model["top"])


def test_headline_has_the_numbers(run_path: Path) -> None:
    words = " ".join(Page(report.write(run_path).read_text(encoding="utf-8")).words)
    totals = tables.pooled(tables.load(run_path).rows, ("agent", "game"))
    mine = totals.filter((pl.col("agent") == MODEL) & (pl.col("subset") == "determined"))
    for value in (mine["accuracy"].max(), mine["accuracy"].min()):
        assert percent(value) in words  # type: ignore[arg-type]
    assert "26 of its symbols are not one token" in words


def test_on_a_phone_the_headline_table_is_stacked(run_path: Path) -> None:
    text = report.write(run_path).read_text(encoding="utf-8")
    table = text[text.index('<table class="stacked" aria-describedby="summary">') :]
    titles = re.findall(r'<th class="num">(.*?)</th>', table[: table.index("</thead>")])
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    assert re.findall(r"<td[^>]*data-name=\"(.*?)\"", body) == titles * body.count("<tr>")
    assert body.count("<td") == len(titles) * body.count("<tr>") > len(titles)


def test_where_nothing_is_determined_the_page_says_so(tmp_path: Path) -> None:
    path = report.write(make_run(tmp_path, [("DFA", {"states": 4}, "", 1)]))
    words = " ".join(Page(path.read_text(encoding="utf-8")).words)
    assert "The transcript settles the answer of none of them" in words
    assert "Easy against hard" not in words


def test_easy_against_hard_needs_two_sizes(run_path: Path, tmp_path: Path) -> None:
    words = " ".join(Page(report.write(run_path).read_text(encoding="utf-8")).words)
    assert "Easy against hard, on determined questions:" in words
    one = report.write(make_run(tmp_path, [("Box", {"boxes": 3}, "", 3), ("DFA", {"states": 4}, "", 1)]))
    words = " ".join(Page(one.read_text(encoding="utf-8")).words)
    assert "of questions in Box" in words
    assert "Easy against hard" not in words
    assert " and on " not in " ".join(words.split())  # of DFA no question is determined, so that Box is not compared


def test_writing_again_replaces(run_path: Path) -> None:
    first = report.write(run_path).read_text(encoding="utf-8")
    (run_path / "report.html").write_text("old")
    assert report.write(run_path).read_text(encoding="utf-8") == first
    assert not list(run_path.glob(".report*"))
    assert not list(run_path.glob(".cells*"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "read-only file system; copy the folder"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device; free some space"),
        (PermissionError("Permission denied (os error 13)"), "permission denied; let yourself read and write"),
        (pl.exceptions.ComputeError("parquet: No space left on device"), "[Nn]o space left on device; free some space"),
    ],
)
def test_a_page_that_cannot_be_written_is_named(error: Exception, said: str, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise error

    (tmp_path / "report.html").write_text("old")
    with pytest.raises(PathError, match=f"report.html: .*{said}"):
        replace(tmp_path / "report.html", fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.html", "old")]


def test_reports_without_a_model_and_unfinished(run_path: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_path, tmp_path / "run"))
    info = json.loads((run / "run.json").read_text())
    info["agents"] = [a for a in info["agents"] if a["kind"] != "model"]
    (run / "run.json").write_text(json.dumps(info | {"finished": None, "seconds": None}))
    shutil.rmtree(run / "rows" / "nextstate-tiny")
    next(run.glob("rows/chance/*.parquet")).unlink()
    words = " ".join(Page(report.write(run).read_text(encoding="utf-8")).words)
    assert "not finished" in words
    assert "1 of its files are still to come" in words


def test_missing_transcripts_are_named(run_path: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_path, tmp_path / "run"))
    file = sorted(run.glob("transcripts/Box*.parquet"))[0]
    file.write_bytes(b"no parquet")
    with pytest.raises(RunError, match=f"{file.name} cannot be read"):
        report.write(run)
    file.unlink()
    with pytest.raises(RunError, match=f"{file.name} is missing"):
        report.write(run)


def test_packed_data_is_plain_letters_and_comes_back_whole() -> None:
    text = pack({"a": EVIL + "\u2028\u2029&<!--", "b": [float("nan"), float("-inf"), 1.5]})
    assert re.fullmatch("[A-Za-z0-9+/=]+", text)
    assert unpack(text) == {"a": EVIL + "\u2028\u2029&<!--", "b": [None, None, 1.5]}


def test_cells_asked_late_in_long_episodes_are_in_the_viewer(tmp_path: Path) -> None:
    from nextstate import experiment

    games = [{"game": "DFA", "over": {"states": [3]}, "steps": [1, 60], "episodes": 3}]
    config = {"name": "cells", "grid": "cells", "agents": ["ideal"], "games": games, "wandb": "disabled"}
    experiment.run(experiment.Config.model_validate(config), tmp_path / "cells")
    late = report.sample(tables.load(tmp_path / "cells"))["settings"][-1]["episodes"][0]
    assert [bool(step["asked"]) for step in late["steps"]] == [False] * 59 + [True]
    story = late["opening"] + "".join(step["told"] for step in late["steps"])
    assert story.count("go to state") == 59


def test_how_each_model_was_run_and_what_was_left_out(run_path: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_path, run)
    info = json.loads((run / "run.json").read_text())
    reason = "someone/bert is refused: it is not causal"
    refused = [{"agent": "someone/bert", "setting": f"DFA-states={n}", "reason": reason} for n in range(3, 8)]
    (run / "run.json").write_text(json.dumps(info | {"left_out": refused}))
    text = report.write(run).read_text(encoding="utf-8")
    words = " ".join(" ".join(Page(text).words).split())
    table = words[words.index("How each model was run") : words.index("Left out")]
    assert "nextstate/tiny fork 1.2e-05 2.6e-04 1,253 1,277 0.3 tree : off by 3.1 nats: " + EVIL in table
    assert "nextstate/tiny step live 1.2e-05 2.6e-04 1,253 1,277 12.0 –" in table
    for road in ("tree", "fork", "step", "rows"):
        assert f" {road} (" in table
    assert EVIL not in text
    assert "half precision" not in table
    assert text.count(reason) == 1
    assert "DFA-states=3, DFA-states=4, DFA-states=5 and 2 more" in words
    for agent in info["agents"]:
        agent.pop("certificates", None)  # as earlier versions wrote them
    (run / "run.json").write_text(json.dumps(info))
    assert "How each model was run" not in report.write(run).read_text(encoding="utf-8")
