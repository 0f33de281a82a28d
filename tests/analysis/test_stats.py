"""Intervals against scipy's, laws that they must obey, and how often they hold the true value."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as some

from nextstate.analysis import stats

LEVELS = (0.5, 0.8, 0.95, 0.99)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, size=shape)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def inside(ends: np.ndarray, truth: float) -> float:
    return float(((ends[0] <= truth) & (truth <= ends[1])).mean())


# --- the same as scipy's


@given(some.integers(1, 200), some.integers(0, 200), some.sampled_from(LEVELS))
def test_wilson_is_scipys(n: int, hits: int, level: float) -> None:
    hits = min(hits, n)
    theirs = scipy.stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    ends = stats.wilson(np.array([float(hits)]), np.array([float(n)]), level)
    np.testing.assert_allclose(ends[:, 0], theirs, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_student_is_scipys(level: float) -> None:
    x = numbers(0, 17)
    theirs = scipy.stats.t.interval(level, len(x) - 1, loc=x.mean(), scale=scipy.stats.sem(x))
    np.testing.assert_allclose(stats.student(x, level), theirs, rtol=1e-12)


def test_bootstrap_intervals_are_scipys_to_within_the_error_of_simulation() -> None:
    """Both resample 40,000 times with streams of their own, so that ends differ by about 1 % of the width."""
    top, bottom, draws = numbers(1, 30, 2), numbers(2, 30) + 1, 40_000

    def ratio(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(a.mean(axis) / b.mean(axis))

    band = stats.ratio_band((top, bottom), rng(), draws=draws)
    sums = stats.resampled_sums(np.column_stack([top, bottom]), rng(1), draws)
    for cell in range(2):
        theirs = scipy.stats.bootstrap(
            (top[:, cell], bottom), ratio, paired=True, vectorized=True, n_resamples=draws, method="percentile",
            random_state=rng(2),
        )  # fmt: skip
        expected, width = np.array(theirs.confidence_interval), np.ptp(theirs.confidence_interval)
        np.testing.assert_allclose([band.low[cell], band.high[cell]], expected, atol=0.02 * width)
        np.testing.assert_allclose(stats.percentiles(sums[:, cell] / sums[:, 2]), expected, atol=0.02 * width)


@pytest.mark.parametrize("level", LEVELS)
def test_percentiles_are_numpys_of_the_draws_that_are_numbers(level: float) -> None:
    draws = numbers(3, 200, 2, 3)
    draws[::7, 0] = np.nan
    draws[:, 1, 2] = np.nan
    found = stats.percentiles(draws, level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group of NaN alone
        expected = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_spearman_is_pearsons_correlation_of_ranks() -> None:
    one, two = numbers(4, 50).round(1), numbers(5, 50).round(1)  # with ties
    ranks = [scipy.stats.rankdata(x) for x in (one, two)]
    assert stats.spearman(one, two) == pytest.approx(float(np.corrcoef(*ranks)[0, 1]))
    assert math.isnan(stats.spearman(one[:3], np.full(3, 5.0)))
    assert math.isnan(stats.spearman(one[:2], two[:2]))


# --- laws


def test_wilson_is_the_same_for_successes_and_failures_and_narrows() -> None:
    hits, n = np.arange(11.0), np.full(11, 10.0)
    low, high = stats.wilson(hits, n)
    np.testing.assert_allclose(low, 1 - high[::-1], atol=1e-12)
    assert (np.diff(low) > 0).all()
    assert (np.diff(high) > 0).all()
    assert (np.diff(np.subtract(*stats.wilson(5 * 2.0 ** np.arange(8), 10 * 2.0 ** np.arange(8))[::-1])) < 0).all()
    assert np.isnan(stats.wilson(np.zeros(1), np.zeros(1))).all()


def test_a_higher_level_holds_a_lower_one() -> None:
    x, y = numbers(6, 25, 3), numbers(7, 25) + 1
    sums = stats.resampled_sums(x, rng())
    made = {
        "wilson": [stats.wilson(np.array([3.0]), np.array([9.0]), level) for level in LEVELS],
        "student": [stats.student(x[:, 0], level) for level in LEVELS],
        "percentiles": [stats.percentiles(sums, level) for level in LEVELS],
        "paired": [stats.paired_interval(sums[:, 0] / 200, 25, level) for level in LEVELS],
    }
    bands = [stats.ratio_band((x, y), rng(), level=level) for level in LEVELS]
    made |= {"cell": [np.stack([b.low, b.high]) for b in bands]}
    made |= {"band": [np.stack([b.band_low, b.band_high]) for b in bands]}
    for name, ends in made.items():
        for narrow, wide in pairwise(ends):
            assert (wide[0] < narrow[0]).all(), name
            assert (wide[1] > narrow[1]).all(), name


def test_intervals_of_means_move_and_stretch_with_the_values() -> None:
    x = numbers(8, 20)
    for interval in (stats.student, lambda values: stats.mean_interval(values, rng())):
        np.testing.assert_allclose(interval(3 * x + 5), 3 * interval(x) + 5)
        np.testing.assert_allclose(interval(-x)[::-1], -interval(x), rtol=0.05)  # other draws decide the ends


def test_bands_stretch_with_the_scale_and_do_not_depend_on_how_many_cells_are_done_at_once() -> None:
    top, bottom = numbers(9, 30, 4, 3), numbers(10, 30) + 1
    found, part = stats.ratio_band((top, bottom), rng()), stats.ratio_band((top, bottom), rng(), cells=5)
    double = stats.ratio_band((6 * top, 2 * bottom), rng())
    for name in ("value", "low", "high", "band_low", "band_high"):
        assert getattr(found, name).shape == (4, 3)
        np.testing.assert_allclose(getattr(part, name), getattr(found, name))
        np.testing.assert_allclose(getattr(double, name), 3 * getattr(found, name))
    assert (found.band_low < found.low).all()
    assert (found.band_high > found.high).all()
    assert (found.nonzero == (found.band_low > 0)).all()


def test_a_mean_is_a_ratio_to_one_and_a_difference_is_that_of_its_parts() -> None:
    x, y = numbers(11, 30, 2), numbers(12, 20, 2)
    ones = [np.ones(len(v)) for v in (x, y)]
    np.testing.assert_array_equal(stats.mean_band(x, rng()).band_low, stats.ratio_band((x, ones[0]), rng()).band_low)
    one, two, apart = stats.ratio_difference_band((x, ones[0]), (y, ones[1]), rng())
    np.testing.assert_allclose(apart.value, x.mean(0) - y.mean(0))
    np.testing.assert_array_equal(apart.value, one.value - two.value)
    widths = [b.high - b.low for b in (one, two, apart)]
    np.testing.assert_allclose(widths[2], np.hypot(widths[0], widths[1]), rtol=0.1)  # independent errors


def test_resampled_sums_are_sums_of_resampled_units() -> None:
    x = numbers(13, 12, 2, 3)
    counts = stats.multiplicities(12, rng(), 50)
    assert (counts.sum(1) == 12).all()
    by_hand = [np.repeat(x, often, axis=0).sum(0) for often in counts]
    np.testing.assert_allclose(stats.resampled_sums(x, rng(), 50), by_hand)


def test_where_units_agree_the_interval_is_wilsons() -> None:
    hits, trials = np.full((20, 3), 4.0), np.full((20, 3), 8.0)
    hits[::2, 0], trials[:, 2], hits[:, 2] = 2.0, 0.0, 0.0
    share, ends = stats.pooled_share(hits, trials, rng())
    np.testing.assert_allclose(share, [3 / 8, 1 / 2, np.nan])
    np.testing.assert_array_equal(ends[:, 1], stats.wilson(np.array([10.0]), np.array([20.0]))[:, 0])
    assert 0.25 < ends[0, 0] < 3 / 8 < ends[1, 0] < 0.5
    assert np.isnan(ends[:, 2]).all()
    scaled = stats.wilson_where_flat(np.zeros((2, 1)), np.array([0.5]), np.array([20.0]), 0.5)
    np.testing.assert_array_equal(scaled, 2 * ends[:, 1:2])
    low, high = stats.paired_interval(np.zeros(100), 20)
    assert -low == high == stats.wilson(np.zeros(1), np.array([20.0]))[1, 0]


def test_what_cannot_be_known_is_not_claimed() -> None:
    one = stats.ratio_band((np.ones((1, 2)), np.ones(1)), rng())
    assert np.isnan([one.low, one.high, one.band_low, one.band_high]).all()
    weak = (numbers(14, 3, 2), np.array([1.0, -1.0, 0.1]))  # the sign of the bottom depends on the resample
    strong = (numbers(15, 9, 2), np.ones(9))
    for band in (stats.ratio_band(weak, rng()), stats.ratio_difference_band(strong, weak, rng())[2]):
        assert (band.low == -np.inf).all()
        assert (band.band_high == np.inf).all()
        assert not band.nonzero.any()
    assert np.isnan(stats.student(np.ones(1))).all()


# --- how often intervals hold the true value


@pytest.mark.parametrize(("p", "n"), [(0.5, 50), (0.9, 50), (0.2, 30)])
def test_wilson_covers(p: float, n: int) -> None:
    hits = rng().binomial(n, p, size=20_000).astype(float)
    assert 0.93 <= inside(stats.wilson(hits, np.full(20_000, float(n))), p) <= 0.985


@pytest.mark.parametrize("n", [5, 40])
def test_student_covers_and_the_bootstrap_of_few_units_is_too_narrow(n: int) -> None:
    source = rng(1)
    values = source.normal(3, 2, size=(1000, n))
    exact = np.stack([stats.student(x) for x in values], 1)
    drawn = np.stack([stats.mean_interval(x, source) for x in values], 1)
    assert 0.93 <= inside(exact, 3) <= 0.97
    assert (0.91 <= inside(drawn, 3) <= 0.97) if n == 40 else (0.75 <= inside(drawn, 3) <= 0.90)


def test_shares_of_clusters_cover() -> None:
    """Units have probabilities of their own, 0.6 on average; trials taken as independent would cover far less."""
    source, units, trials = rng(2), 50, 8
    hits = source.binomial(trials, source.beta(1.8, 1.2, size=(units, 1000))).astype(float)
    _, ends = stats.pooled_share(hits, np.full_like(hits, trials), source)
    assert 0.92 <= inside(ends, 0.6) <= 0.975
    assert inside(stats.wilson(hits.sum(0), np.full(1000, float(units * trials))), 0.6) < 0.85


def test_bands_cover_all_cells_at_once() -> None:
    """100 cells at 0 and one at 0.5; 60 units; 200 times."""
    source, cell, every, found = rng(3), 0, 0, 0
    for _ in range(200):
        bottom = source.normal(4, 1, 60)
        top = source.normal(0, 1, (60, 101))
        top[:, 0] += bottom / 2
        truth = np.eye(101)[0] / 2
        band = stats.ratio_band((top, bottom), source, draws=300)
        cell += int(band.low[0] <= 0.5 <= band.high[0])
        every += int(((band.band_low <= truth) & (truth <= band.band_high)).all())
        found += int(band.nonzero[0])
    assert 0.9 <= cell / 200 <= 0.99
    assert 0.87 <= every / 200 <= 0.99
    assert found == 200


def test_differences_cover() -> None:
    """The true difference is 0.5 - 0.2, between samples of different sizes."""
    source, cell, every = rng(4), 0, 0
    for _ in range(200):
        bottoms = [source.normal(4, 1, n) for n in (60, 40)]
        one, two = ((source.normal(0, 1, (len(b), 20)) + b[:, None] * x, b)
                    for b, x in zip(bottoms, (0.5, 0.2), strict=True))  # fmt: skip
        _, _, apart = stats.ratio_difference_band(one, two, source, draws=300)
        cell += int(apart.low[0] <= 0.3 <= apart.high[0])
        every += int(((apart.band_low <= 0.3) & (apart.band_high >= 0.3)).all())
    assert 0.9 <= cell / 200 <= 0.99
    assert 0.87 <= every / 200 <= 0.99


def test_ratio_spearman_is_that_of_the_ratios_and_its_interval_narrows_with_the_noise() -> None:
    rng = np.random.default_rng(0)
    truth, widths = rng.normal(size=12), []
    for noise in (0.0, 0.3, 3.0):
        samples = []
        for units in (40, 60):
            gap = rng.uniform(1, 3, units)
            samples.append((gap[:, None] * (truth + noise * rng.normal(size=(units, 12))), gap))
        value, (low, high) = stats.ratio_spearman(*samples, np.random.default_rng(1))
        by_hand = [top.sum(0) / bottom.sum() for top, bottom in samples]
        assert value == pytest.approx(scipy.stats.spearmanr(*by_hand).statistic)
        assert low - 1e-12 <= value
        assert value <= high + 1e-12
        widths.append(high - low)
    assert widths[0] == pytest.approx(0)
    assert widths[0] < widths[1] < widths[2]
