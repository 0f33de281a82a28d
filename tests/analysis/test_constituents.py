"""Attention measures against loops over all pairs, and on attention of which we know what it follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, GPT2Config, GPT2LMHeadModel

from nextstate.agents.generation import TokenMap
from nextstate.analysis.grammar.constituents import (
    Constituents,
    Measure,
    constituents,
    falls,
    heads,
    means,
    peaks,
    rows,
    spread,
)
from nextstate.envs import GameError
from nextstate.envs.grammar.derivation import Derivation, sample
from nextstate.envs.grammar.grammar import Grammar

CODES = TokenMap(begin=3, end=0, terminals=(1, 2))
GRAMMAR = Grammar.read("S -> A B | B A\nA -> c d | d c c\nB -> c c | d d d\nc -> x y | x\nd -> y x | y y")
EVEN = Grammar.read("S -> A B | B A\nA -> c d | d c\nB -> c c | d d\nc -> x y | x x\nd -> y x | y y")
# Two ends are three tokens apart at least, so that no token is two from one and itself another.
WIDE = Grammar.read(
    "S -> A B A | B A\nA -> c d | d c c\nB -> c c | d d d\nc -> x x x y | x y x\nd -> y y y x x | y y x"
)
Attend = Callable[[Derivation, int, int], np.ndarray]


class Looking(nn.Module):
    """A model with made-up attention between the tokens of a string, in 2 layers of 3 heads; the rest is noise."""

    def __init__(self, strings: Sequence[Derivation], attend: Attend) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.device = torch.device("cpu")
        self.known = {tuple(x.tokens.tolist()): x for x in strings}
        self.attend = attend

    def forward(self, input_ids: Tensor, attention_mask: Tensor, output_attentions: bool) -> Any:
        assert output_attentions
        rows, n = input_ids.shape
        layers = torch.rand(2, rows, 3, n, n, dtype=torch.float64)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            size = int(mask.sum())
            string = self.known[tuple((ids[1:size] - 1).tolist())]
            for layer, head in product(range(2), range(3)):
                layers[layer, row, head, 1:size, 1:size] = torch.tensor(self.attend(string, layer, head))
        return SimpleNamespace(attentions=tuple(layers))


def noise(string: Derivation, layer: int, head: int) -> np.ndarray:
    """Return weights that depend on the string, and on nothing else."""
    n = len(string.tokens)
    rng = np.random.default_rng([layer, head, *string.tokens.tolist()])
    return rng.random((n, n))


def causal_noise(string: Derivation, layer: int, head: int) -> np.ndarray:
    return np.tril(noise(string, layer, head))


@cache
def drawn(n: int = 12, seed: int = 0, grammar: Grammar = GRAMMAR) -> list[Derivation]:
    return sample(grammar, np.random.default_rng(seed), n)


def measures(found: Constituents) -> dict[str, Measure]:
    return {name: measure for name, measure in found._asdict().items() if isinstance(measure, Measure)}


def loops(strings: Sequence[Derivation], weights: Sequence[np.ndarray], causal: bool) -> dict[str, dict[Any, list]]:  # type: ignore[type-arg]
    """Return for each measure and cell the values of all its pairs; `weights` are [layer head query key]."""
    at: dict[int, list[np.ndarray]] = {}
    every = []
    for x, w in zip(strings, weights, strict=True):
        n = w.shape[-1]
        for i, j in product(range(n), range(n)):
            if j <= i or not causal:
                at.setdefault(i - j, []).append(w[:, :, i, j])
                every.append((x, w, i, j, n))
    profile = {p: np.mean(values, axis=0) for p, values in at.items()}
    out: dict[str, dict[Any, list[np.ndarray]]] = {"profile": {(p,): v for p, v in at.items()}}
    for x, w, i, j, n in every:
        b, levels = w[:, :, i, j] - profile[i - j], range(2, len(x.symbols))

        def put(name: str, *cell: int, b: np.ndarray = b) -> None:
            out.setdefault(name, {}).setdefault(cell, []).append(b)

        def is_end(token: int, level: int, x: Derivation = x, n: int = n) -> bool:
            return 0 <= token < n and [bool(e[token]) for e in x.ends[1:]].index(True) + 2 == level

        for level in levels:
            for delta in range(-2, 3):
                if is_end(j + delta, level):
                    put("to_end", level, delta)
            for one, two in product(range(-1, 2), range(-1, 2)):
                if is_end(i + one, level) and is_end(j + two, level):
                    put("between_ends", level, one, two)
            for query_level in levels:
                apart = int(x.index[level - 1, i] - x.index[level - 1, j])
                if is_end(i, query_level) and is_end(j, level) and (0 if causal else -4) <= apart <= 4:
                    put("adjacent", query_level, level, apart)
    return out


def assert_as_loops(found: Constituents, expected: dict[str, dict[Any, list[np.ndarray]]], atol: float) -> None:
    for name, measure in measures(found).items():
        cells = list(product(*measure.axes.values()))
        assert measure.pairs.shape == tuple(map(len, measure.axes.values()))
        assert set(expected[name]) <= set(cells)
        for place, cell in zip(np.ndindex(*measure.pairs.shape), cells, strict=True):
            values = expected[name].get(cell, [])
            assert measure.pairs[place] == len(values)
            got = measure.value[(slice(None), slice(None), *place)]
            if values:
                np.testing.assert_allclose(got, np.mean(values, axis=0), rtol=0, atol=atol)
            else:
                assert np.isnan(got).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", [1, 5, 100])
def test_measures_are_what_loops_say(causal: bool, batch: int) -> None:
    strings, attend = drawn(), causal_noise if causal else noise
    found = constituents(Looking(strings, attend).eval(), CODES, strings, causal, batch)
    weights = [np.array([[attend(x, a, h) for h in range(3)] for a in range(2)]) for x in strings]
    assert_as_loops(found, loops(strings, weights, causal), 1e-12)


def tiny(causal: bool, positions: int = 32) -> Any:
    torch.manual_seed(0)
    if causal:
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": positions}
        config = GPT2Config(vocab_size=4, bos_token_id=3, eos_token_id=3, initializer_range=0.5, **shape)
        return GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    return DebertaV2ForMaskedLM(
        DebertaV2Config(vocab_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=positions, relative_attention=True, pos_att_type=["c2p", "p2c"],
                        type_vocab_size=0, initializer_range=0.5)
    ).eval()  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", [32, 9])
def test_measures_of_a_real_model_are_what_loops_over_its_weights_say(causal: bool, positions: int) -> None:
    """With 9 positions, only 8 tokens of a string count, but their labels are those of the whole."""
    model, strings, weights = tiny(causal, positions), drawn(), []
    assert max(len(x.tokens) for x in strings) > 8
    for x in strings:
        with torch.no_grad():
            ids = torch.tensor([CODES.encode(x.tokens[: positions - 1])])
            weights.append(torch.cat(model(ids, output_attentions=True).attentions)[:, :, 1:, 1:].double().numpy())
    found = constituents(model, CODES, strings, causal)
    cut = [_cut(x, positions - 1) for x in strings]
    assert_as_loops(found, loops(cut, weights, causal), 1e-6)


def _cut(x: Derivation, n: int) -> Any:
    return SimpleNamespace(symbols=x.symbols[:, :n], index=x.index[:, :n], ends=x.ends[:, :n])


def test_attention_by_distance_leaves_nothing() -> None:
    def fading(string: Derivation, layer: int, head: int) -> np.ndarray:
        i, j = np.indices((len(string.tokens),) * 2)
        return np.tril(np.exp(-(i - j) * (head + 1) / 5) * (layer + 1))

    for grammar in (EVEN, GRAMMAR):  # strings of one length, and of many
        strings = drawn(20, 0, grammar)
        found = constituents(Looking(strings, fading).eval(), CODES, strings)
        distances = np.array(found.profile.axes["distance"])
        for layer, head in product(range(2), range(3)):
            expected = np.exp(-distances * (head + 1) / 5) * (layer + 1)
            np.testing.assert_allclose(found.profile.value[layer, head], expected)
        for measure in found[1:4]:
            seen = measure.pairs > 0
            assert seen.any()
            assert np.abs(measure.value[:, :, seen]).max() < 1e-12
            assert np.isnan(measure.value[:, :, ~seen]).all()


@pytest.mark.parametrize("level", [2, 3])
def test_attention_to_the_last_end_of_a_level_is_found_there_and_nowhere_else(level: int) -> None:
    def last(string: Derivation, layer: int, head: int) -> np.ndarray:
        n = len(string.tokens)
        out, ends = np.zeros((n, n)), np.flatnonzero(string.highest == level)
        for i in range(n):
            if (before := ends[ends <= i]).size:
                out[i, before[-1]] = 1
        return out

    strings = drawn(200, 0, WIDE)
    found = constituents(Looking(strings, last).eval(), CODES, strings)
    value, at = found.to_end.value[0, 0].copy(), (level - 2, 2)
    assert (found.to_end.axes["level"][at[0]], found.to_end.axes["delta"][at[1]]) == (level, 0)
    assert value[at] > 0.1
    value[at] = -1
    assert value.max() <= 0
    table = peaks(found.to_end, np.random.default_rng(0)).filter(pl.col("layer").is_null())
    own, other = (table.filter((pl.col("level") == level) == same) for same in (True, False))  # without the mean
    assert own["low"].item() > 0.1
    assert other["high"].item() < 0.05


def test_attention_between_neighbours_is_found_one_apart() -> None:
    def neighbour(string: Derivation, layer: int, head: int) -> np.ndarray:
        ends, p = string.highest == 3, string.index[2]
        return (ends[:, None] & ends & (p[:, None] - p == 1)).astype(float)

    strings = drawn(100, 0, WIDE)
    found = constituents(Looking(strings, neighbour).eval(), CODES, strings)
    table = means(found.adjacent, np.random.default_rng(0)).filter(pl.col("layer").is_null())
    best = table.sort("value", descending=True, nulls_last=True).row(0, named=True)
    assert (best["query_level"], best["key_level"], best["apart"]) == (3, 3, 1)
    assert best["low"] > 0.2
    assert table.drop_nulls("value").sort("value")["value"][-2] < 0.05
    centre = found.between_ends.value[0, 0, 1]
    assert np.unravel_index(np.argmax(centre), centre.shape) == (1, 1)


def test_a_token_is_no_constituent_apart_from_itself_alone() -> None:
    found = constituents(Looking(drawn(), causal_noise).eval(), CODES, drawn())
    alone = found.adjacent.pairs[:, :, 0]
    counts = [sum(int((x.highest == level).sum()) for x in drawn()) for level in (2, 3)]
    assert (alone == np.diag(counts)).all()


def test_rows_say_where_each_value_is() -> None:
    found = constituents(Looking(drawn(), causal_noise).eval(), CODES, drawn())
    for measure in measures(found).values():
        table = rows(measure)
        assert table.columns == ["layer", "head", *measure.axes, "value", "pairs"]
        assert len(table) == measure.value.size
        for row in table.iter_rows(named=True):
            place = tuple(values.index(row[name]) for name, values in measure.axes.items())
            value = measure.value[(row["layer"], row["head"], *place)]
            assert row["pairs"] == measure.pairs[place]
            assert row["value"] == value if row["pairs"] else row["value"] is None


def test_means_are_over_heads_and_layers() -> None:
    found = constituents(Looking(drawn(), causal_noise).eval(), CODES, drawn())
    for measure in measures(found).values():
        table = means(measure, np.random.default_rng(0))
        assert table.columns == ["layer", *measure.axes, "value", "low", "high", "pairs"]
        heads = measure.value.mean(1).reshape(2, -1)
        expected = np.concatenate([heads, heads.mean(0, keepdims=True)])
        np.testing.assert_allclose(table["value"].fill_null(np.nan).to_numpy(), expected.ravel(), atol=1e-12)
        kept = table.drop_nulls("value")
        assert ((kept["low"] <= kept["value"]) & (kept["value"] <= kept["high"])).all()
        assert table["layer"].to_list() == sorted([0, 1] * measure.pairs.size) + [None] * measure.pairs.size
        assert table.equals(means(measure, np.random.default_rng(0)))
    delta = found.to_end.value.mean((0, 1))
    table = peaks(found.to_end, np.random.default_rng(0)).filter(pl.col("layer").is_null())
    excess = delta[:, 2] - np.delete(delta, 2, axis=1).mean(1)
    np.testing.assert_allclose(table["value"], [*excess, excess.mean()], atol=1e-12)
    assert table["level"].to_list() == [2, 3, None]
    both = found.between_ends.value.mean((0, 1)).reshape(2, 9)
    table = peaks(found.between_ends, np.random.default_rng(0)).filter(pl.col("layer").is_null())
    excess = both[:, 4] - np.delete(both, 4, axis=1).mean(1)
    known = ~np.isnan(excess)
    np.testing.assert_allclose(table["value"].drop_nulls(), [*excess[known], excess[known].mean()], atol=1e-12)
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()


@pytest.mark.slow
def test_intervals_are_as_wide_as_measuring_resamples_again_says() -> None:
    """The other road draws strings, and measures all anew, the profile too."""
    strings, rng = drawn(60, 1), np.random.default_rng(0)
    found = constituents(Looking(strings, uneven).eval(), CODES, strings)
    anew = []
    for _ in range(200):
        some = [strings[k] for k in rng.integers(0, len(strings), len(strings))]
        anew.append(constituents(Looking(strings, uneven).eval(), CODES, some, batch=60))
    for name, measure in measures(found).items():
        sure = np.flatnonzero((measure.own_pairs > 0).mean(0) > 0.5)  # rare cells are not there in each resample
        table = means(measure, np.random.default_rng(1)).filter(pl.col("layer").is_null())[sure]
        again = np.array([getattr(f, name).value.mean((0, 1)).ravel()[sure] for f in anew])
        error, expected = ((table["high"] - table["low"]) / (2 * 1.96)).to_numpy(), again.std(0)
        assert len(sure) > 3
        assert error.mean() == pytest.approx(expected.mean(), rel=0.12)
        np.testing.assert_allclose(error, expected, rtol=0.35)


def uneven(string: Derivation, layer: int, head: int) -> np.ndarray:
    """Return weights of which some strings have more than others, so that the profile is not sure."""
    return causal_noise(string, layer, head) * (1 + int(string.tokens[:3].sum()))


def by_hand(
    strings: Sequence[Derivation], weights: Sequence[np.ndarray], causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return reach and explained variance of each head, from the list of all pairs."""
    pairs = [
        (abs(i - j), i - j, w[:, :, i, j])
        for w in weights for i, j in product(range(w.shape[-1]), repeat=2) if j <= i or not causal
    ]  # fmt: skip
    every = np.array([w for _, _, w in pairs])
    reach = sum(far * w for far, _, w in pairs) / every.sum(0)
    signed = np.array([p for _, p, _ in pairs])
    fitted = np.zeros_like(every)
    for p in set(signed.tolist()):
        fitted[signed == p] = every[signed == p].mean(0)
    return reach, fitted.var(0) / every.var(0)


