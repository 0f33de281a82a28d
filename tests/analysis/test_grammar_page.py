"""The page of a grammar study says what its tables hold: on made-up ones, whole, in part, and with hostile names."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from nextstate.analysis.grammar import figures, heatmaps
from nextstate.analysis.grammar import page as pages
from nextstate.analysis.grammar.config import GrammarConfig
from nextstate.analysis.grammar.paper import published, published_robustness
from nextstate.analysis.grammar.study import GrammarStudy
from nextstate.analysis.grammar.tables import SCHEMAS, Summary, binned, support
from nextstate.analysis.page.formats import big, percents, short
from nextstate.analysis.page.page import render
from nextstate.analysis.progress import Progress
from nextstate.analysis.run import Run, open_record
from nextstate.analysis.stats import wilson
from nextstate.envs.files import slug
from tests.pages import data, loads_nothing, markup, places, shown

EVIL = "</script><img src=x onerror=\"document.title='owned'\">|'a"
MODELS: dict[str, tuple[str, bool, str, float]] = {  # architecture, untrained, perturbation, share of strings
    "rotary": ("rotary", False, "", 0.0),
    "absolute": ("absolute", False, "", 0.0),
    "masked": ("masked", False, "", 0.0),
    "random": ("rotary", True, "", 0.0),
    **{f"rotary, {kind} {share:g} at {rate:g}": ("rotary", False, kind, share)
       for kind, rate in (("token", 0.15), ("symbol", 0.1), ("permutation", 0.05)) for share in (0.1, 0.5, 1.0)},
}  # fmt: skip
LEVELS, LAYERS, HEADS = range(2, 7), 3, 4
RATES = {"": 0.0, "token": 0.15, "symbol": 0.1, "permutation": 0.05}
Tables = dict[str, pl.DataFrame]


def tables(models: dict[str, tuple[str, bool, str, float]] = MODELS, seed: int = 0) -> dict[str, pl.DataFrame]:
    """Make every table of a run, with what the paper would lead one to expect."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in SCHEMAS}
    for k, (name, (kind, untrained, perturbation, share)) in enumerate(models.items()):
        steps = 0 if untrained else 5000
        tokens = steps * 96 * 512
        rows["training"].append((name, 86_000_000 + k, steps, tokens, 1, "0" * 64))
        seconds = 0.0 if untrained else 1800.0 + k
        speed = None if untrained else tokens / seconds
        rows["speed"].append((name, seconds, speed, None if untrained else 0.41, "NVIDIA H100"))
        writes = kind != "masked"
        if not untrained and not perturbation:
            for step in (0, 50, 200, 800, 2000, 5000):
                done = 1 - np.exp(-step / (600 + 300 * k))
                accuracy, kl = (float(done**3), float(1.2 * (1 - done) + 2e-4)) if writes else (None, None)
                rows["curve"].append((name, step, step * 96 * 512, float(1.1 - 0.7 * done), accuracy, kl))
        for prefix, given in (("nothing", 0), ("clean", 50), ("corrupted", 50)):
            for temperature in (0.1, 1.0):
                if not writes or untrained:
                    continue
                if prefix == "corrupted":
                    p = (0.3 if not perturbation else 0.8 - RATES[perturbation]) if temperature < 1 else 0.004
                    p = 0.3 if not perturbation else p
                else:
                    p = 0.9975 - 0.02 * k * (not perturbation) if temperature == 1 else 1.0
                    p *= (1 - share) if temperature == 1 else 1.0
                rows["generation"].append((name, prefix, given, temperature, 2000, int(rng.binomial(2000, p))))
        if writes and not untrained:
            bits, kl = 169.3 + 3 * k, 9e-5 * (1 + 4 * k) * (1 + 100 * share)
            rows["diversity"].append((name, 2000, 1990 - k, bits, bits - 1.2, bits + 1.2, 169.2, 1990 - k, 0, 1e-9, kl,
                                      kl * 0.8, kl * 1.3))  # fmt: skip
            for level in range(1, 7):
                possible = 2 if level == 6 else None
                rows["symbols"].append((name, level, f"s{level}", 900, 800, 2, 2, possible, 0.98, 0.97, 1.0, 1.0))
        if perturbation:
            continue
        auc = 0.5 if untrained else 0.9
        rows["embeddings"].append((name, auc, auc - 0.02, auc + 0.02, 0.4 if untrained else 0.001, 0.3, 0.1, 30))
        for one, two in ((a, b) for a in ("7", "8", "7 8") for b in ("7", "8", "7 8")):
            rows["similarity"].append((name, one, two, 0.3 if one == two else -0.1, 90))
        for step, gain in ((500, None), (1000, 0.1), (2000, 0.0)):
            for level in LEVELS:
                p = 0.8 if step == 500 else 0.9
                ends = (None, None) if gain is None else (gain - 0.01, gain + 0.01)
                rows["probe-curve"].append((name, step, LAYERS, "full", False, "ancestor", level, "all", p, p - 0.01,
                                            p + 0.01, gain, *ends))  # fmt: skip
        spread = 1.1 if untrained else 40.0
        rows["attention-scales"].append((name, 2.0, 120.0, spread, 0.9 * spread, 1.1 * spread, 0.7, 0.68, 0.72, 100))
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
                rows["attention-heads"].append((name, layer, head, scale, scale * 0.9, scale * 1.1, 0.7))
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
        for level in (*LEVELS, None):
            for k, table in enumerate(("centres", "falls"), start=1):
                peak = 0.0 if untrained else 0.002 * k
                rows[f"attention-{table}"].append((name, level, peak, peak - 4e-4, peak + 4e-4, 9_000))
        rows["attention-peaks"].append((name, None, 0.0 if untrained else 0.01, -4e-4, 0.0104, 450_000))
        for a in LEVELS:
            for b in LEVELS:
                for r in range(0 if a != b else 1, 5):
                    value = (0 if untrained else 0.02) / (1 + r) ** 2 + rng.normal(0, 1e-4)
                    rows["attention-adjacent"].append((name, a, b, r, float(value), float(value) - 3e-4,
                                                       float(value) + 3e-4, 8_000))  # fmt: skip
    return {name: pl.DataFrame(rows[name], schema=SCHEMAS[name], orient="row") for name in SCHEMAS}


