"""Strongest of what needs no knowledge of the model's inside, for heads patched at the last token: a cached prefix.

The keys and values of all tokens but the last are read once and expanded; then every head is a row of one token,
patched by a hook in its layer. The rows run through all layers, also those below the patch.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.peers import Pairs

ROWS = 48  # of a batch: each has a copy of the cache


@torch.inference_mode()
def differences(model: Any, pairs: Pairs) -> Tensor:
    """Return the logit difference after patching each head at the last token, [pair layer head 1]."""
    blocks, heads, n = model.transformer.h, model.config.n_head, len(pairs.clean)
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for block in blocks:
            hook = block.attn.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1]))
            stack.callback(hook.remove)
        model.transformer(pairs.clean, use_cache=False)
    prefix = model.transformer(pairs.corrupted[:, :-1], use_cache=True).past_key_values
    rows = torch.cartesian_prod(torch.arange(n), torch.arange(len(blocks)), torch.arange(heads))
    weight = model.lm_head.weight[pairs.answer] - model.lm_head.weight[pairs.other]
    out = torch.cat([_batch(model, pairs, seen, prefix, weight, part) for part in rows.split(ROWS)])
    return out.view(n, len(blocks), heads, 1)


def _batch(model: Any, pairs: Pairs, seen: list[Tensor], prefix: DynamicCache, weight: Tensor, rows: Tensor) -> Tensor:
    pair, layers, head = rows.T
    size = model.config.n_embd // model.config.n_head
    with ExitStack() as stack:
        for layer, block in enumerate(model.transformer.h):
            mine = (layers == layer).nonzero()[:, 0]

            def write(_: Any, args: tuple[Tensor], mine: Tensor = mine, source: Tensor = seen[layer]) -> tuple[Tensor]:
                x = args[0].clone()
                for row in mine.tolist():
                    cut = slice(int(head[row]) * size, (int(head[row]) + 1) * size)
                    x[row, -1, cut] = source[pair[row], cut]
                return (x,)

            if len(mine):
                stack.callback(block.attn.c_proj.register_forward_pre_hook(write).remove)
        cache = DynamicCache([(layer.keys[pair], layer.values[pair]) for layer in prefix.layers])
        last = model.transformer(pairs.corrupted[pair, -1:], past_key_values=cache, use_cache=True).last_hidden_state
    return (last[:, -1] * weight[pair]).sum(-1)
