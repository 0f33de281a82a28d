"""GPT-2 by hand, for programs that run some layers, for some tokens, on cached keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

TOKENS = 512  # in a batch: what one layer makes of them fits into the cache of a core


@dataclass(frozen=True)
class Run:
    """What one causal pass over whole prompts leaves, by layer."""

    inputs: list[Tensor]  # residual stream before each block, and after the last, [row token hidden]
    keys: list[Tensor]  # [row head token dim]
    values: list[Tensor]
    mixed: list[Tensor]  # what the heads hand to the output projection, [row token hidden]


def project(block: Any, x: Tensor, first: int = 0) -> list[Tensor]:
    """Return queries, keys and values of tokens, each [... hidden]; with `first` = 1 keys and values alone."""
    attention, width = block.attn.c_attn, x.shape[-1]
    weight, bias = attention.weight[:, first * width :], attention.bias[first * width :]
    return list(torch.addmm(bias, block.ln_1(x).flatten(0, -2), weight).view(*x.shape[:-1], -1).split(width, -1))


def by_head(x: Tensor, heads: int) -> Tensor:
    """Return [row token hidden] as [row head token dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def finish(block: Any, x: Tensor, mixed: Tensor) -> Tensor:
    """Return the residual stream after a block, given what its heads hand on."""
    x = x + block.attn.c_proj(mixed)
    return x + block.mlp(block.ln_2(x))  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    """Return attention of rows that share the tokens before them.

    The shared keys and values are not copied for each row: all queries of a prompt meet them in one product.

    Args:
        q: queries of the last tokens of each row, [prompt row head query dim].
        k: keys of each row's own tokens, [prompt row head token dim].
        v: their values.
        past_k: keys of the tokens before, [prompt head past dim].
        past_v: their values.

    Returns:
        What the heads hand on, [prompt row query hidden].
    """
    prompts, rows, heads, queries, dim = q.shape
    tokens, past = k.shape[-2], past_k.shape[-2]
    q = q * dim**-0.5
    own = q @ k.transpose(-1, -2)  # [prompt row head query token]
    if queries > 1:
        own = own.masked_fill(torch.ones(queries, tokens, dtype=torch.bool).triu(1 + tokens - queries), -torch.inf)
    together = q.transpose(1, 2).reshape(prompts, heads, rows * queries, dim)
    before = (together @ past_k.transpose(-1, -2)).view(prompts, heads, rows, queries, past).transpose(1, 2)
    weights = torch.cat([before, own], -1).softmax(-1)
    flat = weights[..., :past].transpose(1, 2).reshape(prompts, heads, rows * queries, past)
    out = (flat @ past_v).view(prompts, heads, rows, queries, dim).transpose(1, 2) + weights[..., past:] @ v
    return out.transpose(2, 3).flatten(-2)


@torch.inference_mode()
def run(model: Any, tokens: Tensor) -> Run:
    """Read whole prompts, [row token], and keep everything that passes between the parts of the blocks."""
    body, heads = model.transformer, model.config.n_head
    x = body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1]))
    out = Run([x], [], [], [])
    for block in body.h:
        q, k, v = (by_head(part, heads) for part in project(block, x))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = finish(block, x, mixed)
        out.keys.append(k)
        out.values.append(v)
        out.mixed.append(mixed)
        out.inputs.append(x)
    return out


def step(
    model: Any, base: Run, layer: int, positions: Sequence[int], x: Sequence[Tensor], last: bool = False
) -> list[Tensor]:
    """Run one layer for rows that begin at different positions; what is not attention is one product for all.

    Args:
        model: the language model.
        base: keys and values of the tokens before.
        layer: the layer to run.
        positions: where the rows of each part begin.
        x: for each position the residual stream before the layer, [prompt row token hidden].
        last: return the last token of each row alone; the others get keys and values only.
    """
    block, heads = model.transformer.h[layer], model.config.n_head
    sizes = [rows[..., 0].numel() for rows in x]
    together = torch.cat([rows.flatten(0, 2) for rows in x])
    if last:
        k, v = project(block, together, first=1)
        x = [rows[:, :, -1:] for rows in x]
        together = torch.cat([rows.flatten(0, 2) for rows in x])
        q = project(block, together)[0]
    else:
        q, k, v = project(block, together)
    ends = [rows[..., 0].numel() for rows in x]
    mixed = []
    for p, rows, *parts in zip(positions, x, q.split(ends), k.split(sizes), v.split(sizes), strict=True):
        shape = rows.shape[:2]
        own = [by_head(part.view(shape.numel(), -1, part.shape[-1]), heads).unflatten(0, shape) for part in parts]
        past = (base.keys[layer][:, :, :p], base.values[layer][:, :, :p])
        mixed.append(attend(own[0], own[1], own[2], *past).flatten(0, 2))
    out = finish(block, together, torch.cat(mixed))
    return [part.view(rows.shape) for part, rows in zip(out.split(ends), x, strict=True)]


def batches(positions: Sequence[int], length: int, rows: int) -> Iterator[list[int]]:
    """Yield positions whose rows, each from its position to the end, run together: about `TOKENS` tokens."""
    batch: list[int] = []
    for p in positions:
        if batch and rows * sum(length - b for b in [*batch, p]) > TOKENS:
            yield batch
            batch = []
        batch.append(p)
    if batch:
        yield batch


def contrast(model: Any, x: Tensor, answer: Tensor, other: Tensor) -> Tensor:
    """Return logit differences, [prompt row], of final streams, [prompt row hidden]: two rows of the vocabulary."""
    weight = model.lm_head.weight
    return (model.transformer.ln_f(x) * (weight[answer] - weight[other])[:, None]).sum(-1)