def config_of(models: dict[str, tuple[str, bool, str, float]], **grammar: Any) -> GrammarConfig:
    specs: list[dict[str, Any]] = []
    for name, (architecture, untrained, kind, share) in models.items():
        specs.append({"name": name, "architecture": architecture, "untrained": untrained})
        if kind:
            specs[-1]["perturbation"] = {"kind": kind, "fraction": share, "rate": RATES[kind]}
    writing = {"kinds": ["nothing", "clean", "corrupted"], "temperatures": [0.1, 1.0]}
    return GrammarConfig(name="made-up", grammar=grammar, models=specs, writing=writing)  # type: ignore[arg-type]


def make(
    path: Path,
    models: dict[str, tuple[str, bool, str, float]] = MODELS,
    change: Callable[[Tables], Tables] = lambda made: made,
    **grammar: Any,
) -> Run[GrammarConfig]:
    """Return a run with made-up tables, changed before they are kept, and their summary; of cfg3b by default."""
    config, study = config_of(models, **grammar or {"grammar": "cfg3b"}), GrammarStudy()
    record = open_record(study.name, config, path, "nextstate grammar made-up", Progress())
    run = Run(path, config, record)
    for part, rows in change(tables(models)).items():
        for own in rows.partition_by("name"):
            run.keep(f"{part}/{slug(own['name'][0])}", own, {})
    for name, frame in study.summarise(run).items():
        run.keep(f"summary/{name}", frame, {})
    return run


def rendered(run: Run[GrammarConfig]) -> str:
    return render(GrammarStudy().page(run), run.record)


def summary_of(run: Run[GrammarConfig]) -> Summary:
    return Summary(run.summaries())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run[GrammarConfig]:
    run = make(tmp_path_factory.mktemp("grammar") / "run")
    run.warn("masked writes no strings")
    return run


