"""Pages of sections alone, the parts that all pages share, and figures as SVG and CSV."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import polars as pl
import pytest

from nextstate.analysis.grammar.study import GrammarStudy
from nextstate.analysis.heads.figures import COLOURS
from nextstate.analysis.page import vector
from nextstate.analysis.page.formats import cell
from nextstate.analysis.page.page import FigureList, Page, Section, environment, render, sha256, write
from nextstate.analysis.study import open_run
from tests.analysis.conftest import EVIL
from tests.analysis.test_grammar_page import make as make_grammar_run
from tests.pages import data, loads_nothing, markup, places, shown

RECORD = {
    "name": "small", "command": "nextstate lens", "started": "2026-01-01T00:00:00+00:00", "finished": None,
    "seconds": 1.5, "seed": 3, "config": {"name": "small"}, "config_digest": "ab" * 32, "hardware": {"cores": 2},
    "versions": {"nextstate": "0.1"}, "agents": [], "left_out": [{"agent": "a", "what": "s", "reason": "too long"}],
    "warnings": ["one warning"], "set_aside": [], "mixed": [],
}  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"


def figure(title: str = "Rising", name: str = "model") -> go.Figure:
    line = go.Scatter(x=[1, 2, 4], y=[0.25, None, 1.0], name=name, mode="lines+markers")
    return go.Figure([line], {"title": {"text": title}, "height": 300, "xaxis": {"title": {"text": "layer"}}})


def page(word: str = "plain") -> Page:
    table = pl.DataFrame({word: [f"{word} cell", None], "share": [0.5, float("nan")], "n": [1200, -3]})
    sections = [Section(f"{word} section", f"{word} text\n\nsecond paragraph", [figure(word), figure(word)], table)]
    return Page(f"{word} title", [f"{word} lead"], sections, {f"{word} word": f"{word} meaning"})


def texts(svg: bytes) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def rows(figure: go.Figure) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(vector.table(figure).decode())))


def test_a_page_needs_sections_only() -> None:
    text = render(page(), RECORD)
    assert loads_nothing(text)
    for words in ("plain title", "plain lead", "plain section", "plain text", "plain word", "plain meaning",
                  "0.500", "1,200", "−3", "nextstate lens", "too long", "one warning"):  # fmt: skip
        assert words in shown(text)
    assert re.findall(r'<a href="#([\w-]+)">', text) == re.findall(r'<section id="([\w-]+)"', text)
    assert re.findall(r'<section id="([\w-]+)"', text) == ["section-1", "run", "words"]
    assert text.count("<p>plain text</p>") == text.count("<p>second paragraph</p>") == 1
    assert places(text) == sorted(data(text, "figures")) == ["plain-section-plain", "plain-section-plain-2"]
    drawn = data(text, "figures")["plain-section-plain"]
    assert drawn["layout"]["showlegend"] is True
    assert drawn["layout"]["template"] == {}  # not plotly's own, which would be white in the dark
    assert 'data-v="0.5"' in text
    assert 'data-v=""' in text


def test_without_words_figures_and_table_nothing_is_left_empty() -> None:
    text = markup(render(Page("title", sections=[Section("bare")]), RECORD | {"left_out": [], "remarks": []}))
    assert re.findall(r'<section id="([\w-]+)"', text) == ["section-1", "run"]
    for absent in ("<table", "Left out", "Remarks", "<figure"):
        assert absent not in text


def test_hostile_text_stays_text_everywhere() -> None:
    record = RECORD | {"name": EVIL, "command": EVIL, "remarks": [EVIL], "config": {EVIL: EVIL}}
    record |= {"left_out": [{"agent": EVIL, "what": EVIL, "reason": EVIL}], "versions": {EVIL: EVIL}}
    text = render(page(EVIL), record)
    assert "<img" not in markup(text)
    assert text.count("</script>") == 3
    for words in ("title", "lead", "section", "text", "cell", "word", "meaning"):
        assert f"{EVIL} {words}" in shown(text)
    assert loads_nothing(text)


def test_the_policy_allows_the_two_scripts_alone() -> None:
    text = render(page(), RECORD)
    policy = re.search(r"script-src (.*?);", text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert policy is not None
    assert policy[1].split() == [f"'sha256-{sha256(script)}'" for script in scripts]
    assert len(scripts) == 2
    assert "plotly.js (cartesian - minified)" in scripts[0][:100]


def test_a_template_extends_the_base_and_shares_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    own = (
        '{% extends "page/base.html.jinja" %}{% set kind = "own" %}{% block sections %}'
        '{% call section("mine", "Mine") %}{{ plot(shown) }}{% endcall %}{% endblock %}'
        "{% block words %}<dt>w</dt><dd>{{ meaning }}</dd>{% endblock %}"
    )
    base = environment()
    assert base.loader is not None
    base.loader = jinja2.ChoiceLoader([jinja2.DictLoader({"own.html.jinja": own}), base.loader])
    monkeypatch.setattr("nextstate.analysis.page.page.environment", lambda: base)
    drawn = FigureList()
    context = {"shown": drawn.add(figure("Own")), "meaning": EVIL}
    text = render(Page("t", template="own.html.jinja", context=context, figures=drawn), RECORD)
    assert re.findall(r'<section id="([\w-]+)"', text) == ["mine", "run", "words"]
    assert places(text) == ["own"]
    assert data(text, "figures")["own"]["layout"]["showlegend"] is False
    assert EVIL in shown(text)
    assert "nextstate · own" in shown(text)


def test_every_figure_of_a_page_is_a_file_beside_it(tmp_path: Path) -> None:
    one = page()
    assert write(one, RECORD, tmp_path) == tmp_path / "report.html"
    names = {f"{name}.{kind}" for name in one.figures.figures for kind in ("svg", "csv")}
    assert {file.name for file in (tmp_path / "figures").iterdir()} == names
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert {link for link in re.findall(r'href="figures/([^"]+)"', text)} == names
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    write(page(), RECORD, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234, "1,234"), (-2, "−2"), (True, "yes"), (None, "–"), (0.12345, "0.123"), (-0.5, "−0.500"), (0.0, "0.000"),
     (1e-5, "1 × 10⁻⁵"), (float("nan"), "–"), (float("inf"), "–"), ([1, 2.5], "1, 2.500"), ("a", "a")],
)  # fmt: skip
def test_cells_of_tables(value: Any, text: str) -> None:
    assert cell(value) == text


# --- the figures of all studies as files


@pytest.fixture(scope="module")
def real(run_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, go.Figure]:
    study, run = open_run(run_path)
    out = dict(study.page(run).figures.figures)
    grammar = make_grammar_run(tmp_path_factory.mktemp("grammar") / "run")
    return out | GrammarStudy().page(grammar).figures.figures


KINDS = (
    "box-accuracy-of-", "box-accuracy-against-boxes", "dfa-density-min-accuracy-against-step", "determined-and",
    "where-the-shortcut-fails", "generated-strings", "accuracy-from-nothing", "divergence-from", "loss",
    "ancestors-at-all-tokens-from-the-whole-string", "after-a-clean-prefix-temperature", "attention-pairs-rotary",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_real_figures_become_svg_and_csv(kind: str, real: dict[str, go.Figure]) -> None:
    chosen = {name: one for name, one in real.items() if name.startswith(kind)}
    assert chosen
    for one in list(chosen.values())[:6]:
        svg = vector.svg(one)
        assert svg == vector.svg(one)
        words = texts(svg)
        assert vector._text(one.layout.title.text) in words
        for axis in (one.layout.xaxis, one.layout.yaxis):
            assert (axis.title.text or words[0]) in words
        count = 0
        for trace in one.to_plotly_json()["data"]:
            if trace["type"] == "heatmap":
                count += sum(map(len, trace["z"]))
            elif not trace.get("fill") and trace.get("mode") != "text":
                count += len(trace["x"])
        assert len(rows(one)) == count > 0
        assert {"x", "y"} <= rows(one)[0].keys()


def heatmap_cells(one: go.Figure) -> Iterator[tuple[str, str, str]]:
    (trace,) = (t for t in one.data if t.type == "heatmap")
    for y, line in zip(trace.y, trace.z, strict=True):
        for x, value in zip(trace.x, line, strict=True):
            yield str(x), str(y), "" if value is None else str(value)


def test_numbers_of_heatmaps_curves_and_bars_are_those_of_the_figure(real: dict[str, go.Figure]) -> None:
    maps = next(figure for name, figure in real.items() if name.startswith("box-accuracy-of-"))
    assert [(r["x"], r["y"], r["z"]) for r in rows(maps)] == list(heatmap_cells(maps))
    numbers = next(t for t in maps.data if t.type == "scatter")
    assert set(numbers.text) <= set(texts(vector.svg(maps)))
    curve = real["box-accuracy-against-boxes-all-steps"]
    model = [r for r in rows(curve) if r["series"] == "tests.analysis.conftest:Noisy"]
    band = next(t for t in curve.data if t.fill == "toself")
    assert [float(r["low"]) for r in model] == list(band.y[len(model) :])[::-1]
    assert [float(r["high"]) for r in model] == list(band.y[: len(model)])
    assert all(float(r["low"]) <= float(r["y"]) <= float(r["high"]) for r in model)
    apart = rows(real["determined-and-undetermined-questions-tests-analysis-conftest-noisy"])
    assert {r["y"] for r in apart} == {"Box", "Cycle", "DFA middle", "DFA min", "FruitStore"}
    assert {r["series"] for r in apart} == {
        "ideal reader (ceiling)", "lookup reader", "chance", "determined", "undetermined",
    }  # fmt: skip


def test_a_slider_is_drawn_at_its_step_and_saved_whole() -> None:
    grids = [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, None]]]
    steps = [{"label": str(k), "method": "restyle", "args": [{"z": [z]}]} for k, z in enumerate(grids)]
    slider = {"active": 1, "steps": steps, "currentvalue": {"prefix": "layer "}}
    trace = go.Heatmap(x=["a", "b"], y=["c", "d"], z=grids[1], colorscale=[[0, "#ffffff"], [1, "#000000"]])
    one = go.Figure([trace], {"title": {"text": "Maps"}, "sliders": [slider], "template": {}})
    assert "Maps, layer 1" in texts(vector.svg(one))
    assert [(r["series"], r["z"]) for r in rows(one)][:5] == [
        ("layer 0", "0.0"), ("layer 0", "1.0"), ("layer 0", "2.0"), ("layer 0", "3.0"), ("layer 1", "4.0"),
    ]  # fmt: skip


def test_bars_errors_shapes_and_dashes_are_drawn() -> None:
    error = {"type": "data", "array": [0.1, 0.2], "arrayminus": [0.2, 0.1], "color": COLOURS["state"]}
    bars = [go.Bar(x=["0", "1"], y=[1.0, 2.0], name=name, error_y=error) for name in ("state", "action")]
    one = go.Figure([*bars, go.Scatter(x=["0", "1"], y=[1, 2], name="line", line={"dash": "5px 2px"})])
    one.update_layout(title_text="Bars", template={}, xaxis={"type": "category"}, barmode="group")
    one.add_vrect(x0=0.2, x1=0.4, fillcolor="rgba(0,158,115,0.13)", line_width=0)
    assert {"state", "action", "line", "Bars", "0", "1"} <= set(texts(vector.svg(one)))
    first = rows(one)[0]
    assert (first["series"], float(first["low"]), float(first["high"])) == ("state", 0.8, 1.1)
    plain = go.Figure(one.data[:2], {"title": {"text": "Bars"}, "template": {}})
    assert vector.svg(plain) != vector.svg(one)


@pytest.mark.parametrize("name", [EVIL, "<b>&lt;x", "$\\frac{1}{2}$", "_a^b$", "50 % #1", "語 ✖ \x00\x07", "a\nb"])
def test_names_are_plain_text_in_files(name: str) -> None:
    plain = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")  # as figures escape them for plotly
    one = figure(plain, plain).add_scatter(x=[1], y=[1], name="other", text=[plain], mode="markers+text")
    svg = vector.svg(one)
    tree = ElementTree.fromstring(svg)
    assert not [node for node in tree.iter() if node.tag.removeprefix(SVG) in {"script", "img", "b"}]
    expected = re.sub(r"[\x00-\x1f]+", " ", name)
    assert sum(words == expected for words in texts(svg)) == 3  # title, legend, beside its point
    assert rows(one)[0]["series"] == expected


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(ValueError, match="'violin' cannot be drawn: expected one of scatter, bar, heatmap"):
        vector.svg(go.Figure([go.Violin(y=[1, 2])]))
