"""Generation measures of tiny models against every string they can write, listed with its probability."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from nextstate.agents.generation import (
    TokenMap,
    divergence,
    divergences,
    diversity,
    next_logs,
    right,
    surprise,
    write,
)
from nextstate.envs import GameError
from nextstate.envs.grammar.derivation import sample
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.inside import log_probabilities, next_tokens
from nextstate.envs.grammar.sources import random_grammar

CODES = TokenMap(begin=4, end=3, terminals=(1, 2))  # token 0 stands for nothing
GRAMMAR = Grammar.read("S -> A B | B A A\nA -> x\nB -> y | x")
LONGEST = 3


def tiny(seed: int = 0, vocabulary: int = 5) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = GPTNeoXConfig(vocab_size=vocabulary, max_position_embeddings=64, initializer_range=0.3, **shape)
    return GPTNeoXForCausalLM(config).eval()


def chances(model: GPTNeoXForCausalLM, string: tuple[int, ...], temperature: float = 1.0) -> list[float]:
    """Return the model's probability of each token of a string and of its end, one plain pass a token."""
    tokens, out = [4], []
    for token in [*[CODES.terminals[t] for t in string], 3]:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1].double()
        out.append(float(torch.softmax(logits / temperature, dim=0)[token]))
        tokens.append(token)
    return out


STRINGS = [s for k in range(LONGEST + 1) for s in product(range(2), repeat=k)]
LANGUAGE = {(0, 1), (0, 0), (1, 0, 0), (0, 0, 0)}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("prefix", [(), (0,)])
def test_strings_are_written_as_often_as_the_model_has_them_likely(prefix: tuple[int, ...], temperature: float) -> None:
    model, n = tiny(), 3000
    written = write(model, CODES, [prefix] * n, np.random.default_rng(0), LONGEST, temperature, batch=1000)
    found = [None if x is None else tuple(x.tolist()) for x in written]
    total = 0.0
    for string in STRINGS:
        if string[: len(prefix)] == prefix:
            p = math.prod(chances(model, string, temperature)[len(prefix) :])
            total += p
            assert abs(found.count(string) - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1
    assert abs(found.count(None) - n * (1 - total)) <= 5 * math.sqrt(n * total * (1 - total)) + 1
    assert right(GRAMMAR, written) == sum(s in LANGUAGE for s in found)


def test_diversity_is_what_listing_says() -> None:
    model, n = tiny(1), 3000
    written = write(model, CODES, [()] * n, np.random.default_rng(1), LONGEST)
    got = diversity(model, CODES, written)
    p = {s: math.prod(chances(model, s)) for s in STRINGS}
    ended = sum(p.values())
    surprises = {s: -math.log2(q) for s, q in p.items()}
    mean = sum(q * surprises[s] for s, q in p.items()) / ended
    spread = math.sqrt(sum(q * (surprises[s] - mean) ** 2 for s, q in p.items()) / ended)
    assert got.strings == n
    assert abs(got.bits.mean() - mean) <= 5 * spread / math.sqrt(n * ended)
    assert abs(len(got.bits) - n * ended) <= 5 * math.sqrt(n * ended * (1 - ended)) + 1
    pairs = n * (n - 1) / 2 * sum(q * q for q in p.values())
    assert got.equal_pairs == pytest.approx(pairs, rel=0.2)
    assert got.distinct == len({tuple(x.tolist()) for x in written if x is not None})


def test_divergence_is_that_of_plain_passes_and_none_of_the_truth() -> None:
    model = tiny(2)
    drawn = [d.tokens for d in sample(GRAMMAR, np.random.default_rng(0), 40)]
    for x, after, logs in zip(drawn, next_tokens(GRAMMAR, drawn), next_logs(model, CODES, drawn, batch=7), strict=True):
        expected = 0.0
        for k, row in enumerate(after.p):
            for choice, p in enumerate(row):
                own = (*x[:k].tolist(), choice) if choice < 2 else tuple(x[:k].tolist())
                expected += p * (math.log(p) - math.log(chances(model, own)[k])) if p else 0.0
        assert divergence(after.p, logs) == pytest.approx(expected / (len(x) + 1), abs=1e-5)
        with np.errstate(divide="ignore"):
            assert divergence(after.p, np.log(after.p)) == 0
        assert surprise(x, logs) == pytest.approx(-sum(map(math.log2, chances(model, tuple(x.tolist())))), abs=1e-4)


def test_a_model_that_learns_gets_nearer() -> None:
    grammar = random_grammar(np.random.default_rng(0), levels=3)
    codes = TokenMap(0, 0, (1, 2, 3))  # one token before and after, as strings follow one another in windows
    model, rng = tiny(3, 4), np.random.default_rng(2)
    strings = [d.tokens for d in sample(grammar, rng, 200)]

    def measured() -> tuple[float, float, float]:
        found = [
            right(grammar, write(model, codes, prefixes, rng, 9)) / 200
            for prefixes in ([()] * 200, [x[:3] for x in strings])
        ]
        return found[0], found[1], float(divergences(model, codes, grammar, strings).mean())

    before = measured()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for _ in range(150):
        rows = [[*codes.encode(d.tokens), codes.end] for d in sample(grammar, rng, 32)]
        ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=-100)
        loss = model(input_ids=ids.clamp(min=0), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    after = measured()
    assert after[0] > 0.9 > 0.2 > before[0]
    assert after[1] > 0.9 > before[1]
    assert after[2] < 0.1 < before[2]
    bits = diversity(model, codes, write(model, codes, [()] * 200, rng, 9)).bits.mean()
    assert abs(bits + float(log_probabilities(grammar, strings).mean()) / math.log(2)) < 0.5


def test_bad_input_is_named() -> None:
    model, rng = tiny(), np.random.default_rng(0)
    with pytest.raises(GameError, match="expected a token of its own"):
        TokenMap(1, 3, (1, 2))
    with pytest.raises(GameError, match="expected a token of its own"):
        TokenMap(4, 2, (1, 2))
    with pytest.raises(GameError, match="temperature=0 is not possible"):
        write(model, CODES, [[]], rng, 3, temperature=0)
    with pytest.raises(GameError, match="longest=1 is not possible with a prefix of 2"):
        write(model, CODES, [[0, 0]], rng, 1)
    with pytest.raises(GameError, match="2 terminals: expected 3"):
        divergences(model, CODES, random_grammar(rng), [[0, 1]])
    assert CODES.decode([1, 2]) is None
    assert CODES.decode([1, 0, 3]) is None
    assert CODES.decode([3, 1]).tolist() == []
    assert right(GRAMMAR, [None]) == 0