@pytest.fixture(scope="module")
def page(whole: Run[GrammarConfig]) -> str:
    return rendered(whole)


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
        "grammar", "paper", "generation", "probes", "embeddings", "attention", "robustness", "run", "words"
    ]  # fmt: skip


def test_the_first_lines_say_the_numbers_of_the_tables(whole: Run[GrammarConfig], page: str) -> None:
    made, text = tables(), shown(page)
    (own,) = made["generation"].filter(name="rotary", prefix="nothing", temperature=1.0).rows(named=True)
    share = percents(own["right"] / 2000)
    assert f"{share} of the strings that rotary generates from nothing are in the grammar" in text
    low, high = wilson(np.array([own["right"]]), np.array([2000.0]))[:, 0]
    assert f"({percents(low)} to {percents(high)})" in text
    first = pages.headline(summary_of(whole))
    assert [row["name"] for row in first["written"]] == ["rotary", "absolute"]
    assert [row["name"] for row in first["kl"]] == ["rotary", "absolute"]
    assert "next-token distribution is 9 × 10⁻⁵ nats per token" in text
    probes = made["probes"].filter(reach="full", target="ancestor", where="all")
    levels = probes.filter(name="random")["accuracy"]
    assert first["probes"]["random"]["mean"] == pytest.approx(levels.mean())
    assert first["probes"]["shuffled"]["mean"] == pytest.approx(probes.filter(shuffled=True)["accuracy"].mean())
    best = first["probes"]["best"]
    own_levels = probes.filter(name=best["name"], shuffled=False)
    assert best["least"] == own_levels["accuracy"].min()
    assert best["hardest"] == own_levels.sort("accuracy")["level"][0]
    assert first["probes"]["random_at_hardest"] == probes.filter(name="random", level=best["hardest"])["accuracy"][0]
    assert (best["beyond"], best["levels"]) == (5, 5)
    ends = {one["name"]: one for one in first["ends"]}
    residual = made["attention-ends"].filter(name="rotary")
    assert ends["rotary"]["at"] == pytest.approx(residual.filter(delta=0)["residual"].mean())
    assert ends["rotary"]["beside"] == pytest.approx(residual.filter(pl.col("delta") != 0)["residual"].mean())
    assert ends["rotary"]["peaks"] == ends["rotary"]["levels"] == 5
    assert abs(ends["random"]["at"]) < 1e-4
    assert "At all 5 levels attention is highest at the ends of constituents: in " in text
    assert first["perturbed"]["best"]["name"].startswith("rotary, permutation")
    assert first["perturbed"]["clean"]["name"] == "rotary"


def test_the_headline_has_a_row_for_each_model(whole: Run[GrammarConfig]) -> None:
    made, headline = tables(), GrammarStudy().headline(whole)
    trained = [name for name in MODELS if name != "random"]
    assert headline["model"].to_list() == [*trained, "random"]
    (own,) = headline.filter(model="absolute").rows(named=True)
    (right,) = made["generation"].filter(name="absolute", prefix="corrupted", temperature=1.0)["right"]
    assert own["after_corrupted"] == right / 2000
    assert own["after_corrupted_low"] < right / 2000 < own["after_corrupted_high"]
    assert own["kl"] == made["diversity"].filter(name="absolute")["kl"][0]
    probes = made["probes"].filter(name="absolute", reach="full", target="ancestor", where="all")
    assert own["ancestors"] == pytest.approx(probes["accuracy"].mean())
    assert headline.filter(model="masked").select("from_nothing", "kl").row(0) == (None, None)


