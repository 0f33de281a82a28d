"""The published grids, on models with the windows and positions of the published models: plain passes, cell by cell.

The fifteen models of `configs/paper` are GPT-2, Pythia (GPT-NeoX) and TinyStories (GPT-Neo). Their tiny twins here have
the real number of positions, and GPT-Neo its real window of 256 tokens in every second layer, so that the longest
prompts go far beyond it. Every cell is asked with all its sizes and steps; of its episodes there are one or two.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

from nextstate.agents.agent import Prompt
from nextstate.agents.columns import Grid
from nextstate.agents.config import read_config
from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import episodes_of, prompts_of, replay
from nextstate.analysis.grid import Cell
from nextstate.analysis.heads.pairs import TokenPair
from nextstate.analysis.heads.patch import sweep
from nextstate.analysis.predict.config import PredictConfig, asked_cells
from nextstate.envs.games import make_game
from tests.exactness import BOX, noise, tokens_of, tolerance, truth
from tests.plain import PATHS, Plain, agent_of, tokenizer
from tests.zoo import widen

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "paper").glob("*.yaml"))
FAMILIES = {"roneneldan/TinyStories-": "gpt_neo", "openai-community/gpt2": "gpt2", "EleutherAI/pythia-": "gpt_neox"}
CONTEXTS = {"gpt_neo": 2048, "gpt2": 1024, "gpt_neox": 2048}
GRIDS: tuple[Grid, ...] = ("cells", "episodes")
DEALT = "DFA-generator=paper-density"
FAST = {  # the largest of each game, and some around and beyond 256 tokens
    "cells": (
        *(f"{DEALT}=max-states=20-steps=100", f"{DEALT}=middle-states=12-steps=60", f"{DEALT}=min-states=4-steps=30"),
        *("Box-boxes=10-steps=10", "FruitStore-generator=paper-people=21-steps=20"),
    ),
    "episodes": (f"{DEALT}=max-states=12", "Box-boxes=10", "FruitStore-generator=paper-people=21"),
}


def build(family: str, vocabulary: int) -> Any:
    """Return a tiny model with the windows and positions of the real ones, four layers where they alternate."""
    sizes = {"vocab_size": vocabulary, "hidden_size": 64, "num_attention_heads": 4}
    if family == "gpt2":
        made: Any = GPT2LMHeadModel(GPT2Config(**sizes, num_hidden_layers=2, n_positions=1024))
    elif family == "gpt_neox":
        made = GPTNeoXForCausalLM(
            GPTNeoXConfig(**sizes, num_hidden_layers=2, intermediate_size=128, max_position_embeddings=2048)
        )
    else:
        kinds = {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 256}
        made = GPTNeoForCausalLM(
            GPTNeoConfig(vocab_size=vocabulary, hidden_size=64, num_heads=4, **kinds, max_position_embeddings=2048)
        )
    return widen(made, 0)


@cache
def agent(family: str) -> LanguageModel:
    return agent_of(build(family, len(tokenizer())), family)


@cache
def own_noise(family: str) -> float:
    return noise(agent(family).model, agent(family).encoder, BOX.prompts)


@cache
def cells(grid: Grid) -> dict[str, Cell]:
    """Return the cells of all published grids, by name; the grid of episodes asks after every step up to the last."""
    out = {}
    for path in CONFIGS:
        config = read_config(str(path), [], PredictConfig)
        assert config.grid == "cells"
        if grid == "episodes":
            games = [g.model_copy(update={"steps": max(g.steps)}) for g in config.games]  # type: ignore[arg-type]
            config = config.model_copy(update={"grid": grid, "games": games})
        out |= {cell.slug: cell for cell in asked_cells(config)}
    return out


def fits(who: LanguageModel, prompt: Prompt) -> bool:
    """Tell whether a prompt and the tokens of its longest choice but the last are within the model's positions."""
    longest = max(len(who.encoder.piece(choice)) for choice in prompt.asked.choices)
    assert who.context is not None
    return len(tokens_of(who.encoder, prompt)) + longest - 1 <= who.context


def check(who: LanguageModel, own: float, cell: Cell, grid: Grid, episodes: int, most: int) -> tuple[int, int]:
    """Hold the deepest question of a cell and others to plain passes; return the longest, and how many are left out."""
    asked = episodes_of(cell.game, cell.seeds[:episodes], cell.steps, cell.questions_per_step)
    prompts = [p for e in asked for p in prompts_of(e, grid)]
    found = replay(who, asked, grid)
    kept = [p for p in prompts if fits(who, p)]
    rows = [(r["episode"], r["step"], r["question"]) for r in found.rows]
    assert rows == [(p.episode.seed, p.step + 1, p.question) for p in kept]  # nothing is cut, nothing else left out
    gone = len(prompts) - len(kept)
    assert found.left_out.startswith(f"{gone} of {len(prompts)} prompts of {cell.game.name}") == (gone > 0)
    lengths = [r["prompt_tokens"] for r in found.rows]
    if not kept:
        return 0, gone
    drawn = np.random.default_rng(len(prompts)).permutation(len(kept))[: most - 1].tolist()
    for i in {int(np.argmax(lengths)), *drawn}:
        known = truth(who.model, who.encoder, kept[i])
        assert lengths[i] == len(tokens_of(who.encoder, kept[i]))
        bound = tolerance(who.model, known.spread, own)
        assert found.rows[i]["logprobs"] == pytest.approx(known.logprobs, abs=bound), (cell.slug, kept[i].step)
    return max(lengths), gone


