"""Verdicts: the rule, the intervals over trainings, and what made-up models of a known kind are said to show."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from nextstate.analysis.grammar.claims import AGREES, CONTRADICTS, OPEN, verdict
from nextstate.analysis.grammar.paper import published
from nextstate.analysis.stats import estimate, estimated_difference


def test_of_one_training_the_interval_is_that_over_strings() -> None:
    found = estimate([0.9], [0.85], [0.93])
    assert found[:6] == (0.9, pytest.approx(0.85), pytest.approx(0.93), 1, 0.9, 0.9)
    none = estimate([0.9], [None], [None])
    assert math.isnan(none.low)
    assert verdict(none) == OPEN


def test_of_several_trainings_the_interval_is_students() -> None:
    values = [0.943, 0.978, 0.962]
    found = estimate(values, [v - 0.01 for v in values], [v + 0.01 for v in values])
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)
    assert found.low == pytest.approx(np.mean(values) - half)
    assert found.high == pytest.approx(np.mean(values) + half)
    assert (found.least, found.most, found.trainings) == (0.943, 0.978, 3)
    assert estimate(values, [0.9] * 3, [1.0] * 3, (0, 1)).high == 1


def test_equal_trainings_keep_the_uncertainty_of_their_strings() -> None:
    found = estimate([1.0] * 4, [0.96] * 4, [1.0] * 4)
    assert (found.low, found.high) == pytest.approx((0.98, 1.0))


def test_a_difference_of_trainings_has_welchs_interval() -> None:
    from scipy.stats import ttest_ind

    one, two = [0.9, 0.7, 0.85], [0.4, 0.45, 0.6, 0.41]
    ends = [math.nan] * 4
    found = estimated_difference(estimate(one, ends[:3], ends[:3]), estimate(two, ends, ends))
    welch = ttest_ind(one, two, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((welch.low, welch.high))
    assert (found.least, found.most, found.trainings) == (pytest.approx(0.1), pytest.approx(0.5), 3)


def test_a_difference_of_single_trainings_adds_squares() -> None:
    found = estimated_difference(estimate([0.8], [0.7], [0.85]), estimate([0.5], [0.42], [0.6]))
    assert found.low == pytest.approx(0.3 - math.hypot(0.1, 0.1))
    assert found.high == pytest.approx(0.3 + math.hypot(0.05, 0.08))


def test_intervals_over_trainings_hold_the_truth() -> None:
    """Trainings differ and so do their strings; the truth is the mean of all trainings that there could be."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(1000):
        p = np.clip(rng.normal(0.8, 0.05, 3), 0, 1)
        share = rng.binomial(200, p) / 200
        half = 1.96 * np.sqrt(share * (1 - share) / 200)
        found = estimate(share.tolist(), (share - half).tolist(), (share + half).tolist())
        inside.append(found.low <= 0.8 <= found.high)
    assert np.mean(inside) > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 1000)


@pytest.mark.parametrize(
    ("low", "high", "bound", "near", "expected"),
    [
        (0.1, 0.3, 0.0, None, AGREES), (-0.3, -0.1, 0.0, None, CONTRADICTS), (-0.1, 0.3, 0.0, None, OPEN),
        (0.4, 0.6, 0.5, None, OPEN), (0.6, 0.7, 0.5, None, AGREES), (-0.01, 0.02, 0.0, 0.03, AGREES),
        (0.02, 0.05, 0.0, 0.03, OPEN), (0.04, 0.05, 0.0, 0.03, CONTRADICTS), (-0.05, -0.04, 0.0, 0.03, CONTRADICTS),
        (0.97, 0.99, 0.998, 0.03, AGREES), (0.086, 0.178, 0.998, 0.03, CONTRADICTS), (-0.5, 0.5, 0.0, 0.03, OPEN),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_interval(
    low: float, high: float, bound: float, near: float | None, expected: str
) -> None:
    assert verdict(estimate([(low + high) / 2], [low], [high]), bound, near) == expected


def test_the_papers_own_numbers_agree_with_what_it_says() -> None:
    """Relative attention writes better than absolute on the hard grammar, and entropies are within 3 %."""
    hard = published("cfg3f")
    assert hard is not None
    assert hard.accuracy["nothing"]["uniform"] > hard.accuracy["nothing"]["absolute"]
    for name in ("cfg3b", "cfg3i", "cfg3h", "cfg3g", "cfg3f", "cfg3e1", "cfg3e2"):
        one = published(name)
        assert one is not None
        assert all(abs(x / one.truth - 1) < 0.03 for x in one.bits.values())


def claims_of(path: object, **numbers: float) -> pl.DataFrame:
    from tests.analysis.test_grammar_page import MODELS, Tables, make

    def change(made: Tables) -> Tables:
        right = pl.col("right")
        for name, share in numbers.items():
            at = (pl.col("name") == name) & (pl.col("temperature") == 1.0) & (pl.col("prefix") == "nothing")
            right = pl.when(at).then(int(2000 * share)).otherwise(right)
        return made | {"generation": made["generation"].with_columns(right=right)}

    models = MODELS | {"uniform": ("uniform", False, "", 0.0)}
    return make(path, models, change).summary("claims")  # type: ignore[arg-type]


def test_uniform_attention_that_is_last_contradicts_the_paper(tmp_path: object) -> None:
    words = "writes more strings of the grammar from nothing"
    for k, (share, expected) in enumerate(((0.7, CONTRADICTS), (0.95, AGREES), (0.86, OPEN))):
        claims = claims_of(tmp_path / str(k), absolute=0.86, uniform=share)  # type: ignore[operator]
        (row,) = claims.filter(result=1, claim=words, model="uniform").rows(named=True)
        assert (row["verdict"], row["against"]) == (expected, "absolute")
        assert row["value"] == pytest.approx(share - 0.86, abs=1e-3)
        assert (row["paper"], row["paper_of"]) == (pytest.approx(0.001), "cfg3b")


def test_every_result_that_was_measured_is_judged(tmp_path: object) -> None:
    claims = claims_of(tmp_path)
    assert set(claims["result"]) == set(range(1, 14))
    assert set(claims["verdict"]) <= {AGREES, CONTRADICTS, OPEN}
    known = claims.drop_nulls("low")
    assert ((known["low"] <= known["value"]) & (known["value"] <= known["high"])).all()
    level2 = "states hold ancestors of level 2 at all tokens (full probe)"
    (row,) = claims.filter(result=4, claim=level2, model="rotary").rows(named=True)
    assert (row["against"], row["verdict"]) == ("random", AGREES)
    assert row["paper"] == pytest.approx(1 - 0.627)
    (worse,) = claims.filter(result=11, model="rotary, token 0.1 at 0.15").rows(named=True)
    assert (worse["against"], worse["paper"]) == ("rotary", pytest.approx(0.808 - 0.3))
    assert worse["verdict"] == AGREES
