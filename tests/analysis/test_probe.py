"""Probes against the formula written out, and on states of which we know where they hold what."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, GPT2Config, GPT2LMHeadModel

from nextstate.agents.generation import TokenMap
from nextstate.analysis.grammar.config import ProbeConfig
from nextstate.analysis.grammar.probe import (
    PositionProbe,
    Target,
    Wanted,
    accuracies,
    evaluate_probes,
    learning,
    probe,
    targets,
    train_probes,
)
from nextstate.envs import GameError
from nextstate.envs.grammar.derivation import Derivation, sample
from nextstate.envs.grammar.grammar import Grammar

CODES = TokenMap(begin=3, end=3, terminals=(1, 2))
# No string comes about in two ways: the first of each two terminals tells c from d, and these A B from B A. Weights
# make one symbol the likelier one at each position: where none is, noise decides what a shuffled probe says.
GRAMMAR = Grammar.read("S -> A B (3) | B A\nA -> c d (3) | d c c\nB -> c c | d d d (3)\nc -> x y | x x\nd -> y x | y y")
SAME, BEFORE, FAR, PLACED = 0, 1, 2, 3  # layers of the made-up model
SMALL = ProbeConfig(heads=4, dim=16, steps=400, rows=30, learning_rate=0.02, strings=100)


@cache
def derivations() -> dict[tuple[int, ...], Derivation]:
    return {tuple(x.tokens.tolist()): x for x in sample(GRAMMAR, np.random.default_rng(0), 100_000)}


class Oracle(nn.Module):
    """A model whose states are the symbols of a token's ancestors and whether they end, as one-hot codes.

    In layer SAME a token has its own; in BEFORE that of the token after it (the first one also its own, elsewhere); in
    FAR, the first eight tokens have that of the token four on or back; in PLACED each its own and its position.
    """

    def __init__(self, padding: float = 0) -> None:
        super().__init__()
        self.padding = padding
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.device = torch.device("cpu")
        self.passes = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool) -> Any:
        assert output_hidden_states
        self.passes += 1
        layers = torch.zeros(4, *input_ids.shape, 28)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            assert ids[0] == CODES.begin
            found = derivations()[tuple((ids[1 : int(mask.sum())] - 1).tolist())]
            labels = np.concatenate([found.symbols[1:-1], found.ends[1:-1]])
            code = np.concatenate([labels == 0, labels == 1]).T  # [token 8]
            n = len(code)
            layers[:, row, n + 1 :] = self.padding
            layers[SAME, row, 1 : n + 1, :8] = torch.tensor(code, dtype=torch.float)
            layers[BEFORE, row, 1:n, :8] = torch.tensor(code[1:], dtype=torch.float)
            layers[BEFORE, row, 1, 8:16] = torch.tensor(code[0], dtype=torch.float)
            order = np.arange(n)
            order[:8] = (order[:8] + 4) % 8
            layers[FAR, row, 1 : n + 1, :8] = torch.tensor(code[order], dtype=torch.float)
            layers[PLACED, row, 1 : n + 1, :8] = layers[SAME, row, 1 : n + 1, :8]
            layers[PLACED, row, 1 : n + 1, 16 : 16 + n] = torch.eye(n)
        return SimpleNamespace(hidden_states=tuple(layers))


def tiny(bidirectional: bool = False, positions: int = 32) -> Any:
    torch.manual_seed(0)
    if bidirectional:
        config = DebertaV2Config(vocab_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=32, max_position_embeddings=positions, relative_attention=True,
                                 pos_att_type=["c2p", "p2c"], type_vocab_size=0)  # fmt: skip
        return DebertaV2ForMaskedLM(config).eval()
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(vocab_size=4, bos_token_id=3, eos_token_id=3, **shape)).eval()


def least(table: pl.DataFrame, layer: int, reach: int | None) -> float:
    """Return the lowest accuracy among a probe's targets."""
    mine = table.filter(pl.col("layer") == layer, pl.col("reach").eq_missing(pl.lit(reach)))
    assert len(mine) == 6
    return float(mine["accuracy"].min())  # type: ignore[arg-type]


@cache
def oracle_table() -> pl.DataFrame:
    wanted = [Wanted(layer, reach) for layer in (SAME, BEFORE, FAR) for reach in (0, 1, None)]
    return probe(Oracle().eval(), CODES, GRAMMAR, np.random.default_rng(0), SMALL, wanted)[0]


