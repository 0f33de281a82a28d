"""Every interval and test of the project: pure functions of arrays.

A unit is one independently drawn item: an episode, a pair of prompts, a string. Intervals are over units, independent
of the number of questions or tokens in each. An interval is an array whose row 0 is the lower end and row 1 the upper
one; its level is 95 % unless another is given.

Which function is for what:

- `accuracy`: a share of right answers, by `half_episode_t`, or `clopper_pearson` where each episode has one question.
- `over_ceiling`: an accuracy divided by the accuracy of the ideal reader.
- `paired_difference`, `sign_flip`: two agents on the same questions, as an interval and as a test.
- `wilson`: a share of many independent trials, such as strings.
- `student`: a mean of one number an episode that is no share, such as a number of commands.
- `estimate`, `estimated_difference`: numbers of models that were trained several times, over trainings.
- `auc`: how well a number tells two kinds of items apart.
- `ratio_band`, `mean_band`, `mean_interval`: many ratios or means at once, such as the recovery of every head, by
  percentile bootstrap (Efron 1979, Annals of Statistics 7, 1-26); with fewer than about 20 units they are too narrow.

`accuracy`, `over_ceiling` and `paired_difference` give no interval (NaN) below `FEWEST_EPISODES` episodes, and tables
mark those of fewer than `FEW_EPISODES`. How often they contain the true value: docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import betaincinv, ndtri, stdtrit

LEVEL = 0.95  # confidence level
DRAWS = 1000  # bootstrap resamples for tables; bands take their number from the config
FEWEST_EPISODES = 5  # fewer have no interval
FEW_EPISODES = 10  # fewer are marked in tables and on pages
_WEIGHT = 0.5  # of each of the two episodes that `half_episode_t` adds
_UNSEEN = 0.5  # share of an episode's questions by which the two episodes differ that `paired_difference` adds

Ratio = tuple[Float[np.ndarray, "unit ..."], Float[np.ndarray, " unit"]]  # numerators and denominator of each unit


def wilson(
    hits: Float[np.ndarray, " cell"], n: Float[np.ndarray, " cell"], level: float = LEVEL
) -> Float[np.ndarray, "2 cell"]:
    """Return Wilson's score interval for a probability (Wilson 1927, JASA 22, 209-212); NaN where n = 0.

    Trials are assumed independent: for clustered trials the interval is too narrow.

    Args:
        hits: successes; they need not be whole numbers.
        n: trials.
        level: confidence level.
    """
    z = float(ndtri(0.5 + level / 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        p = hits / n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(np.maximum(p * (1 - p), 0) / n + z * z / (4 * n * n))
        return np.stack([np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)])


def clopper_pearson(
    hits: Float[np.ndarray, " cell"], n: Float[np.ndarray, " cell"], level: float = LEVEL
) -> Float[np.ndarray, "2 cell"]:
    """Return the exact interval for a probability (Clopper & Pearson 1934, Biometrika 26, 404-413); NaN where n = 0.

    Of independent trials it contains the true value at least as often as `level` says, for every n and probability;
    Wilson's interval, which does so on average, can fall to 0.83 with few trials.

    Args:
        hits: successes; they need not be whole numbers.
        n: trials.
        level: confidence level.
    """
    tail, misses = (1 - level) / 2, n - hits
    low = np.where(hits > 0, betaincinv(hits, misses + 1, tail), 0)
    high = np.where(misses > 0, betaincinv(hits + 1, misses, 1 - tail), 1)
    return np.where(n > 0, np.stack([low, high]), np.nan)


def student(values: Float[np.ndarray, " unit"], level: float = LEVEL) -> Float[np.ndarray, " 2"]:
    """Return Student's t interval for a mean, NaN for fewer than two values.

    It is exact for normal values, and too narrow for few values of a very skewed distribution.
    """
    n = len(values)
    if n < 2:
        return np.full(2, np.nan)
    half = float(stdtrit(n - 1, (1 + level) / 2) * values.std(ddof=1) / math.sqrt(n))
    return np.array([values.mean() - half, values.mean() + half])


def difference_interval(one: tuple[float, float, float], other: tuple[float, float, float]) -> Float[np.ndarray, " 2"]:
    """Return the interval of one - other from the value, lower and upper end of each.

    The method of square-and-add (Zou & Donner 2008, Statistics in Medicine 27, 1693-1702) for independent estimates; it
    is too wide where they are positively correlated.
    """
    (a, a_low, a_high), (b, b_low, b_high) = one, other
    return np.array([a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)])


def spearman(one: Float[np.ndarray, " cell"], two: Float[np.ndarray, " cell"]) -> float:
    """Return Spearman's rank correlation; NaN for fewer than three pairs, or where one side does not vary."""
    if len(one) < 3 or len(np.unique(one)) < 2 or len(np.unique(two)) < 2:
        return math.nan
    from scipy.stats import spearmanr  # takes longer to import than most runs compute statistics

    return float(spearmanr(one, two).statistic)


