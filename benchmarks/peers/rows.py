"""Strongest, for questions with branches: the longest prompt is read once, everything else in rows of a batch.

What a prompt, or the beginning of a choice, does not share with the longest prompt is a row that goes on from the
cached keys and values, which are expanded for the batch. Rows are sorted by where they begin, so that each batch has a
cache of about the length that it needs. A row that begins another one is left out. The vocabulary is computed once, at
the wanted tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.peers import Answer, Request, Tokens, answers

BATCH = 16


def common(one: Tokens, two: Tokens) -> int:
    """Return the number of tokens that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


@torch.inference_mode()
def score(model: Any, requests: Sequence[Request]) -> list[Answer]:
    """Return the answers to all requests."""
    trunk = max((r.context for r in requests), key=len)
    first = model.transformer(torch.tensor([trunk]), use_cache=True)
    starts = [common(r.context, trunk) for r in requests]
    wanted = [
        (i, head[:j], (starts[i], r.context[starts[i] :] + head[:j]))
        for i, r in enumerate(requests)
        for head in dict.fromkeys(c[:-1] for c in r.choices)
        for j in range(len(head) + 1)
    ]
    ends = sorted({(start, rest) for *_, (start, rest) in wanted if rest})
    leaves = [a for a, b in pairwise([*ends, (-1, ())]) if a[0] != b[0] or b[1][: len(a[1])] != a[1]]
    found: dict[tuple[int, Tokens], Tensor] = {}
    for k in range(0, len(leaves), BATCH):
        batch = leaves[k : k + BATCH]
        past, width = batch[-1][0], max(len(rest) for _, rest in batch)
        mask = torch.zeros(len(batch), past + width, dtype=torch.int64)
        ids, positions = torch.zeros(2, len(batch), width, dtype=torch.int64)
        for row, (start, rest) in enumerate(batch):
            mask[row, :start] = mask[row, past : past + len(rest)] = 1
            ids[row, : len(rest)] = torch.tensor(rest)
            positions[row] = torch.arange(start, start + width).clamp(max=start + len(rest) - 1)
        cache = DynamicCache(
            [tuple(x[:, :, :past].expand(len(batch), -1, -1, -1) for x in (layer.keys, layer.values))
             for layer in first.past_key_values.layers]
        )  # fmt: skip
        out = model.transformer(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        for row, (start, rest) in enumerate(batch):
            for j in range(len(rest)):
                found[start, rest[: j + 1]] = out[row, j]
    places = {(i, head): k for k, (i, head, _) in enumerate(wanted)}
    rows = [found[end] if end[1] else first.last_hidden_state[0, end[0] - 1] for *_, end in wanted]
    return answers(requests, places, model.lm_head(torch.stack(rows)))
