"""Strongest, for head patching: resume the base run in the layer that is patched, with all shortcuts.

The base run leaves its residual stream, keys and values in every layer, so nothing below the patched layer runs again,
and no token before the patched one. In the patched layer only the patched token changes, so only that token is
computed; in the last layer only the last token is read, so the others need keys and values alone; a patch in the last
layer before the last token cannot change the answer and is skipped. The heads of a layer, and positions, are rows of a
batch; positions have rows of different lengths, which share all products except those within attention. Of the
vocabulary two rows are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Pairs
from benchmarks.peers.gpt2 import Run, batches, contrast, finish, run, step


@torch.inference_mode()
def differences(model: Any, pairs: Pairs, positions: Sequence[int]) -> Tensor:
    """Return the logit difference after each patch, [pair layer head position]."""
    n, length, layers, heads = *pairs.clean.shape, model.config.n_layer, model.config.n_head
    both = run(model, torch.cat([pairs.corrupted, pairs.clean]))
    base = Run(*([x[:n] for x in part] for part in (both.inputs, both.keys, both.values, both.mixed)))
    plain = contrast(model, base.inputs[-1][:, -1:], pairs.answer, pairs.other)
    out = plain[:, :, None, None].repeat(1, layers, heads, len(positions))
    for layer in range(layers):
        where = positions if layer < layers - 1 else [p for p in positions if p == length - 1]
        for part in batches(where, length, n * heads):
            x = patched(model, base, both.mixed[layer][n:], layer, part)
            for after in range(layer + 1, layers):
                x = step(model, base, after, part, x, last=after == layers - 1)
            last = torch.stack([rows[:, :, -1] for rows in x], 1).flatten(1, 2)
            found = contrast(model, last, pairs.answer, pairs.other).unflatten(1, (len(part), heads))
            out[:, layer, :, [positions.index(p) for p in part]] = found.transpose(1, 2)
    return out


def patched(model: Any, base: Run, source: Tensor, layer: int, positions: Sequence[int]) -> list[Tensor]:
    """Return the stream after the patched layer from each position on, [pair head token hidden]."""
    heads, (n, length, width) = model.config.n_head, source.shape
    own = torch.eye(heads, dtype=torch.bool).repeat_interleave(width // heads, 1)[:, None]  # [head 1 hidden]
    mixed = torch.where(own, source[:, None, positions], base.mixed[layer][:, None, positions])
    x = finish(model.transformer.h[layer], base.inputs[layer][:, None, positions], mixed)
    rest = [base.inputs[layer + 1][:, None, p + 1 :].expand(n, heads, length - p - 1, width) for p in positions]
    return [torch.cat([x[:, :, [i]], later], 2) for i, later in enumerate(rest)]