@pytest.mark.parametrize("reach", [0, 1, 2, 40, None])
def test_a_probe_is_its_formula(reach: int | None) -> None:
    told = (Target("ancestor", 2, 3), Target("boundary", 2, 2))
    made = PositionProbe(5, told, 12, heads=3, dim=4, reach=reach).double().requires_grad_(False)
    states, lengths = torch.randn(3, 9, 5, dtype=torch.float64), [9, 4, 1]
    present = torch.arange(9) < torch.tensor(lengths)[:, None]
    got = made(states, present)
    heads = 1 if reach == 0 else 3
    weight, bias = made.maps.weight.view(heads, 5, 5), made.maps.bias.view(heads, 5)
    for b, n in enumerate(lengths):
        for i in range(n):
            total = torch.zeros(5, dtype=torch.float64)
            near = [k for k in range(n) if reach is None or abs(i - k) <= reach]
            for r in range(heads):
                scores = [0.0 if made.places is None else float(made.places[r, i] @ made.places[r, k]) for k in near]
                whole = sum(map(math.exp, scores))
                for k, score in zip(near, scores, strict=True):
                    total += math.exp(score) / whole * (weight[r] @ states[b, k] + bias[r])
            torch.testing.assert_close(got[b, i], total, rtol=0, atol=1e-9)
    first, second = made.each(got)
    assert torch.equal(torch.cat([first, second], -1), got)
    assert (first.shape[-1], second.shape[-1]) == (3, 2)
    assert (made.places is None) == (reach == 0)


@pytest.mark.parametrize("reach", [0, 1, None])
def test_padding_changes_nothing(reach: int | None) -> None:
    made = PositionProbe(5, (Target("ancestor", 2, 3),), 12, heads=3, dim=4, reach=reach)
    states = torch.randn(2, 9, 5)
    present = torch.arange(9) < torch.tensor([[9], [4]])
    weights = torch.randn(4, 3)

    def gradients(x: Tensor, there: Tensor, row: int) -> list[Tensor]:
        made.zero_grad()
        (made(x, there)[row, :4] * weights).sum().backward()
        return [p.grad.clone() for p in made.parameters() if p.grad is not None]

    both, alone = gradients(states, present, 1), gradients(states[1:, :4], present[1:, :4], 0)
    for one, two in zip(both, alone, strict=True):
        assert bool(one.isfinite().all())
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(made(states, present)[1, :4], made(states[1:, :4], present[1:, :4])[0])


def test_the_diagonal_probe_reads_what_a_token_has_itself() -> None:
    table = oracle_table()
    for reach in (0, 1, None):
        assert least(table, SAME, reach) > 0.99
    assert least(table, SAME, 0) == 1


def test_only_a_probe_that_reaches_it_reads_what_another_token_has() -> None:
    table = oracle_table()
    assert least(table, BEFORE, 1) > 0.98
    assert least(table, BEFORE, 0) < 0.9
    assert least(table, FAR, None) > 0.98
    assert max(least(table, FAR, 0), least(table, FAR, 1)) < 0.9


def by_position(given: list[Derivation], target: str, level: int, where: str) -> float:
    """Return the share of tokens right of the best guess that knows the position of a token, and nothing else."""
    seen: dict[int, Counter[int]] = {}
    for x in given:
        labels = x.symbols[level - 1] if target == "ancestor" else x.ends[level - 1]
        for i, label in enumerate(labels.tolist()):
            if where == "all" or x.ends[level - 1, i]:
                seen.setdefault(i, Counter())[int(label)] += 1
    return sum(max(c.values()) for c in seen.values()) / sum(sum(c.values()) for c in seen.values())


def test_a_shuffled_probe_knows_what_positions_tell() -> None:
    rng, wanted = np.random.default_rng(2), [Wanted(PLACED, 0, shuffled=True), Wanted(PLACED, 0)]
    config = SMALL.model_copy(update={"steps": 1000, "learning_rate": 0.01})
    trained = train_probes(Oracle().eval(), CODES, GRAMMAR, rng, config, wanted)
    table = accuracies(evaluate_probes(Oracle().eval(), CODES, GRAMMAR, rng, trained, strings=2000, rows=500))
    given, below = sample(GRAMMAR, np.random.default_rng(3), 20_000), 0
    for row in table.filter("shuffled").iter_rows(named=True):
        expected = by_position(given, row["target"], row["level"], "all")
        if row["where"] == "all":
            assert row["accuracy"] == pytest.approx(expected, abs=0.03)
            below += expected < 0.9
    assert below == 3
    assert least(table.filter(~pl.col("shuffled")), PLACED, 0) == 1