def test_what_controls_give_as_well_is_not_claimed(tmp_path: Path) -> None:
    known = (pl.col("name") == "random") & (pl.col("level") < 4)

    def equal(made: Tables) -> Tables:
        """Let the untrained network's intervals reach into those of the best model, below its accuracy."""
        probes = made["probes"]
        own = probes.filter(
            ~pl.col("shuffled"), pl.col("name") != "random", reach="full", target="ancestor", where="all"
        )
        best = (
            own.filter(pl.col("name") != "random")
            .group_by("name")
            .agg(pl.col("accuracy").mean())
            .sort("accuracy")["name"][-1]
        )
        within = dict(own.filter(name=best).select("level", pl.mean_horizontal("low", "accuracy")).rows())
        high = pl.when(known).then(pl.col("level").replace_strict(within)).otherwise(pl.col("high"))
        return made | {"probes": probes.with_columns(high=high)}

    run = make(tmp_path / "a", change=equal)
    assert pages.headline(summary_of(run))["probes"]["best"]["beyond"] == 3
    assert "at 3 of 5 levels: mean accuracy 99.1" in shown(rendered(run))
    run = make(tmp_path / "b", change=lambda made: made | {"probes": made["probes"].with_columns(high=pl.lit(1.0))})
    assert "no better than from a control" in shown(rendered(run))
    alone = ~pl.col("shuffled") & (pl.col("name") != "random")
    run = make(tmp_path / "c", change=lambda made: made | {"probes": made["probes"].filter(alone)})
    assert "(no control was run): mean accuracy 99" in shown(rendered(run))


def test_the_deepest_layer_is_shown(tmp_path: Path) -> None:
    own = tables()["probes"].filter(name="rotary")
    last = own.with_columns(layer=pl.lit(-1, dtype=pl.Int64), accuracy=pl.lit(0.5))
    first = own.with_columns(layer=pl.lit(0, dtype=pl.Int64), accuracy=pl.lit(0.9))
    middle = own.with_columns(accuracy=pl.lit(0.7))
    for k, (parts, expected) in enumerate((([first, last], 0.5), ([first, middle], 0.7))):
        run = make(tmp_path / str(k), change=lambda made, parts=parts: made | {"probes": pl.concat(parts)})  # type: ignore[misc]
        assert set(run.summary("probes").filter("deepest")["accuracy"]) == {expected}
        assert run.summary("ancestors").filter(~pl.col("shuffled"))["mean"].to_list() == pytest.approx([expected])


def test_attention_that_avoids_ends_is_reported(tmp_path: Path) -> None:
    turned = -pl.col("residual").abs() * (pl.col("delta") == 0)
    run = make(
        tmp_path,
        change=lambda made: made | {"attention-ends": made["attention-ends"].with_columns(residual=turned)},
    )
    assert "At none of the levels attention is highest" in shown(rendered(run))


def test_each_section_has_its_numbers(page: str) -> None:
    text, made = shown(page), tables()
    assert "9.2 × 10" in text  # states
    assert "7, of 1, 3, 3, 3, 3, 3, 3 symbols" in text
    assert "22 -> 21 20 | 20 19" in text
    maps = [f["data"][0] for f in drawn(page) if f["data"][0]["type"] == "heatmap"]
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


def test_the_paper_stands_beside_its_own_grammars_only(tmp_path: Path, whole: Run[GrammarConfig]) -> None:
    marks = [t.name for t in figures.generation(summary_of(whole), "x").data]  # type: ignore[union-attr]
    assert "rotary, from nothing, paper" in marks
    run = make(tmp_path, levels=7)
    other = summary_of(run)
    assert "it reports nothing on this grammar" in shown(rendered(run))
    assert not any("paper" in t.name for t in figures.generation(other, "x").data)  # type: ignore[union-attr]
    assert not any("paper" in str(t.name) for t in figures.robustness(other, "nothing", 1.0, "x").data)


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


def test_robustness_draws_a_line_a_kind_and_the_clean_model(whole: Run[GrammarConfig]) -> None:
    found = summary_of(whole)
    assert figures.panels(found) == [(p, t) for p in ("nothing", "clean", "corrupted") for t in (0.1, 1.0)]
    lines = {t.name: t for t in figures.robustness(found, "nothing", 1.0, "x").data}
    rows = tables()["generation"].filter(prefix="nothing", temperature=1.0)
    token = lines["rotary, token at 0.15"]
    assert list(token.x) == [0.1, 0.5, 1.0]
    assert list(token.y) == [
        rows.filter(name=f"rotary, token {share:g} at 0.15")["right"][0] / 2000 for share in (0.1, 0.5, 1.0)
    ]
    assert list(lines["rotary"].y) == [rows.filter(name="rotary")["right"][0] / 2000] * 2
    assert "absolute" not in lines  # no perturbed model of its kind
    assert list(lines["token, paper"].y) == pytest.approx([0.925, 0.141, 0])