def test_the_fifteen_models_are_of_three_architectures() -> None:
    for path in CONFIGS:
        named = [a for a in read_config(str(path), [], PredictConfig).agents if isinstance(a, str) and "/" in a]
        families = [family for name in named for start, family in FAMILIES.items() if name.startswith(start)]
        assert len(named) == len(families) == 15
        assert {family: families.count(family) for family in FAMILIES.values()} == {
            "gpt_neo": 5,
            "gpt2": 4,
            "gpt_neox": 6,
        }
    assert {family: agent(family).context for family in CONTEXTS} == CONTEXTS
    assert len(cells("cells")) == 9 * 10 + 3 * 19 * 19 + 210
    assert len(cells("episodes")) == 9 + 3 * 19 + 20


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", CONTEXTS)
def test_cells_beyond_the_window_are_plain_passes(family: str, grid: Grid) -> None:
    longest = [
        check(agent(family), own_noise(family), cells(grid)[slug], grid, 2 if grid == "cells" else 1, 4)[0]
        for slug in FAST[grid]
    ]
    assert max(longest) > 2.5 * 256
    assert min(longest) < 256
    certificate = agent(family).certificate
    assert certificate is not None
    assert certificate.road == "tree"
    assert certificate.depth >= max(longest)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", CONTEXTS)
def test_every_cell_is_plain_passes(family: str, grid: Grid) -> None:
    done = [
        check(agent(family), own_noise(family), setting, grid, 1 if grid == "cells" else 2, 4)
        for setting in cells(grid).values()
    ]
    assert max(longest for longest, _ in done) > 900
    assert sum(longest > 256 for longest, _ in done) > len(done) // 4
    certificate = agent(family).certificate
    assert certificate is not None
    assert certificate.road == "tree"


def letters() -> Any:
    """A tokenizer of single bytes: three times as many tokens, so that not all of them fit."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_what_the_context_does_not_hold_is_left_out_and_counted(family: str) -> None:
    who = LanguageModel(family, loaded=(build(family, 256), letters()))
    whole = cells("cells")[f"{DEALT}=max-states=20-steps=100"]
    longest, gone = check(who, 0.0, whole, "cells", 1, 1)
    assert (longest, gone) == (0, 1)
    longest, gone = check(who, 0.0, cells("episodes")[f"{DEALT}=middle-states=10"], "episodes", 1, 2)
    assert 0 < gone < 100
    assert who.context is not None
    assert who.context - 30 < longest <= who.context


def test_gpt_neo_can_be_patched_beyond_its_window() -> None:
    who, plain = agent("gpt_neo"), Plain(agent("gpt_neo").model, PATHS["gpt_neo"])
    pair = make_game("DFA", states=8, density="middle").contrast(np.random.default_rng(0), "state", steps=30)
    clean, corrupted = (tuple(tokens_of(who.encoder, Prompt(side, len(side.steps) - 1))) for side in pair.sides)
    changed = [i for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b]
    assert len(clean) > 256 + 30
    known = {"told": changed[0], "between": (changed[0] + len(clean)) // 2}
    both = [
        TokenPair(clean, corrupted, 5, 6, known),
        # The prompts differ from their beginning on, which the local layers do not see from the end.
        TokenPair((9, *clean[1:]), corrupted, 5, 6, {"told": 0, "between": len(clean) - 300}),
    ]
    for site in ("head", "resid_pre"):
        found = sweep(
            who, both, site=site, positions=("told", "between", "last"), layers=[0, 1], failures="include"  # type: ignore[arg-type]
        )  # fmt: skip
        for i, one in enumerate(both):
            values = plain.values(one.clean, site)
            for layer, head, c in np.ndindex(found.patched.difference.shape[1:]):
                if (layer + head + c) % 3:  # a third of them: a plain pass is long
                    continue
                at = [one.roles[found.columns[c]]]
                logits = plain.patched(one.corrupted, site, layer, head, at, values[site, layer][at, head])
                expected = float(logits[5] - logits[6])
                assert found.patched.difference[i, layer, head, c] == pytest.approx(expected, abs=1e-4)
        assert np.abs(found.patched.difference - found.base.difference[:, None, None, None]).max() > 1e-3
