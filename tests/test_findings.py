"""The claims of the published studies: complete, readable off real runs, judged by rules, and shown as they are."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import markdown
import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from nextstate import cli
from nextstate.agents.config import ConfigError, find_config, read_config
from nextstate.analysis.findings import claims as claims_module
from nextstate.analysis.findings import record as record_module
from nextstate.analysis.findings.claims import CLAIMS, Cost, Reading, read_claims
from nextstate.analysis.findings.document import digits, document, plain, shown
from nextstate.analysis.findings.record import (
    RECORDS,
    measure,
    read_records,
    record_of,
    statuses,
    verdict_of,
    write_record,
)
from nextstate.analysis.findings.verdict import Check, Judged, Number, Verdict, combined, difference, judge, ratio
from nextstate.analysis.run import Run
from nextstate.analysis.stats import difference_interval, student
from nextstate.analysis.study import checked, find_study, go
from nextstate.cli import app
from tests.documents import ROOT

LEDGER = read_claims()
QUIET = "wandb=disabled"
BRIEF = ["training.steps=2", "training.save_every=2", "training.evaluate_every=2", "training.evaluation_strings=2",
         "writing.strings=3"]  # fmt: skip
SMALL = {  # overrides that make a run small but leave it all the rows that claims read
    "dfa-published": ["games.0.episodes=1"],
    "box-published": ["games.0.episodes=1"],
    "heads-quickstart": ["pairs=6", "resamples=100"],
    "response-quickstart": ["prompts=3", "window_prompts=1", "head_prompts=2", "resamples=100", "bridge=[]"],
    "grammar-quickstart": [*BRIEF, "probes.steps=2", "probes.strings=4", "attention.strings=4"],
    "grammar-quickstart-seeds": BRIEF,
    "grammar-uniform": [*BRIEF, "training.rows=2"],
    "grammar-cfg3b-small": [*BRIEF, "training.rows=2", "probes.steps=2", "probes.strings=4", "attention.strings=2"],
    "grammar-implicit-small": BRIEF,
    "grammar-robustness-mid": BRIEF,
    "grammar-robustness-small": BRIEF,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that makes a small version of a run, once."""
    made: dict[str, Run[Any]] = {}

    def make(name: str) -> Run[Any]:
        if name not in made:
            entry = LEDGER.runs[name]
            study = find_study(entry.study)
            config = read_config(entry.config, [*entry.overrides, *SMALL[name], QUIET], study.config)
            made[name] = go(study, config, tmp_path_factory.mktemp(name) / "run")
        return made[name]

    return make


# --- the claims are complete


def test_every_result_of_every_study_has_a_claim() -> None:
    by_study = {key: [claim for claim in LEDGER.claims if claim.study == key] for key in LEDGER.studies}
    assert {claim.result for claim in by_study["grammar"]} == set(range(1, 14))
    assert len(by_study["states"]) >= 6
    assert len(by_study["response"]) >= 5
    assert {claim.result for key in ("states", "response") for claim in by_study[key]} == {None}


@pytest.mark.parametrize("name", LEDGER.runs)
def test_every_run_has_a_config_that_can_be_run(name: str) -> None:
    entry = LEDGER.runs[name]
    study = find_study(entry.study)
    config = read_config(entry.config, entry.overrides, study.config)
    assert checked(study, config)
    assert find_config(entry.config).read_text(encoding="utf-8").startswith(f"# nextstate {entry.study} ")


def test_runs_that_need_nothing_are_small_here_and_the_others_have_a_cost() -> None:
    assert {name for name, run in LEDGER.runs.items() if run.cost is None} == set(SMALL)
    for claim in LEDGER.claims:  # the command of a claim makes its smallest run
        costs = [LEDGER.runs[name].cost for name in claim.runs]
        hours = [cost.hours if cost else 0.0 for cost in costs]
        assert hours == sorted(hours) or claim.study != "grammar"
        assert all(cost is None for cost in costs[: costs.count(None)])


LOCAL = [pytest.param(name, marks=[] if name == "box-published" else pytest.mark.slow) for name in SMALL]


