"""Depth-first intervals, rows of many trees, and block-sparse attention: all equal to ancestry and to plain passes.

FlexAttention runs uncompiled here, which gives the same numbers; a slow test compiles it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Bool
from torch.nn.attention.flex_attention import BlockMask
from transformers import MistralConfig, MistralForCausalLM
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from nextstate.agents import flex
from nextstate.agents.agent import AgentError
from nextstate.agents.branches import Tree, intervals, pack, pack_row
from nextstate.agents.intervene import Intervened
from nextstate.agents.intervention import Intervention
from nextstate.agents.language import LanguageModel
from nextstate.agents.masks import Places
from nextstate.agents.rollout import episodes_of, prompts_of
from nextstate.analysis.attention import Look, attention_hooks
from nextstate.envs.games import make_game
from tests.conftest import build
from tests.exactness import Job, lived, sample, tolerance, truth
from tests.plain import agent_of, tokenizer
from tests.zoo import ENDS, widen

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
JOB = Job("mixed", "TextWorld", {"games": 1, "rooms": 2, "objects": 3, "quest": 2}, 6, episodes=3)
MODELS = ("gpt2", "gpt_neox", "llama", "gemma2", "mistral")


@pytest.fixture(autouse=True)
def _uncompiled(request: pytest.FixtureRequest) -> Iterator[None]:
    compiled = request.node.get_closest_marker("slow") is not None
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        yield


def made(name: str) -> Any:
    if name != "mistral":
        return build(name, len(tokenizer())).eval()
    config = MistralConfig(
        vocab_size=len(tokenizer()), **ENDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, sliding_window=40,
    )  # fmt: skip
    return widen(MistralForCausalLM(config), 0).eval()


def sparse(name: str) -> LanguageModel:
    """A model with block-sparse attention: transformers' own where plain passes are not SDPA's."""
    model = made(name)
    if not flex.use(model):
        model.set_attn_implementation("flex_attention")
    return agent_of(model)


def random_tree(rng: np.random.Generator, pieces: int, most: int = 9) -> tuple[Tree, int]:
    """A tree that grows at its end and at random nodes, and the last node of its longest path."""
    tree, end = Tree(), -1
    for _ in range(pieces):
        end = tree.grow(end, rng.integers(3, 400, rng.integers(1, most)).tolist())
        for _ in range(rng.integers(4)):
            tree.grow(int(rng.integers(len(tree))), rng.integers(3, 400, rng.integers(1, most)).tolist())
    return tree, end


def ancestors(parents: Sequence[int]) -> Bool[np.ndarray, "node node"]:
    """Whether the second node is on the path to the first one, by walking it."""
    out = np.zeros((len(parents), len(parents)), dtype=bool)
    for start in range(len(parents)):
        node = start
        while node >= 0:
            out[start, node] = True
            node = parents[node]
    return out


# --- intervals and packing


def test_intervals_are_ancestry() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        count, chain = int(rng.integers(1, 40)), rng.choice([0.0, 0.5, 0.9, 1.0])
        parents = np.array([i - 1 if rng.random() < chain else rng.integers(-1, i) for i in range(count)])
        enter, leave = intervals(parents)
        found = (enter <= enter[:, None]) & (enter[:, None] < leave)
        assert (found == ancestors(parents.tolist())).all()
        assert sorted(enter) == list(range(count))  # a depth-first order: each number once
        assert (leave - enter == found.sum(0)).all()  # as many numbers as descendants


def test_rows_with_a_cache_see_their_paths() -> None:
    """Half of each tree was read before, in columns that later ones of other trees stand between."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        trees = [random_tree(rng, int(n))[0] for n in rng.integers(1, 6, 3)]
        width = 3 * max(map(len, trees))
        cached = [sorted(rng.choice(width, len(t) // 2, replace=False).tolist()) for t in trees]
        batch = pack(trees, 0, cached, width)
        assert batch.seen is not None
        for row, (tree, columns) in enumerate(zip(trees, cached, strict=True)):
            place = [*columns, *range(width, width + len(tree) - len(columns))]
            expected = np.zeros(batch.seen.shape[1:], dtype=bool)
            known = ancestors(tree.parents)
            for node in range(len(columns), len(tree)):
                expected[node - len(columns), [place[k] for k in np.flatnonzero(known[node])]] = True
            pads = np.arange(len(tree) - len(columns), expected.shape[0])
            expected[pads, width + pads] = True
            assert (batch.seen[row] == expected).all()
            assert batch.depths[row, place].tolist() == tree.depths
            assert [batch.layout.columns(row, tree.path(n)) for n in range(len(tree))] == [
                [place[k] for k in tree.path(n)] for n in range(len(tree))
            ]


def test_one_row_of_trees_has_no_padding_between_them_and_spines_first() -> None:
    rng = np.random.default_rng(2)
    trees, spines = zip(*(random_tree(rng, int(n)) for n in rng.integers(1, 9, 5)), strict=True)
    count = sum(map(len, trees))
    row = pack_row(trees, spines, pad=7, length=count + 10)
    assert sorted(row.columns) == list(range(count))
    seen = (row.enter <= row.enter[:, None]) & (row.enter[:, None] < row.leave)
    expected = np.eye(count + 10, dtype=bool)
    for begin, tree, spine in zip(row.begins, trees, spines, strict=True):
        own = row.columns[begin : begin + len(tree)]
        assert sorted(own) == list(range(begin, begin + len(tree)))
        assert own[tree.path(spine)].tolist() == list(range(begin, begin + tree.depths[spine] + 1))
        assert row.tokens[own].tolist() == tree.tokens
        assert row.depths[own].tolist() == tree.depths
        expected[np.ix_(own, own)] = ancestors(tree.parents)
    assert (seen == expected).all()
    assert (row.tokens[count:] == 7).all()


def test_lengths_are_few_and_close() -> None:
    lengths = [flex.length_of(n) for n in range(1, 1 << 17)]
    assert all(n % flex.BLOCK == 0 for n in lengths)
    assert all(0 <= n - k < max(flex.BLOCK, k / 16) for k, n in enumerate(lengths, 1))
    assert len(set(lengths)) < 150


# --- block masks


def dense(mask: BlockMask) -> torch.Tensor:
    """What FlexAttention sees: all of full blocks, what the function allows in partial ones, nothing of the others."""
    rows, _, length, _ = mask.shape
    row, q, k = (torch.arange(n) for n in (rows, length, length))
    allowed = mask.mask_mod(row[:, None, None], torch.tensor(0), q[:, None], k).expand(rows, length, length)
    out = torch.zeros(rows, length, length, dtype=torch.bool)
    for full, number, which in (
        (False, mask.kv_num_blocks, mask.kv_indices),
        (True, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert number is not None
        assert which is not None
        for r, block in np.ndindex(rows, number.shape[-1]):
            for other in which[r, 0, block, : number[r, 0, block]].tolist():
                at = np.s_[
                    r, block * flex.BLOCK : (block + 1) * flex.BLOCK, other * flex.BLOCK : (other + 1) * flex.BLOCK
                ]
                assert not out[at].any()  # no block twice
                out[at] = True if full else allowed[at]
    return out


@pytest.mark.parametrize("window", [None, 5, 100])
def test_a_block_mask_of_intervals_is_the_dense_mask(window: int | None) -> None:
    rng = np.random.default_rng(3)
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    skipped = full = 0
    for pieces, most, count, shared in ((3, 9, 2, False), (40, 9, 1, False), (4, 150, 4, False), (60, 9, 1, True)):
        rows = []
        for _ in range(count):
            trees, spines = zip(*(random_tree(rng, pieces, most) for _ in range(3)), strict=True)
            rows.append(pack_row(trees, spines, length=1500))
        enter, leave, depths = (
            torch.from_numpy(np.stack([getattr(row, name)[:1500] for row in rows]))  # the last block is not whole
            for name in ("enter", "leave", "depths")
        )
        mask = flex.block_mask(enter, leave, depths, mask_function=function, batch_size=2 if shared else None)
        places = Places.of_intervals(enter, leave, depths)
        expected = places.seen
        if window is not None:
            expected = expected & (depths[:, :, None] - depths[:, None] < window)
        assert (dense(mask) == expected).all()
        blocks = -(-enter.shape[1] // flex.BLOCK)
        skipped += int((blocks - mask.kv_num_blocks - mask.full_kv_num_blocks).sum())  # type: ignore[operator]
        full += int(mask.full_kv_num_blocks.sum())  # type: ignore[union-attr]
    assert skipped > 0
    assert (full > 0) == (window is None)


# --- models


@pytest.mark.parametrize("name", MODELS)
def test_block_sparse_answers_equal_plain_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, usual, shapes = sparse(name), agent_of(made(name)), list[tuple[int, ...]]()
    in_tree = agent.forward.in_tree

    def spied(tokens: Any, *args: Any) -> Any:
        shapes.append(tuple(tokens.shape))
        return in_tree(tokens, *args)

    monkeypatch.setattr(agent.forward, "in_tree", spied)
    found, other = agent.predict(JOB.prompts), usual.predict(JOB.prompts)
    assert agent.certificate is not None
    assert agent.certificate.road == "tree"
    assert agent.certificate.attention[0] in flex.NAMES
    assert shapes[-1][0] == 1  # three episodes of unlike lengths
    for one, two in zip(found, other, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
        assert one.greedy == two.greedy
    for i in sample(JOB.prompts, 6):
        known = truth(usual.model, usual.encoder, JOB.prompts[i])
        assert found[i].logprobs == pytest.approx(known.logprobs, abs=tolerance(agent.model, known.spread, 0))
    for one, two in zip(lived(agent, JOB.prompts), found, strict=True):  # with a cache, by a dense mask
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_hooks_see_the_same_and_change_the_same(name: str) -> None:
    seen: list[dict[tuple[int, int, int], torch.Tensor]] = []
    agents = (sparse(name), agent_of(made(name)))
    for agent in agents:
        own: dict[tuple[int, int, int], torch.Tensor] = {}

        def look(layer: int, x: torch.Tensor, agent: LanguageModel = agent, own: Any = own) -> None:
            for row, (tree, nodes) in enumerate(zip(agent.reading.now.trees, agent.reading.now.nodes, strict=True)):
                own.update({(layer, tree, int(n)): x[row, k].clone() for k, n in enumerate(nodes) if n >= 0})

        with agent.hooks(*(("head", layer, partial(look, layer)) for layer in range(2))):
            agent.predict(JOB.prompts)
        seen.append(own)
    assert agents[0].certificate is not None
    assert agents[0].certificate.attention == (flex.ATTENTION,)
    assert seen[0].keys() == seen[1].keys()
    for key, value in seen[0].items():
        torch.testing.assert_close(value, seen[1][key], atol=1e-4, rtol=1e-4)
    without = [Intervened(agent, Intervention(((0, 1), (1, 2)), "zero")).predict(JOB.prompts) for agent in agents]
    whole = agents[0].predict(JOB.prompts)
    for one, two in zip(*without, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
    assert any(abs(a.logprobs[0] - b.logprobs[0]) > 1e-3 for a, b in zip(without[0], whole, strict=True))


def test_attention_weights_are_read_under_block_masks() -> None:
    found: list[list[torch.Tensor]] = []
    for agent in (sparse("mistral"), agent_of(made("mistral"))):
        agent.predict(JOB.prompts)
        own: list[torch.Tensor] = []

        def look(agent: LanguageModel = agent) -> Look:
            reading = agent.reading
            rows, tokens = reading.answering
            paths = [reading.rows[r].tree.path(int(reading.now.nodes[r, k])) for r, k in zip(rows, tokens, strict=True)]
            columns = [reading.now.columns(r, path) for r, path in zip(rows, paths, strict=True)]
            return Look(rows, tokens, columns, reading.now.total)

        def attend(layer: int, weights: torch.Tensor, own: list[torch.Tensor] = own) -> None:
            own.append(weights)

        with agent.hooks(), attention_hooks(agent, {0: [0, 3], 1: [2]}, look, attend):
            agent.predict(JOB.prompts)
        found.append(own)
    assert len(found[0]) == len(found[1]) == 2
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:-1]))


def test_chains_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = sparse("llama")
    prompts = [p for e in episodes_of(make_game("DFA", states=4), range(3), 5) for p in prompts_of(e)]
    agent.predict(prompts)
    monkeypatch.setattr(agent.forward, "in_tree", lambda *_: pytest.fail("a mask was made"))
    for one, two in zip(agent.predict(prompts), agent_of(made("llama")).predict(prompts), strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)


def test_a_kernel_that_fails_is_said_once_and_sdpa_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("NoValidChoicesError: no kernel fits\nand much more")

    monkeypatch.setattr(flex, "flex_attention_forward", broken)
    check_fallback(sparse("llama"), "llama", "RuntimeError: NoValidChoicesError: no kernel fits")


def test_a_kernel_that_is_wrong_is_said_once_and_sdpa_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flex.flex_attention_forward

    def leaking(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        mask.mask_mod = lambda row, head, q, k: k <= q
        return right(module, query, key, value, mask, **given)

    monkeypatch.setattr(flex, "flex_attention_forward", leaking)
    check_fallback(sparse("llama"), "llama", "off by .*: tokens of other branches leak into a path")


def check_fallback(agent: LanguageModel, name: str, why: str) -> None:
    for _ in range(2):
        found = agent.predict(JOB.prompts)
    for one, two in zip(found, agent_of(made(name)).predict(JOB.prompts), strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
    assert agent.certificate is not None
    assert agent.certificate.attention == ("sdpa",)
    (said,) = agent.warnings()
    assert re.fullmatch(f"model is run without FlexAttention, by sdpa: {why}", said)


def test_memory_that_runs_out_halves_the_batch_and_the_kernel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = sparse("llama")
    prompts = [p for e in episodes_of(make_game("Box", boxes=6), range(6), 10) for p in prompts_of(e)]
    before, most = agent.predict(prompts), 512
    sizes = [len(t.tree) for t in agent.add_question(prompts)[0].values()]
    assert 2 * max(sizes) < most < sum(sizes)
    right, refused = flex.flex_attention_forward, list[int]()

    def narrow(module: Any, query: Any, *args: Any, **given: Any) -> Any:
        if query.shape[2] > most:
            refused.append(query.shape[2])
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return right(module, query, *args, **given)

    monkeypatch.setattr(flex, "flex_attention_forward", narrow)
    for one, two in zip(agent.predict(prompts), before, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
    assert refused
    assert agent.batch_size < len(sizes)
    assert agent.warnings() == ()
    agent.forward.certificates.clear()  # where the proof of a whole row does not fit, rows are halved
    agent.batch_size, agent.batch_tokens = 64, 8192
    for one, two in zip(agent.predict(prompts), before, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
    assert agent.batch_tokens < sum(sizes)
    assert agent.warnings() == ()


def test_a_batch_is_read_when_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a GPU always has work; the answers are the same, and a batch without numbers is refused all the same."""
    agent, events = agent_of(made("llama"), batch_size=1), list[str]()
    scores = agent.forward.scores

    def spied(*args: Any) -> Any:
        number, read = len([e for e in events if "run" in e]), scores(*args)
        events.append(f"run {number}")

        def reading() -> Any:
            events.append(f"read {number}")
            return read()

        return reading

    whole = agent_of(made("llama")).predict(JOB.prompts)
    monkeypatch.setattr(agent.forward, "scores", spied)
    for one, two in zip(agent.predict(JOB.prompts), whole, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
    assert events == ["run 0", "run 1", "read 0", "run 2", "read 1", "read 2"]
    events.clear()
    with agent.hooks(("resid_pre", 0, lambda _: None), done=lambda _: events.append("done")):
        agent.predict(JOB.prompts)
    assert events == [word for n in range(3) for word in (f"run {n}", f"read {n}", "done")]
    agent.model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(AgentError, match="not finite"):
        agent.predict(JOB.prompts)


def test_batches_count_tokens_without_padding_where_trees_share_a_row() -> None:
    agents = [sparse("llama"), agent_of(made("llama"))]
    trunks, _ = agents[0].add_question(JOB.prompts)
    sizes = sorted((len(t.tree) for t in trunks.values()), reverse=True)
    assert sizes[0] + sizes[1] + sizes[2] < 3 * sizes[0]
    found = []
    for agent in agents:
        agent.batch_tokens = sum(sizes)
        found.append([len(batch) for batch in agent._batches(trunks, "tree")])
    assert found[0] == [3]
    assert found[1] != [3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiled_kernels_give_the_same(name: str) -> None:
    agent, usual = sparse(name), agent_of(made(name))
    for n in (1, 3, 9):
        prompts = [p for e in episodes_of(make_game("Box", boxes=6), range(n), 6) for p in prompts_of(e)]
        for one, two in zip(agent.predict(prompts), usual.predict(prompts), strict=True):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
    assert agent.warnings() == ()
    assert agent.certificate is not None
    assert agent.certificate.attention == (flex.ATTENTION,)