def ratio_spearman(one: Ratio, two: Ratio, rng: np.random.Generator) -> tuple[float, Float[np.ndarray, " 2"]]:
    """Return Spearman's rank correlation of the ratios of means of two independent samples over the same cells.

    The interval is the percentile bootstrap over the units of both; noise in the ratios draws it towards 0.
    """
    from scipy.stats import rankdata

    value = spearman(*(top.mean(0) / bottom.mean() for top, bottom in (one, two)))
    drawn = []
    for top, bottom in (one, two):
        sums = resampled_sums(np.column_stack([top, bottom]), rng)
        ranks = rankdata(sums[:, :-1] / sums[:, -1:], axis=1)
        drawn.append(ranks - ranks.mean(1, keepdims=True))
    with np.errstate(invalid="ignore"):
        draws = (drawn[0] * drawn[1]).sum(1) / np.sqrt((drawn[0] ** 2).sum(1) * (drawn[1] ** 2).sum(1))
    return value, percentiles(draws)


# --- accuracies


def half_episode_t(
    hits: Float[np.ndarray, "episode group"],
    total: Float[np.ndarray, "episode group"],
    squares: Float[np.ndarray, "episode group"] | None = None,
    level: float = LEVEL,
) -> Float[np.ndarray, "2 group"]:
    """Return the half-episode t interval of hits.sum(0) / total.sum(0); NaN below `FEWEST_EPISODES` episodes.

    It is the t interval of a ratio with clustered observations, from the linearised variance, after adding two episodes
    of average size with weight 1/2 each: one without any hit, one with a hit for every question. They keep the interval
    from closing where all episodes agree, as the two added successes and failures of Agresti & Coull (1998, American
    Statistician 52, 119-126) do for independent trials. The variance is never below that of independent questions,
    and the interval always contains the observed ratio. For one question an episode it is too narrow; see `accuracy`.

    Args:
        hits: right answers of each episode.
        total: number of questions of each episode, or the sum of their ceilings. Episodes with 0 are not counted.
        squares: sum of the squared ceilings of each episode; by default `total`, which is right for ceilings of 1.
        level: confidence level.
    """
    squares = total if squares is None else squares
    episodes, everything = (total > 0).sum(0).astype(np.float64), total.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        size, more = everything / episodes, episodes + 2 * _WEIGHT
        ratio = (hits.sum(0) + _WEIGHT * size) / (everything + 2 * _WEIGHT * size)
        spread = ((hits - ratio * total) ** 2).sum(0) + _WEIGHT * size**2 * (ratio**2 + (1 - ratio) ** 2)
        variance = more / (more - 1) * spread / (more * size) ** 2 * more / episodes
        variance = np.maximum(variance, _independent(ratio, everything, squares.sum(0)))
        raw, half = hits.sum(0) / everything, _quantile(episodes, level) * np.sqrt(variance)
        return np.stack([np.minimum(ratio - half, raw), np.maximum(ratio + half, raw)])