@pytest.mark.parametrize("name", LOCAL)
def test_every_number_can_be_read_off_a_run(name: str, small: Any) -> None:
    run = small(name)
    for claim in LEDGER.on(name):
        numbers, judged = measure(claim, run.summaries())
        assert numbers.keys() == claim.readings.keys()
        for key, number in numbers.items():
            absent = re.search("has no table|has no column|rows with", number.missing)
            assert not absent, f"{claim.name}: {key}: {number.missing}"
        assert judged.verdict in Verdict


@pytest.mark.slow
@pytest.mark.parametrize("claim", [c for c in LEDGER.claims if c.runs], ids=lambda c: c.name)
def test_every_column_that_is_read_off_a_run_of_others_is_made_by_its_study(claim: Any, small: Any) -> None:
    for name in claim.runs:
        study = LEDGER.runs[name].study
        mine = next(n for n in SMALL if LEDGER.runs[n].study == study)
        tables = small(mine).summaries()
        for reading in claim.readings.values():
            assert set(reading.columns) <= set(tables[reading.table].columns), (claim.name, reading.table)


# --- files of claims that are not valid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["claims"].append(d["claims"][0]), "name of two claims or runs"),
        (lambda d: d["claims"][0].update(runs=["nowhere"]), "there is no run nowhere"),
        (lambda d: d["claims"][0].update(study="nobody"), "there is no study 'nobody'"),
        (lambda d: d["claims"][0].update(checks=[]), "has checks"),
        (lambda d: d["claims"][0].update(checks=[{"of": "lost", "above": 0}]), "has no reading lost"),
        (lambda d: d["claims"][0].update(checks=[{"of": "few"}]), "has no bound"),
        (lambda d: d["claims"][0].update(checks=[{"of": "few", "above": 1, "below": 1}]), "nothing is both"),
        (lambda d: d["claims"][0].update(because="it is hard"), "expected runs, or because"),
        (lambda d: d["claims"][0].update(verdict="agrees"), "unknown key 'verdict'"),
        (lambda d: d["claims"][0]["readings"]["few"].update(low=""), "needs both low and high"),
        (lambda d: d["claims"][0]["readings"]["few"].update(pick="count"), "which has none"),
        (lambda d: d["runs"]["box-published"].update(time=""), "expected either time"),
        (lambda d: d["runs"]["box-published"].update(needs="a GPU"), "expected both needs and cost"),
        (lambda d: d["runs"].update({"Box": d["runs"]["box-published"]}), "no claim is measured on the run Box"),
    ],
)
def test_a_file_of_claims_that_is_wrong_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    data = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))
    change(data)
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        read_claims(path)
    assert str(path) in str(raised.value)


# --- reading


ROWS = pl.DataFrame({
    "name": ["a, seed 0", "a, seed 1", "ab", "c"], "size": [1, 2, 3, 4], "x": [0.2, 0.4, 0.9, None],
    "low": [0.1, 0.3, 0.8, None], "high": [0.3, 0.5, 1.0, None], "n": [10, 20, 30, 40],
})  # fmt: skip
ENDS = {"value": "x", "low": "low", "high": "high", "n": "n"}


def read(**given: Any) -> Number:
    return Reading.model_validate({"table": "t", **ENDS, **given}).read({"t": ROWS})


def test_one_row_is_read_with_its_interval() -> None:
    assert read(where={"name": "ab"}, units="strings") == Number(value=0.9, low=0.8, high=1.0, n=30, units="strings")
    assert read(where={"size": {"at_least": 2, "at_most": 2}}).value == 0.4
    assert read(where={"name": ["ab", "c"], "size": 3}).value == 0.9


def test_the_highest_and_lowest_rows_bring_their_own_intervals() -> None:
    assert (read(pick="highest").low, read(pick="lowest").high) == (0.8, 0.3)