def test_what_is_trained_together_is_what_is_trained_alone() -> None:
    model, config = Oracle().eval(), SMALL.model_copy(update={"steps": 5})
    wanted = [Wanted(SAME, None), Wanted(FAR, 1), Wanted(SAME, None, shuffled=True)]
    steps: list[int] = []

    def note(step: int, probes: object) -> None:
        steps.append(step)

    together = train_probes(model, CODES, GRAMMAR, np.random.default_rng(7), config, wanted, note)
    assert model.passes == 5
    assert steps == [1, 2, 3, 4, 5]
    for want in wanted:
        alone = train_probes(model, CODES, GRAMMAR, np.random.default_rng(7), config, [want])
        for one, two in zip(together[want].parameters(), alone[want].parameters(), strict=True):
            assert torch.equal(one, two)
    plain, shuffled = together[wanted[0]], together[wanted[2]]
    assert not torch.equal(plain.maps.weight, shuffled.maps.weight)


@pytest.mark.parametrize("shuffled", [False, True])
def test_states_beyond_the_end_of_a_string_are_not_learned_from(shuffled: bool) -> None:
    config = SMALL.model_copy(update={"steps": 3})
    wanted = [Wanted(SAME, reach, shuffled) for reach in (0, 1, None)]
    found = [
        train_probes(Oracle(padding).eval(), CODES, GRAMMAR, np.random.default_rng(0), config, wanted)
        for padding in (0.0, 50.0)
    ]
    for want in wanted:
        for one, two in zip(found[0][want].parameters(), found[1][want].parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_probe_of_a_real_model(bidirectional: bool) -> None:
    model, config = tiny(bidirectional), SMALL.model_copy(update={"steps": 20, "strings": 50})
    before = [p.clone() for p in model.parameters()]
    wanted = [Wanted(-1, None), Wanted(0, 0), Wanted(1, 1, shuffled=True)]
    table, _ = probe(model, CODES, GRAMMAR, np.random.default_rng(0), config, wanted)
    assert table.equals(probe(model, CODES, GRAMMAR, np.random.default_rng(0), config, wanted)[0])
    assert not table.equals(probe(model, CODES, GRAMMAR, np.random.default_rng(1), config, wanted)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(table) == 18
    for name in ("accuracy", "low", "high", "chance"):
        assert table[name].is_between(0, 1).all()
    assert ((table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])).all()
    assert (table["low"] < table["high"]).all()


def test_rows_at_once_change_nothing() -> None:
    config = SMALL.model_copy(update={"steps": 3})
    trained = train_probes(tiny(), CODES, GRAMMAR, np.random.default_rng(0), config, [Wanted(), Wanted(reach=1)])
    tables = [
        accuracies(evaluate_probes(tiny(), CODES, GRAMMAR, np.random.default_rng(0), trained, 40, rows))
        for rows in (1, 7, 40)
    ]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_tables_count_tokens_and_base_rates() -> None:
    table = oracle_table().filter(pl.col("layer") == SAME, pl.col("reach") == 0)
    # The strings again, whose rng is the first child of the second.
    given = sample(GRAMMAR, np.random.default_rng(0).spawn(2)[1].spawn(2)[0], 100)
    for row in table.iter_rows(named=True):
        level, kept = row["level"] - 1, row["where"] == "ends"
        labels = [x.symbols[level] if row["target"] == "ancestor" else x.ends[level] for x in given]
        chosen = np.concatenate([y[x.ends[level]] if kept else y for x, y in zip(given, labels, strict=True)])
        assert (row["tokens"], row["strings"]) == (len(chosen), 100)
        assert row["chance"] == pytest.approx(np.bincount(chosen.astype(int)).max() / len(chosen))
    assert table["where"].to_list() == ["all"] * 4 + ["ends"] * 2
    # All is right in all of 100 strings: Wilson's interval, as an empty one would say too much.
    np.testing.assert_allclose(table["low"], 100 / (100 + 1.959964**2), atol=1e-6)


@pytest.mark.slow
def test_learning_is_what_shorter_trainings_give() -> None:
    """A training of an eighth, a quarter or half of the steps ends where the whole one is tested on its way."""
    wanted, config = [Wanted(BEFORE, 1), Wanted(SAME, 0)], SMALL.model_copy(update={"steps": 40, "strings": 60})
    model = Oracle().eval()
    table, curve = probe(model, CODES, GRAMMAR, np.random.default_rng(5), config, wanted)
    assert curve["step"].unique(maintain_order=True).to_list() == [5, 10, 20, 40]
    key = ["layer", "reach", "shuffled", "target", "level", "where"]
    numbers = ["accuracy", "low", "high"]
    before: pl.DataFrame | None = None
    for step in (5, 10, 20, 40):
        shorter = config.model_copy(update={"steps": step})
        alone = probe(model, CODES, GRAMMAR, np.random.default_rng(5), shorter, wanted)[0].filter(target="ancestor")
        own = curve.filter(step=step)
        assert own.select(key + numbers).equals(alone.select(key + numbers))
        if before is not None:
            assert own["gain"].to_list() == pytest.approx((alone["accuracy"] - before["accuracy"]).to_list())
        before = alone
    assert curve.filter(step=5)["gain"].null_count() == len(curve.filter(step=5))
    later = curve.filter(pl.col("step") > 5)
    assert ((later["gain_low"] <= later["gain"]) & (later["gain"] <= later["gain_high"])).all()
    assert table.filter(target="ancestor")["accuracy"].equals(curve.filter(step=40)["accuracy"])


def test_a_probe_that_no_longer_learns_gains_nothing() -> None:
    trained = train_probes(tiny(), CODES, GRAMMAR, np.random.default_rng(0), SMALL.model_copy(update={"steps": 2}),
                           [Wanted()])  # fmt: skip
    one, two = (evaluate_probes(tiny(), CODES, GRAMMAR, np.random.default_rng(0), trained, 40) for _ in range(2))
    curve = learning({1: one, 2: two}).filter(step=2)
    assert set(curve["gain"]) == {0}


def test_of_strings_too_long_for_the_model_the_beginning_counts() -> None:
    config = SMALL.model_copy(update={"steps": 2, "strings": 60})
    table, _ = probe(tiny(positions=9), CODES, GRAMMAR, np.random.default_rng(0), config, [Wanted(), Wanted(reach=1)])
    given = sample(GRAMMAR, np.random.default_rng(0).spawn(2)[1].spawn(2)[0], 60)
    ends = table.filter(pl.col("where") == "ends", pl.col("level") == 2)["tokens"].to_list()
    assert set(table.filter(pl.col("where") == "all")["tokens"]) == {60 * 8}
    assert ends == [sum(int(x.ends[1, :8].sum()) for x in given)] * 2
    assert ends[0] < 2 * 60


def test_there_are_as_many_targets_as_levels_between() -> None:
    told = targets(GRAMMAR)
    assert told == (
        Target("ancestor", 2, 2),
        Target("ancestor", 3, 2),
        Target("boundary", 2, 2),
        Target("boundary", 3, 2),
    )
    with pytest.raises(GameError, match="levels=2 is not possible"):
        targets(Grammar.read("S -> x y"))


def test_errors_say_what_was_given() -> None:
    def train(wanted: list[Wanted], model: Any = None, codes: TokenMap = CODES) -> object:
        config = SMALL.model_copy(update={"steps": 1})
        return train_probes(model or tiny(), codes, GRAMMAR, np.random.default_rng(0), config, wanted)

    with pytest.raises(GameError, match="layer=3 is not possible: expected a whole number from -3 to 2"):
        train([Wanted(layer=3)])
    for reach in (-1, 1.5, True):
        with pytest.raises(GameError, match=r"reach=.* is not possible"):
            Wanted(reach=reach)  # type: ignore[arg-type]
    with pytest.raises(GameError, match="each once"):
        train([Wanted(), Wanted()])
    with pytest.raises(GameError, match="each once"):
        train([])
    with pytest.raises(GameError, match=r"model\.eval\(\)"):
        train([Wanted()], tiny().train())
    with pytest.raises(GameError, match="3 terminals: expected 2"):
        train([Wanted()], codes=TokenMap(0, 0, (1, 2, 3)))
    with pytest.raises(GameError, match="5 tokens are too long for a probe of 4 positions"):
        PositionProbe(3, targets(GRAMMAR), 4, 2, 2, None)(torch.zeros(1, 5, 3), torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValidationError, match="did you mean 'steps'"):
        ProbeConfig.model_validate({"step": 3})
