"""Usual, for head patching: record the source run, then one forward pass for each head and position.

The loop of most interpretability code, once with PyTorch's own hooks and once with one nnsight trace for each head.
Both compute the vocabulary at the last token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Pairs


@torch.inference_mode()
def differences(model: Any, pairs: Pairs, layers: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Return logit differences, [pair layer head position]; NaN for layers that are left out."""
    blocks, heads, rows = model.transformer.h, model.config.n_head, torch.arange(len(pairs.clean))
    size = model.config.n_embd // heads
    seen: list[Tensor] = []
    hooks = [b.attn.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for b in blocks]
    model(pairs.clean, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    out = torch.full((len(rows), len(blocks), heads, len(positions)), torch.nan)
    for layer in layers:
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            for column, position in enumerate(positions):

                def write(
                    _: Any, args: tuple[Tensor], layer: int = layer, cut: slice = cut, at: int = position
                ) -> tuple[Tensor]:
                    x = args[0].clone()
                    x[:, at, cut] = seen[layer][:, at, cut]
                    return (x,)

                hook = blocks[layer].attn.c_proj.register_forward_pre_hook(write)
                logits = model(pairs.corrupted, use_cache=False, logits_to_keep=1).logits[:, -1]
                hook.remove()
                out[:, layer, head, column] = logits[rows, pairs.answer] - logits[rows, pairs.other]
    return out


@torch.inference_mode()
def traced_differences(traced: Any, pairs: Pairs, layers: Sequence[int]) -> Tensor:
    """Return those of patches at the last token, [pair layer head 1], by a model that nnsight has wrapped."""
    config, rows = traced.config, torch.arange(len(pairs.clean))
    size = config.n_embd // config.n_head
    with traced.trace(pairs.clean, logits_to_keep=1):
        seen = list().save()
        for block in traced.transformer.h:
            seen.append(block.attn.c_proj.input[:, -1])
    out = torch.full((len(rows), config.n_layer, config.n_head, 1), torch.nan)
    for layer in layers:
        for head in range(config.n_head):
            cut = slice(head * size, (head + 1) * size)
            with traced.trace(pairs.corrupted, logits_to_keep=1):
                traced.transformer.h[layer].attn.c_proj.input[:, -1, cut] = seen[layer][:, cut]
                logits = traced.lm_head.output[:, -1].save()
            out[:, layer, head, 0] = logits[rows, pairs.answer] - logits[rows, pairs.other]
    return out
