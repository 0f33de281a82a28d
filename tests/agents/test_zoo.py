"""Every causal architecture of transformers: answers are those of plain forward passes, or the model is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from nextstate.agents.agent import AgentError
from nextstate.agents.identity import BUILT_IN
from nextstate.agents.language import LanguageModel
from tests.exactness import BOX, JOBS, ROADS, TWO_TOKENS, Job, measure, noise, tolerance, truths
from tests.zoo import BOTH_WAYS, FAST, NAMES, ODD, build, build_odd

HALF = ("llama", "gemma3_text", "gpt_neo", "cohere2", "mamba2")
SHORT_BOX = Job("short Box", "Box", {"boxes": 10}, 40, episodes=1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUILT_IN["nextstate/tiny"])


def check(agent: LanguageModel, *jobs: Job, most: int, roads: Sequence[str] = tuple(ROADS)) -> None:
    """Hold an agent to plain forward passes in all jobs."""
    own = noise(agent.model, agent.encoder, TWO_TOKENS.prompts)
    for job in jobs:
        known = truths(agent.model, agent.encoder, job, most)
        for road in roads:
            found = measure(agent, job, known, road)
            bound = tolerance(agent.model, found.spread, own)
            assert found.error <= bound, (job.name, road)
            assert found.greedy == 0, (job.name, road)


def law(name: str, tokenizer: Any, *jobs: Job, most: int) -> None:
    agent = LanguageModel(name, loaded=(build(name, len(tokenizer)), tokenizer))
    if name in BOTH_WAYS:
        with pytest.raises(AgentError, match="not causal"):
            agent.predict(BOX.prompts[:1])
    else:
        check(agent, *jobs, most=most)


@pytest.mark.parametrize("name", FAST)
def test_answers_are_those_of_plain_forward_passes(name: str, tokenizer: Any) -> None:
    law(name, tokenizer, SHORT_BOX, TWO_TOKENS, most=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_so_are_those_of_all_architectures_in_all_jobs(name: str, tokenizer: Any) -> None:
    law(name, tokenizer, *JOBS, most=25)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("odd", ODD)
def test_a_model_that_breaks_the_rules_is_caught(odd: str, seed: int, tokenizer: Any) -> None:
    """It mixes neighbours, has a window that its masks do not know, or takes columns for positions."""
    agent = LanguageModel(odd, loaded=(build_odd(odd, len(tokenizer), seed), tokenizer))
    asked = tuple(ROADS) if seed % 5 == 0 else ("replay",)
    check(agent, SHORT_BOX, most=6, roads=asked)
    roads = [c["road"] for c in agent.describe()["certificates"]]
    assert len(roads) == len(asked)
    assert "tree" not in roads


@pytest.mark.parametrize("name", HALF)
def test_half_precision_takes_the_same_road(name: str, tokenizer: Any) -> None:
    roads = []
    for dtype in (torch.float32, torch.bfloat16):
        agent = LanguageModel(name, loaded=(build(name, len(tokenizer)).to(dtype), tokenizer))
        agent.predict(SHORT_BOX.prompts)
        assert agent.certificate is not None
        roads.append(agent.certificate.road)
    assert roads[0] == roads[1]


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "nemotron_h"])
def test_the_zoo_is_the_same_at_every_visit(name: str, tokenizer: Any) -> None:
    one, two, other = (build(name, len(tokenizer), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
