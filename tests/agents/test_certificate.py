"""Models that behave badly, and certificates that have to be renewed: exact all the same, or refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from nextstate.agents.agent import AgentError, ContextError, Prompt
from nextstate.agents.certificate import _Ladder
from nextstate.agents.forward import Forward
from nextstate.agents.intervene import Intervened
from nextstate.agents.intervention import Intervention
from nextstate.agents.language import LanguageModel
from nextstate.analysis.heads.patch import sweep
from tests.exactness import ROADS, Job, lived, measure, noise, replayed, sample, tokens_of, tolerance, truth, truths
from tests.plain import PATHS, Plain, agent_of, made_pairs, tokenizer
from tests.zoo import ENDS, ODD, HiddenWindow, build, build_odd, widen

SHORT = Job("short", "Box", {"boxes": 3}, 2, episodes=2)
LONG = Job("long", "DFA", {"states": 10}, 60, episodes=1)  # beyond 400 tokens
SHAPE: dict[str, Any] = {
    **ENDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip


def llama(made: type[LlamaForCausalLM] = LlamaForCausalLM, **more: Any) -> LanguageModel:
    return agent_of(widen(made(LlamaConfig(vocab_size=len(tokenizer()), **SHAPE | more)), 0))


def roads(agent: LanguageModel) -> dict[str, str]:
    return {"live" if live else "replay": found.road for live, found in agent.forward.certificates.items()}


def exact(agent: LanguageModel, prompts: Sequence[Prompt], road: str = "replay", most: int = 6) -> None:
    """Hold the last question of each episode, and some others, to plain passes."""
    found = ROADS[road](agent, prompts)
    for i in sample(prompts, most):
        known = truth(agent.model, agent.encoder, prompts[i])
        assert found[i].logprobs == pytest.approx(known.logprobs, abs=tolerance(agent.model, known.spread, 0))


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


# --- renewed as the work grows


def test_a_window_beyond_the_first_work_is_kept_when_there_is_more_to_read() -> None:
    config = MistralConfig(vocab_size=len(tokenizer()), **SHAPE, sliding_window=300)
    agent = agent_of(widen(MistralForCausalLM(config), 0))
    depths = []
    for job in (SHORT, LONG, SHORT):
        exact(agent, job.prompts)
        certificate = agent.certificate
        assert certificate is not None
        assert certificate.road == "tree"
        depths.append(certificate.depth)
    assert depths[0] < 300 < max(len(tokens_of(agent.encoder, p)) for p in LONG.prompts) <= depths[1] == depths[2]
    exact(agent, LONG.prompts[::12], "live")


def test_a_hidden_window_is_met_when_the_work_gets_as_wide() -> None:
    agent = llama(HiddenWindow, odd=200)
    exact(agent, SHORT.prompts)
    assert roads(agent) == {"replay": "tree"}
    exact(agent, LONG.prompts)
    assert roads(agent) == {"replay": "fork"}
    certificate = agent.certificate
    assert certificate is not None
    assert certificate.tried["tree"].startswith("off by ")
    exact(agent, SHORT.prompts)  # what was refused once is not tried again
    assert roads(agent) == {"replay": "fork"}


def test_a_session_that_grows_into_another_road_reads_anew() -> None:
    agent, prompts, seen = llama(HiddenWindow, odd=200), LONG.prompts[:40], list[str]()
    session = agent.live()
    for i, prompt in enumerate(prompts):
        (found,) = session.predict([prompt])
        seen.append(roads(agent)["live"])
        if i % 4 == 0 or seen[-2:] == ["tree", "fork"]:
            known = truth(agent.model, agent.encoder, prompt)
            assert found.logprobs == pytest.approx(known.logprobs, abs=1e-4 * known.spread)
    assert list(dict.fromkeys(seen)) == ["tree", "fork"]


def test_the_columns_of_a_sweep_count_too() -> None:
    """Copies stand side by side behind both prompts, far from the tokens that they look back to."""
    agent = llama(HiddenWindow, odd=400, num_key_value_heads=4, num_hidden_layers=4)
    (pair,) = made_pairs(((60, 20),))
    found = sweep(agent, [pair], positions="all", failures="include")
    plain = Plain(agent.model, PATHS["qwen3"])
    values, at = plain.values(pair.clean, "head"), list(range(20, 60))
    for layer, head in np.ndindex(4, 4):
        logits = plain.patched(pair.corrupted, "head", layer, head, at, values["head", layer][at, head])
        expected = float(logits[pair.answer] - logits[pair.other])
        assert found.patched.difference[0, layer, head, 0] == pytest.approx(expected, abs=1e-4), (layer, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_longrope_is_exact_up_to_its_switch_and_refused_beyond(dtype: torch.dtype) -> None:
    """Beyond 128 tokens all positions turn otherwise: what a token says depends on how long the text gets."""
    scaling = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128, "factor": 16.0,
        "short_factor": [1.0] * 8, "long_factor": [float(2 + k) for k in range(8)],
    }  # fmt: skip
    config = Phi3Config(
        vocab_size=len(tokenizer()), **SHAPE, rope_parameters=scaling, original_max_position_embeddings=128
    )
    agent = agent_of(widen(Phi3ForCausalLM(config), 0).to(dtype))
    short = [p for p in LONG.prompts if len(tokens_of(agent.encoder, p)) < 128]
    assert len(short) > 2
    for road in ROADS:
        for prompts in (SHORT.prompts, short[:-1], short):  # each a little deeper, but not beyond
            exact(agent, prompts, road)
        with pytest.raises(AgentError, match=r"refused at \d+ tokens: log-probabilities change by up to") as caught:
            ROADS[road](agent, LONG.prompts)
        one_line(caught.value)
        exact(agent, short, road)
    assert roads(agent) == {"replay": "tree", "live": "tree"}


def test_dynamic_rotation_ends_where_its_context_does() -> None:
    agent = llama(
        max_position_embeddings=160, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    )
    short = [p for p in LONG.prompts if len(tokens_of(agent.encoder, p)) < 155]
    exact(agent, short)
    with pytest.raises(ContextError, match="it reads 160") as caught:
        agent.predict(LONG.prompts)
    assert len(caught.value.prompts) >= len(LONG.prompts) - len(short) - 1


# --- models that are not what they seem


def test_a_model_that_looks_ahead_is_refused_by_how_much() -> None:
    agent = agent_of(build("ernie", len(tokenizer())), "ernie")
    for ask in (replayed, lived):
        with pytest.raises(AgentError, match=r"^ernie is refused: it is not causal.* by up to \d[\d.]* nats") as caught:
            ask(agent, SHORT.prompts)
        one_line(caught.value)
    with pytest.raises(AgentError, match="not causal"):
        sweep(agent, made_pairs(((20, 10),)), failures="include", site="resid_pre")


class LateNaN(LlamaForCausalLM):
    """A Llama that gives no numbers from position 200 on."""

    def forward(self, *args: Any, position_ids: Any = None, **more: Any) -> Any:
        out = super().forward(*args, position_ids=position_ids, **more)
        if position_ids is None or int(position_ids.max()) >= 200:
            out.logits = torch.where(torch.tensor(more["input_ids"].shape[1] > 200), torch.nan, out.logits)
        return out


def test_logits_that_are_no_numbers_are_told() -> None:
    agent = llama()
    with torch.no_grad():
        agent.model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    for ask in (replayed, lived):
        with pytest.raises(AgentError, match="gives logits that are not finite in torch") as caught:
            ask(agent, SHORT.prompts)
        one_line(caught.value)
    late = llama(LateNaN)
    exact(late, SHORT.prompts)
    with pytest.raises(AgentError, match="not finite") as caught:
        late.predict(LONG.prompts)
    one_line(caught.value)
    exact(late, SHORT.prompts)


class Forgetful(LlamaForCausalLM):
    """A Llama that returns a state of the right shape and takes no notice of the one that it is given."""

    def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: Any = None, **more: Any) -> Any:
        more.pop("attention_mask", None)
        out = super().forward(input_ids, past_key_values=DynamicCache(), use_cache=True, **more)
        return out


def test_a_state_that_is_ignored_is_not_relied_on() -> None:
    agent = llama(Forgetful)
    exact(agent, SHORT.prompts, "live")
    assert roads(agent) == {"live": "rows"}
    certificate = agent.certificate
    assert certificate is not None
    assert set(certificate.tried) == {"tree", "fork", "step"}


def test_float64_models_that_compute_parts_in_float32_are_causal_still() -> None:
    assert agent_of(build("mpt", len(tokenizer())).double()).forward.require(60, 120) in ("tree", "rows")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "road"), [("gemma3_text", "tree"), ("gpt_neo", "tree"), ("lfm2", "fork"), ("recurrent_gemma", "rows")]
)
def test_half_precision_takes_the_road_of_float32_and_stays_within_its_noise(
    name: str, road: str, dtype: torch.dtype
) -> None:
    agent = agent_of(build(name, len(tokenizer())).to(dtype), name)
    known, own = truths(agent.model, agent.encoder, SHORT, 8), noise(agent.model, agent.encoder, LONG.prompts)
    for how in ROADS:
        found = measure(agent, SHORT, known, how)
        assert found.error <= tolerance(agent.model, found.spread, own)
    assert roads(agent) == {"replay": road, "live": road}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_roundings_that_choose_other_experts_are_no_reason_to_leave_the_tree(name: str, seed: int) -> None:
    agent = agent_of(build(name, len(tokenizer()), seed=seed).to(torch.bfloat16), name)
    assert agent.forward.require(120, 250) == "tree"
    assert agent.certificate is not None
    assert 0 <= agent.certificate.error <= agent.certificate.tolerance < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mamba2", "canon", "hidden window", "columns"])
def test_half_precision_sees_a_wrong_tree_by_itself(name: str, dtype: torch.dtype) -> None:
    """Without the copy in float32: wrong roads are far off at most nodes, whatever is rounded."""
    for seed in range(3):
        model = build_odd(name, len(tokenizer()), seed) if name in ODD else build(name, len(tokenizer()), seed=seed)
        forward = agent_of(model.to(dtype), name).forward
        with torch.inference_mode(), pytest.raises(AgentError, match=r"is refused: no way .* \(tree: off by"):
            _Ladder(forward, live=False).climb(300, 700, ("tree",))


def test_a_refusal_is_remembered_for_the_attention_that_it_was_met_with(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, measured = agent_of(build("ernie", len(tokenizer()))).forward, list[int]()
    plain = forward.plain
    monkeypatch.setattr(forward, "plain", lambda *args: measured.append(1) or plain(*args))
    for attention, again in (("sdpa", True), ("sdpa", False), ("eager", True)):
        forward.model.set_attn_implementation(attention)
        measured.clear()
        with pytest.raises(AgentError, match="is not causal"):
            forward.require(60, 120)
        assert bool(measured) == again


# --- while it is proved, and while memory runs out


@pytest.mark.parametrize(
    ("name", "road", "rows"), [("lfm2", "fork", 2), ("jamba", "step", 1), ("recurrent_gemma", "rows", 1)]
)
def test_memory_that_runs_out_is_halved(name: str, road: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run, widest = build(name, len(tokenizer())), Forward._pass, list[int]()
    prompts = Job("pairs", "DFA", {"states": 5, "symbols": "pairs"}, 4, 1).prompts
    whole = agent_of(model, name).predict(prompts)

    def narrow(self: Forward, tokens: Any, *args: Any, **more: Any) -> Any:
        out = run(self, tokens, *args, **more)
        widest.append(len(tokens))
        if len(tokens) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return out

    monkeypatch.setattr(Forward, "_pass", narrow)
    agent = agent_of(model, name)
    for ask in (replayed, lived):
        for one, other in zip(ask(agent, prompts), whole, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert one.greedy == other.greedy
    assert set(roads(agent).values()) == {road}
    assert max(widest) > rows
    rows = 0
    with pytest.raises(AgentError, match="runs out of memory") as caught:
        agent.predict(prompts)
    one_line(caught.value)


def test_hooks_do_not_act_while_a_model_is_proved() -> None:
    model, during = build("gemma3_text", len(tokenizer())), list[bool]()
    expected = agent_of(model)
    expected.predict(SHORT.prompts)
    agent = agent_of(model)

    def wreck(x: Any) -> Any:
        during.append(agent.forward.proving)
        return torch.zeros_like(x) + torch.randn(x.shape[-1])

    with agent.hooks(("resid_pre", 2, wreck)):
        agent.predict(SHORT.prompts)
        lived(agent, SHORT.prompts)
    assert during
    assert not any(during)
    assert agent.certificate is not None
    assert expected.certificate is not None
    assert (agent.certificate.road, agent.certificate.error) == ("tree", expected.certificate.error)
    assert roads(agent) == {"replay": "tree", "live": "tree"}
    # A model whose heads are taken out is proved whole, also when it is asked with them gone before anything else.
    first = agent_of(model)
    Intervened(first, Intervention(((1, 1), (3, 0)))).predict(SHORT.prompts)
    assert first.certificate is not None
    assert first.certificate.error == expected.certificate.error
    exact(first, SHORT.prompts)