def test_rows_are_counted() -> None:
    found = Reading(table="t", where={"size": {"at_least": 2}}, pick="count", units="rows").read({"t": ROWS})
    assert found == Number(value=3, units="rows")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"table": "u"}, "the run has no table 'u'"),
        ({"value": "y"}, "the table 't' has no column 'y'"),
        ({"where": {"name": "z"}}, "the table 't' has no x in name=z"),
        ({"where": {"name": "c"}}, "the table 't' has no x in name=c"),
        ({}, "the table 't' has 4 rows with any row, expected one"),
    ],
)
def test_what_cannot_be_read_says_why(given: dict[str, Any], missing: str) -> None:
    assert read(**given).missing == missing
    assert judge(Check(of="a", above=0), {"a": read(**given)}).verdict == Verdict.OPEN


def test_a_number_whose_interval_is_missing_decides_nothing() -> None:
    rows = ROWS.with_columns(low=pl.lit(None, pl.Float64))
    found = Reading.model_validate({"table": "t", **ENDS, "where": {"name": "ab"}}).read({"t": rows})
    assert (found.value, found.low) == (0.9, None)
    assert judge(Check(of="a", above=0), {"a": found}).verdict == Verdict.OPEN


# --- verdicts


FINITE = st.integers(-4, 4).map(float)  # few values, so that ends and bounds often meet
NUMBERS = st.tuples(FINITE, FINITE, FINITE).map(sorted).map(lambda x: Number(value=x[1], low=x[0], high=x[2]))
BOUNDS = st.tuples(st.none() | FINITE, st.none() | FINITE).filter(
    lambda x: x != (None, None) and (None in x or x[0] < x[1])
)


def check(bounds: tuple[float | None, float | None], of: str = "a") -> Check:
    return Check(of=of, above=bounds[0], below=bounds[1])


def negative(x: float | None) -> float | None:
    return None if x is None else -x


def negated(number: Number) -> Number:
    return Number(value=negative(number.value), low=negative(number.high), high=negative(number.low))


@given(NUMBERS, BOUNDS)
def test_a_verdict_is_that_of_the_points_of_the_interval(number: Number, bounds: Any) -> None:
    above, below = (-math.inf if bounds[0] is None else bounds[0]), (math.inf if bounds[1] is None else bounds[1])
    ends = [number.low, number.high]
    inside = [above < x < below for x in (*ends, number.value)]
    # An open interval meets [low, high] iff it holds an end of it, or lies within it.
    meets = any(inside) or (number.low <= above and below <= number.high)  # type: ignore[operator]
    expected = Verdict.AGREES if all(inside) else Verdict.OPEN if meets else Verdict.CONTRADICTS
    assert judge(check(bounds), {"a": number}).verdict == expected


@given(NUMBERS, BOUNDS)
def test_a_verdict_does_not_depend_on_the_sign(number: Number, bounds: Any) -> None:
    mirrored = check((negative(bounds[1]), negative(bounds[0])))
    assert judge(check(bounds), {"a": number}).verdict == judge(mirrored, {"a": negated(number)}).verdict


@given(NUMBERS, BOUNDS, st.floats(0, 1))
def test_a_narrower_interval_never_turns_a_verdict_around(number: Number, bounds: Any, share: float) -> None:
    assert number.value is not None
    assert number.low is not None
    assert number.high is not None
    low, high = (number.value + share * (end - number.value) for end in (number.low, number.high))
    narrow = number.model_copy(update={"low": low, "high": high})
    wide, closer = (judge(check(bounds), {"a": x}).verdict for x in (number, narrow))
    assert wide in (closer, Verdict.OPEN)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.0, 1.0, Verdict.OPEN),  # the bound itself is not above it
        (0.001, 1.0, Verdict.AGREES),
        (-1.0, 0.0, Verdict.CONTRADICTS),
        (-1.0, 0.001, Verdict.OPEN),
    ],
)
def test_bounds_are_not_included(low: float, high: float, verdict: Verdict) -> None:
    assert judge(Check(of="a", above=0), {"a": Number(value=(low + high) / 2, low=low, high=high)}).verdict == verdict


@given(NUMBERS, NUMBERS)
def test_a_difference_turns_its_sign_with_its_sides(one: Number, other: Number) -> None:
    found, back = difference(one, other), negated(difference(other, one))
    for x, y in ((found.value, back.value), (found.low, back.low), (found.high, back.high)):
        assert x == pytest.approx(y, abs=1e-9)
    assert found.low <= found.value + 1e-9  # type: ignore[operator]
    assert found.value <= found.high + 1e-9  # type: ignore[operator]
    widest = max(one.high - one.low, other.high - other.low)  # type: ignore[operator]
    both = one.high - one.low + other.high - other.low  # type: ignore[operator]
    assert widest - 1e-6 <= found.high - found.low <= both + 1e-6  # type: ignore[operator]


