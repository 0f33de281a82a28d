"""Strongest of what needs no knowledge of the model's inside, for responses: the strengths are rows of a batch.

For each position the whole prompt is a row for each strength; a hook pushes the embedding there, others read the stream
after each block. The body of the model runs without the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def responses(model: Any, tokens: Tensor, strengths: Sequence[float]) -> Tensor:
    """Return |x' - x| / (strength * |embedding|), [strength layer position target]; NaN before the position.

    Args:
        model: a GPT-2.
        tokens: of one prompt, [token].
        strengths: how much longer the pushed vector becomes, relative to its length.
    """
    blocks, length = model.transformer.h, len(tokens)
    size, seen = torch.tensor(strengths), list[Tensor]()
    out = torch.full((len(size), len(blocks), length, length), torch.nan)
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(lambda _, __, x: seen.append(x)).remove)
        model.transformer(tokens[None], use_cache=False)
        base, rows = list(seen), tokens.expand(len(size), -1)
        for position in range(length):
            norm: list[Tensor] = []

            def push(
                _: Any, args: tuple[Tensor, ...], at: int = position, norm: list[Tensor] = norm
            ) -> tuple[Tensor, ...]:
                x = args[0].clone()
                norm.append(x[0, at].norm())
                x[:, at] *= 1 + size[:, None]
                return (x, *args[1:])

            seen.clear()
            hook = blocks[0].register_forward_pre_hook(push)
            model.transformer(rows, use_cache=False)
            hook.remove()
            moved = torch.stack([(x - y)[:, position:].norm(dim=-1) for x, y in zip(seen, base, strict=True)], 1)
            out[:, :, position, position:] = moved / (size * norm[0])[:, None, None]
    return out