def accuracy(
    hits: Float[np.ndarray, "episode group"], trials: Float[np.ndarray, "episode group"], level: float = LEVEL
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, "2 group"]]:
    """Return all hits out of all trials, in [0, 1], and the interval over episodes.

    The interval is `half_episode_t`, or `clopper_pearson` where no episode has more than one question. It is NaN for
    fewer than `FEWEST_EPISODES` episodes; for groups without trials the share is NaN too.

    Args:
        hits: right answers of each episode; they need not be whole numbers.
        trials: questions of each episode, 0 for episodes that have none in this group.
        level: confidence level.
    """
    n = trials.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = hits.sum(0) / n
    single = np.where(n >= FEWEST_EPISODES, clopper_pearson(hits.sum(0), n, level), np.nan)
    ends = np.clip(half_episode_t(hits, trials, level=level), 0, 1)
    return share, np.where((trials <= 1).all(0), single, ends)


def over_ceiling(
    hits: Float[np.ndarray, "episode group"],
    trials: Float[np.ndarray, "episode group"],
    ceilings: Float[np.ndarray, "episode group"],
    squares: Float[np.ndarray, "episode group"],
    level: float = LEVEL,
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, "2 group"]]:
    """Return the ratio of all hits to the sum of all ceilings, and its interval over episodes.

    The ratio can exceed 1. The interval is `half_episode_t`, or where no episode has more than one question the t
    interval of a ratio with the variance of independent questions as its least. Where all ceilings are 1 it is that of
    `accuracy`. It is NaN for fewer than `FEWEST_EPISODES` episodes.

    Args:
        hits: right answers of each episode.
        trials: questions of each episode.
        ceilings: sum of their ceilings.
        squares: sum of their squared ceilings.
        level: confidence level.
    """
    right, below = hits.sum(0), ceilings.sum(0)
    episodes = (trials > 0).sum(0).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = right / below
        spread = ((hits - ratio * ceilings) ** 2).sum(0) * episodes / (episodes - 1) / below**2
        least = _independent((right + 2) / (below + 4), below, squares.sum(0))
        half = _quantile(episodes, level) * np.sqrt(np.maximum(spread, least))
    ends = np.where((trials <= 1).all(0), np.stack([ratio - half, ratio + half]),
                    half_episode_t(hits, ceilings, squares, level))  # fmt: skip
    known = squares.sum(0) == trials.sum(0)
    return ratio, np.where(known, accuracy(hits, trials, level)[1], np.maximum(ends, 0))


def paired_difference(
    gaps: Float[np.ndarray, "episode group"], trials: Float[np.ndarray, "episode group"], level: float = LEVEL
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, "2 group"]]:
    """Return the mean difference of two agents on the same questions, in [-1, 1], and its interval over episodes.

    It is the t interval of a ratio with clustered observations. Two episodes are added to the variance, in which one
    agent or the other is ahead by _UNSEEN of an episode's questions, and by one question at least, because
    episodes in which the agents differ may exist but not be in the sample. NaN below `FEWEST_EPISODES` episodes.

    Args:
        gaps: right answers of one agent less those of the other, of each episode.
        trials: questions of each episode, 0 for episodes that have none in this group.
        level: confidence level.
    """
    episodes, n = (trials > 0).sum(0).astype(np.float64), trials.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = gaps.sum(0) / n
        spread = ((gaps - gap * trials) ** 2).sum(0) + 2 * np.maximum(_UNSEEN * n / episodes, 1) ** 2
        half = _quantile(episodes, level) * np.sqrt(spread * episodes / (episodes - 1)) / n
    return gap, np.clip(np.stack([gap - half, gap + half]), -1, 1)


def sign_flip(totals: Int[np.ndarray, " episode"]) -> float:
    """Return the two-sided p value of equal agents, from the differences of their right answers in each episode.

    If the agents are equal, each episode's total is as likely with either sign. The p value is the share of all
    2**episodes choices of signs that give a sum at least as far from 0 as the observed one; it is exact, since the
    distribution of the sum is found by convolution. Ties make the test conservative.
    """
    reach = int(np.abs(totals).sum())
    chances = np.zeros(2 * reach + 1)  # of each sum, from -reach to reach
    chances[reach] = 1
    for total in np.abs(totals):
        chances = (np.roll(chances, total) + np.roll(chances, -total)) / 2
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(int(totals.sum()))
    return float(min(1.0, chances[far].sum()))