def test_a_difference_from_what_is_known_keeps_the_interval() -> None:
    assert difference_interval((0.5, 0.4, 0.7), (0.2, 0.2, 0.2)) == pytest.approx([0.2, 0.5])


def test_the_interval_of_a_difference_covers_it() -> None:
    rng, hits, draws = np.random.default_rng(0), 0, 2000
    for _ in range(draws):
        samples = [rng.normal(mean, sd, 12) for mean, sd in ((1.0, 1.0), (0.4, 3.0))]
        low, high = difference_interval(*((float(x.mean()), *student(x).tolist()) for x in samples))
        hits += low <= 0.6 <= high
    assert abs(hits / draws - 0.95) < 3 * math.sqrt(0.95 * 0.05 / draws)


def test_a_ratio_needs_a_denominator_that_is_known() -> None:
    assert ratio(Number(value=2, low=1, high=3), Number(value=4)) == Number(value=0.5, low=0.25, high=0.75)
    for other in (Number(value=4, low=3, high=5), Number(value=0)):
        assert judge(Check(of="a / b", above=0), {"a": Number(value=2), "b": other}).verdict == Verdict.OPEN


@given(st.lists(st.sampled_from(list(Verdict)), min_size=1, max_size=5), st.randoms())
def test_the_verdict_of_several_checks(verdicts: list[Verdict], rng: Any) -> None:
    found = combined([Judged(v, "why") for v in verdicts]).verdict
    assert (found == Verdict.AGREES) == (set(verdicts) == {Verdict.AGREES})
    assert (found == Verdict.CONTRADICTS) == (Verdict.CONTRADICTS in verdicts)
    rng.shuffle(verdicts)
    assert combined([Judged(v, "why") for v in verdicts]).verdict == found


def test_a_cost_is_its_operations() -> None:
    assert Cost(parameters=1e9, tokens=72e6, how="x").hours == pytest.approx(1.0)
    trained = Cost(parameters=1e9, tokens=72e6, training=True, precision="float32", how="x")
    assert trained.hours == pytest.approx(12.0)
    assert str(trained) == "about 12 GPU hours"


# --- records and the page


def test_the_records_fit_the_claims() -> None:
    records = read_records()
    assert records
    assert records.keys() <= LEDGER.runs.keys()
    for name, record in records.items():
        assert (RECORDS / f"{name}.json").is_file()
        assert record.claims.keys() <= {claim.name for claim in LEDGER.on(name)}
    for claim in LEDGER.claims:
        for status in statuses(claim, LEDGER, records):
            if status.record is not None and not status.stale:
                assert status.record.claims[claim.name].verdict == combined(
                    [judge(one, status.numbers) for one in claim.checks]
                ).verdict  # fmt: skip


def test_the_page_is_made_from_claims_and_records() -> None:
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    again = "make it again with `nextstate reproduce --page docs/findings.md`"
    assert page == document(LEDGER, read_records()), again


def test_the_page_holds_every_claim_whatever_its_verdict() -> None:
    page = document(LEDGER, {})
    for claim in LEDGER.claims:
        assert f"\n### {claim.name}\n" in page
        section = page.split(f"\n### {claim.name}\n")[1].split("\n##")[0]
        assert plain(claim.published) in section
        assert "cannot be said" in section.lower()
        for name in claim.runs:
            cost = LEDGER.runs[name].cost
            assert f"`nextstate reproduce {name}` was not run" in section
            assert cost is None or (plain(LEDGER.runs[name].needs) in section and str(cost) in section)
            assert cost is None or f"{cost} ({plain(cost.how)})" in page


