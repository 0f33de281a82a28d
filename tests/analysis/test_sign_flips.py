"""The sign-flip test: equal to plain enumeration, and its errors by simulation are those that it promises."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from benchmarks.sign_flips import NOISES, SCALE, own_draw, own_effects, simulate
from nextstate.analysis.stats import FEWEST_PAIRS, sign_flip_test


def enumerated(values: np.ndarray) -> np.ndarray:
    """Return the step-down p-values from every combination of signs, with t written out."""

    def t(x: np.ndarray) -> np.ndarray:
        return np.abs(x.mean(0)) / (x.std(0, ddof=1) / len(x) ** 0.5)

    found = t(values)
    flipped = np.array([t(values * np.array(signs)[:, None]) for signs in product((1, -1), repeat=len(values))])
    p, left, largest = np.empty(len(found)), list(range(len(found))), 0.0
    while left:
        cell = max(left, key=lambda i: found[i])
        largest = max(largest, float((flipped[:, left].max(1) >= found[cell] * (1 - 1e-9)).mean()))
        p[cell] = largest
        left.remove(cell)
    return p


@pytest.mark.parametrize("pairs", [6, 7, 9])
def test_p_is_what_enumeration_gives(pairs: int) -> None:
    rng = np.random.default_rng(pairs)
    values = rng.standard_exponential((pairs, 5)) - np.array([1.0, 0.5, 0.0, 0.8, 1.2])
    p = sign_flip_test(values, rng)
    assert p == pytest.approx(enumerated(values), abs=1e-12)
    assert len(set(p)) > 2  # otherwise the order of the cells is not tested
    assert p.min() >= 2 ** (1 - pairs)
    order = rng.permutation(5)
    assert sign_flip_test(7 * values[:, order], rng).tolist() == p[order].tolist()
    assert sign_flip_test(-values[::-1], rng).tolist() == p.tolist()


def test_random_flips_agree_with_all_of_them() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(15, 4)) + np.array([0.0, 0.3, 0.6, 0.9])
    p, exact = sign_flip_test(values, rng, flips=20_000), enumerated(values)
    assert (np.abs(p - exact) < 4 * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4).all()
    clear = 5 + rng.normal(size=(40, 1))
    assert sign_flip_test(clear, rng, flips=99).tolist() == [0.01]  # the observed signs are one of the 100


def test_the_shape_is_kept_and_cells_at_0_are_not_named() -> None:
    values = np.ones((8, 2, 3))
    values[:, 1] = 0
    p = sign_flip_test(values, np.random.default_rng(0))
    assert p.shape == (2, 3)
    assert (p[0] == 1 / 128).all()
    assert (p[1] == 1).all()
    few = sign_flip_test(np.ones((FEWEST_PAIRS - 1, 2)), np.random.default_rng(0))
    assert np.isnan(few).all()
    assert sign_flip_test(np.ones((FEWEST_PAIRS, 2)), np.random.default_rng(0)).max() < 0.05


def test_step_down_finds_what_one_step_misses() -> None:
    """A weak effect beside strong ones is compared with the largest of the others that are left."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(30, 200))
    values[:, :150] += 3
    values[:, 150] += 0.75
    alone = sign_flip_test(values[:, 150:], rng)[0]
    assert alone < 0.05
    assert sign_flip_test(values, rng)[150] == pytest.approx(alone, abs=0.01)


HEADS, SWEEPS = (32, 144, 1200), 1000
MOST = 0.07


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("noise", NOISES)
def test_family_wise_error_and_power(noise: str, heads: int) -> None:
    power = {}
    for pairs in (24, 48, 96):
        rng = np.random.default_rng([pairs, heads])
        false, power[pairs] = simulate(NOISES[noise], SCALE[noise], heads, pairs, SWEEPS, rng)
        assert false <= MOST, (noise, heads, pairs)
    assert power[24] < power[48] < power[96]
    if noise == "normal" and heads == 32:
        assert power[48] >= 0.92
    if noise == "skewed" and heads == 1200:
        assert 0.68 <= power[48] <= 0.80
    assert power[96] > 0.94


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
def test_family_wise_error_on_effects_of_the_built_in_model(heads: int) -> None:
    effects = own_effects()
    skew = (effects**3).mean(0) / (effects**2).mean(0) ** 1.5
    assert np.median(np.abs(skew)) > 0.9  # this is what makes plain sign flips fail
    for pairs in (24, 48, 96):
        rng = np.random.default_rng([pairs, heads])
        false, _ = simulate(own_draw(effects), 1.0, heads, pairs, SWEEPS, rng)
        assert false <= MOST, (heads, pairs)


@pytest.mark.slow
def test_without_a_control_the_test_would_err() -> None:
    effects, rng = own_effects(), np.random.default_rng(0)
    draw = own_draw(effects)
    named = [(sign_flip_test(draw(rng, 48, 32), rng, flips=299) <= 0.05).any() for _ in range(200)]
    assert np.mean(named) > 2 * MOST