def _independent(
    ratio: Float[np.ndarray, " group"], total: Float[np.ndarray, " group"], squares: Float[np.ndarray, " group"]
) -> Float[np.ndarray, " group"]:
    """Return the variance of a ratio if questions were independent, each with probability ratio * ceiling."""
    return np.asarray(np.maximum(ratio * total - ratio**2 * squares, 0) / total**2)


def _quantile(episodes: Float[np.ndarray, " group"], level: float) -> Float[np.ndarray, " group"]:
    """Return the quantile of Student's t with one degree of freedom less than there are episodes; NaN for too few."""
    return np.asarray(np.where(episodes >= FEWEST_EPISODES, stdtrit(episodes - 1, (1 + level) / 2), np.nan))


# --- bootstrap over units


def multiplicities(n: int, rng: np.random.Generator, draws: int) -> Int[np.ndarray, "draw unit"]:
    """Return how often each of `n` units is in each bootstrap resample of n units with replacement."""
    return rng.multinomial(n, np.full(n, 1 / n), size=draws)


def resampled_sums(
    sums: Float[np.ndarray, "unit ..."], rng: np.random.Generator, draws: int = DRAWS
) -> Float[np.ndarray, "draw ..."]:
    """Return the sums over units in each bootstrap resample. All groups share the resamples.

    Ratios of these sums resample ratios of means. For a stratified bootstrap, add the results of all strata.
    """
    flat = multiplicities(len(sums), rng, draws).astype(np.float64) @ sums.reshape(len(sums), -1)
    return np.asarray(flat.reshape(draws, *sums.shape[1:]))


def percentiles(draws: Float[np.ndarray, "draw ..."], level: float = LEVEL) -> Float[np.ndarray, "2 ..."]:
    """Return the percentile interval of each group's draws; NaN draws are ignored.

    A draw is NaN (0/0) if the resample has none of a group's units. If all draws are NaN, so is the interval.
    """
    draws = np.sort(draws, axis=0)  # NaN sorts last
    valid = np.maximum((~np.isnan(draws)).sum(axis=0), 1)
    at = np.multiply.outer(np.array([(1 - level) / 2, (1 + level) / 2]), valid - 1)
    below, above = (np.take_along_axis(draws, end(at).astype(int), axis=0) for end in (np.floor, np.ceil))
    return np.asarray(below + (at - np.floor(at)) * (above - below))


def mean_interval(values: Float[np.ndarray, " unit"], rng: np.random.Generator) -> Float[np.ndarray, " 2"]:
    """Return the percentile bootstrap interval of a mean."""
    return percentiles(resampled_sums(values, rng) / len(values))


def jackknife(
    whole: Float[np.ndarray, ...], without: Float[np.ndarray, "group ..."], level: float = LEVEL
) -> Float[np.ndarray, "2 ..."]:
    """Return the delete-one-group jackknife interval of smooth statistics (Quenouille 1956, Biometrika 43, 353-360).

    Args:
        whole: the statistics of all groups of units.
        without: the same without each group; with fewer than two groups the interval is NaN.
        level: confidence level, of Student's t with as many degrees of freedom as groups less one.
    """
    n = len(without)
    if n < 2:
        return np.full((2, *np.shape(whole)), np.nan)
    error = np.sqrt((n - 1) / n * ((without - without.mean(0)) ** 2).sum(0))
    half = float(stdtrit(n - 1, (1 + level) / 2)) * error
    return np.stack([whole - half, whole + half])


