"""Intervals against scipy's, laws that they must obey, and how often they hold the true value."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise, product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as some

from benchmarks import coverage
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


@given(some.integers(1, 200), some.integers(0, 200), some.sampled_from(LEVELS))
def test_clopper_pearson_is_scipys(n: int, hits: int, level: float) -> None:
    hits = min(hits, n)
    theirs = scipy.stats.binomtest(hits, n).proportion_ci(level, method="exact")
    ends = stats.clopper_pearson(np.array([float(hits)]), np.array([float(n)]), level)
    np.testing.assert_allclose(ends[:, 0], theirs, atol=1e-9)


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


def test_the_half_episode_t_is_its_formula_added_up_by_hand() -> None:
    hits, trials = [4.0, 0.0, 7.0, 2.0, 5.0, 5.0], [5.0, 3.0, 9.0, 2.0, 5.0, 8.0]
    e, size = 6, sum(trials) / 6
    r = (sum(hits) + size / 2) / (sum(trials) + size)
    spread = sum((h - r * d) ** 2 for h, d in zip(hits, trials, strict=True)) + size**2 / 2 * (r**2 + (1 - r) ** 2)
    variance = (e + 1) / e * spread / ((e + 1) * size) ** 2 * (e + 1) / e
    half = scipy.stats.t.ppf(0.975, e - 1) * math.sqrt(variance)
    given = [np.array(x)[:, None] for x in (hits, trials)]
    np.testing.assert_allclose(stats.half_episode_t(*given)[:, 0], [r - half, r + half])
    share, ends = stats.accuracy(*given)
    assert share[0] == sum(hits) / sum(trials)
    np.testing.assert_allclose(ends[:, 0], [r - half, min(1, r + half)])


def test_the_variance_of_a_share_is_at_least_that_of_independent_questions() -> None:
    """Episodes in which each share is the same hardly spread; then the variance is r (1 - r) / n."""
    hits, trials = np.full((200, 1), 5.0), np.full((200, 1), 10.0)
    half = scipy.stats.t.ppf(0.975, 199) * math.sqrt(0.25 / 2000)
    np.testing.assert_allclose(stats.accuracy(hits, trials)[1][:, 0], [0.5 - half, 0.5 + half])


def test_the_sign_flip_test_is_the_enumeration_of_all_signs() -> None:
    for seed in range(20):
        totals = rng(seed).integers(-4, 6, size=9)
        signs = np.array(list(product((-1, 1), repeat=len(totals))))
        expected = (np.abs(signs @ totals) >= abs(totals.sum())).mean()
        assert stats.sign_flip(totals) == pytest.approx(expected, abs=1e-12)
    assert stats.sign_flip(np.zeros(8, int)) == 1
    assert stats.sign_flip(np.full(8, 3)) == pytest.approx(2 / 2**8)


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
    trials = np.full((25, 3), 8.0)
    hits = rng(1).binomial(8, 0.5, trials.shape).astype(float)
    made = {
        "wilson": [stats.wilson(np.array([3.0]), np.array([9.0]), level) for level in LEVELS],
        "student": [stats.student(x[:, 0], level) for level in LEVELS],
        "percentiles": [stats.percentiles(sums, level) for level in LEVELS],
        "accuracy": [stats.accuracy(hits, trials, level)[1] for level in LEVELS],
        "exact": [stats.accuracy(hits[:, :1] / 8, trials[:, :1] / 8, level)[1] for level in LEVELS],
        "over ceiling": [stats.over_ceiling(hits, trials, trials / 2, trials / 4, level)[1] for level in LEVELS],
        "paired": [stats.paired_difference(hits - 4, trials, level)[1] for level in LEVELS],
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


def test_right_and_wrong_answers_have_the_same_interval_turned_round() -> None:
    hits, trials = rng().binomial(7, 0.8, size=(12, 5)).astype(float), np.full((12, 5), 7.0)
    ends, turned = stats.accuracy(hits, trials)[1], stats.accuracy(trials - hits, trials)[1]
    np.testing.assert_allclose(ends, 1 - turned[::-1], atol=1e-12)


def test_where_all_episodes_agree_the_interval_still_has_a_width() -> None:
    for right in (0.0, 4.0, 8.0):
        hits, trials = np.full((20, 1), right), np.full((20, 1), 8.0)
        share, ends = stats.accuracy(hits, trials)
        assert ends[1, 0] - ends[0, 0] > 0.05
        assert ends[0, 0] <= share[0] <= ends[1, 0]
    gap, ends = stats.paired_difference(np.zeros((20, 1)), np.full((20, 1), 8.0))
    assert gap[0] == 0
    assert -ends[0, 0] == ends[1, 0] > 0.05


def test_episodes_without_questions_and_empty_groups_do_not_count() -> None:
    hits, trials = rng().binomial(6, 0.7, size=(9, 1)).astype(float), np.full((9, 1), 6.0)
    none = np.zeros((4, 1))
    for function in (stats.accuracy, stats.paired_difference):
        more = function(np.vstack([hits, none]), np.vstack([trials, none]))
        for one, two in zip(more, function(hits, trials), strict=True):
            np.testing.assert_allclose(one, two)
        assert all(np.isnan(x).all() for x in function(np.zeros((9, 1)), np.zeros((9, 1))))


@pytest.mark.parametrize("asked", [1.0, 6.0])
def test_fewer_than_five_episodes_have_no_interval(asked: float) -> None:
    for episodes, known in ((stats.FEWEST_EPISODES - 1, False), (stats.FEWEST_EPISODES, True)):
        hits, trials = np.full((episodes, 1), asked), np.full((episodes, 1), asked)
        made = (stats.accuracy(hits, trials), stats.paired_difference(0 * hits, trials),
                stats.over_ceiling(hits, trials, trials / 2, trials / 4))  # fmt: skip
        for value, ends in made:
            assert np.isfinite(value).all()
            assert np.isfinite(ends).all() == known


@pytest.mark.parametrize("asked", [1, 6])
def test_over_a_ceiling_of_one_the_interval_is_that_of_the_accuracy(asked: int) -> None:
    trials = np.full((15, 200), float(asked))
    hits = rng().binomial(asked, 0.8, size=trials.shape).astype(float)
    for one, two in zip(stats.over_ceiling(hits, trials, trials, trials), stats.accuracy(hits, trials), strict=True):
        np.testing.assert_array_equal(one, two)
    half = stats.over_ceiling(hits / 2, trials, trials / 2, trials / 4)
    assert (half[1][1] - half[1][0] > 0.1).all()
    np.testing.assert_allclose(half[0], stats.accuracy(hits, trials)[0])


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


@pytest.mark.parametrize("part", [part for part in coverage.ACCURACIES if not part.startswith("for comparison")])
@pytest.mark.slow
def test_every_cell_of_the_simulation_is_covered(part: str) -> None:
    """The table of docs/statistics.md: at least 0.93 in every cell, of intervals of 95 %."""
    (cells,) = coverage.simulate([part]).values()
    assert [cell for cell in cells if cell.coverage < coverage.WANTED] == []


@pytest.mark.parametrize("questions", [1, 2, 10])
def test_accuracies_of_clusters_cover(questions: int) -> None:
    """A few cells of that table, to 3 standard errors of 2000 draws."""
    for icc, p in ((0.1, 0.9), (0.5, 0.97)):
        trials = np.full((20, 2000), float(questions))
        hits = rng(2).binomial(questions, coverage.probabilities(rng(3), p, icc, trials.shape)).astype(float)
        assert inside(stats.accuracy(hits, trials)[1], p) >= 0.95 - 0.015
        pooled = inside(stats.wilson(hits.sum(0), trials.sum(0)), p)
        assert (pooled < 0.9) == (questions == 10)  # questions of an episode are no independent trials


def test_ratios_and_differences_cover() -> None:
    ratios = [c for c in coverage.ratios(rng(4), 300) if c.setting["episodes"] == 20]
    pairs = [c for c in coverage.differences(rng(5), 300, shared=False) if c.setting["episodes"] == 20]
    for cells in (ratios, pairs):
        assert min(cell.coverage for cell in cells) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300)
        assert np.mean([cell.coverage for cell in cells]) >= 0.95


def test_equal_agents_seldom_fail_the_sign_flip_test() -> None:
    totals = rng(6).binomial(10, 0.8, (2, 1000, 12))
    values = np.array([stats.sign_flip(x) for x in totals[0] - totals[1]])
    for level in (0.05, 0.2):
        assert (values <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / 1000)
    ahead = rng(7).binomial(10, 0.95, (100, 12)) - rng(8).binomial(10, 0.5, (100, 12))
    assert max(stats.sign_flip(x) for x in ahead) < 0.01


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
