"""Transfer of heads: sets patched together are what hooks by hand give, and a known circuit is found in both games."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from nextstate.agents.identity import BUILT_IN
from nextstate.agents.language import LanguageModel
from nextstate.analysis.heads.pairs import TokenPair
from nextstate.analysis.heads.patch import sweep
from nextstate.analysis.heads.routing import token_pairs
from nextstate.analysis.run import RunError
from nextstate.analysis.study import go, open_run, verify, write_page
from nextstate.analysis.transfer import Heads, Transfer, TransferConfig, random_sets, together, top_heads
from nextstate.envs.game import GameError
from nextstate.envs.games import make_game
from tests import zoo
from tests.circuits import circuit
from tests.idle import start_again, times
from tests.pages import loads_nothing, shown

GAMES = [
    {"game": "DFA", "game_args": {"states": 4, "actions_listed": 4}, "steps": 5},
    {"game": "Cycle", "game_args": {"period": 4}, "steps": 7},
]
SIZES: dict[str, Any] = {"pairs": 8, "top": 2, "random_sets": 20, "kinds": ["state"]}
PROJECTIONS = {"gpt2": "transformer.h.{}.attn.c_proj", "llama": "model.layers.{}.self_attn.o_proj"}


def config(**more: Any) -> TransferConfig:
    given = {"name": "transfer", "model": "nextstate/tiny", "games": GAMES, "wandb": "disabled", **SIZES}
    return TransferConfig(**given | more)


def pairs_of(model: LanguageModel, kind: str = "state", pairs: int = 4, steps: int = 6) -> list[TokenPair]:
    rng = np.random.default_rng(0)
    game = make_game("DFA", states=4)
    found, _ = token_pairs(model.encoder, [game.contrast(rng, kind, steps=steps) for _ in range(pairs)])
    return found


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN["nextstate/tiny"])
    return LanguageModel(request.param, loaded=(zoo.build(request.param, len(tokenizer)), tokenizer))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("transfer") / "run"
    go(Transfer(), config(), out)
    return out


def by_hand(model: LanguageModel, pair: TokenPair, heads: Heads) -> float:
    """Return what a pair says with heads patched by hooks on the output projections that know no sites."""
    width = model.sites.head_dim
    clean: dict[int, Tensor] = {}
    blocks = {layer: model.model.get_submodule(PROJECTIONS[model.name].format(layer)) for layer, _ in heads}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, n=layer: clean.__setitem__(n, args[0][0, -1].clone()))
        for layer, block in blocks.items()
    ]
    with torch.no_grad():
        model.model(input_ids=torch.tensor([pair.clean]))
    for hook in hooks:
        hook.remove()

    def patch(layer: int, x: Tensor) -> tuple[Tensor]:
        x = x.clone()
        for own in [head for at, head in heads if at == layer]:
            x[0, -1, own * width : (own + 1) * width] = clean[layer][own * width : (own + 1) * width]
        return (x,)

    hooks = [
        block.register_forward_pre_hook(lambda _, args, n=layer: patch(n, args[0])) for layer, block in blocks.items()
    ]
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([pair.corrupted])).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return float(logits[pair.answer] - logits[pair.other])


def test_one_head_patched_is_a_cell_of_the_exact_sweep(model: LanguageModel) -> None:
    pairs = [*pairs_of(model), *pairs_of(model, steps=8)]  # of several lengths
    found = sweep(model, pairs, failures="include", vocabulary=False)
    cells = [(layer, head) for layer in found.layers for head in range(model.sites.heads)]
    alone = together(model, pairs, [(cell,) for cell in cells])
    expected = found.patched.difference[..., 0].reshape(len(pairs), -1).T
    assert np.abs(alone - found.base.difference).max() > 0.01
    assert alone == pytest.approx(expected, abs=1e-5)


def test_several_heads_patched_are_what_hooks_by_hand_give(model: LanguageModel) -> None:
    pairs = [*pairs_of(model), *pairs_of(model, "action", steps=8)]
    last = model.sites.layers - 1
    sets: list[Heads] = [((0, 1), (last, 2)), ((0, 0), (0, 3), (last, 0)), ((last, 1),)]
    found = together(model, pairs, sets)
    for s, heads in enumerate(sets):
        assert found[s] == pytest.approx([by_hand(model, pair, heads) for pair in pairs], abs=1e-5)


def test_nothing_patched_is_the_base_run_and_everything_the_source_run(model: LanguageModel) -> None:
    pairs = pairs_of(model)
    assert all(pair.clean[-1] == pair.corrupted[-1] for pair in pairs)
    found = sweep(model, pairs, failures="include", vocabulary=False)
    every = tuple((layer, head) for layer in range(model.sites.layers) for head in range(model.sites.heads))
    nothing, everything = together(model, pairs, [(), every])
    assert nothing == pytest.approx(found.base.difference, abs=1e-5)
    assert everything == pytest.approx(found.source.difference, abs=1e-5)  # nothing else reads other tokens


@pytest.mark.parametrize("seed", range(3))
def test_the_heads_of_a_circuit_are_those_of_both_games(tmp_path: Path, seed: int) -> None:
    made = circuit("DFA", seed)
    games = [{"game": "DFA", "game_args": {"states": n, "actions_listed": 4}, "steps": 8} for n in (4, 5)]
    given = config(model="circuit", games=games, kinds=["state", "action"])
    run = go(Transfer(), given, tmp_path / "run", model=made.agent)
    for row in run.summary("transfer").rows(named=True):
        right = {"{}.{}".format(*made.heads[name]) for name in (row["kind"], "match")}
        assert set(row["heads"].split()) == set(row["own_heads"].split()) == right
        assert (row["shared"], row["recovery"], row["difference"]) == (2, pytest.approx(1, abs=1e-3), 0)
        assert row["p"] >= 1 / 21
        assert row["carrying"] == 2
    for (kind, _), heads in run.summary("heads").group_by("kind", "game"):
        found = set(heads.filter("carries").select("layer", "head").iter_rows())
        assert found == {made.heads[str(kind)], made.heads["match"]}
        assert heads["tested"].unique().to_list() == [8]


def test_heads_are_chosen_on_other_pairs_than_they_are_measured_on(done: Path) -> None:
    _, run = open_run(done, "")
    for one, two in permutations(("DFA-states=4-actions_listed=4", "Cycle-period=4")):
        theirs, own = (run.table(f"heads/state/{game}") for game in (one, two))
        rows = run.table(f"transfer/state/{one}-to-{two}")
        assert set(rows["pair"]) == set(own.filter(~pl.col("chooses"))["pair"])
        assert not set(rows["pair"]) & set(own.filter("chooses")["pair"])
        named = rows.unique("set", maintain_order=True, keep="first")["heads"].to_list()
        assert named[:2] == [" ".join(f"{a}.{b}" for a, b in top_heads(x, 2)) for x in (theirs, own)]
        (row,) = run.summary("transfer").filter(heads_of=one).rows(named=True)
        for name, which in (("recovery", "theirs"), ("own", "own"), ("random", "random")):
            mean = rows.filter(set=which).select(pl.col("patched", "base", "source").mean()).row(0)
            assert row[name] == pytest.approx((mean[0] - mean[1]) / (mean[2] - mean[1]))
        assert row["difference"] == pytest.approx(row["recovery"] - row["own"])
        assert row["recovery_low"] <= row["recovery"] <= row["recovery_high"]


def test_top_heads_change_most_over_the_pairs_that_choose() -> None:
    changes = {(0, 0): (1.0, 9.0), (0, 1): (3.0, -9.0), (1, 0): (-5.0, 9.0), (1, 1): (3.0, 0.0)}
    rows = [
        {"layer": layer, "head": head, "pair": pair, "base": 2.0, "patched": 2.0 + change, "chooses": pair == 0}
        for (layer, head), both in changes.items()
        for pair, change in enumerate(both)
    ]
    assert top_heads(pl.DataFrame(rows), 3) == ((0, 1), (1, 1), (0, 0))


def test_random_sets_have_as_many_heads_of_each_layer() -> None:
    rows = pl.DataFrame({"layer": [0] * 4 + [1] * 4 + [2] * 4, "head": [0, 1, 2, 3] * 3})
    like = ((2, 0), (0, 1), (0, 3))
    sets = random_sets(like, rows, 300, np.random.default_rng(0))
    assert sets == random_sets(like, rows, 300, np.random.default_rng(0))
    assert all(sorted(layer for layer, _ in one) == [0, 0, 2] and len(set(one)) == 3 for one in sets)
    assert len({frozenset(one) for one in sets}) == 6 * 4  # every set comes up


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"games": GAMES[:1]}, RunError, "can be tried in no other game: give at least two games"),
        ({"games": [*GAMES, GAMES[0]]}, RunError, "two jobs of the study 'transfer' have the key"),
        ({"kinds": ["action"]}, RunError, "Cycle has no balanced action pairs"),
        ({"games": [GAMES[0], {"game": "Cycles"}]}, GameError, "did you mean 'Cycle'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        go(Transfer(), config(**more), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_run_does_nothing_and_imports_no_torch(done: Path) -> None:
    before = times(done)
    assert start_again(Transfer, config(), done) == []
    assert times(done) == before


def test_page_and_verify_work_on_the_folder(done: Path) -> None:
    page = (done / "report.html").read_text(encoding="utf-8")
    assert loads_nothing(page)
    text = " ".join(shown(page).split())
    assert "of 2 ordered pairs of games the 2 heads with the largest effect on state pairs" in text
    assert "Heads that carry it:" in text
    assert all(not x.found for x in verify(done))
    write_page(*open_run(done))
    assert (done / "report.html").read_text(encoding="utf-8") == page