def auc(
    rank: Int[np.ndarray, " item"], positive: Bool[np.ndarray, " item"], weight: Int[np.ndarray, " item"] | None = None
) -> float:
    """Return the probability that a positive item ranks above a negative one, equal ranks counted half.

    NaN where items of one of the two kinds are missing.

    Args:
        rank: of each item, from 0; equal values have equal ranks.
        positive: whether the item is a positive one.
        weight: how many times it counts; by default once.
    """
    counted = np.ones(len(rank)) if weight is None else weight.astype(np.float64)
    own, other = np.bincount(rank, counted * positive), np.bincount(rank, counted * ~positive)
    total = own.sum() * other.sum()
    return float((own * (np.cumsum(other) - other / 2)).sum() / total) if total else math.nan


# --- numbers of models that were trained several times


class Estimate(NamedTuple):
    """A number of a model, over its trainings.

    Attributes:
        value: mean over trainings.
        low: lower end of the 95 % interval; NaN where there is none.
        high: upper end.
        trainings: number of trainings.
        least: the smallest value of a training.
        most: the largest one.
        below: how far the interval over strings alone reaches below the mean.
        above: how far it reaches above.
        error: standard error of the mean over trainings; NaN for one training.
    """

    value: float
    low: float
    high: float
    trainings: int
    least: float
    most: float
    below: float
    above: float
    error: float


