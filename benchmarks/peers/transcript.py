"""Strongest, for questions with choices of one token whose answers stay in the transcript: one plain forward pass.

Every prompt is then a prefix of the longest one, and the causal model gives the logits after each prefix in the same
pass. No method can read less than the transcript once, so this is the limit; the vocabulary is computed at the ends
of the prompts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.peers import Answer, Request, answers


@torch.inference_mode()
def score(model: Any, requests: Sequence[Request]) -> list[Answer]:
    """Return the answers to all requests.

    Raises:
        ValueError: a prompt is not a prefix of the longest one, or a choice has several tokens.
    """
    longest = max((r.context for r in requests), key=len)
    for r in requests:
        if longest[: len(r.context)] != r.context or any(len(c) != 1 for c in r.choices):
            raise ValueError("expected prompts that are prefixes of the longest one, and choices of one token")
    ends = torch.tensor([len(r.context) - 1 for r in requests])
    logits = model(torch.tensor([longest]), use_cache=False, logits_to_keep=ends).logits[0]
    return answers(requests, {(i, ()): i for i in range(len(requests))}, logits)
