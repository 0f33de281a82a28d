"""Responses against other roads: one forward pass a push, Jacobian-vector products, a linear model, built circuits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nextstate.agents.language import LanguageModel
from nextstate.agents.sites import SiteError
from nextstate.analysis.attention import copying, prefix_matching
from nextstate.analysis.response import branches as engine
from nextstate.analysis.response.branches import ResponseError
from nextstate.analysis.response.bridge import pushed, role_rows, transcripts
from nextstate.analysis.response.config import ALONG, STRENGTHS
from nextstate.analysis.response.induction import (
    Repeated,
    averaged,
    excess,
    head_excess,
    lost,
    means,
    profile,
    repeated,
    vocabulary_of,
    without,
)
from nextstate.analysis.response.measure import (
    Response,
    exact,
    responses,
    unit_directions,
)
from nextstate.analysis.response.window import restored, window
from nextstate.envs.games import make_game
from tests.circuits import STATES, Circuit, circuit, word_tokenizer
from tests.conftest import ARCHITECTURES

BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "llama": "model.layers", "gemma2": "model.layers"}
BLOCKS |= {"nextstate_distances": "transformer.h"}
SEEDS = range(4)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def deep(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LanguageModel:
    """The tiny models in float64."""
    return LanguageModel(str(folders[request.param]), device="cpu", dtype="float64")


def prompts(n: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(5, 400, (n, length))


def streams(
    agent: LanguageModel, tokens: np.ndarray, layer: int, push: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Run a whole prompt with bare hooks; return what leaves each block, [layer token hidden]."""
    model, seen = agent.model, list[torch.Tensor]()
    blocks = model.get_submodule(BLOCKS[model.config.model_type])
    hooks = [blocks[layer].register_forward_pre_hook(lambda _, args: (push(args[0]), *args[1:]))]
    hooks += [
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in list(blocks)[layer:]
    ]
    try:
        model(torch.from_numpy(tokens[None]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([x[0] for x in seen])


def push_at(position: int, by: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what adds `by(vector)` to the stream at a position."""

    def push(x: torch.Tensor) -> torch.Tensor:
        at = torch.zeros(x.shape[1], 1, dtype=x.dtype)
        at[position] = 1
        return x + at * by(x[0, position].detach())

    return push


@torch.no_grad()
def by_hand(
    agent: LanguageModel, tokens: np.ndarray, strengths: tuple[float, ...], directions: np.ndarray, layer: int
) -> np.ndarray:
    """One forward pass a push: [prompt strength direction layer position target]."""
    n, length = tokens.shape
    out = np.full((n, len(strengths), 1 + directions.shape[1], agent.sites.layers - layer, length, length), np.nan)
    for i in range(n):
        base = streams(agent, tokens[i], layer, lambda x: x)
        ways = [lambda x: x / x.norm(), *(lambda x, u=u: torch.from_numpy(u).to(x) for u in directions[i])]
        for s, eps in enumerate(strengths):
            for d, way in enumerate(ways):
                for j in range(length):
                    size: list[float] = []

                    def by(x: torch.Tensor, way: Any = way, eps: float = eps, size: list[float] = size) -> torch.Tensor:
                        size.append(eps * float(x.norm()))
                        return eps * x.norm() * way(x)

                    moved = streams(agent, tokens[i], layer, push_at(j, by))
                    out[i, s, d, :, j, j:] = ((moved - base).norm(dim=-1) / size[0]).numpy()[:, j:]
    return out


@pytest.mark.parametrize("layer", [0, 1])
def test_branches_give_what_one_forward_pass_a_push_gives(deep: LanguageModel, layer: int) -> None:
    tokens, strengths = prompts(2, 7), (1e-2, 0.3)
    ways = unit_directions(np.random.default_rng(1), 2, 2, 32)
    found = responses(deep, tokens, strengths=strengths, directions=ways, layer=layer)
    expected = by_hand(deep, tokens, strengths, ways, layer)
    assert found.value.shape == expected.shape
    assert found.directions == (ALONG, "random 1", "random 2")
    assert found.layers == tuple(range(layer, 2))
    np.testing.assert_allclose(found.value, expected, rtol=1e-4, atol=1e-5)  # Gemma's softmax is in float32
    some = responses(deep, tokens, positions=[4, 1], strengths=strengths, directions=ways, along=False, layer=layer)
    np.testing.assert_allclose(some.value, expected[:, :, 1:, :, [4, 1]], rtol=1e-4, atol=1e-5)
    assert found.control < 1e-6


def test_the_exact_product_is_that_of_the_whole_prompt(deep: LanguageModel) -> None:
    tokens = prompts(1, 6)
    ways = unit_directions(np.random.default_rng(1), 1, 1, 32)
    found = exact(deep, tokens, directions=ways)
    own = streams(deep, tokens[0], 0, lambda x: x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for j in (0, 2, 5):
            for d, way in enumerate((lambda x: x, lambda x: x.norm() * torch.from_numpy(ways[0, 0]))):

                def after(t: torch.Tensor, j: int = j, way: Any = way) -> torch.Tensor:
                    return streams(deep, tokens[0], 0, push_at(j, lambda x: t * way(x)))

                plain, product = torch.func.jvp(after, (torch.zeros((), dtype=torch.float64),), (torch.tensor(1.0),))
                assert torch.allclose(plain, own, atol=1e-6)
                expected = product.norm(dim=-1).detach().numpy()[:, j:] / found.pushed[0, j]
                np.testing.assert_allclose(found.value[0, 0, d, :, j, j:], expected, rtol=1e-5, atol=1e-7)


def test_finite_differences_approach_the_exact_product_in_first_order(deep: LanguageModel) -> None:
    tokens, ways = prompts(1, 9), unit_directions(np.random.default_rng(2), 1, 2, 32)
    limit = exact(deep, tokens, directions=ways)
    strengths = tuple(1e-3 * 2**k for k in range(5))
    found = responses(deep, tokens, strengths=strengths, directions=ways)
    apart = np.sqrt(np.nanmean(np.square(found.value - limit.value), (0, 2, 3, 4, 5)))
    order = np.polyfit(np.log(strengths), np.log(apart), 1)[0]
    assert order == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_cosines_are_those_of_the_changes_of_all_later_tokens(deep: LanguageModel) -> None:
    tokens, strengths = prompts(1, 6), (0.02, 0.1, 0.5)
    way = unit_directions(np.random.default_rng(1), 1, 1, 32)
    found = responses(deep, tokens, strengths=strengths, directions=way, along=False)
    base, unit = streams(deep, tokens[0], 0, lambda x: x), torch.from_numpy(way[0, 0])
    for j in range(5):
        moved = [streams(deep, tokens[0], 0, push_at(j, lambda x, e=e: e * x.norm() * unit)) for e in strengths]
        changes = [(m - base)[:, j + 1 :].flatten(1) for m in moved]
        for k in range(2):
            expected = torch.cosine_similarity(changes[k], changes[k + 1], dim=-1).numpy()
            np.testing.assert_allclose(found.cosine[0, k, 0, :, j], expected, atol=1e-4)
        sizes = [float(c[-1].norm()) / (e * found.pushed[0, j]) for c, e in zip(changes, strengths, strict=True)]
        np.testing.assert_allclose(found.total[0, :, 0, -1, j], sizes, rtol=1e-4)
    assert np.isnan(found.cosine[..., 5]).all()
    assert np.isnan(found.total[..., 5]).all()


@cache
def linear() -> tuple[LanguageModel, list[np.ndarray]]:
    """A model in which each token gets a linear map of the mean of all before it, and these maps."""
    width, layers, large = 16, 3, 1e8
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(word_tokenizer()), n_positions=32, n_embd=width, n_layer=layers, n_head=1, n_inner=1,
            layer_norm_epsilon=large**2, bos_token_id=None, eos_token_id=None,
        )
    ).double().eval()  # fmt: skip
    rng, maps = np.random.default_rng(0), []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("transformer.h"):  # the norm becomes the identity, less the mean
                parameter.fill_(large if ".ln_" in name and name.endswith("weight") else 0.0)
        for block in model.transformer.h:
            value, out = rng.normal(size=(2, width, width)) / width**0.5
            block.attn.c_attn.weight[:, 2 * width :] = torch.from_numpy(value)
            block.attn.c_proj.weight.copy_(torch.from_numpy(out))
            maps.append((np.eye(width) - 1 / width) @ value @ out)
    return LanguageModel("linear", loaded=(model, word_tokenizer())), maps


def test_in_a_linear_model_the_response_is_the_known_matrix() -> None:
    agent, maps = linear()
    tokens, ways = prompts(1, 10) % 90, unit_directions(np.random.default_rng(3), 1, 2, 16)
    found, limit = responses(agent, tokens, directions=ways, along=False), exact(agent, tokens, directions=ways)
    mean = np.tri(10) / np.arange(1, 11)[:, None]
    for d in range(2):
        for j in range(10):
            change = np.zeros((10, 16))
            change[j] = ways[0, d]
            for layer, into in enumerate(maps):
                change = change + mean @ change @ into
                expected = np.linalg.norm(change, axis=1)[j:]
                np.testing.assert_allclose(limit.value[0, 0, 1 + d, layer, j, j:], expected, atol=1e-9)
                for s in range(len(STRENGTHS)):
                    np.testing.assert_allclose(found.value[0, s, d, layer, j, j:], expected, atol=1e-8)
    edges = window([found])
    assert set(edges.low) == {STRENGTHS[0]}
    assert set(edges.high) == {STRENGTHS[-1]}
    assert edges.holds(edges.middle or 0) == (0, 1, 2)
    shares = found.value * found.pushed[0][:, None] / found.norms[0][:, None]
    np.testing.assert_allclose(found.relative, shares)


def test_batches_do_not_change_what_is_found(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    agent, tokens = LanguageModel(str(folders["llama"]), device="cpu", dtype="float64"), prompts(1, 12)
    whole = responses(agent, tokens)
    one_by_one = responses(agent, tokens, max_bytes=1)
    np.testing.assert_allclose(one_by_one.value, whole.value, rtol=1e-6, atol=1e-6)
    real, calls = engine._one_pass, list[int]()

    def scarce(model: Any, base: Any, rows: Any, *rest: Any) -> float:
        calls.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, base, rows, *rest)

    monkeypatch.setattr(engine, "_one_pass", scarce)
    halved = responses(agent, tokens)
    assert max(calls) > 2
    np.testing.assert_allclose(halved.value, whole.value, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(engine, "_one_pass", lambda *_: scarce(None, None, [1, 2, 3]))
    with pytest.raises(ResponseError, match="runs out of memory on one row of 12 tokens"):
        responses(agent, tokens, max_bytes=1)


# --- windows


def made_up(level: np.ndarray, cosine: float = 1.0) -> Response:
    """One push of token 0 and its response at token 1, [strength layer]."""
    strengths = tuple(10.0**k for k in range(-len(level) + 1, 1))
    value = np.full((1, len(level), 1, level.shape[1], 1, 2), np.nan)
    value[0, :, 0, :, 0, 1] = level
    turns = np.full((1, len(level) - 1, 1, level.shape[1], 1), cosine)
    layers = tuple(range(level.shape[1]))
    return Response(0, layers, np.array([0]), ("random 1",), strengths, value, turns, np.ones((1, len(layers), 2)),
                    np.ones((1, 1)), 0.0)  # fmt: skip


def test_the_window_lies_between_noise_and_saturation() -> None:
    strengths = 10.0 ** np.arange(-6, 1)
    levels = np.stack([1 + 1e-5 / strengths, 1 / (1 + 5 * strengths), strengths, np.ones(7)], 1)
    edges = window([made_up(levels)])
    assert edges.low == pytest.approx([1e-4, 1e-6, np.nan, 1e-6], nan_ok=True)
    assert edges.high == pytest.approx([1, 1e-2, np.nan, 1], nan_ok=True)
    assert edges.common == pytest.approx((1e-4, 1e-3, 1e-2))
    assert edges.middle == pytest.approx(1e-3)
    assert edges.holds(edges.middle or 0) == (0, 1, 3)
    back = restored(edges.table("float32"))
    for name in ("level", "slope", "cosine", "low", "high"):
        np.testing.assert_array_equal(getattr(back, name), getattr(edges, name))
    assert (back.layers, back.strengths, back.kind) == (edges.layers, edges.strengths, "random")


def test_no_window_is_none() -> None:
    for found in (made_up(np.geomspace(1, 10, 7)[:, None]), made_up(np.ones((7, 1)), cosine=0.9)):
        edges = window([found])
        assert np.isnan(edges.low).all()
        assert edges.common == ()
        assert edges.middle is None
    with pytest.raises(ResponseError, match="2 strengths are too few for a window"):
        window([made_up(np.ones((2, 1)))])
    with pytest.raises(ResponseError, match="the response has random 1"):
        window([made_up(np.ones((5, 1)))], ALONG)


# --- induction


@cache
def built(seed: int) -> Circuit:
    return circuit("Cycle", seed, decoys=0)


@cache
def given(seed: int, repeats: int = 2) -> Repeated:
    agent = built(seed).agent
    letters = vocabulary_of(agent, [f" {x}" for x in STATES])
    return repeated(agent, np.random.default_rng(4), block=9, repeats=repeats, prompts=3, vocabulary=letters)


def offsets(agent: LanguageModel, drawn: Repeated, tokens: np.ndarray, limit: bool = False) -> np.ndarray:
    """Return the mean response by layer and offset."""
    ways = unit_directions(np.random.default_rng(5), len(tokens), 2, agent.sites.hidden)
    given: dict[str, Any] = {"positions": drawn.sources, "directions": ways, "along": False}
    found = exact(agent, tokens, **given) if limit else responses(agent, tokens, strengths=(3e-2,), **given)
    return profile(averaged(found, "random"), drawn).mean(0)


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_signature_is_at_the_layer_and_offset_that_were_built(seed: int, repeats: int) -> None:
    made, drawn = built(seed), given(seed, repeats if seed < 2 else 2)
    (before, _), (layer, head) = made.heads["previous"], made.heads["induction"]
    for limit in (True, False):
        found = offsets(made.agent, drawn, drawn.tokens, limit)
        expected = np.zeros(found.shape, dtype=bool)
        expected[before:, 0] = True  # what the previous-token head brings
        expected[layer:, drawn.block - 2] = True  # offset B - 1
        expected[layer:, -1] = drawn.repeats > 2  # the last letter of a block is followed by the first of the next
        assert (found[expected] > (0.2 if repeats == 2 else 0.05)).all()  # earlier occurrences share attention
        assert np.abs(found[~expected]).max() < 1e-3
    control = offsets(made.agent, drawn, drawn.control)
    assert np.abs(excess(control, drawn.block)[0][:, 0]).max() < 0.1
    with without(made.agent, layer, head, None):
        ablated = offsets(made.agent, drawn, drawn.tokens)
    assert np.abs(ablated[:, drawn.block - 2]).max() < 1e-3
    with without(made.agent, *made.heads["previous"], None):
        assert np.abs(excess(offsets(made.agent, drawn, drawn.tokens), drawn.block)[0][:, 0]).max() < 0.1


@pytest.mark.parametrize("seed", [0, 3])
def test_the_heads_that_were_built_carry_it_and_no_others(seed: int) -> None:
    made, drawn = built(seed), given(seed)
    ways = unit_directions(np.random.default_rng(5), 3, 1, made.agent.sites.hidden)
    more: dict[str, Any] = {"strength": 3e-2, "directions": ways}
    left = np.stack([head_excess(made.agent, drawn, n, **more, ablation="zero") for n in range(4)], 1)
    found = responses(
        made.agent, drawn.tokens, positions=drawn.sources, strengths=(3e-2,), directions=ways, along=False
    )
    whole = excess(profile(averaged(found, "random")[:, -1:], drawn), drawn.block)[0][:, 0, 0]
    gone = lost(whole, left, np.random.default_rng(0), resamples=100)
    assert gone is not None
    others = np.ones((4, 4), dtype=bool)
    for name in ("previous", "induction"):
        others[made.heads[name]] = False
        assert gone.value[made.heads[name]][0] == pytest.approx(1, abs=0.1)
    assert np.abs(gone.value[others]).max() < 1e-3
    prefix, copies = (f(made.agent, drawn.tokens, drawn.block, drawn.lead) for f in (prefix_matching, copying))
    at = made.heads["induction"]
    assert prefix[at] == pytest.approx(1, abs=1e-4)
    prefix[at] = 0
    assert prefix.max() < 0.2
    assert copies[at] == 1


def test_scores_are_those_of_plain_passes(model: LanguageModel) -> None:
    drawn = repeated(model, np.random.default_rng(0), block=6, prompts=2)
    found, copies = (f(model, drawn.tokens, drawn.block, drawn.lead) for f in (prefix_matching, copying))
    before = model.model.config._attn_implementation
    model.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            seen = model.model(torch.from_numpy(drawn.tokens), output_attentions=True).attentions
    finally:
        model.model.set_attn_implementation(before)
    late = range(drawn.lead + 6, drawn.lead + 12)
    expected = [torch.stack([a[:, :, i, i - 5] for i in late]).mean((0, 1)).tolist() for a in seen]
    np.testing.assert_allclose(found, expected, atol=2e-3 if model.name.endswith("gemma2") else 1e-5)
    assert ((copies >= 0) & (copies <= 1)).all()
    assert np.ptp(copies) > 0


def test_an_offset_is_counted_once_whatever_the_number_of_blocks() -> None:
    drawn = Repeated(4, 3, 1, np.zeros((1, 13), dtype=int), np.zeros((1, 13), dtype=int))
    value = np.full((1, 1, 8, 13), 100.0)
    for k, j in enumerate(drawn.sources):
        first = 1 + 4 * ((j - 1) // 4 + 1)
        for i in range(first, first + 4):
            value[0, 0, k, i] = i - j
    assert profile(value, drawn).tolist() == [[list(range(1, 8))]]
    over, others = excess(profile(value, drawn), 4)
    assert others[0, 0] == pytest.approx((1 * 1 + 2 * 2 + 5 * 3 + 6 * 2) / 8)
    assert over[0, 0].tolist() == pytest.approx([3 - others[0, 0], 4 - others[0, 0]])


def test_means_have_the_intervals_that_means_have() -> None:
    values = np.random.default_rng(0).normal(2, 1, (400, 3, 2))
    found = means(values, np.random.default_rng(1), resamples=2000)
    assert found.value[:, 0] == pytest.approx(values.mean(0))
    half = (found.high - found.low)[:, 0] / 2
    assert half == pytest.approx(1.96 * values.std(0) / 20, rel=0.1)
    assert (found.band_low <= found.low + 0.01).all()
    assert lost(np.array([1.0, -1.0]), np.zeros((2, 1, 1)), np.random.default_rng(0)) is None


# --- games


def test_the_answering_token_answers_to_what_the_circuit_reads() -> None:
    made = circuit("DFA", 2, decoys=0)
    game, rng = make_game("DFA", states=5, actions_listed=4), np.random.default_rng(0)
    for kind in ("state", "action"):
        for one in transcripts(made.agent.encoder, [game.contrast(rng, kind, steps=10) for _ in range(2)]):
            ways = unit_directions(rng, 1, 2, made.agent.sites.hidden)
            rows = role_rows(one, pushed(made.agent, one, strengths=(1e-2,), directions=ways))
            found = {role: mine.sort("layer")["response"].to_numpy() for (role,), mine in rows.group_by("role")}
            assert {"state", "action", "match", "others"} <= set(found)
            for role, name in (("state", "state"), ("action", "action"), ("match", "match")):
                layer = made.heads[name][0]
                assert np.abs(found[role][:layer]).max(initial=0) < 1e-3
                assert found[role][layer:].min() > 0.1
            assert np.abs(found.get("distractor", np.zeros(1))).max() < 1e-3


def test_a_transcript_is_the_prompt_and_its_roles_are_where_the_pair_says() -> None:
    agent = circuit("DFA", 2, decoys=0).agent
    pair = make_game("DFA", states=5, actions_listed=4).contrast(np.random.default_rng(1), "state", steps=10)
    (one,) = transcripts(agent.encoder, [pair])
    words = [agent.tokenizer.decode([t]) for t in one.tokens]
    assert words[one.roles["match"]] == pair.answers[0]
    assert words[one.roles["distractor"]] == pair.answers[1]
    assert len(one.others) == 16
    assert not {0, len(one.tokens) - 1, *one.roles.values()} & set(one.others)


# --- bad input


def test_bad_pushes(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    agent, tokens = LanguageModel(str(folders["gpt2"]), device="cpu"), prompts(1, 6)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"strengths": (1e-8, 0.1)}, ResponseError, r"\[1e-08, 0.1\] are not possible: .* above 1.2e-07.* float32"),
        ({"strengths": (0.1, 0.01)}, ResponseError, "expected increasing values"),
        ({"strengths": ()}, ResponseError, r"strengths=\[\]"),
        ({"strengths": (float("nan"),)}, ResponseError, "above"),
        ({"positions": [2, 6]}, ResponseError, r"positions=\[6\] are not possible: expected some of 0 to 5"),
        ({"positions": [-1]}, ResponseError, r"positions=\[-1\]"),
        ({"positions": []}, ResponseError, r"positions=\[\]"),
        ({"positions": [1, 1]}, ResponseError, "each once"),
        ({"along": False}, ResponseError, "directions of shape None"),
        (
            {"directions": np.ones((2, 1, 32))},
            ResponseError,
            r"shape \(2, 1, 32\) are not possible: expected 1 prompts",
        ),
        ({"layer": 2}, SiteError, "layer=2 is not possible"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=words):
            responses(agent, tokens, **arguments)
    with pytest.raises(ResponseError, match=r"a prompt has 600 tokens, but .* reads 512"):
        responses(agent, prompts(1, 600))
    half = LanguageModel(str(folders["gpt2"]), device="cpu", dtype="bfloat16")
    with pytest.raises(ResponseError, match=r"above 0.0078.*bfloat16; load the model with dtype=float32"):
        responses(half, tokens)
    with torch.no_grad():
        agent.model.transformer.wte.weight[7] = 0
        agent.model.transformer.wpe.weight[3] = 0
    with pytest.raises(ResponseError, match=r"position 3 has norm 0\.0 at layer 0"):
        responses(agent, np.array([[5, 6, 8, 7, 9]]))


def test_a_model_that_branches_cannot_follow_is_refused(folders: dict[str, Path]) -> None:
    agent = LanguageModel(str(folders["gpt2"]), device="cpu")
    by_row = lambda x: x * torch.arange(1, 1 + len(x))[:, None, None, None]  # noqa: E731 - depends on who else is there
    with (
        agent.hooks(("head", 0, by_row)),
        pytest.raises(ResponseError, match=r"control failed.*after layers 0 to 1"),
    ):
        responses(agent, prompts(1, 8))


def test_bad_blocks(folders: dict[str, Path]) -> None:
    agent, rng = LanguageModel(str(folders["gpt2"]), device="cpu"), np.random.default_rng(0)
    known = len(vocabulary_of(agent))
    assert set(agent.tokenizer.all_special_ids).isdisjoint(vocabulary_of(agent))
    for arguments, words in [
        ({"block": known}, f"needs {2 * known} different tokens, but there are {known}; .* at most {known // 2}"),
        ({"block": 30, "vocabulary": range(5, 35)}, "needs 60 different tokens, but there are 30"),
        ({"block": 2}, "expected at least 3, 2 and 1"),
        ({"repeats": 1}, "repeats=1"),
    ]:
        with pytest.raises(ResponseError, match=words):
            repeated(agent, rng, **arguments)  # type: ignore[arg-type]
    short = replace_context(agent, 20)
    with pytest.raises(ResponseError, match=r"has 25 tokens, but the context of .* is 20; use a block of at most 9"):
        repeated(short, rng, block=12)
    with pytest.raises(ResponseError, match=r"alphabet=\['the cup is in Box A'\] is not possible"):
        vocabulary_of(agent, [" a", "the cup is in Box A"])
    drawn = repeated(agent, rng, block=5, repeats=3, prompts=2)
    assert drawn.tokens.shape == drawn.control.shape == (2, 1 + 15)
    assert (drawn.tokens[:, 1:6] == drawn.tokens[:, 11:]).all()
    assert (drawn.tokens[:, :6] == drawn.control[:, :6]).all()
    assert all(len(set(row)) == 16 for row in drawn.control.tolist())


def replace_context(agent: LanguageModel, tokens: int) -> LanguageModel:
    """The same model, which says that it reads fewer tokens."""
    twin = LanguageModel(agent.name, loaded=(agent.model, agent.tokenizer))
    twin.context = tokens
    return twin


def test_a_response_of_one_kind_has_no_other() -> None:
    with pytest.raises(ResponseError, match="kind='up' is not possible"):
        averaged(replace(made_up(np.ones((3, 1)))), "up")