def estimate(
    values: Sequence[float],
    lows: Sequence[float | None],
    highs: Sequence[float | None],
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """Return the mean over trainings, with its 95 % interval.

    Of one training the interval is that over strings. Of several it is Student's t interval over trainings, whose
    values differ by chance in their strings too; but where strings alone explain a wider interval, as when all
    trainings give 100 %, it is that one.

    Args:
        values: the number of each training.
        lows: lower end of its interval over strings; None where there is none.
        highs: upper end.
        within: the smallest and the largest possible number, which the interval keeps to.
    """
    n, mean = len(values), float(np.mean(values))
    below, above = (
        float(
            np.sqrt(np.mean([math.nan if x is None else (v - x) ** 2 for v, x in zip(values, ends, strict=True)]) / n)
        )
        for ends in (lows, highs)
    )
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return _with_interval(mean, n, (min(values), max(values)), (below, above, error), n - 1, within)


def estimated_difference(one: Estimate, two: Estimate) -> Estimate:
    """Return the difference of two independent estimates. The range is that of all pairs of trainings.

    The interval is Welch's over trainings, or that over strings, by adding squares (Newcombe 1998, Statistics in
    Medicine 17, 873-890), whichever is wider.
    """
    sides = math.hypot(one.below, two.above), math.hypot(one.above, two.below), math.hypot(one.error, two.error)
    freedom = 0.0
    if min(one.trainings, two.trainings) > 1 and sides[2] > 0:
        parts = sum(x.error**4 / (x.trainings - 1) for x in (one, two))
        freedom = sides[2] ** 4 / parts
    trainings = min(one.trainings, two.trainings)
    return _with_interval(
        one.value - two.value, trainings, (one.least - two.most, one.most - two.least), sides, freedom
    )


def _with_interval(
    value: float, trainings: int, span: tuple[float, float], sides: tuple[float, float, float], freedom: float,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:  # fmt: skip
    below, above, error = sides
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error if freedom > 0 else math.nan
    ends = np.array([value - np.fmax(below, half), value + np.fmax(above, half)])
    low, high = np.clip(ends, *within).tolist()
    return Estimate(value, low, high, trainings, *span, *sides)


# --- simultaneous bands


@dataclass(frozen=True)
class Band:
    """Estimates with two intervals each; all arrays have one shape.

    `low` and `high` are pointwise intervals; `band_low` and `band_high` cover all cells at once, so select cells by
    `nonzero`: those whose band excludes 0.
    """

    value: Float[np.ndarray, ...]
    low: Float[np.ndarray, ...]
    high: Float[np.ndarray, ...]
    band_low: Float[np.ndarray, ...]
    band_high: Float[np.ndarray, ...]

    @property
    def nonzero(self) -> Bool[np.ndarray, ...]:
        """Whether the simultaneous band excludes 0."""
        return np.asarray((self.band_low > 0) | (self.band_high < 0))


def ratio_band(
    ratio: Ratio, rng: np.random.Generator, *, level: float = LEVEL, draws: int = 2000, cells: int = 4096
) -> Band:
    """Return ratios of means, top.mean(0) / bottom.mean(), with percentile bootstrap intervals and a sup-t band.

    A ratio of means, unlike a mean of ratios, is not dominated by units with a bottom near 0. Units are resampled as a
    whole: all their cells together with their bottom. The band is value +- q * standard error, with q the quantile
    over resamples of the largest studentised deviation among all cells (Montiel Olea & Plagborg-Moller 2019, J. Applied
    Econometrics 34, 1-17; a one-step relative of Romano & Wolf 2005). With one unit all ends are NaN. Where more than
    (1 - level) / 2 of the resamples disagree with the sign of bottom.mean(), the scale is not known and ends are
    infinite.

    Args:
        ratio: top and bottom of each unit.
        rng: for the resamples.
        level: confidence level of the intervals and of the band.
        draws: number of resamples.
        cells: number of cells processed at a time, which bounds memory to about 3 * 8 * draws * cells bytes.
    """
    top, bottom = _flat(ratio)
    draw, scales = _ratio_draws(top, bottom, rng, draws)
    found = _band(top.mean(0) / bottom.mean(), draw, draws, level, cells)
    if len(top) == 1:
        found = _unknown(found, math.nan)
    elif (scales * bottom.mean() <= 0).mean() > (1 - level) / 2:
        found = _unknown(found, math.inf)
    return _shaped(found, ratio)


def mean_band(values: Float[np.ndarray, "unit ..."], rng: np.random.Generator, *, draws: int = 2000) -> Band:
    """Return means over units with percentile bootstrap intervals and a sup-t band, as in `ratio_band`."""
    return ratio_band((values, np.ones(len(values))), rng, draws=draws)


def ratio_difference_band(
    one: Ratio, two: Ratio, rng: np.random.Generator, *, level: float = LEVEL, draws: int = 2000, cells: int = 4096
) -> tuple[Band, Band, Band]:
    """Return the `ratio_band` of `one`, that of `two`, and the band of one - two, for two independent samples.

    The samples are resampled independently. The band of the difference is NaN or infinite if one of the others is.
    """
    found = [ratio_band(x, rng, level=level, draws=draws, cells=cells) for x in (one, two)]
    (first, _), (second, _) = (_ratio_draws(*_flat(x), rng, draws) for x in (one, two))
    value = (found[0].value - found[1].value).ravel()
    gap = _band(value, lambda part: first(part) - second(part), draws, level, cells)
    if min(len(one[1]), len(two[1])) == 1:
        gap = _unknown(gap, math.nan)
    elif not all(np.isfinite(x.low).all() for x in found):
        gap = _unknown(gap, math.inf)
    return found[0], found[1], _shaped(gap, one)


def _flat(ratio: Ratio) -> Ratio:
    # Rounding of sums depends on the memory layout, so it is fixed.
    return np.ascontiguousarray(ratio[0].reshape(len(ratio[0]), -1)), ratio[1]


def _ratio_draws(
    top: Float[np.ndarray, "unit cell"], bottom: Float[np.ndarray, " unit"], rng: np.random.Generator, draws: int
) -> tuple[Callable[[slice], Float[np.ndarray, "draw part"]], Float[np.ndarray, " draw"]]:
    """Return a function from a range of cells to their resampled ratios, and the resampled bottoms."""
    weights = multiplicities(len(top), rng, draws) / len(top)
    scales = weights @ bottom
    return lambda part: (weights @ top[:, part]) / scales[:, None], scales


def _band(
    value: Float[np.ndarray, " cell"],
    draw: Callable[[slice], Float[np.ndarray, "draw part"]],
    draws: int,
    level: float,
    cells: int,
) -> Band:
    low, high, error, largest = np.empty_like(value), np.empty_like(value), np.empty_like(value), np.zeros(draws)
    tail = (1 - level) / 2
    for k in range(0, len(value), cells):
        part = slice(k, k + cells)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = draw(part)
            error[part] = drawn.std(0, ddof=1)
            low[part], high[part] = np.quantile(drawn, (tail, 1 - tail), axis=0)
            far = np.abs(drawn - value[part]) / error[part]
        # Cells without variance (an error of 0) do not widen the band.
        largest = np.maximum(largest, np.where(error[part] > 1e-12, far, 0).max(1))
    reach = np.quantile(largest, level) * error
    return Band(value, low, high, value - reach, value + reach)


def _unknown(band: Band, reach: float) -> Band:
    low, high = (np.full_like(band.value, x) for x in (-reach, reach))
    return Band(band.value, low, high, low, high)


def _shaped(band: Band, ratio: Ratio) -> Band:
    shape = ratio[0].shape[1:]
    return Band(*(x.reshape(shape) for x in (band.value, band.low, band.high, band.band_low, band.band_high)))


# --- sign-flip test of many cells


FEWEST_PAIRS = 6  # with fewer, not even the smallest possible p is below .05
FEW_PAIRS = 24  # with fewer, an effect of one standard deviation is missed about as often as it is found
FLIPS = 10_000
_ENUMERATED = 14  # with at most as many units, every combination of signs is used
_TIED = 1e-9  # statistics that differ by less are equal: they only differ by rounding


def sign_flip_test(
    values: Float[np.ndarray, "unit ..."], rng: np.random.Generator, *, flips: int = FLIPS
) -> Float[np.ndarray, ...]:
    """Return p-values for "the mean is 0" in each cell, corrected for testing all cells.

    The values of a unit must be distributed symmetrically around 0 under the null hypothesis, jointly over its cells.
    This holds by design for differences between two conditions that are then exchangeable, however skewed each of them
    is. The signs of whole units are flipped at random, and p is the share of flips, with the observed signs among
    them, in which the largest |t| over the cells is at least the observed |t|. The cells are taken in the order of
    their |t|, each compared with the maximum over itself and those after it (step-down: Westfall & Young 1993,
    "Resampling-based multiple testing", algorithm 2.8), so that the probability of any false discovery is at most the
    level, whichever null hypotheses hold.

    Args:
        values: one row for each unit. Cells without variance at 0 have p = 1.
        rng: draws the signs, for more than 14 units; for fewer all combinations are used.
        flips: number of random flips.

    Returns:
        p-values in the shape of a unit's values; NaN for fewer than `FEWEST_PAIRS` units.
    """
    n, shape = len(values), values.shape[1:]
    if n < FEWEST_PAIRS:
        return np.full(shape, np.nan)
    flat = values.reshape(n, -1).astype(np.float64)
    # Flips do not change a cell's sum of squares, and |t| increases with |sum| / sqrt(n * sum of squares).
    norm = np.sqrt(n * (flat**2).sum(0))
    unit = np.divide(flat, norm, out=np.zeros_like(flat), where=norm > 0)
    found = np.abs(unit.sum(0))
    order = np.argsort(-found, kind="stable")
    unit, found = unit[:, order], found[order]
    if n <= _ENUMERATED:  # the first sign is fixed, since |t| is the same for opposite signs
        codes = np.arange(2 ** (n - 1))
        signs = 1.0 - 2.0 * ((codes[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.concatenate([np.ones((1, n)), 1.0 - 2.0 * rng.integers(0, 2, (flips, n))])
    reached = np.zeros(len(found))
    size = max(1, (1 << 17) // max(1, len(found)))  # what fits into a cache
    for k in range(0, len(signs), size):
        drawn = np.abs(signs[k : k + size] @ unit)
        largest = np.maximum.accumulate(drawn[:, ::-1], axis=1)[:, ::-1]
        reached += (largest >= found - _TIED).sum(0)
    p = np.empty(len(found))
    p[order] = np.maximum.accumulate(reached / len(signs))
    return p.reshape(shape)