@pytest.mark.parametrize("causal", [True, False])
def test_scales_are_what_a_list_of_all_pairs_says(causal: bool) -> None:
    strings, attend = drawn(9), causal_noise if causal else noise
    weights = [np.array([[attend(x, a, h) for h in range(3)] for a in range(2)]) for x in strings]
    scales = constituents(Looking(strings, attend).eval(), CODES, strings, causal, batch=4).scales
    reach, explained = by_hand(strings, weights, causal)
    np.testing.assert_allclose(scales.reach[0], reach)
    np.testing.assert_allclose(scales.explained[0], explained)
    assert scales.spread[0] == pytest.approx((1 + reach.max()) / (1 + reach.min()))
    assert scales.mean[0] == pytest.approx(explained.mean())
    # Nine strings are nine groups: the jackknife measures all strings but one, anew.
    without = [
        by_hand([*strings[:k], *strings[k + 1 :]], [*weights[:k], *weights[k + 1 :]], causal)[0] for k in range(9)
    ]
    error = np.sqrt(8 / 9 * ((np.array(without) - np.mean(without, axis=0)) ** 2).sum(0))
    np.testing.assert_allclose(scales.reach[2] - scales.reach[0], 2.306004 * error, rtol=1e-6)


def test_heads_of_known_scales_are_told_apart() -> None:
    def fading(string: Derivation, layer: int, head: int) -> np.ndarray:
        i, j = np.indices((len(string.tokens),) * 2)
        return np.tril(np.exp(-(i - j) / (1 + 3 * head)))

    strings = drawn(30, 0, WIDE)
    scales = constituents(Looking(strings, fading).eval(), CODES, strings).scales
    np.testing.assert_allclose(scales.explained[0], 1, atol=1e-12)
    table, one = heads(scales), spread(scales).row(0, named=True)
    assert table.columns == ["layer", "head", "reach", "low", "high", "explained"]
    assert table.sort("reach")["head"].to_list() == [0, 0, 1, 1, 2, 2]
    assert ((table["low"] < table["reach"]) & (table["reach"] < table["high"])).all()
    assert (one["nearest"], one["farthest"]) == (table["reach"].min(), table["reach"].max())
    assert 1.5 < one["spread_low"] < one["spread"] < one["spread_high"]

    def even(string: Derivation, layer: int, head: int) -> np.ndarray:
        return np.tril(np.ones((len(string.tokens),) * 2))

    one = spread(constituents(Looking(strings, even).eval(), CODES, strings).scales).row(0, named=True)
    assert (one["spread"], one["explained"]) == (1, 1)
    alone = spread(constituents(Looking(strings[:1], fading).eval(), CODES, strings[:1]).scales).row(0, named=True)
    assert alone["spread_low"] is None is alone["explained_high"]


