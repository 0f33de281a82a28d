"""The published way of adding up patches: equal to plain hooks, one trial a length, sums and not means."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nextstate.agents.config import ConfigError, read_config
from nextstate.agents.language import LanguageModel
from nextstate.analysis.heads.config import PAPER_STEPS, PAPER_TRIALS, PatchConfig, draw, published_sizes
from nextstate.analysis.heads.pairs import TokenPair
from nextstate.analysis.heads.published import Trial, scores, summed, trial_rows, trials
from nextstate.analysis.heads.routing import ONE_ANSWER, token_pairs
from nextstate.analysis.heads.study import Heads
from nextstate.analysis.study import go
from nextstate.envs.contrast import Pair
from nextstate.envs.games import make_game
from tests import zoo
from tests.circuits import Circuit, circuit
from tests.pages import shown

ROOM = 1 << 28
CONFIG: dict[str, Any] = {
    "name": "published", "model": "circuit", "designs": ["paper"], "aggregate": "sum", "kinds": ["state", "noop"],
    "pairs": 14, "sites": ["head"], "directions": ["denoise"], "resamples": 100, "wandb": "disabled",
}  # fmt: skip


@cache
def built() -> Circuit:
    return circuit("DFA", 1)


def published(kind: str = "state", **size: int) -> Pair:
    return make_game("DFA").contrast(np.random.default_rng(4), kind, "paper", **size)


def test_at_most_one_trial_of_a_length_is_patched_and_each_has_letters_of_its_own() -> None:
    sizes, rng, patched, drawn = published_sizes("state"), np.random.default_rng(0), [], 0

    def count(size: dict[str, int]) -> Any:
        nonlocal drawn
        drawn += 1
        return drawn

    for _ in range(400):
        found = list(trials(sizes, count, rng))
        assert [t.size for t in found] == sorted({t.size for t in found})
        patched += [t.number for t in found]
    share = [patched.count(k) / (400 * len(sizes)) for k in range(PAPER_TRIALS)]
    assert share == pytest.approx([0.5**k for k in range(1, 6)], abs=0.03)
    assert drawn == pytest.approx(400 * len(sizes) * sum(0.5**k for k in range(5)), rel=0.05)


def logits(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].double()


def difference(model: Any, rows: list[tuple[tuple[int, ...], int, int]]) -> float:
    """Return the mean of logit(answer) - logit(other) over the rows of a batch."""
    return float(np.mean([float(x[a] - x[b]) for x, a, b in ((logits(model, t), a, b) for t, a, b in rows)]))


def test_scores_are_what_hooks_by_hand_give() -> None:
    agent = built().agent
    (pair,), _ = token_pairs(agent.encoder, [published(steps=6)])
    model, config = agent.model, agent.model.config
    width, answers = config.n_embd // config.n_head, ((pair.answer, pair.other), (pair.other, pair.answer))
    clean = [(pair.clean, *answers[0]), (pair.corrupted, *answers[1])]
    corrupted = [(pair.corrupted, *answers[0]), (pair.clean, *answers[1])]
    ends = difference(model, clean), difference(model, corrupted)

    def by_hand(module: torch.nn.Module, cut: slice, at: int) -> float:
        found = []
        for (source, *_), (base, answer, other) in zip(clean, corrupted, strict=True):
            kept: list[torch.Tensor] = []
            hook = module.register_forward_pre_hook(lambda _, x, k=kept: k.append(x[0][0, at, cut].clone()))  # type: ignore[misc]
            logits(model, source)
            hook.remove()

            def patch(_: torch.nn.Module, x: Any, kept: list[torch.Tensor] = kept) -> Any:
                new = x[0].clone()
                new[0, at, cut] = kept[0]
                return (new, *x[1:])

            hook = module.register_forward_pre_hook(patch)
            found.append(difference(model, [(base, answer, other)]))
            hook.remove()
        return (float(np.mean(found)) - ends[1]) / (ends[0] - ends[1])

    heads, columns = scores(agent, pair, "head", "last", ROOM)
    assert columns == ("last",)
    for layer, head in np.ndindex(4, 4):
        cut = slice(head * width, (head + 1) * width)
        expected = by_hand(model.transformer.h[layer].attn.c_proj, cut, -1)
        assert heads[layer, head, 0] == pytest.approx(expected, abs=1e-4)
    assert np.abs(heads).max() > 0.5
    stream, columns = scores(agent, pair, "resid_pre", "each", ROOM)
    for layer in range(4):
        for c in (0, len(columns) // 2, len(columns) - 1):
            expected = by_hand(model.transformer.h[layer], slice(None), int(columns[c]))
            assert stream[layer, 0, c] == pytest.approx(expected, abs=1e-4)
    wrong = TokenPair(pair.clean, pair.corrupted, pair.other, pair.answer)  # clean - corrupted is negative
    assert not scores(agent, wrong, "head", "last", ROOM)[0].any()


def bytewise() -> LanguageModel:
    """Return a model whose tokens are bytes, so that a letter and the space before it are two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return LanguageModel(
        "bytes", loaded=(zoo.build("gpt2", len(alphabet)), PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    )


def test_trials_with_one_answer_score_0_and_split_letters_are_left_out() -> None:
    agent = built().agent
    same = trial_rows(agent, "state", Trial(10, 0, published(steps=10)), ["head"], ROOM)
    assert set(same["reason"]) == {ONE_ANSWER}
    assert same["score"].to_list() == [0.0] * 16
    split = trial_rows(bytewise(), "state", Trial(6, 0, published(steps=6)), ["head"], ROOM)
    assert split["reason"].to_list() == ["a letter of this published pair is several tokens to this tokenizer"]
    assert split["layer"].to_list() == [None]
    assert summed(split).is_empty()


def test_the_stream_is_patched_at_each_position_where_the_sites_ask_for_it() -> None:
    agent = built().agent
    rows = trial_rows(agent, "state", Trial(6, 0, published(steps=6)), ["resid_pre"], ROOM)
    (pair,), _ = token_pairs(agent.encoder, [published(steps=6)])
    value, columns = scores(agent, pair, "resid_pre", "each", ROOM)
    assert rows["score"].to_numpy() == pytest.approx(value.ravel())
    assert rows.filter(layer=0)["position"].to_list() == [int(c) for c in columns]
    assert rows["token"][-1].strip() == "state"


def test_the_map_is_a_sum_over_trials() -> None:
    agent = built().agent
    rows = [trial_rows(agent, "state", Trial(t, 0, published(steps=t)), ["head"], ROOM) for t in (6, 10, 14)]
    found = summed(pl.concat(rows))
    assert found["trials"].unique().to_list() == [3]
    each = [r.filter(site="head")["score"].to_numpy() for r in rows]
    assert found["score"].to_numpy() == pytest.approx(np.sum(each, 0))
    assert found["score"].max() == pytest.approx(2, abs=0.01)  # above 1: it is not divided by the number of trials


def test_published_pairs_go_through_the_lengths_and_are_left_out_where_answers_agree() -> None:
    config, rng = PatchConfig(**CONFIG), np.random.default_rng(0)
    pairs = draw(config, make_game("DFA"), "paper", "state", rng)
    assert [len(p.clean.steps) - 1 for p in pairs] == [*PAPER_STEPS, *PAPER_STEPS]
    assert len({p.clean.opening for p in pairs}) > 1  # letters are drawn anew
    found, excluded = token_pairs(built().agent.encoder, pairs)
    assert {len(pairs[x.pair].clean.steps) - 1 for x in excluded} == {10, 18, 26}
    assert len(found) == 8
    assert len(token_pairs(built().agent.encoder, draw(config, make_game("DFA"), "paper", "noop", rng))[0]) == 14


def test_a_run_shows_the_published_map_beside_ours(tmp_path: Path) -> None:
    made = built()
    run = go(Heads(), PatchConfig(**CONFIG), tmp_path / "run", model=made.agent)
    rows = run.summary("published")
    assert {"state", "noop"} == set(rows["kind"])
    assert set(rows["site"]) == {"head"}
    text = shown((tmp_path / "run/report.html").read_text(encoding="utf-8"))
    for words in ("Added up as published", "trials, as published", "our ratio of means (n = 8)"):
        assert words in text
    assert "6 paper state pairs cannot be used: both sides have the same answer" in text


def test_the_published_sum_needs_published_pairs(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(CONFIG | {"designs": ["balanced"]}))
    with pytest.raises(ConfigError, match=r"aggregate=sum is for published pairs, but designs=\['balanced'\]"):
        read_config(str(tmp_path / "c.yaml"), [], PatchConfig)
