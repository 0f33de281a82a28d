"""The script for a GPU runs at small size without one, and what it finds there is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import gpu
from nextstate.agents.agent import Prediction


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_all_parts_run_at_small_size() -> None:
    kept: list[dict[str, Any]] = []
    with torch.compiler.set_stance("force_eager"):
        found = gpu.measure(gpu.plan(small=True, device="cpu", minutes=20), kept.append)
    assert kept[-1] == found
    assert not [name for name, part in found.items() if {"failed", "skipped"} & part.keys()]
    for name, part in found["exactness"].items():
        if name != "part_seconds":
            relative = 0.15 if "bfloat16" in name else 1e-4
            assert part["largest_error_nats"] < relative * part["spread_nats"], name
            assert part["certificate"]["road"] == "tree"
            assert part["warnings"] == []
            assert part["certificate"]["attention"] == ("nextstate_flex" if "flex" in name else "sdpa")
    assert found["precision"]["choice_equal"] > 0.9
    assert found["predict"]["flex"]["flop"] == found["predict"]["sdpa"]["flop"] > 0
    assert 0 < found["predict"]["sdpa"]["share_of_peak"] < 1


def test_parts_begin_only_in_time() -> None:
    found = gpu.measure(gpu.plan(small=True, device="cpu", minutes=-1), lambda _: None)
    assert all(part == {"skipped": "time is over"} for part in found.values())


def test_agreement_counts_questions_and_takes_the_largest_difference() -> None:
    def answer(text: str, choice: int, *logprobs: float) -> Prediction:
        return Prediction(text, choice, choice, choice, choice, logprobs, 3)

    one = [answer("a", 0, -1.0, -2.0), answer("b", 1, -3.0, -1.0), answer("c", 0, -1.0, -1.5), answer("d", 0, -1.0)]
    two = [answer("a", 0, -1.1, -2.0), answer("x", 1, -3.0, -1.0), answer("c", 1, -1.0, -0.75), answer("d", 0, -1.0)]
    assert gpu.agreement(one, two) == {
        "questions": 4, "greedy_equal": 0.75, "choice_equal": 0.75, "largest_difference_nats": 0.75
    }  # fmt: skip


def test_operations_are_those_of_the_trees() -> None:
    """One chain of tokens: two operations for each weight and token, four a width for each pair seen, vocabulary."""
    shape = gpu.Shape("llama", 2, 4, 32, 1536)
    agent = gpu.asked_by(gpu.made(shape, "cpu", torch.float32), "sdpa")
    prompts = gpu.Game("DFA", {"states": 10}, 4, 1, 1).prompts
    flop, tokens = gpu.operations(agent, prompts)
    inside = sum(p.numel() for name, p in agent.model.named_parameters() if "layers" in name or "norm" in name)
    assert flop == 2 * inside * tokens + 4 * 32 * 2 * tokens * (tokens + 1) // 2 + 2 * 32 * 1536 * len(prompts)