@pytest.mark.slow
def test_intervals_of_scales_hold_the_truth_as_often_as_they_say() -> None:
    """With noise between strings, the intervals of 40 strings hold what 4,000 strings give in 95 of 100 samples."""

    def attend(string: Derivation, layer: int, head: int) -> np.ndarray:
        i, j = np.indices((len(string.tokens),) * 2)
        rng = np.random.default_rng([layer, head, *string.tokens.tolist()])
        return np.tril(np.exp(-(i - j) / (1 + head + 3 * rng.random())) + 0.2 * rng.random(i.shape))

    every = drawn(1000, 3, WIDE)
    truth = constituents(Looking(every, attend).eval(), CODES, every, batch=100).scales
    inside = []
    for k in range(25):
        some = every[40 * k : 40 * k + 40]
        found = constituents(Looking(some, attend).eval(), CODES, some, batch=40).scales
        for own, known in ((found.reach, truth.reach), (found.explained, truth.explained)):
            inside += ((own[1] <= known[0]) & (known[0] <= own[2])).ravel().tolist()
    assert np.mean(inside) == pytest.approx(0.95, abs=0.04)


def test_attention_falls_from_neighbours_to_farther_constituents() -> None:
    def neighbour(string: Derivation, layer: int, head: int) -> np.ndarray:
        ends, p = string.highest == 3, string.index[2]
        return (ends[:, None] & ends & (p[:, None] - p == 1)).astype(float)

    strings = drawn(200, 0, WIDE)
    adjacent = constituents(Looking(strings, neighbour).eval(), CODES, strings).adjacent
    table = falls(adjacent, np.random.default_rng(0))
    table = table.filter(pl.col("layer").is_null())
    own = table.filter(level=3).row(0, named=True)
    same = {r: adjacent.value[:, :, 1, 1, r].mean() for r in (1, 2, 3, 4)}
    assert own["value"] == pytest.approx(same[1] - np.nanmean([same[r] for r in (2, 3, 4)]))
    assert own["low"] > 0.2
    mean = table.filter(pl.col("level").is_null()).row(0, named=True)
    assert mean["value"] == pytest.approx(table.drop_nulls("level").drop_nulls("value")["value"].mean())
    # Attention that follows distance alone does not fall.

    def fading(string: Derivation, layer: int, head: int) -> np.ndarray:
        i, j = np.indices((len(string.tokens),) * 2)
        return np.tril(np.exp(-(i - j) / 4))

    flat = falls(constituents(Looking(strings, fading).eval(), CODES, strings).adjacent, np.random.default_rng(0))
    assert flat["value"].abs().max() < 1e-12  # type: ignore[operator]


def test_errors_say_what_was_given() -> None:
    strings = drawn()
    with pytest.raises(GameError, match="attends to later tokens: measure it with causal=False"):
        constituents(tiny(causal=False), CODES, strings)
    model = tiny(causal=True)
    model.set_attn_implementation("sdpa")
    with pytest.raises(GameError, match='attn_implementation="eager"'):
        constituents(model, CODES, strings)
    with pytest.raises(GameError, match="strings=0 is not possible"):
        constituents(tiny(causal=True), CODES, [])
    with pytest.raises(GameError, match=r"model\.eval\(\)"):
        constituents(tiny(causal=True).train(), CODES, strings)
    with pytest.raises(GameError, match="levels=2 is not possible"):
        constituents(tiny(causal=True), CODES, sample(Grammar.read("S -> x y"), np.random.default_rng(0), 2))
    with pytest.raises(GameError, match="batch=0 is not possible"):
        constituents(tiny(causal=True), CODES, strings, batch=0)
