"""Models that behave badly, and certificates that have to be renewed: exact all the same, or refused in one line."""

from __future__ import annotations

from tests.plain import agent_of, tokenizer
from tests.zoo import build


def test_float64_models_that_compute_parts_in_float32_are_causal_still() -> None:
    agent = agent_of(build("mpt", len(tokenizer())).double())
    assert agent.forward.require(60, 120) in ("tree", "rows")
