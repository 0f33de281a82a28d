"""The models built by hand play their games by the heads they say, and by no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from circuits import EPSILON, Circuit, Slot, circuit

from nextstate.agents.language import LanguageModel
from nextstate.agents.rollout import prompts_of
from nextstate.envs import Episode, make_game, unroll
from nextstate.envs.contrast import Pair, differences, segments

SEEDS = range(10)
GAMES = ("DFA", "Cycle")
KINDS = {  # the pairs whose answers hang on a head; an empty seat would be right on one side at most
    "DFA": {
        "state": ("state",),
        "told_state": ("state",),
        "action": ("action",),
        "told_action": ("action",),
        "match": ("state", "action", "name"),
    },
    "Cycle": {"previous": ("state",), "induction": ("state", "name")},
}


@cache
def built(game: str, seed: int) -> Circuit:
    return circuit(game, seed)


@cache
def pairs(game: str, kind: str) -> list[Pair]:
    rng, size = np.random.default_rng(7), {"DFA": {"states": 5, "actions_listed": 4}, "Cycle": {"period": 5}}[game]
    return [make_game(game, **size).contrast(rng, kind, steps=10) for _ in range(3)]


@torch.inference_mode()
def logits(agent: LanguageModel, episodes: list[Episode]) -> torch.Tensor:
    """Return the logits at the end of the last prompt of each episode; all prompts are equally long."""
    encode = agent.encoder
    parts = [segments(episode) for episode in episodes]
    tokens = [encode.opening(p[0]) + tuple(t for text in p[1:] for t in encode.piece(text)) for p in parts]
    return agent.model(torch.tensor(tokens)).logits[:, -1]


@contextmanager
def ablated(agent: LanguageModel, slot: Slot) -> Iterator[None]:
    """Set what one head gives to the output projection to zero."""
    attention = agent.model.transformer.h[slot[0]].attn
    own = slice(slot[1] * attention.head_dim, (slot[1] + 1) * attention.head_dim)

    def silence(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        heads = args[0].clone()
        heads[..., own] = 0
        return (heads,)

    hook = attention.c_proj.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        hook.remove()


def margins(agent: LanguageModel, kind: str, game: str) -> torch.Tensor:
    """Return by how much each side of each pair prefers its own answer to the other side's; pair, side."""
    both = [side for pair in pairs(game, kind) for side in pair.sides]
    answers = [[agent.encoder.piece(a)[0] for a in pair.answers] for pair in pairs(game, kind)]
    right, wrong = torch.tensor(answers), torch.tensor(answers).flip(1)
    found = logits(agent, both).reshape(len(answers), 2, -1)
    return (found.gather(2, right[..., None]) - found.gather(2, wrong[..., None]))[..., 0]


def shown(episode: Episode) -> list[bool]:
    """Tell for each step whether the story has shown what follows, so that no rule of the game is needed."""
    seen: set[object] = set()
    out = []
    for step in episode.steps:
        key = (step.state, step.action) if episode.game.name == "DFA" else step.state
        out.append(key in seen)
        seen.add(key)
    if episode.game.name == "Cycle":
        out = [t >= episode.game.settings["period"] for t in range(len(out))]
    return out


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("game", "size", "steps"),
    [
        ("DFA", {"states": 2, "actions_listed": 2}, 12),
        ("DFA", {"states": 5, "actions_listed": 3}, 30),
        ("DFA", {"states": 12, "density": "min"}, 25),
        ("Cycle", {"period": 2}, 6),
        ("Cycle", {"period": 7}, 20),
        ("Cycle", {"period": 26}, 60),
    ],
)
def test_a_circuit_solves_its_game(game: str, size: dict[str, int], steps: int, seed: int) -> None:
    agent = built(game, seed).agent
    episodes = [unroll(make_game(game, **size), s, steps) for s in range(3)]
    prompts = [p for e in episodes for p in prompts_of(e)]
    known = [k for e in episodes for k in shown(e)]
    assert sum(known) > 0.2 * len(known)
    predictions = agent.predict(prompts)
    right = [p.greedy in q.asked.accepted for p, q in zip(predictions, prompts, strict=True)]
    assert all(r for r, k in zip(right, known, strict=True) if k)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("game", GAMES)
def test_each_head_of_the_circuit_is_needed_and_no_decoy_does_anything(game: str, seed: int) -> None:
    found = built(game, seed)
    whole = {kind: margins(found.agent, kind, game) for kind in {k for ks in KINDS[game].values() for k in ks}}
    assert all(m.min() > 10 for m in whole.values())
    assert set(found.heads) == set(KINDS[game])
    for name, slot in found.heads.items():
        for kind in KINDS[game][name]:
            with ablated(found.agent, slot):
                left = margins(found.agent, kind, game)
            assert left.mean(1).abs().max() < 1e-3, f"{name} on {kind} pairs"  # right on one side is wrong on the other
    episodes = [side for kind in whole for side in pairs(game, kind)[0].sides][:4]
    before, config = logits(found.agent, episodes), found.agent.model.config
    for slot in {(a, b) for a in range(config.n_layer) for b in range(config.n_head)} - set(found.heads.values()):
        with ablated(found.agent, slot):
            assert (logits(found.agent, episodes) - before).abs().max() < 1e-4, slot
    assert len(found.decoys) == len(set(found.decoys)) == 7
    assert not set(found.decoys) & set(found.heads.values())


