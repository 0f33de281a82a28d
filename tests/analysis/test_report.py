from __future__ import annotations

import errno
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from nextstate.analysis.page.formats import percent
from nextstate.analysis.page.page import pack, sha256
from nextstate.analysis.predict import statistics, viewer
from nextstate.analysis.study import open_run, write_page
from nextstate.envs.files import PathError, write_atomic
from nextstate.envs.games import make_game
from tests.analysis.conftest import EVIL, MODEL, make_run
from tests.pages import loads_nothing, markup, unpack
from tests.runs import frame, opened


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


def text_of(path: Path) -> str:
    return (path / "report.html").read_text(encoding="utf-8")


def words_of(path: Path) -> str:
    return " ".join(" ".join(Page(text_of(path)).words).split())


def rewritten(path: Path, copy: Path, **changes: Any) -> Path:
    """Return a copy of a run with other entries in `run.json`, and the page that is then written."""
    shutil.copytree(path, copy)
    study, run = open_run(copy)
    run.record.update(changes)
    write_page(study, run)
    return copy


@pytest.fixture(scope="module")
def evil(run_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every name is hostile."""
    path = Path(shutil.copytree(run_path, tmp_path_factory.mktemp("evil") / "run"))
    study, run = open_run(path)
    agent, variant = pl.col("agent").replace(MODEL, EVIL), pl.col("variant").replace("density=min", f"x={EVIL}")
    changes = {"agent": agent, "variant": variant, "size_name": pl.lit(EVIL), "opening": pl.lit(EVIL + "\u2028")}
    changes |= {"stem": pl.lit(EVIL), "truth": pl.lit(EVIL)}
    for name, table in run.summaries().items():
        own = {column: change for column, change in changes.items() if column in table.columns}
        run.keep(f"summary/{name}", table.with_columns(**own), {})
    found = next(a for a in run.record["agents"] if a["name"] == MODEL)
    found["name"] = run.record["versions"][EVIL] = run.record["hardware"][EVIL] = run.record["command"] = EVIL
    run.record["left_out"] = [{"agent": EVIL, "what": EVIL, "reason": EVIL}]
    run.record["warnings"] = [EVIL]
    write_page(study, run)
    return path


@pytest.mark.parametrize("which", ["run_path", "evil", "many_path"])
def test_page_is_whole_and_harmless(which: str, request: pytest.FixtureRequest) -> None:
    text = text_of(request.getfixturevalue(which))
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
    page = Page(text_of(run_path))
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for attrs, text in page.scripts:
        if not attrs:
            assert f"'sha256-{sha256(text)}'" in policy


def test_every_cell_and_figure_is_there(run_path: Path) -> None:
    page = Page(text_of(run_path))
    cells = page.data("cells")
    assert isinstance(cells, dict)
    expected = statistics.cells(frame(run_path))
    assert len(cells["columns"]["accuracy"]) == len(expected)
    assert cells["columns"]["accuracy"] == pytest.approx(expected["accuracy"].to_list(), abs=6e-4)
    keys = ["agent", "game", "variant", "size", "step", "subset"]
    assert_frame_equal(opened(run_path).summary("cells"), expected, check_row_order=False)
    assert expected.select(keys).is_unique().all()
    drawn = page.data("figures")
    assert isinstance(drawn, dict)
    assert {a["data-figure"] for t, a in page.tags if "data-figure" in a} == set(drawn)
    maps = [t for f in drawn.values() for t in f["data"] if t["type"] == "heatmap"]
    assert len(maps) == 5 * 3
    assert {(t["zmin"], t["zmax"]) for t in maps} == {(0, 1)}


def test_each_figure_is_saved_under_a_name_of_its_own(run_path: Path) -> None:
    page = Page(text_of(run_path))
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
    page = Page(text_of(run_path))
    sample = page.data("episodes")
    assert isinstance(sample, dict)
    assert {s["game"] for s in sample["settings"]} == {"Box", "DFA", "Cycle", "FruitStore"}
    dfa = next(s for s in sample["settings"] if s["game"] == "DFA")["episodes"][0]
    told = dfa["opening"] + "".join(
        s["added"] + q["stem"] + " " + q["truth"] + s["closing"] for s in dfa["steps"] for q in s["asked"]
    )
    assert re.fullmatch(
        r"States: \{.*\}\nActions:\{.*\}\nSequence: Start at state \w\.( Take action \w, go to state \w\.){6}", told
    )
    question = dfa["steps"][0]["asked"][0]
    model = question["by"][str(sample["agents"].index(MODEL))]
    assert len(model["top"]) <= viewer.TOP
    assert all(0 <= p <= 1 for _, p in model["top"])


def test_headline_has_the_numbers(run_path: Path) -> None:
    words = " ".join(Page(text_of(run_path)).words)
    totals = statistics.pooled(frame(run_path), ("agent", "game"))
    mine = totals.filter((pl.col("agent") == MODEL) & (pl.col("subset") == "determined"))
    for value in (mine["accuracy"].max(), mine["accuracy"].min()):
        assert percent(value) in words  # type: ignore[arg-type]


def test_on_a_phone_the_headline_table_is_stacked(run_path: Path) -> None:
    text = text_of(run_path)
    table = text[text.index('<table class="stacked" aria-describedby="summary">') :]
    titles = re.findall(r'<th class="num">(.*?)</th>', table[: table.index("</thead>")])
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    assert re.findall(r"<td[^>]*data-name=\"(.*?)\"", body) == titles * body.count("<tr>")
    assert body.count("<td") == len(titles) * body.count("<tr>") > len(titles)


def test_where_nothing_is_determined_the_page_says_so(tmp_path: Path) -> None:
    words = words_of(make_run(tmp_path, [("DFA", {"states": 4}, 1)]))
    assert "None of them is determined" in words
    assert "smallest against largest size" not in words


def test_easy_against_hard_needs_two_sizes(run_path: Path, tmp_path: Path) -> None:
    words = " ".join(Page(text_of(run_path)).words)
    assert "Accuracy on determined questions, smallest against largest size:" in words
    words = words_of(make_run(tmp_path, [("Box", {"boxes": 3}, 3), ("DFA", {"states": 4}, 1)]))
    assert "correctly in Box" in words
    assert "smallest against largest size" not in words
    assert " and on " not in words  # of DFA no question is determined, so that Box is not compared


def test_the_page_is_written_again_from_the_summary_alone(run_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_path, tmp_path / "run"))
    for name in ("questions", "answers", "figures"):
        shutil.rmtree(copy / name)
    (copy / "report.html").write_text("old")
    write_page(*open_run(copy))
    assert text_of(copy) == text_of(run_path)
    assert {p.name for p in (copy / "figures").iterdir()} == {p.name for p in (run_path / "figures").iterdir()}
    assert not list(copy.glob(".report*"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "read-only file system; copy the folder"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device; free some space"),
        (PermissionError("Permission denied (os error 13)"), "permission denied; make it readable and writable"),
    ],
)
def test_a_page_that_cannot_be_written_is_named(error: Exception, said: str, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise error

    (tmp_path / "report.html").write_text("old")
    with pytest.raises(PathError, match=f"report.html: .*{said}"):
        write_atomic(tmp_path / "report.html", fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.html", "old")]


def test_reports_without_a_model_show_the_first_agent(tmp_path: Path) -> None:
    path = make_run(tmp_path, [("Box", {"boxes": 3}, 3)], agents=["chance", "ideal"])
    assert "reference agents in Box" in words_of(path)
    assert "ideal answered 18 questions" in words_of(path)


def test_packed_data_is_plain_letters_and_comes_back_whole() -> None:
    text = pack({"a": EVIL + "\u2028\u2029&<!--", "b": [float("nan"), float("-inf"), 1.5]})
    assert re.fullmatch("[A-Za-z0-9+/=]+", text)
    assert unpack(text) == {"a": EVIL + "\u2028\u2029&<!--", "b": [None, None, 1.5]}


def test_cells_asked_late_in_long_episodes_are_in_the_viewer(tmp_path: Path) -> None:
    games = [{"game": "DFA", "grid": {"states": [3]}, "steps": [1, 60], "episodes": 3}]
    path = make_run(tmp_path, [], grid="cells", agents=["ideal"], games=games)
    late = Page(text_of(path)).data("episodes")["settings"][-1]["episodes"][0]  # type: ignore[index]
    (step,) = late["steps"]
    assert (step["step"], len(step["asked"])) == (60, 1)
    assert late["opening"].count("go to state") == 59
    assert (
        late["opening"] + step["added"] + step["asked"][0]["stem"]
        == (opened(path).table("questions/DFA-states=3-steps=60")["prompt"][0])
    )


def test_the_viewer_gives_back_the_text_that_was_read(tmp_path: Path) -> None:
    games = [make_game(name) for name in ("Box", "DFA", "FruitStore", "TextWorld")]
    chosen = [(g.name, {"feedback": f}, min(4, g.max_steps or 4)) for g in games for f in g.feedbacks]
    assert {s["feedback"] for _, s, _ in chosen} == {"inline", "branch"}
    path = make_run(tmp_path, chosen, episodes=2, ask="all", agents=["ideal"])
    run = opened(path)
    for setting in Page(text_of(path)).data("episodes")["settings"]:  # type: ignore[index]
        inline = any(episode["inline"] for episode in setting["episodes"])
        prompts = run.table(f"questions/{setting['slug']}")
        for episode in setting["episodes"]:
            transcript = episode["opening"]
            mine = prompts.filter(episode=episode["id"])
            for step in episode["steps"]:
                transcript += step["added"]
                for i, asked in enumerate(step["asked"]):
                    row = mine.filter(step=step["step"], question=i).row(0, named=True)
                    assert transcript + asked["stem"] == row["prompt"]
                    if inline:
                        (answer,) = {c for c in row["choices"] if c.strip() == row["truth"]}
                        transcript += asked["stem"] + answer + row["closing"]
                transcript += step["outcome"]


def test_how_each_model_was_run_and_what_was_left_out(run_path: Path, tmp_path: Path) -> None:
    reason = "someone/bert is refused: it is not causal"
    refused = [{"agent": "someone/bert", "what": f"DFA-states={n}", "reason": reason} for n in range(3, 8)]
    path = rewritten(run_path, tmp_path / "run", left_out=refused)
    text, words = text_of(path), words_of(path)
    table = words[words.index("How each model was run") : words.index("Left out")]
    assert f"{MODEL} fork 1.2e-05 2.6e-04 1,253 1,277 0.3 tree : off by 3.1 nats: {EVIL}" in table
    assert f"{MODEL} step live 1.2e-05 2.6e-04 1,253 1,277 12.0 –" in table
    for road in ("tree", "fork", "step", "rows"):
        assert f" {road} :" in table
    assert EVIL not in text
    assert "half precision" not in table
    assert text.count(reason) == 1
    assert "DFA-states=3, DFA-states=4, DFA-states=5 and 2 more" in words
    plain = [{k: v for k, v in a.items() if k != "certificates"} for a in opened(run_path).record["agents"]]
    path = rewritten(run_path, tmp_path / "plain", agents=plain)
    assert "How each model was run" not in text_of(path)


def test_the_trained_range_is_marked_where_it_is_known(run_path: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(run_path, tmp_path / "run"))
    study, run = open_run(path)
    rows = [(MODEL, "DFA", 3, 4), (MODEL, "Cycle", 3, 6), (MODEL, "Cycle", 5, 6)]
    run.keep("summary/trained", pl.DataFrame(rows, schema=run.summary("trained").schema, orient="row"), {})
    write_page(study, run)
    page = Page(text_of(path))
    drawn: Any = page.data("figures")

    def lines(name: str) -> set[tuple[float, ...]]:
        shapes = drawn[name]["layout"].get("shapes", ())
        return {tuple(shape[k] for k in ("x0", "y0", "x1", "y1")) for shape in shapes}

    (dfa,) = {name for name in drawn if name.startswith("dfa-density-min-accuracy-of-")}
    # Columns are steps 1 to 6, rows 3 and 5 states; 3 states were trained to step 4.
    assert lines(dfa) == {(x - 0.5, 0.5, x + 0.5, 0.5) for x in range(4)} | {(3.5, -0.5, 3.5, 0.5)}
    assert {line[0] for line in lines("dfa-density-min-accuracy-against-states-all-steps")} == {3}
    assert {line[0] for line in lines("dfa-density-min-accuracy-against-step-all-sizes")} == {4}
    for name in drawn:
        if "-against-" in name:
            assert any(t.get("name") == "end of training" for t in drawn[name]["data"]) == bool(lines(name))
    for name in drawn:
        if name.startswith(("cycle", "box")):  # trained on every cell, or not known
            assert lines(name) == set(), name
    cells: Any = page.data("cells")
    columns, names = cells["columns"], cells["names"]
    found = zip(*(columns[c] for c in ("agent", "game", "size", "step", "beyond")), strict=True)
    for agent, game, size, step, beyond in found:
        known = names["agent"][agent] == MODEL and names["game"][game] in ("DFA", "Cycle")
        inside = step <= 4 and size == 3 if names["game"][game] == "DFA" else step <= 6
        assert beyond == ((not inside) if known else None)
    words = words_of(path)
    assert f"{MODEL} was trained on sizes 3 to 3, to at most 4 steps" in words
    assert "trained on sizes" not in words_of(run_path)


def test_too_few_episodes_have_no_band_and_a_reason(tmp_path: Path) -> None:
    path = make_run(tmp_path / "few", [("Box", {"boxes": n}, 3) for n in (2, 3)], episodes=4)
    page, words = Page(text_of(path)), words_of(path)
    drawn: Any = page.data("figures")
    assert not [t for figure in drawn.values() for t in figure["data"] if t.get("fill") == "toself"]
    assert "no interval: 4 episodes are too few" in words
    assert "(–): no interval, because there are fewer than 5 episodes" in words
    hover = drawn[next(name for name in drawn if "accuracy-of" in name)]["data"][0]["customdata"]
    assert {cell[1] for row in hover for cell in row} == {"no interval: fewer than 5 episodes"}
    assert words_of(make_run(tmp_path / "more", [("Box", {"boxes": 2}, 3)], episodes=6)).count(") †") > 0