def test_a_model_has_one_colour(tmp_path: Path, whole: Run[GrammarConfig]) -> None:
    found = summary_of(whole)
    look = figures.styles(found)
    assert len({(s.colour, s.dash) for n, s in look.items()}) == len(look)
    for figure in (figures.generation(found, "x"), figures.divergence(found, "x"),
                   figures.curve(found, "kl", "x", "y")):  # fmt: skip
        assert figure is not None
        for trace in figure.data:
            assert trace.marker.color in (None, look[trace.name.split(", ")[0]].colour)
            assert trace.line.color in (None, look[trace.name.split(", ")[0]].colour)
    twice = {"one": MODELS["rotary"], "two": MODELS["rotary"], "three": MODELS["random"]}
    again = figures.styles(summary_of(make(tmp_path, twice)))
    assert len({s.colour for s in again.values()}) == 3


HEADINGS = {
    "symbols": "Symbol by symbol", "probe-curve": "Learning of the probes", "embeddings": 'id="embeddings"',
    "attention-scales": "Scales of heads", "attention-centres": "Pairs of ends compared",
    "attention-falls": "Fall with distance",
    "generation": "Generated strings that", "curve": "Learning curves", "diversity": "Diversity</h3>",
    "probes": "All probes, with", "attention-profile": "By distance", "attention-ends": "To the ends of",
    "attention-peaks": "Ends compared with", "attention-pairs": "From end to end",
    "attention-adjacent": "Between adjacent",
}  # fmt: skip


@pytest.mark.parametrize("gone", [[name] for name in HEADINGS] + [list(HEADINGS)])
def test_a_section_without_rows_is_left_out(tmp_path: Path, gone: list[str]) -> None:
    above = markup(rendered(make(tmp_path, change=lambda made: {k: v for k, v in made.items() if k not in gone})))
    for name, words in HEADINGS.items():
        assert (words in above) == (name not in gone), name
    assert ('id="robustness"' in above) == ("generation" not in gone)
    assert ('id="attention"' in above) == ('id="probes"' in above) == (len(gone) == 1)
    assert 'id="run"' in above


def test_without_perturbed_models_there_is_no_robustness(tmp_path: Path) -> None:
    run = make(tmp_path, {name: model for name, model in MODELS.items() if not model[2]})
    assert 'id="robustness"' not in rendered(run)
    assert pages.headline(summary_of(run))["perturbed"] is None


def test_strings_from_nothing_alone_make_a_page(tmp_path: Path) -> None:
    alone = pl.col("prefix") == "nothing"
    run = make(tmp_path, change=lambda made: made | {"generation": made["generation"].filter(alone)})
    assert "of the strings that rotary generates from nothing are in the grammar" in shown(rendered(run))


@pytest.mark.parametrize(
    "which", [["masked"], ["random"], ["rotary, token 0.5 at 0.15"], ["random", "rotary, token 1 at 0.15"]]
)
def test_any_few_models_make_a_page(tmp_path: Path, which: list[str]) -> None:
    run = make(tmp_path, {name: MODELS[name] for name in which})
    text = shown(rendered(run))
    assert all(name in text for name in which)
    assert pages.headline(summary_of(run))["written"] == []
    assert set(run.summary("headline")["model"]) == set(which)