@pytest.mark.slow
def test_a_record_of_another_config_or_reading_is_marked(small: Any, tmp_path: Path) -> None:
    run = small("box-published")
    record = record_of(LEDGER, "box-published", run)
    write_record(record, tmp_path)
    assert read_records(tmp_path) == {"box-published": record}
    (claim,) = LEDGER.on("box-published")
    assert not statuses(claim, LEDGER, {record.run: record})[0].stale
    assert "has changed since" not in document(LEDGER, {record.run: record})
    entry = LEDGER.runs["box-published"]
    other = entry.model_copy(update={"overrides": [*entry.overrides, "seed=1"]})
    changed = LEDGER.model_copy(update={"runs": LEDGER.runs | {"box-published": other}})
    assert statuses(claim, changed, {record.run: record})[0].stale
    assert "has changed since" in document(changed, {record.run: record})
    reading = claim.readings["model"].model_copy(update={"value": "choice"})
    reread = claim.model_copy(update={"readings": claim.readings | {"model": reading}})
    assert statuses(reread, LEDGER, {record.run: record})[0].stale
    fewer = claim.model_copy(update={"readings": {"shortcut": claim.readings["shortcut"]}})
    assert statuses(fewer, LEDGER, {record.run: record})[0].record is None  # its numbers are not those of the claim


def test_the_verdict_of_a_claim_is_that_of_the_largest_run_that_was_made() -> None:
    records = read_records()
    claim = next(c for c in LEDGER.claims if len(c.runs) > 1 and c.runs[0] in records)
    known = statuses(claim, LEDGER, records)
    assert verdict_of(claim, known)[1] == [s.run for s in known if s.record is not None][-1]
    none = statuses(claim, LEDGER, {})
    assert verdict_of(claim, none) == (none[0].judged, "")
    assert none[0].judged.verdict == Verdict.OPEN


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.json is not a record"):
        read_records(tmp_path)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.just(" "), max_size=30))
@example("__0__")
def test_text_is_shown_as_it_is(text: str) -> None:
    page = f"| a |\n|---|\n| x{plain(text)}y |\n"
    made = markdown.markdown(page, extensions=["tables", "attr_list"])
    cell = made.partition("<td>")[2].partition("</td>")[0]
    assert "<" not in cell
    assert html.unescape(cell) == f"x{' '.join(text.split())}y"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.0, "12"), (0.12345, "0.123"), (12.345, "12.3"), (0.00012, "0.000120"), (1e-5, "1e-05"),
     (-0.5, "-0.500"), (123456.0, "123,456")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_a_number_is_shown_with_interval_and_units() -> None:
    assert (
        shown(Number(value=0.5, low=0.4, high=0.6, n=1000, units="strings"))
        == "0.500 (0.400 to 0.600), n = 1,000 strings"
    )
    assert shown(Number(value=3, units="heads")) == "3 heads"
    assert shown(Number(value=3, n=1, units="trainings")) == "3, n = 1 training"
    assert shown(Number(missing="no row")) == "– (no row)"


# --- the command


READ = {"table": "by_game", "where": {"agent": "ideal", "subset": "all"}, "value": "accuracy", "low": "accuracy_low",
        "high": "accuracy_high", "n": "episodes", "units": "episodes"}  # fmt: skip