@pytest.mark.parametrize("game", GAMES)
def test_decoys_are_busy(game: str) -> None:
    found = built(game, 0)
    heard: dict[int, torch.Tensor] = {}
    hooks = [
        block.attn.c_proj.register_forward_pre_hook(lambda _, args, i=i: heard.__setitem__(i, args[0]))
        for i, block in enumerate(found.agent.model.transformer.h)
    ]
    logits(found.agent, [pairs(game, "state")[0].clean])
    for hook in hooks:
        hook.remove()
    width = found.agent.model.transformer.h[0].attn.head_dim
    for layer, head in (*found.decoys, *found.heads.values()):
        assert heard[layer][..., head * width : (head + 1) * width].abs().max() > 0.5


def test_the_seed_deals_out_the_slots() -> None:
    for game in GAMES:
        for name in KINDS[game]:
            assert len({built(game, seed).heads[name] for seed in SEEDS}) > 3
        last = "match" if game == "DFA" else "induction"
        for seed in SEEDS:
            slots = dict(built(game, seed).heads)
            layer = slots.pop(last)[0]
            assert all(earlier < layer for earlier, _ in slots.values())
    again = circuit("DFA", 3)
    assert again.heads == built("DFA", 3).heads
    ours, theirs = (c.agent.model.state_dict() for c in (again, built("DFA", 3)))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_matching_head_looks_at_what_the_pair_calls_the_match() -> None:
    found = circuit("DFA", 1)
    agent, (layer, head) = found.agent, found.heads["match"]
    agent.model.set_attn_implementation("eager")
    for kind in ("state", "action", "noop"):
        for pair in pairs("DFA", kind):
            for i, side in enumerate(pair.sides):
                parts = segments(side)
                tokens = agent.encoder.opening(parts[0]) + tuple(t for p in parts[1:] for t in agent.encoder.piece(p))
                with torch.inference_mode():
                    seen = agent.model(torch.tensor([tokens]), output_attentions=True).attentions[layer][0, head, -1]
                match, distractor = (agent.encoder.locate(parts, pair.roles[r][i]) for r in ("match", "distractor"))
                share = float(seen[match])
                assert share == pytest.approx(1 / round(1 / share), rel=1e-4)  # it may have been told k times
                assert share == pytest.approx(float(seen.max()), rel=1e-4)
                assert seen[distractor] < 1e-6


@pytest.mark.parametrize(("game", "kind"), [("DFA", k) for k in ("state", "action", "name")] + [("Cycle", "state")])
def test_the_tokens_of_a_pair_differ_where_its_words_do(game: str, kind: str) -> None:
    encode = built(game, 0).agent.encoder
    for pair in pairs(game, kind):
        parts = [segments(side) for side in pair.sides]
        clean, corrupted = (
            encode.opening(p[0]) + tuple(t for text in p[1:] for t in encode.piece(text)) for p in parts
        )
        assert len(clean) == len(corrupted)
        told = [[encode.locate(p, role[i]) for role in differences(pair)] for i, p in enumerate(parts)]
        assert told[0] == told[1] == [i for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b]


@pytest.mark.parametrize("given", [{"steps": t} for t in (6, 10, 14, 30)] + [{"distance": t} for t in (1, 5, 20)])
def test_the_published_pairs_are_solved_too(given: dict[str, int]) -> None:
    agent, kind = built("DFA", 0).agent, "state" if "steps" in given else "noop"
    pair = make_game("DFA").contrast(np.random.default_rng(0), kind, "paper", **given)
    for side, answer in zip(pair.sides, pair.answers, strict=True):
        assert int(logits(agent, [side])[0].argmax()) == agent.encoder.piece(answer)[0]


def test_layer_norms_do_nothing() -> None:
    for norm in built("DFA", 0).agent.model.modules():
        if isinstance(norm, torch.nn.LayerNorm):
            x = torch.randn(4, norm.normalized_shape[0])
            x -= x.mean(-1, keepdim=True)
            assert norm.eps == EPSILON
            assert torch.allclose(norm(x), x, atol=1e-5)


def test_other_shapes_and_no_room() -> None:
    found = circuit("DFA", 0, layers=2, heads=12, decoys=0)
    assert margins(found.agent, "state", "DFA").min() > 10
    assert found.agent.model.config.n_layer == 2
    with pytest.raises(ValueError, match="2 layers of 2 heads have no room for DFA"):
        circuit("DFA", 0, layers=2, heads=2)
