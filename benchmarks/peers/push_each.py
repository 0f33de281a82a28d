"""Usual, for responses: one forward pass for each position and strength.

Once with PyTorch's own hooks, calling the model as it comes, which also computes the vocabulary; once with one nnsight
trace for each push.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def responses(model: Any, tokens: Tensor, strengths: Sequence[float], positions: Sequence[int]) -> Tensor:
    """Return |x' - x| / (strength * |embedding|), [strength layer position target]; NaN for what is left out."""
    blocks, ids, seen = model.transformer.h, tokens[None], list[Tensor]()
    hooks = [block.register_forward_hook(lambda _, __, x: seen.append(x)) for block in blocks]
    model(ids, use_cache=False)
    base = torch.stack(seen)[:, 0]
    out = torch.full((len(strengths), len(blocks), len(tokens), len(tokens)), torch.nan)
    for position in positions:
        for s, eps in enumerate(strengths):
            norm: list[Tensor] = []

            def push(
                _: Any, args: tuple[Tensor, ...], at: int = position, eps: float = eps, norm: list[Tensor] = norm
            ) -> tuple[Tensor, ...]:
                x = args[0].clone()
                norm.append(x[0, at].norm())
                x[0, at] *= 1 + eps
                return (x, *args[1:])

            seen.clear()
            hook = blocks[0].register_forward_pre_hook(push)
            model(ids, use_cache=False)
            hook.remove()
            moved = (torch.stack(seen)[:, 0] - base).norm(dim=-1) / (eps * norm[0])
            out[s, :, position, position:] = moved[:, position:]
    for hook in hooks:
        hook.remove()
    return out


@torch.inference_mode()
def traced_responses(traced: Any, tokens: Tensor, strengths: Sequence[float], positions: Sequence[int]) -> Tensor:
    """Return the same by a model that nnsight has wrapped."""
    blocks, ids = traced.transformer.h, tokens[None]
    out = torch.full((len(strengths), len(blocks), len(tokens), len(tokens)), torch.nan)
    with traced.trace(ids):
        plain = list().save()
        start = blocks[0].input.save()
        for block in blocks:
            plain.append(block.output)
    base, sizes = torch.stack(list(plain))[:, 0], start[0].norm(dim=-1)
    for position in positions:
        for s, eps in enumerate(strengths):
            with traced.trace(ids):
                blocks[0].input[:, position] *= 1 + eps
                seen = list().save()
                for block in blocks:
                    seen.append(block.output)
            moved = (torch.stack(list(seen))[:, 0] - base).norm(dim=-1) / (eps * sizes[position])
            out[s, :, position, position:] = moved[:, position:]
    return out