CELL = ["games.0.grid.boxes=[2]", "games.0.steps=[2]", "games.0.episodes=12", QUIET]
SAYS = {"study": "mine", "says": "They are.", "published": "always", "source": "implied"}
COST = {"parameters": 1e9, "tokens": 1e6, "how": "guessed"}
BOX, CFG3B = "configs/paper/box.yaml", "configs/grammar/cfg3b.yaml"
MINE = {
    "studies": {"mine": {"title": "A [bold]study[/bold] of *mine*", "arxiv": "2505.14892"}},
    "runs": {
        "tiny": {"study": "run", "config": BOX, "overrides": ["agents=[ideal, shortcuts]", *CELL], "what": "readers",
                 "time": "seconds"},
        "hub": {"study": "run", "config": BOX, "overrides": ["agents=[nobody/no-such-model]", *CELL], "what": "a model",
                "needs": "its weights", "cost": COST},
        "trained": {"study": "grammar", "config": CFG3B, "what": "trainings", "needs": "GPUs",
                    "cost": COST | {"tokens": 1e12, "training": True}},
    },
    "claims": [
        SAYS | {"name": "readers-are-right", "title": "Readers are [red]right[/red]", "runs": ["tiny", "hub"],
                "readings": {"ideal": READ, "gone": READ | {"where": {"agent": "[blink]"}}},
                "checks": [{"of": "ideal", "above": 0.5}]},
        SAYS | {"name": "readers-are-wrong", "title": "Readers are wrong", "runs": ["tiny"],
                "readings": {"ideal": READ}, "checks": [{"of": "ideal", "below": 0.5}]},
        SAYS | {"name": "training-works", "title": "Training works", "runs": ["trained"],
                "readings": {"it": {"table": "training", "pick": "count"}}, "checks": [{"of": "it", "above": 0}]},
    ],
}  # fmt: skip


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with claims and records of its own."""
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(MINE), encoding="utf-8")
    monkeypatch.setattr(claims_module, "CLAIMS", tmp_path / "claims.yaml")
    monkeypatch.setattr(record_module, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(cli, "console", Console(width=200))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reproduce(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["reproduce", *arguments])
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    return done.output


def test_the_claims_are_listed() -> None:
    out = reproduce()
    for claim in LEDGER.claims:
        assert claim.name in out
    for study in LEDGER.studies.values():
        assert study.arxiv in out


def test_a_claim_is_reproduced_recorded_and_listed(mine: Path) -> None:
    out = reproduce("readers-are-right", "--record")
    assert "Readers are [red]right[/red]" in out
    assert "1 (0." in out
    assert "ideal above 0.5: agrees" in out
    assert "has no accuracy in agent=[blink]" in out
    assert "readers-are-wrong" not in out
    assert (mine / "runs" / "findings" / "tiny" / "report.html").is_file()
    record = json.loads((mine / "records" / "tiny.json").read_text(encoding="utf-8"))
    assert set(record["claims"]) == {"readers-are-right", "readers-are-wrong"}  # all claims of the run
    assert record["claims"]["readers-are-wrong"]["verdict"] == "contradicts"
    assert record["claims"]["readers-are-right"]["numbers"]["ideal"]["n"] == 12
    listed = reproduce()
    assert "A [bold]study[/bold] of *mine*" in listed
    assert re.search(r"readers-are-right .* agrees +tiny", listed)
    assert re.search(r"readers-are-wrong .* contradicts +tiny", listed)
    assert re.search(r"training-works .* cannot be said +not run", listed)
    reproduce("--page", "page.md")
    page = (mine / "page.md").read_text(encoding="utf-8")
    assert "3 claims: agrees 1, contradicts 1, cannot be said 1" in page
    assert "## A \\[bold\\]study\\[/bold\\] of \\*mine\\*" in page


def test_a_run_is_finished_where_it_was_begun(mine: Path) -> None:
    reproduce("tiny", "--out", "here")
    table = next((mine / "here" / "answers").rglob("*.parquet"))
    before = table.stat().st_mtime_ns
    out = reproduce("readers-are-wrong", "--out", "here")
    assert table.stat().st_mtime_ns == before
    assert "ideal below 0.5: contradicts" in out
    assert not (mine / "records").exists()


def test_a_model_that_is_not_here_is_named_with_what_it_needs(mine: Path) -> None:
    done = CliRunner().invoke(app, ["reproduce", "hub"])
    assert done.exit_code != 0
    assert "Needs its weights; about 2 GPU minutes (guessed)." in done.output
    assert "nobody/no-such-model" in str(done.exception)


def test_a_training_of_many_gpu_hours_is_not_begun(mine: Path) -> None:
    out = reproduce("training-works")
    assert "Not started." in out
    assert "nextstate grammar configs/grammar/cfg3b.yaml --out runs/findings/trained" in out
    assert not (mine / "runs").exists()


def test_an_unknown_name_suggests_one() -> None:
    done = CliRunner().invoke(app, ["reproduce", "respons-window"])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception) == "there is no claim and no run 'respons-window'; did you mean 'response-window'?"
    assert CliRunner().invoke(app, ["reproduce", "--record"]).exit_code == 2
