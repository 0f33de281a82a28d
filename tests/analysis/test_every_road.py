"""Patching, ablation, recording, responses and written answers on every road, against plain forward passes.

The models are those of the zoo whose layers are unlike each other: windows and chunks smaller than the prompts,
grouped queries, ALiBi, experts, convolutions and recurrences. The truth is `tests.plain`: bare hooks, one pass a patch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nextstate.agents import session
from nextstate.agents.agent import Prompt
from nextstate.agents.intervene import _REFERENCE_SEED, Intervened, drawn
from nextstate.agents.intervention import Intervention
from nextstate.agents.rollout import episodes_of, prompts_of
from nextstate.agents.sites import SiteError
from nextstate.analysis.heads.patch import TokenPair, sweep
from nextstate.analysis.record import load, record
from nextstate.analysis.response.branches import ResponseError
from nextstate.analysis.response.config import ALONG
from nextstate.analysis.response.measure import exact, responses, unit_directions
from nextstate.envs.games import make_game
from tests.exactness import ROADS as ASKED
from tests.exactness import tokens_of, truth
from tests.plain import HEADS, PATHS, WIDTH, Plain, made_pairs, tokenizer, zoo_agent
from tests.zoo import WINDOW, build

# The roads of replay and of live sessions. The delta rule of Qwen3-Next rounds otherwise in chunks than token by token,
# by about as much as is let through, so that its fork may be refused.
ROADS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{name: (("tree",), ("tree",)) for name in ("gemma2", "gemma3_text", "qwen3", "phi3", "gpt_neo", "llama4_text")},
    "bloom": (("tree",), ("tree",)),
    "mpt": (("tree",), ("fork",)),
    "lfm2": (("fork",), ("fork",)),
    "bamba": (("fork",), ("fork",)),
    "qwen3_next": (("fork", "rows"), ("fork", "rows")),
    "jamba": (("step",), ("step",)),
    "recurrent_gemma": (("rows",), ("rows",)),
    "minimax": (("rows",), ("rows",)),
}
ABLATED = tuple(name for name in ROADS if PATHS[name].projection)
SINGLE = ("qwen3_next", "jamba", "minimax")  # their experts do not run in float64
NO_SLOPE = ("bloom", "qwen3_next", "jamba", "recurrent_gemma", "minimax")  # torch has none of some of their functions
NOISY = {"qwen3_next": 5.0}  # tolerances are so many times as large
GAME = make_game("Box", boxes=3)


def exact_to(name: str) -> float:
    return 1e-4 * NOISY.get(name, 1.0)


def plain_of(name: str, dtype: torch.dtype = torch.float32) -> Plain:
    return Plain(zoo_agent(name, dtype).model, PATHS[name])


@pytest.mark.parametrize("name", ROADS)
def test_the_road_is_known_and_so_are_the_sites(name: str) -> None:
    agent, plain, (replayed, lived) = zoo_agent(name), plain_of(name), ROADS[name]
    assert agent.forward.require(60, 120) in replayed
    assert agent.forward.require(60, 120, live=True) in lived
    assert agent.sites.layers == plain.layers
    assert agent.sites.layers_with("head") == plain.has("head")
    assert agent.sites.layers_with("attn_out") == tuple(range(plain.layers))
    if plain.has("head"):
        assert agent.sites.shape("head") == (HEADS, WIDTH)


# --- patching


def check_sweep(name: str, site: Any, positions: Any, direction: Any, pairs: list[TokenPair], layers: Any) -> None:
    agent, plain = zoo_agent(name), plain_of(name)
    found = sweep(
        agent, pairs, site=site, positions=positions, direction=direction, layers=layers, failures="include"
    )  # fmt: skip
    shape, moved = found.patched.difference.shape, 0
    for i, pair in enumerate(pairs):
        base, source = (pair.corrupted, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupted)
        values, unpatched = plain.values(source, site), plain.run(base)[-1]
        for n, head, c in np.ndindex(shape[1:]):
            layer, column = found.layers[n], found.columns[c]
            start = pair.first_difference
            at = [pair.roles[column] if column in pair.roles else int(column)] if column != "all" else []
            at = at or list(range(start, len(pair.clean)))
            logits = plain.patched(base, site, layer, head, at, values[site, layer][at, head])
            expected = float(logits[pair.answer] - logits[pair.other])
            assert found.patched.difference[i, n, head, c] == pytest.approx(expected, abs=exact_to(name)), (at, layer)
            likely = float(logits.softmax(-1)[pair.answer])
            assert found.patched.probability[i, n, head, c] == pytest.approx(likely, abs=exact_to(name))
            moved += abs(expected - float(unpatched[pair.answer] - unpatched[pair.other])) > 1e-3
    assert moved  # else equality would show nothing


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", ["head", "resid_pre", "attn_out"])
@pytest.mark.parametrize("name", ROADS)
def test_sweeps_are_one_plain_pass_a_patch(name: str, site: Any, direction: Any) -> None:
    if site == "head" and not PATHS[name].projection:
        with pytest.raises(SiteError, match="no verified heads"):
            sweep(zoo_agent(name), made_pairs(((20, 10),)), failures="include")
        return
    # Both beyond windows and chunks; the middle of the second is out of a window's reach of its end.
    short, long = made_pairs(((2 * WINDOW + 3, 12), (3 * WINDOW, 7)))
    check_sweep(name, site, ("middle", "last"), direction, [short, long], None)
    if direction == "denoise":
        check_sweep(name, site, "each", direction, [short], [plain_of(name).has(site)[0]])
        check_sweep(name, site, "all", direction, [short], None)


# --- ablation and recording


def asked(steps: int = 3) -> list[Prompt]:
    return [p for e in episodes_of(GAME, range(2), steps) for p in prompts_of(e)]


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize("name", ABLATED)
def test_an_ablated_agent_is_a_plain_ablation(name: str, mode: Any) -> None:
    agent, plain, steps = zoo_agent(name), plain_of(name), 3
    first, last = plain.has("head")[0], plain.has("head")[-1]
    heads = ((last, 1), (first, 3), (last, 2))
    references = [Prompt(episodes_of(GAME, [_REFERENCE_SEED + i], steps)[0], steps - 1) for i in range(2)]
    seen = [plain.values(tokens_of(agent.encoder, p), "head") for p in references]

    def ablating(prompt: Prompt) -> AbstractContextManager[None]:
        def put(layer: int, head: int) -> Any:
            pool = torch.cat([v["head", layer][:, head] for v in seen])

            def edit(x: Tensor) -> Tensor:
                picks = drawn(prompt.episode, len(pool), len(x))
                x[:, head] = {"zero": torch.zeros(1), "mean": pool.mean(0), "resample": pool[picks]}[mode]
                return x

            return "head", layer, edit

        return plain.hooked(*(put(*head) for head in heads))

    prompts, moved = asked(steps), 0.0
    known = []
    for prompt in prompts:
        with ablating(prompt):
            known.append(truth(agent.model, agent.encoder, prompt).logprobs)
        moved = max(moved, abs(known[-1][0] - truth(agent.model, agent.encoder, prompt).logprobs[0]))
    assert moved > 0.01
    for road, ask in ASKED.items():
        found = ask(Intervened(agent, Intervention(heads, mode, episodes=2)), prompts)
        for prediction, expected in zip(found, known, strict=True):
            assert prediction.logprobs == pytest.approx(expected, abs=exact_to(name)), road
    whole = truth(agent.model, agent.encoder, prompts[0]).logprobs
    assert agent.predict(prompts[:1])[0].logprobs == pytest.approx(whole, abs=exact_to(name))  # hooks are gone


@pytest.mark.parametrize("road", ASKED)
@pytest.mark.parametrize("name", ROADS)
def test_what_is_recorded_is_what_a_plain_pass_computes(name: str, road: str, tmp_path: Path) -> None:
    agent, plain, prompts, layers = zoo_agent(name), plain_of(name), asked(), plain_of(name).has("head")
    sites: list[Any] = ["resid_pre", *(["head"] if layers else [])]
    weights = bool(layers)
    with record(agent, tmp_path / "r", sites=sites, at=["state", "last", -3, 1], attention=weights):
        ASKED[road](agent, prompts)
    index, tensors = load(tmp_path / "r")
    eager = build(name, len(tokenizer()))
    if weights and eager.config._attn_implementation != "eager":
        eager.set_attn_implementation("eager")
    for prompt in prompts:
        tokens = tokens_of(agent.encoder, prompt)
        mine = index.filter(episode=prompt.episode.seed, step=prompt.step + 1)
        expected = plain.values(tokens, *sites)
        attended = Plain(eager, PATHS[name]).attention(tokens) if weights else {}
        assert set(mine["role"]) == {"state", "last", "-3", "1"}
        assert set(mine.filter(role="last")["position"]) == {len(tokens) - 1}
        assert len(mine) == 4 * (plain.layers + len(layers) * HEADS * (len(sites) - 1 + weights))
        for (site, layer, head), rows in mine.group_by("site", "layer", "head"):
            found, places = tensors(rows), rows["position"].to_list()
            if site == "attention":
                for x, p in zip(found, places, strict=True):
                    assert torch.allclose(x[: p + 1], attended[layer][head, p, : p + 1], atol=exact_to(name))
                    assert not x[p + 1 :].any()
            else:
                theirs = expected[site, layer][places, head or 0]
                assert torch.allclose(found, theirs, atol=exact_to(name) * max(1.0, float(theirs.abs().max())))


# --- responses


def streams(plain: Plain, tokens: np.ndarray, layer: int, position: int, by: Any) -> Tensor:
    """Return what leaves each block from `layer` on, [layer token hidden], with `by(vector)` added at a position."""
    seen = dict[int, Tensor]()
    last = plain.module("resid_pre", plain.layers - 1)
    hook = last.register_forward_hook(
        lambda _, __, out: seen.update({plain.layers: (out[0] if isinstance(out, tuple) else out)[0]})
    )

    def push(x: Tensor) -> Tensor:
        x[position, 0] += by(x[position, 0])
        return x

    looks = [
        ("resid_pre", n, lambda x, n=n: seen.update({n: x[:, 0]}))  # type: ignore[misc]
        for n in range(layer + 1, plain.layers)
    ]
    try:
        plain.run(tokens.tolist(), ("resid_pre", layer, push), *looks)
    finally:
        hook.remove()
    return torch.stack([seen[n] for n in range(layer + 1, plain.layers + 1)])


@pytest.mark.parametrize("name", ROADS)
def test_responses_are_plain_pushes_and_their_limit_is_the_slope(name: str) -> None:
    dtype = torch.float32 if name in SINGLE else torch.float64
    agent, plain = zoo_agent(name, dtype), plain_of(name, dtype)
    layer = plain.layers // 4
    tokens = np.random.default_rng(0).integers(5, 400, (1, 2 * WINDOW))
    positions, strengths = [2, 11], (0.05, 0.3)
    ways = unit_directions(np.random.default_rng(1), 1, 1, agent.sites.hidden)
    found = responses(agent, tokens, positions=positions, strengths=strengths, directions=ways, layer=layer)
    assert found.directions == (ALONG, "random 1")
    if name in NO_SLOPE:
        with pytest.raises(ResponseError, match="cannot be differentiated"):
            exact(agent, tokens, positions=positions, directions=ways, layer=layer)
    else:
        limit = exact(agent, tokens, positions=positions, directions=ways, layer=layer)
        assert limit.directions == found.directions
    close = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float32 else {"rtol": 1e-4, "atol": 1e-5}
    unit = torch.from_numpy(ways[0, 0]).to(dtype)
    for p, position in enumerate(positions):
        base = streams(plain, tokens[0], layer, position, lambda x: 0 * x)
        for d, way in enumerate((lambda x: x, lambda x: x.norm() * unit)):

            def pushed(eps: float, way: Any = way, position: int = position) -> Tensor:
                return streams(plain, tokens[0], layer, position, lambda x: eps * way(x))

            size = float(found.pushed[0, p])
            for s, eps in enumerate(strengths):
                moved = (pushed(eps) - base).norm(dim=-1) / (eps * size)
                own = found.value[0, s, d, :, p]
                np.testing.assert_allclose(own[:, position:], moved[:, position:].numpy(), **close)
                assert np.isnan(own[:, :position]).all()
            if name not in NO_SLOPE:  # norms compute in float32 whatever the model is in, so no smaller step
                slope = (pushed(3e-3) - pushed(-3e-3)).norm(dim=-1) / (6e-3 * size)
                own = limit.value[0, 0, d, :, p, position:]
                np.testing.assert_allclose(own, slope[:, position:].numpy(), rtol=2e-3, atol=5e-4)


# --- writing


@pytest.mark.parametrize("name", ROADS)
def test_written_answers_are_what_greedy_generation_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "WRITTEN", 10)
    agent, prompts = zoo_agent(name), []
    for episode in episodes_of(GAME, range(2), 2):
        step = episode.steps[-1 - episode.seed]  # transcripts of unlike lengths
        (question,) = step.questions
        open_ended = step._replace(questions=(question._replace(choices=(), truth=0, accepted=()),))
        cut = len(episode.steps) - episode.seed
        steps = (*episode.steps[: cut - 1], open_ended)
        prompts.append(Prompt(replace(episode, steps=steps), cut - 1))
    found = agent.predict(prompts)
    for prompt, prediction in zip(prompts, found, strict=True):
        tokens = torch.tensor([tokens_of(agent.encoder, prompt)])
        # Hybrids by plain passes alone: what some of them carry on is not what they compute without it.
        alone = {} if ROADS[name][0] == ("tree",) else {"use_cache": False}
        out = agent.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=10, do_sample=False, pad_token_id=1,
            **alone,
        )  # fmt: skip
        rest = out[0, tokens.shape[1] :].tolist()
        end = tokenizer().eos_token_id
        written = tokenizer().decode(rest[: rest.index(end)] if end in rest else rest)
        assert prediction.answer == written.partition("\n")[0].strip()
        assert prediction.prompt_tokens == tokens.shape[1]
    assert any(p.answer for p in found)