def test_unknown_numbers_are_left_out(tmp_path: Path) -> None:
    def change(made: Tables) -> Tables:
        none = pl.lit(None, dtype=pl.Float64)
        unknown = {name: none for name in ("kl", "bits", "kl_low", "kl_high", "bits_low", "bits_high")}
        level2 = pl.when(pl.col("level") == 2).then(None).otherwise(pl.col("residual"))
        return made | {
            "diversity": made["diversity"].with_columns(**unknown),
            "attention-ends": made["attention-ends"].with_columns(residual=level2),
            "probes": made["probes"].clear(),
            "probe-curve": made["probe-curve"].clear(),
        }

    run = make(tmp_path, change=change)
    text = rendered(run)
    assert "Divergence</h3>" not in text
    assert 'id="probes"' not in text
    assert re.search(r"\bnan\b", shown(text).lower()) is None
    assert pages.headline(summary_of(run))["ends"][0]["levels"] == 4


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    models = {
        EVIL: MODELS["rotary"],
        f"{EVIL} 2": MODELS["rotary, token 0.1 at 0.15"],
        "<b>&lt;random": MODELS["random"],
    }
    file = tmp_path / "<img src=x>.cfg"
    file.write_text("<b>S -> <i>a </i>b | </i>b <i>a\n<i>a -> <img <a> | <a> <img\n</i>b -> <a> <a> | <img <img\n")
    run = make(tmp_path / "run", models, file=str(file))
    run.warn(EVIL)
    run.update(command=EVIL, versions={EVIL: EVIL})
    page = rendered(run)
    assert page.count("</script>") == 3
    assert "<img" not in markup(page)
    assert "<b>random" not in markup(page)
    assert "<b>S" not in markup(page)
    assert EVIL in shown(page)
    for figure in drawn(page):
        for trace in figure["data"]:
            assert "<img" not in json.dumps(trace)
        assert "<img" not in json.dumps(figure["layout"])
    titles = [html.unescape(x) for x in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    assert {EVIL, "<b>&lt;random"} <= set(titles)
    assert "<b><random" not in titles


def test_the_profile_keeps_the_mean_of_each_bin(whole: Run[GrammarConfig]) -> None:
    rows = tables()["attention-profile"].filter(name="rotary")
    trace = heatmaps.profile(summary_of(whole).tables["profile"].filter(name="rotary"), "x").data[0]
    assert list(trace.x)[:8] == ["0", "1", "2", "3", "4", "6", "8", "11"]
    at = list(trace.y).index("1.2")
    own = rows.filter(pl.col("layer") == 1, pl.col("head") == 2, pl.col("distance").is_between(8, 10))
    assert trace.z[at][6] == pytest.approx(np.log10(own["weight"].mean()), rel=1e-3)
    assert [name.split(".")[1] for name in list(trace.y)[:HEADS]] == ["0", "1", "2", "3"]  # nearest first
    both = pl.concat([rows, rows.filter(pl.col("distance") > 0).with_columns(distance=-pl.col("distance"))])
    bins = binned(both)
    ahead = list(heatmaps.profile(bins, "x").data[0].x)
    assert ahead[: ahead.index("0")] == [f"−{x}" for x in ahead[: ahead.index("0") : -1]]
    spans = bins.select("first", "last").unique().filter(pl.col("first") >= 0).sort("first")
    assert (spans["last"][:-1] + 1).to_list() == spans["first"][1:].to_list()
    assert spans["last"][-1] == rows["distance"].max()


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


SEEDS = 3


def seeded(path: Path, shift: float = 0.0) -> Run[GrammarConfig]:
    """Return a run of three trainings of a few models: their numbers differ by `shift` from seed to seed."""
    few = {name: MODELS[name] for name in ("rotary", "absolute", "random", "rotary, token 0.5 at 0.15")}
    config = config_of(few, grammar="cfg3b").model_copy(update={"seeds": SEEDS})
    study = GrammarStudy()
    run = Run(path, config, open_record(study.name, config, path, "nextstate grammar made-up", Progress()))
    for part, rows in tables(few).items():
        for seed in range(SEEDS):
            for own in rows.partition_by("name"):
                title = f"{own['name'][0]}, seed {seed}"
                made = own.with_columns(name=pl.lit(title))
                if part == "generation":
                    made = made.with_columns(right=(pl.col("right") * (1 - shift * seed)).cast(pl.Int64))
                run.keep(f"{part}/{slug(title)}", made, {})
    for name, frame in study.summarise(run).items():
        run.keep(f"summary/{name}", frame, {})
    return run


def test_models_are_judged_over_their_trainings(tmp_path: Path) -> None:
    run = seeded(tmp_path, 0.1)
    found, text = summary_of(run), shown(rendered(run))
    assert list(found.families) == ["rotary", "absolute", "rotary, token 0.5 at 0.15", "random"]
    assert (found.seeds, len(found.models)) == (SEEDS, 4 * SEEDS)
    headline = run.summary("headline")
    assert headline["model"].to_list() == list(found.families)
    assert headline["trainings"].to_list() == [SEEDS] * 4
    rows = run.summary("generation").filter(prefix="nothing", temperature=1.0)
    shares = rows.filter(pl.col("name").str.starts_with("absolute"))["accuracy"].to_numpy()
    (own,) = headline.filter(model="absolute").rows(named=True)
    half = 4.302653 * shares.std(ddof=1) / np.sqrt(3)
    assert own["from_nothing"] == pytest.approx(shares.mean())
    assert own["from_nothing_low"] == pytest.approx(max(0, shares.mean() - half))
    assert own["from_nothing_high"] == pytest.approx(min(1, shares.mean() + half))
    assert f"[{percents(shares.min())} to {percents(shares.max())} in 3 trainings]" in text
    for words in ("Between trainings", "means over 3 trainings with different seeds", "Intervals are over trainings"):
        assert words in text
    drawn_shares = figures.generation(found, "x")
    assert drawn_shares is not None
    marks = [t for t in drawn_shares.data if t.name.startswith("absolute, seed") and "nothing" in t.name]
    assert [t.x[0] for t in marks if "paper" not in t.name] == pytest.approx(shares)
    assert len({t.y[0] for t in marks}) == SEEDS
    assert sum("paper" in t.name for t in marks) == 1
    ends = run.summary("ends")
    assert set(ends["name"]) == {"rotary", "absolute", "random"}
    assert run.summary("profile")["name"].unique(maintain_order=True).to_list() == [
        "rotary, seed 0", "absolute, seed 0", "random, seed 0"
    ]  # fmt: skip
    assert len({s.colour for n, s in figures.styles(found).items() if n.startswith("absolute")}) == 1


def test_one_training_is_said_to_be_one(page: str) -> None:
    text = shown(page)
    assert "95 % intervals over strings of one training; other trainings of the same model differ by more" in text
    assert "another training may give another verdict" in text
    assert 'id="trainings"' not in page


def test_the_page_says_what_contradicts_the_paper(whole: Run[GrammarConfig], page: str) -> None:
    claims, text = whole.summary("claims"), shown(page)
    counts = dict(claims.group_by("verdict").len().iter_rows())
    assert counts["contradicts"] > 0
    assert f"{counts['contradicts']} of {len(claims)} comparisons with the paper contradict" in text
    assert f", {counts['agrees']} agree" in text
    for row in claims.filter(verdict="contradicts").head(3).iter_rows(named=True):
        assert row["claim"] in text


def test_probes_that_still_learn_are_named(tmp_path: Path) -> None:
    assert "No accuracy of a trained model rose" in shown(rendered(make(tmp_path / "a")))
    late = (pl.col("step") == 2000) & (pl.col("level") == 2) & (pl.col("name") == "rotary")

    def change(made: Tables) -> Tables:
        gain = pl.when(late).then(0.05).otherwise(pl.col("gain"))
        low = pl.when(late).then(0.03).otherwise(pl.col("gain_low"))
        high = pl.when(late).then(0.07).otherwise(pl.col("gain_high"))
        return made | {"probe-curve": made["probe-curve"].with_columns(gain=gain, gain_low=low, gain_high=high)}

    text = shown(rendered(make(tmp_path / "b", change=change)))
    assert "The probe had not converged at level 2 of rotary (+5" in text
