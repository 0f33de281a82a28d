"""Strongest, for responses: each row is the prompt from the pushed position on, on cached keys and values.

Nothing before the pushed position changes, so a row needs the tokens from there on alone: half of all tokens. The
strengths are rows of a batch, and several positions, whose rows have different lengths, run together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.gpt2 import batches, run, step


@torch.inference_mode()
def responses(model: Any, tokens: Tensor, strengths: Sequence[float]) -> Tensor:
    """Return |x' - x| / (strength * |embedding|), [strength layer position target]; NaN before the position."""
    size, length, layers = torch.tensor(strengths), len(tokens), model.config.n_layer
    base = run(model, tokens[None])
    start = base.inputs[0][0]
    out = torch.full((len(size), layers, length, length), torch.nan)
    for part in batches(range(length), length, len(size)):
        x = []
        for p in part:
            rows = start[p:].repeat(1, len(size), 1, 1)  # [1 strength token hidden]
            rows[0, :, 0] *= 1 + size[:, None]
            x.append(rows)
        for layer in range(layers):
            x = step(model, base, layer, part, x)
            for p, rows in zip(part, x, strict=True):
                moved = (rows[0] - base.inputs[layer + 1][:, p:]).norm(dim=-1)
                out[:, layer, p, p:] = moved / (size * start[p].norm())[:, None]
    return out
