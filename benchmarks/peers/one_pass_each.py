"""Usual, for questions: every question is a prompt of its own, in left-padded batches of 16 of about equal length.

This is what a script around `model(**tokenizer(prompts))` does. Nothing is shared between the questions of an episode.
Choices of one token are read from one row; a choice of several tokens needs a row for each beginning that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Answer, Request, Tokens, answers

BATCH = 16


@torch.inference_mode()
def score(model: Any, requests: Sequence[Request]) -> list[Answer]:
    """Return the answers to all requests."""
    heads = [(i, c) for i, r in enumerate(requests) for c in dict.fromkeys(c[:-1] for c in r.choices)]
    rows = sorted(((i, head, requests[i].context + head) for i, head in heads), key=lambda row: len(row[2]))
    places: dict[tuple[int, Tokens], int] = {}
    kept: list[Tensor] = []
    for k in range(0, len(rows), BATCH):
        batch = rows[k : k + BATCH]
        width = max(len(tokens) for *_, tokens in batch)
        keep = 1 + max(len(head) for _, head, _ in batch)
        ids = torch.tensor([(0,) * (width - len(tokens)) + tokens for *_, tokens in batch])
        mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for *_, tokens in batch])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
        for (i, head, _), row in zip(batch, logits, strict=True):
            for j in range(len(head) + 1):
                places[i, head[:j]] = len(kept)
                kept.append(row[keep - 1 - len(head) + j])
    return answers(requests, places, torch.stack(kept))
