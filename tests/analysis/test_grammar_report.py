"""The page of a grammar study says what its tables hold: on made-up ones, whole, in part, hostile and broken."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest

from nextstate.analysis import grammar_figures, grammar_heatmaps, grammar_report
from nextstate.analysis.grammar_tables import SCHEMAS, GrammarRun, load, published, published_robustness, support
from nextstate.analysis.page.formats import big, percents, short
from nextstate.analysis.page.page import render
from nextstate.analysis.tables import RunError
from nextstate.envs.grammar.grammar import Grammar
from tests.pages import data, loads_nothing, markup, places, shown

EVIL = "</script><img src=x onerror=\"document.title='owned'\">|'a"
RULES = (
    "22 -> 21 20 | 20 19\n19 -> 16 17 18 | 17 18 16\n20 -> 17 16 18 | 16 17\n21 -> 18 16 | 16 18 17\n"
    "16 -> 15 13 | 13 15 14\n17 -> 14 13 15 | 15 13 14\n18 -> 15 14 13 | 14 13\n13 -> 11 12 | 12 11\n"
    "14 -> 11 10 12 | 10 11 12\n15 -> 12 11 10 | 11 12 10\n10 -> 7 9 8 | 9 8 7\n11 -> 8 7 9 | 7 8 9\n"
    "12 -> 8 9 7 | 9 7 8\n7 -> 3 1 | 1 2 3\n8 -> 3 2 | 3 1 2\n9 -> 3 2 1 | 2 1\n"
)
MODELS: dict[str, tuple[str, bool, str, float]] = {  # architecture, untrained, perturbation, share of strings
    "rotary": ("rotary", False, "", 0.0),
    "absolute": ("absolute", False, "", 0.0),
    "masked": ("masked", False, "", 0.0),
    "random": ("rotary", True, "", 0.0),
    **{f"rotary, {kind} {share:g} at {rate:g}": ("rotary", False, kind, share)
       for kind, rate in (("token", 0.15), ("symbol", 0.1), ("permutation", 0.05)) for share in (0.1, 0.5, 1.0)},
}  # fmt: skip
LEVELS, LAYERS, HEADS = range(2, 7), 3, 4


def wilson(right: int, n: int) -> tuple[float, float]:
    p, z = right / n, 1.96
    middle, half = p + z * z / 2 / n, z * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return float((middle - half) / (1 + z * z / n)), float((middle + half) / (1 + z * z / n))


def info(name: str = "cfg3b", rules: str = RULES) -> dict[str, Any]:
    levels = [list(level) for level in Grammar.read(RULES).levels]
    return {
        "name": "made-up", "config": {"name": "made-up", "seed": 0, "grammar": name}, "config_hash": "0" * 64,
        "seed": 0,
        "command": "nextstate grammar made-up", "started": "2026-01-01T00:00:00+00:00", "finished": None,
        "seconds": 1234.5, "versions": {"nextstate": "0.0", "torch": "2.8"}, "hardware": {"cpu": "one", "cores": 2},
        "agents": [], "settings": [], "left_out": [], "remarks": ["masked writes no strings"],
        "grammar": {
            "name": name, "rules": rules, "levels": levels, "states": "12" + "7" * 90, "strings": None,
            "length_mean": 275.6, "length_sd": 41.7, "length_min": 138, "length_max": 432, "derivation_bits": 169.2,
            "string_bits": 169.2,
        },
    }  # fmt: skip


def tables(models: dict[str, tuple[str, bool, str, float]] = MODELS, seed: int = 0) -> dict[str, pl.DataFrame]:
    """Make every table of a run, with what the paper would lead one to expect."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in SCHEMAS}
    rates = {"": 0.0, "token": 0.15, "symbol": 0.1, "permutation": 0.05}
    for k, (name, (kind, untrained, perturbation, share)) in enumerate(models.items()):
        steps = 0 if untrained else 5000
        tokens = steps * 96 * 512
        rows["models"].append((name, kind, untrained, perturbation, share, rates[perturbation], 86_000_000 + k, steps,
                               tokens, 0.0 if untrained else 1800.0 + k, 0.0 if untrained else tokens / (1800.0 + k),
                               None if untrained else 0.41, "NVIDIA H100"))  # fmt: skip
        writes = kind != "masked"
        if not untrained and not perturbation:
            for step in (0, 50, 200, 800, 2000, 5000):
                done = 1 - np.exp(-step / (600 + 300 * k))
                accuracy, kl = (float(done**3), float(1.2 * (1 - done) + 2e-4)) if writes else (None, None)
                rows["curve"].append((name, step, step * 96 * 512, float(1.1 - 0.7 * done), accuracy, kl))
        for prefix, given in (("nothing", 0), ("clean", 50), ("corrupted", 50)):
            for temperature in (0.1, 1.0):
                if not writes or (untrained and prefix != "nothing"):
                    continue
                if untrained:
                    p = 0.0
                elif prefix == "corrupted":
                    p = (0.3 if not perturbation else 0.8 - rates[perturbation]) if temperature < 1 else 0.004
                    p = 0.3 if not perturbation else p
                else:
                    p = 0.9975 - 0.02 * k * (not perturbation) if temperature == 1 else 1.0
                    p *= (1 - share) if temperature == 1 else 1.0
                right = int(rng.binomial(2000, p))
                rows["generation"].append((name, prefix, given, temperature, 2000, right, right / 2000,
                                           *wilson(right, 2000)))  # fmt: skip
        if writes and not untrained:
            bits, kl = 169.3 + 3 * k, 9e-5 * (1 + 4 * k) * (1 + 100 * share)
            rows["diversity"].append((name, 2000, 1990 - k, bits, bits - 1.2, bits + 1.2, 169.2, 1990 - k, 0, 1e-9, kl,
                                      kl * 0.8, kl * 1.3))  # fmt: skip
        if perturbation:
            continue
        for reach in ("full", "tridiagonal", "diagonal"):
            for target, where in (("ancestor", "all"), ("ancestor", "ends"), ("boundary", "all")):
                for shuffled in (False, True) if name == "rotary" and reach == "full" else (False,):
                    for level in LEVELS:
                        best = 0.86 - 0.05 * (6 - level) if untrained else 0.45 if shuffled else 1 - 0.002 * (6 - level)
                        p = best - (0.0 if reach == "full" or where == "ends" else 0.06)
                        p = float(p - 0.01 * rng.random())
                        chance = 0.36 if target == "ancestor" else 0.8
                        rows["probes"].append((name, LAYERS, reach, shuffled, target, level, where, p, p - 0.004,
                                               p + 0.004, chance, 55_000, 200))  # fmt: skip
        for layer in range(LAYERS):
            for head in range(HEADS):
                scale, strength = 3.0 ** (1 + head), (0.0 if untrained else 0.004 * (1 + layer) / LAYERS)
                weight = np.exp(-np.arange(300) / scale)
                rows["attention-profile"] += [
                    (name, layer, head, d, float(w)) for d, w in enumerate(weight / weight.sum())
                ]
                for level in LEVELS:
                    noise = rng.normal(0, 1e-4, 5 + 9)
                    for i, delta in enumerate(range(-2, 3)):
                        value = (strength * (8 - level) if delta == 0 else -0.2 * strength) + noise[i]
                        rows["attention-ends"].append((name, layer, head, level, delta, float(value), 90_000))
                    for i, (a, b) in enumerate((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
                        value = (strength * 2 if a == b == 0 else -0.1 * strength) + noise[5 + i]
                        rows["attention-pairs"].append((name, layer, head, level, a, b, float(value), 30_000))
        for level in LEVELS:
            peak = 0.0 if untrained else 0.003 * (8 - level)
            rows["attention-peaks"].append((name, level, peak, peak - 4e-4, peak + 4e-4, 90_000))
        for a in LEVELS:
            for b in LEVELS:
                for r in range(0 if a != b else 1, 5):
                    value = (0 if untrained else 0.02) / (1 + r) ** 2 + rng.normal(0, 1e-4)
                    rows["attention-adjacent"].append((name, a, b, r, float(value), float(value) - 3e-4,
                                                       float(value) + 3e-4, 8_000))  # fmt: skip
    return {name: pl.DataFrame(rows[name], schema=SCHEMAS[name], orient="row") for name in SCHEMAS}


def lay(path: Path, told: dict[str, Any], made: dict[str, pl.DataFrame]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "run.json").write_text(json.dumps(told), encoding="utf-8")
    for name, rows in made.items():
        rows.write_parquet(path / f"{name}.parquet")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay(tmp_path_factory.mktemp("grammar") / "run", info(), tables())


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return grammar_report.write(folder).read_text(encoding="utf-8")


def rendered(run: GrammarRun) -> str:
    return render(grammar_report.make_page(run), run.info)


def drawn(page: str) -> list[dict[str, Any]]:
    return list(data(page, "figures").values())


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    above = markup(page)
    assert page.count("</script>") == 3
    assert loads_nothing(page)
    assert places(page) == sorted(data(page, "figures"))
    for anchor in re.findall(r'href="#(\w+)"', above):
        assert f'<section id="{anchor}">' in above
    assert re.findall(r'<section id="(\w+)">', above) == [
        "grammar", "generation", "probes", "attention", "robustness", "run", "words"
    ]  # fmt: skip
    assert "Not here yet" not in above


def test_the_headline_says_the_numbers_of_the_tables(folder: Path, page: str) -> None:
    made, text = tables(), shown(page)
    (own,) = made["generation"].filter(name="rotary", prefix="nothing", temperature=1.0).rows(named=True)
    assert f"{percents(own['accuracy'])} of what rotary writes from nothing is in the grammar" in text
    told = grammar_report.headline(load(folder))
    assert [row["name"] for row in told["written"]] == ["rotary", "absolute"]
    assert [row["name"] for row in told["kl"]] == ["rotary", "absolute"]
    assert "9 × 10⁻⁵ nats off the exact ones" in text
    probes = made["probes"].filter(reach="full", target="ancestor", where="all")
    levels = probes.filter(name="random")["accuracy"]
    assert told["probes"]["random"]["mean"] == pytest.approx(levels.mean())
    assert told["probes"]["shuffled"]["mean"] == pytest.approx(probes.filter(shuffled=True)["accuracy"].mean())
    best = told["probes"]["models"][0]
    own_levels = probes.filter(name=best["name"], shuffled=False)
    assert best["low"] == own_levels["accuracy"].min()
    assert best["hardest"] == own_levels.sort("accuracy")["level"][0]
    assert told["probes"]["beyond"] == 5
    ends = {one["name"]: one for one in told["ends"]}
    residual = made["attention-ends"].filter(name="rotary")
    assert ends["rotary"]["at"] == pytest.approx(residual.filter(delta=0)["residual"].mean())
    assert ends["rotary"]["beside"] == pytest.approx(residual.filter(pl.col("delta") != 0)["residual"].mean())
    assert ends["rotary"]["peaks"] == ends["rotary"]["levels"] == 5
    assert abs(ends["random"]["at"]) < 1e-4
    assert "At all 5 levels attention is highest at the ends of constituents: in " in text
    assert told["perturbed"]["best"]["name"].startswith("rotary, permutation")
    assert told["perturbed"]["clean"]["name"] == "rotary"


def test_what_controls_give_as_well_is_not_claimed(tmp_path: Path) -> None:
    made = tables()
    known = (pl.col("name") == "random") & (pl.col("level") < 4)
    equal = made["probes"].with_columns(pl.when(known).then(1.0).otherwise(pl.col("high")).alias("high"))
    run = load(lay(tmp_path / "a", info(), made | {"probes": equal}))
    assert grammar_report.headline(run)["probes"]["beyond"] == 3
    assert "at 3 of 5 levels: 99.1" in shown(rendered(run))
    none = made["probes"].with_columns(high=pl.lit(1.0))
    text = shown(rendered(load(lay(tmp_path / "b", info(), made | {"probes": none}))))
    assert "No more of the ancestors can be read from" in text
    alone = made["probes"].filter(~pl.col("shuffled"), pl.col("name") != "random")
    text = shown(rendered(load(lay(tmp_path / "c", info(), made | {"probes": alone}))))
    assert "without a control: 99" in text


def test_the_deepest_layer_is_told(tmp_path: Path) -> None:
    made = tables()
    own = made["probes"].filter(name="rotary")
    last = own.with_columns(layer=pl.lit(-1, dtype=pl.Int64), accuracy=pl.lit(0.5))
    first = own.with_columns(layer=pl.lit(0, dtype=pl.Int64), accuracy=pl.lit(0.9))
    for parts, expected in (([first, last], 0.5), ([first, own.with_columns(accuracy=pl.lit(0.7))], 0.7)):
        run = load(lay(tmp_path, info(), made | {"probes": pl.concat(parts)}))
        assert run.probed is not None
        assert set(run.probed["accuracy"]) == {expected}


def test_attention_that_shuns_ends_is_said_so(tmp_path: Path) -> None:
    made = tables()
    turned = made["attention-ends"].with_columns(residual=-pl.col("residual").abs() * (pl.col("delta") == 0))
    text = shown(rendered(load(lay(tmp_path, info(), made | {"attention-ends": turned}))))
    assert "At none of the levels attention is highest" in text


def test_each_section_has_its_numbers(page: str) -> None:
    text, made = shown(page), tables()
    assert "1.3 × 10⁹¹" in text
    assert "7, of 1, 3, 3, 3, 3, 3, 3 symbols" in text
    assert "22 -> 21 20 | 20 19" in text
    figures = drawn(page)
    maps = [f["data"][0] for f in figures if f["data"][0]["type"] == "heatmap"]
    probes = [m for m in maps if m["x"] == [str(level) for level in LEVELS] and m.get("zmin") == 0]
    assert len(probes) == 9
    rotary = made["probes"].filter(name="rotary", reach="full", shuffled=False, target="ancestor", where="all")
    assert probes[0]["z"][0] == pytest.approx(rotary.sort("level")["accuracy"].to_list(), rel=1e-4)
    assert probes[0]["z"][1] == [1] * 5  # the paper's row of cfg3b, under ours
    ends = next(m for m in maps if m["x"] == ["−2", "−1", "0", "+1", "+2"])
    means = [made["attention-ends"].filter(name="rotary", level=level, delta=0)["residual"].mean() for level in LEVELS]
    assert [line[2] for line in ends["z"]] == pytest.approx(means, rel=1e-4)
    assert ends["zmin"] == -ends["zmax"]
    pairs = next(m for m in maps if len(m["x"]) == 2 and isinstance(m["x"][0], list))
    middle = made["attention-pairs"].filter(name="rotary", level=2, delta_query=0, delta_key=0)["residual"].mean()
    assert pairs["z"][1][1] == pytest.approx(middle, rel=1e-4)
    for number in ("86,000,000", "41\u202f%", "NVIDIA H100", "245,760,000", "nextstate grammar made-up", "1,990",
                   "masked writes no strings"):  # fmt: skip
        assert number in text, number
    assert "≥ 2.0 × 10⁶" in text  # 1990² / 2


def test_the_paper_stands_beside_its_own_grammars_only(tmp_path: Path, folder: Path) -> None:
    marks = [t.name for t in grammar_figures.generation(load(folder), "x").data]  # type: ignore[union-attr]
    assert "rotary, from nothing, paper" in marks
    other = load(lay(tmp_path, info("drawn"), tables()))
    text = shown(rendered(other))
    assert "it reports nothing of this grammar" in text
    assert "paper" not in [t.name for t in grammar_figures.generation(other, "x").data]  # type: ignore[union-attr]
    assert not any("paper" in str(t.name) for t in grammar_figures.robustness(other, "nothing", 1.0, "x").data)  # type: ignore[union-attr]


def test_what_the_paper_reports() -> None:
    found = published("cfg3f")
    assert found is not None
    assert found.accuracy["nothing"] == pytest.approx(
        {"absolute": 0.571, "relative": 0.988, "rotary": 0.976, "position": 0.939, "uniform": 0.928}
    )
    assert found.kl["absolute"] == pytest.approx(0.00455)
    assert found.bits["rotary"] == 272
    assert found.probes["full", "all"]["masked"] == pytest.approx({6: 1, 5: 0.996, 4: 0.963, 3: 0.84, 2: 0.775})
    assert found.probes["diagonal", "ends"]["random"][2] == pytest.approx(0.776)
    assert published("drawn") is None
    for name in ("cfg3b", "cfg3i", "cfg3h", "cfg3g", "cfg3f", "cfg3e1", "cfg3e2"):
        one = published(name)
        assert one is not None
        assert all(0.5 < x <= 1 for rows in one.accuracy.values() for x in rows.values())
        assert all(4e-5 <= x <= 5e-3 for x in one.kl.values())
        assert all(set(r) == set(LEVELS) for rows in one.probes.values() for r in rows.values())
    robust = published_robustness("cfg3b", "corrupted", 0.1)
    assert robust[""] == {0.0: 0.3}
    assert robust["token"][1.0] == pytest.approx(0.826)
    assert robust["permutation"][0.1] == pytest.approx(0.569)
    assert published_robustness("cfg3f", "corrupted", 0.1) == published_robustness("cfg3b", "clean", 0.2) == {}


def test_robustness_draws_a_line_a_kind_and_the_clean_model(folder: Path) -> None:
    run = load(folder)
    assert grammar_figures.panels(run) == [(p, t) for p in ("nothing", "clean", "corrupted") for t in (0.1, 1.0)]
    figure = grammar_figures.robustness(run, "nothing", 1.0, "x")
    assert figure is not None
    lines = {t.name: t for t in figure.data}
    rows = run.tables["generation"].filter(prefix="nothing", temperature=1.0)
    token = lines["rotary, token at 0.15"]
    assert list(token.x) == [0.1, 0.5, 1.0]
    assert list(token.y) == [
        rows.filter(name=f"rotary, token {share:g} at 0.15")["accuracy"][0] for share in (0.1, 0.5, 1.0)
    ]
    assert list(lines["rotary"].y) == [rows.filter(name="rotary")["accuracy"][0]] * 2
    assert "absolute" not in lines  # no perturbed model of its kind
    assert list(lines["token, paper"].y) == pytest.approx([0.925, 0.141, 0])


def test_a_model_keeps_its_colour(folder: Path) -> None:
    run = load(folder)
    look = grammar_figures.styles(run)
    assert len({(s.colour, s.dash) for n, s in look.items()}) == len(look)
    for figure in (grammar_figures.generation(run, "x"), grammar_figures.divergence(run, "x"),
                   grammar_figures.curve(run, "kl", "x", "y")):  # fmt: skip
        assert figure is not None
        for trace in figure.data:
            assert trace.marker.color in (None, look[trace.name.split(", ")[0]].colour)
            assert trace.line.color in (None, look[trace.name.split(", ")[0]].colour)
    twice = {"one": MODELS["rotary"], "two": MODELS["rotary"], "three": MODELS["random"]}
    again = grammar_figures.styles(load(lay(folder.parent / "twice", info(), tables(twice))))
    assert len({s.colour for s in again.values()}) == 3


ANCHORS = {
    "generation": "written strings", "curve": "learning curves", "diversity": "diversity and divergence",
    "probes": "probes", "attention-profile": "attention by distance", "attention-ends": "attention to ends",
    "attention-peaks": "attention to ends against tokens beside them",
    "attention-pairs": "attention from end to end", "attention-adjacent": "attention between neighbours",
}  # fmt: skip


@pytest.mark.parametrize("gone", [[name] for name in ANCHORS] + [list(ANCHORS)])
def test_what_is_absent_is_left_out_and_said(tmp_path: Path, gone: list[str]) -> None:
    made = {name: rows for name, rows in tables().items() if name not in gone}
    page = grammar_report.write(lay(tmp_path, info(), made)).read_text(encoding="utf-8")
    above = markup(page)
    said = re.search(r"Not here yet: (.*?)\.</p>", above)
    assert said is not None
    assert said[1] == ", ".join(ANCHORS[name] for name in gone)
    headings = {"generation": "Written strings that", "curve": "Learning curves", "diversity": "Diversity</h3>",
                "probes": 'id="probes"', "attention-profile": "By distance", "attention-ends": "To the ends of",
                "attention-peaks": "Ends against the tokens",
                "attention-pairs": "From end to end", "attention-adjacent": "Between neighbours"}  # fmt: skip
    for name, words in headings.items():
        assert (words in above) == (name not in gone), name
    assert ('id="robustness"' in above) == ("generation" not in gone)
    assert ('id="attention"' in above) == (len(gone) == 1)
    assert 'id="run"' in above


def test_what_was_not_asked_for_is_not_missed(tmp_path: Path) -> None:
    made = {name: rows for name, rows in tables().items() if name != "probes" and not name.startswith("attention")}
    told = info()
    told["config"] = told["config"] | {"probes": None, "attention": None}
    assert not load(lay(tmp_path, told, made)).absent


def test_without_perturbed_models_there_is_no_robustness(tmp_path: Path) -> None:
    made = tables({name: model for name, model in MODELS.items() if not model[2]})
    run = load(lay(tmp_path, info(), made))
    assert 'id="robustness"' not in rendered(run)
    assert grammar_report.headline(run)["perturbed"] is None


@pytest.mark.parametrize(
    "which", [["masked"], ["random"], ["rotary, token 0.5 at 0.15"], ["random", "rotary, token 1 at 0.15"]]
)
def test_any_few_models_make_a_page(tmp_path: Path, which: list[str]) -> None:
    run = load(lay(tmp_path, info(), tables({name: MODELS[name] for name in which})))
    text = shown(rendered(run))
    assert all(name in text for name in which)
    assert grammar_report.headline(run)["written"] == []
    assert all(isinstance(value, go.Figure | int | float) for value in grammar_report.mirrored(run).values())


def test_empty_tables_and_numbers_that_are_none(tmp_path: Path) -> None:
    made = tables()
    nan = {"kl": float("nan"), "bits": float("inf"), "kl_low": None, "equal_pairs_expected": float("nan")}
    made["diversity"] = made["diversity"].with_columns(pl.lit(v, dtype=pl.Float64).alias(k) for k, v in nan.items())
    made["attention-ends"] = made["attention-ends"].with_columns(
        residual=pl.when(pl.col("level") == 2).then(None).otherwise(pl.col("residual"))
    )
    made["probes"] = made["probes"].clear()
    run = load(lay(tmp_path, info(), made))
    text = rendered(run)
    assert "Divergence</h3>" not in text
    assert "nan" not in shown(text).lower()
    assert run.absent == ["probes"]
    assert grammar_report.headline(run)["ends"][0]["levels"] == 4


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    models = {
        EVIL: MODELS["rotary"],
        f"{EVIL} 2": MODELS["rotary, token 0.1 at 0.15"],
        "<b>&lt;random": MODELS["random"],
    }
    told = info(EVIL, f"{EVIL} -> a b | c")
    told |= {"name": EVIL, "command": EVIL, "remarks": [EVIL], "versions": {EVIL: EVIL}, "config": {EVIL: EVIL}}
    page = rendered(load(lay(tmp_path, told, tables(models))))
    assert page.count("</script>") == 3
    assert "<img" not in markup(page)
    assert "<b>random" not in markup(page)
    assert EVIL in shown(page)
    for figure in drawn(page):
        for trace in figure["data"]:
            assert "<img" not in json.dumps(trace)
        assert "<img" not in json.dumps(figure["layout"])
    titles = [html.unescape(x) for x in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    assert {EVIL, "<b>&lt;random"} <= set(titles)
    assert "<b><random" not in titles


def broken(path: Path, how: str) -> None:
    told, made = info(), tables({"rotary": MODELS["rotary"]})
    if how == "no models":
        made.pop("models")
    elif how == "two of a name":
        made["models"] = pl.concat([made["models"]] * 2)
    elif how == "no column":
        made["probes"] = made["probes"].drop("chance", "tokens")
    elif how == "foreign":
        made["curve"] = made["curve"].with_columns(name=pl.lit("another"))
    elif how == "value":
        made["generation"] = made["generation"].with_columns(prefix=pl.lit("dirty"))
    elif how == "kind":
        made["curve"] = made["curve"].with_columns(step=pl.lit("many"))
    elif how == "null":
        made["attention-ends"] = made["attention-ends"].with_columns(level=pl.lit(None, dtype=pl.Int64))
    elif how == "no grammar":
        told.pop("grammar")
    elif how == "no rules":
        told["grammar"].pop("rules")
    elif how == "states":
        told["grammar"]["states"] = "1e9"
    elif how == "length":
        told["grammar"]["length_mean"] = "long"
    elif how == "list":
        told = []  # type: ignore[assignment]
    lay(path, told, made)
    if how == "torn":
        (path / "curve.parquet").write_bytes(b"PAR1 and no more")
    elif how == "torn json":
        (path / "run.json").write_text('{"name": ')


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no models", r"there is no models\.parquet in it"),
        ("two of a name", "each with a name of its own"),
        ("no column", r"probes\.parquet lacks the columns chance, tokens"),
        ("foreign", r"curve\.parquet is about 'another', which models\.parquet does not have"),
        ("value", "prefix='dirty' is not possible: expected one of .*corrupted"),
        ("kind", r"curve\.parquet has values of another kind"),
        ("null", "column level has .* missing values"),
        ("no grammar", "lacks grammar"),
        ("no rules", r"lacks grammar\.rules"),
        ("states", r"grammar\.states='1e9', expected a whole number"),
        ("length", r"grammar\.length_mean='long', expected a finite number"),
        ("list", r"run\.json: expected it to be an object"),
        ("torn", r"curve\.parquet cannot be read"),
        ("torn json", "is not the folder of a grammar study"),
    ],
)
def test_broken_folders_are_refused(tmp_path: Path, how: str, message: str) -> None:
    broken(tmp_path, how)
    with pytest.raises(RunError, match=message):
        load(tmp_path)


def test_a_folder_that_is_none() -> None:
    with pytest.raises(RunError, match="nowhere is not the folder of a grammar study"):
        grammar_report.write(Path("nowhere"))


def test_what_is_mirrored(folder: Path) -> None:
    out = grammar_report.mirrored(load(folder))
    made = tables()
    own = made["generation"].filter(name="rotary", prefix="nothing", temperature=1.0)["accuracy"][0]
    assert out["summary/rotary/accuracy_nothing"] == own
    assert out["summary/rotary/kl"] == pytest.approx(9e-5)
    assert out["summary/rotary-token-0.1-at-0.15/accuracy_corrupted".replace("rotary-", "rotary,-")] < 0.02
    assert {f"summary/random/ancestor_{level}" for level in LEVELS} <= out.keys()
    assert out["summary/rotary/attention_at"] > 0.01
    assert {
        "figures/generation", "figures/divergence", "figures/curve_accuracy", "figures/curve_kl", "figures/curve_loss",
        "figures/probes_ancestor_all_full", "figures/probes_boundary_all_diagonal", "figures/attention_profile_rotary",
        "figures/attention_ends_masked", "figures/attention_depth_rotary", "figures/attention_pairs_random",
        "figures/attention_adjacent_absolute", "figures/robustness_corrupted_0.1",
    } <= out.keys()  # fmt: skip
    for key, value in out.items():
        assert isinstance(value, go.Figure if key.startswith("figures/") else int | float), key


def test_the_profile_keeps_the_mean_of_each_bin(folder: Path) -> None:
    rows = load(folder).tables["attention-profile"].filter(name="rotary")
    trace = grammar_heatmaps.profile(rows, "x").data[0]
    assert list(trace.x)[:8] == ["0", "1", "2", "3", "4", "6", "8", "11"]
    at = list(trace.y).index("1.2")
    own = rows.filter(pl.col("layer") == 1, pl.col("head") == 2, pl.col("distance").is_between(8, 10))
    assert trace.z[at][6] == pytest.approx(np.log10(own["weight"].mean()), rel=1e-3)
    assert [name.split(".")[1] for name in list(trace.y)[:HEADS]] == ["0", "1", "2", "3"]  # nearest first
    both = pl.concat([rows, rows.filter(pl.col("distance") > 0).with_columns(distance=-pl.col("distance"))])
    ahead = list(grammar_heatmaps.profile(both, "x").data[0].x)
    assert ahead[: ahead.index("0")] == [f"−{x}" for x in ahead[: ahead.index("0") : -1]]


def test_support_is_near_what_birthdays_say() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.integers(1000, size=400)
    _, count = np.unique(drawn, return_counts=True)
    assert support(400, int((count * (count - 1) // 2).sum())) == pytest.approx(1000, rel=0.35)
    assert support(20_000, 0) == 2e8


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "100"), (0.998, "99.8"), (0.99996, "99.996"), (0.0002, "0.02"), (0.0, "0"), (0.5, "50"), (None, "–")],
)
def test_shares_are_not_taken_for_all_or_nothing(value: float | None, text: str) -> None:
    assert percents(value).removesuffix("\u202f%") == text


def test_numbers_of_any_size() -> None:
    assert [big(x) for x in ("0", "1234", "9" * 10, "12" + "0" * 500, 200_000_000.0)] == [
        "0", "1,234", "1.0 × 10¹⁰", "1.2 × 10⁵⁰¹", "2.0 × 10⁸"
    ]  # fmt: skip
    assert [short(x) for x in (9e-5, 0.00045, 0.0045, -0.1, 0.0, None)] == [
        "9 × 10⁻⁵", "4.5 × 10⁻⁴", "0.0045", "−0.1", "0", "–"
    ]  # fmt: skip
