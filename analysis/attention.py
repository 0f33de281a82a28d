"""Attention weights of heads at selected tokens, and the prefix-matching and copying scores of heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from nextstate.agents import flex
from nextstate.agents.forward import instead
from nextstate.agents.language import LanguageModel


class Look(NamedTuple):
    """Selected tokens of a forward pass: the row and index of each, and the columns of its path."""

    rows: list[int]
    tokens: list[int]
    columns: list[list[int]]
    total: int  # columns of the pass, including cached ones


Attend = Callable[[int, Float[Tensor, "place head position"]], None]


@contextmanager
def attention_hooks(
    model: LanguageModel, heads: Mapping[int, Sequence[int]], look: Callable[[], Look], attend: Attend
) -> Iterator[None]:
    """Call `attend` in each forward pass with the attention weights of each layer at the tokens that `look` selects.

    With sdpa, the weights are recomputed from the queries and keys that the model passes to its attention function;
    otherwise they are those that the model returns. A token attends only to the tokens of its own path, so position p
    of the weights is the token at position p of its prompt; positions after the token itself are 0.

    Args:
        model: a model with sdpa attention, or one that returns its weights.
        heads: the heads of each layer.
        look: selects tokens of the current pass.
        attend: called with layer and weights.
    """
    modules: dict[nn.Module, int] = {}
    for layer in heads:
        model.sites.check("head", layer)
        module = model.sites.per_layer[layer].attention
        assert module is not None
        modules[module] = layer
    if not modules:
        yield
        return
    with _intercepted(modules, heads, look, attend) as handled, ExitStack() as stack:
        for module, layer in modules.items():

            def leave(module: nn.Module, _: Any, out: Any, layer: int = layer) -> None:
                if module in handled or not look().rows:
                    return
                weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
                if weights is None or weights.ndim != 4:
                    raise AttentionError(
                        f"layer {layer} of {model.name} returns no attention weights; load it with "
                        "attn_implementation='eager', or record without attention"
                    )
                attend(layer, _gather(look(), lambda row, tokens: weights[row, heads[layer]][:, tokens]))

            stack.callback(module.register_forward_hook(leave).remove)
        yield


class AttentionError(ValueError):
    """The attention weights of a model are not available."""


@contextmanager
def _intercepted(
    modules: Mapping[nn.Module, int], heads: Mapping[int, Sequence[int]], look: Callable[[], Look], attend: Attend
) -> Iterator[set[nn.Module]]:
    """Wrap the attention functions of sdpa and of block masks; yield the set of modules that have called them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    before, handled = {name: FUNCTIONS[name] for name in ("sdpa", flex.ATTENTION)}, set[nn.Module]()

    def intercept(
        attention: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if module in modules:
            handled.add(module)
            if look().rows:
                layer = modules[module]
                own, group = list(heads[layer]), query.shape[1] // key.shape[1]
                scale = kwargs.get("scaling")
                scale = query.shape[-1] ** -0.5 if scale is None else scale

                def scores(row: int, tokens: Sequence[int]) -> Tensor:
                    q = query[row, own][:, tokens].float()
                    k = key[row, [head // group for head in own]].float()
                    found: Tensor = q @ k.transpose(1, 2) * scale
                    if mask is None:
                        return found
                    if isinstance(mask, BlockMask):
                        return found.masked_fill(~flex.seen(mask, row, tokens), -torch.inf)
                    seen = mask[row if len(mask) > 1 else 0][own if mask.shape[1] > 1 else [0]][:, tokens]
                    return found.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else found + seen.float()

                attend(layer, _gather(look(), scores, softmax=True).to(query.dtype))
        return attention(module, query, key, value, mask, *args, **kwargs)

    for name, attention in before.items():
        FUNCTIONS[name] = partial(intercept, attention)
    try:
        yield handled
    finally:
        for name, attention in before.items():
            FUNCTIONS[name] = attention


def _gather(
    look: Look, of: Callable[[int, list[int]], Float[Tensor, "head token column"]], softmax: bool = False
) -> Float[Tensor, "place head position"]:
    """Order the weights of each token by position, one row at a time to save memory.

    The cache of a layer with a sliding window may have dropped the first columns; their weights are 0.
    """
    parts: dict[int, Tensor] = {}
    width = max(map(len, look.columns))
    for row in dict.fromkeys(look.rows):
        places = [i for i, r in enumerate(look.rows) if r == row]
        values = of(row, [look.tokens[i] for i in places])
        gone = look.total - values.shape[2]
        own = [[c - gone for c in look.columns[i]] for i in places]
        index = torch.tensor([[max(0, x) for x in c] + [0] * (width - len(c)) for c in own], device=values.device)
        beyond = torch.tensor([[x < 0 for x in c] + [True] * (width - len(c)) for c in own], device=values.device)
        found = values.gather(2, index.expand(len(values), *index.shape))
        if softmax:
            found = found.masked_fill(beyond, -torch.inf).softmax(-1)
        parts.update(zip(places, found.masked_fill(beyond, 0).unbind(1), strict=True))
    return torch.stack([parts[i] for i in range(len(look.rows))])


@torch.no_grad()
def prefix_matching(
    model: LanguageModel, tokens: Int[np.ndarray, "prompt token"], block: int, lead: int
) -> Float[np.ndarray, "layer head"]:
    """Return each head's mean attention from a token to the token that followed it in the previous block.

    Olsson et al. 2022, "In-context Learning and Induction Heads", define the score on a repeated sequence of random
    tokens; an induction head with no other attention scores 1.

    Args:
        model: a model with sdpa attention, or one that returns its weights.
        tokens: prompts with a repeated block.
        block: number of tokens in the block.
        lead: number of tokens before the first block.

    Returns:
        The scores; NaN where a layer has no such head.
    """
    layers, heads, length = model.sites.layers_with("head"), model.sites.heads, tokens.shape[1]
    asked = list(range(lead + block, length))
    where = torch.tensor(asked) - block + 1
    total = np.full((model.sites.layers, heads), np.nan)
    for layer in layers:
        total[layer, : model.sites.shape("head", layer)[0]] = 0

    def attend(layer: int, weights: Float[Tensor, "place head position"]) -> None:
        matched = weights[torch.arange(len(asked)), :, where.to(weights.device)]
        total[layer, : matched.shape[1]] += matched.float().mean(0).cpu().numpy()

    look = Look([0] * len(asked), asked, [list(range(i + 1)) for i in asked], length)
    every = {layer: list(range(model.sites.shape("head", layer)[0])) for layer in layers}
    with attention_hooks(model, every, lambda: look, attend):
        for row in tokens:
            model.forward.plain(torch.from_numpy(row[None]).to(model.device), [length - 1])
    return total / len(tokens)


@torch.no_grad()
def copying(
    model: LanguageModel, tokens: Int[np.ndarray, "prompt token"], block: int, lead: int
) -> Float[np.ndarray, "layer head"]:
    """Return how strongly each head's value at a token raises the logit of that token.

    The head's value at a token of the first block, after its output projection (and the norm that follows, if any), is
    added to the final residual stream of the second block at the token before the same token. The score is the share of
    the block's other tokens whose logits rise less than that token's own: 1 for copying, 1/2 for no preference, 0 for
    suppression. It is a rank version of the copying score of Olsson et al. 2022, comparable between heads of any scale.
    """
    sites = model.sites
    total = np.full((sites.layers, sites.heads), np.nan)
    for layer in sites.layers_with("head"):
        total[layer, : sites.shape("head", layer)[0]] = 0
    sources, ends = slice(lead, lead + block), slice(lead + block - 1, lead + 2 * block - 1)
    for row in tokens:
        ids, stream = torch.from_numpy(row[None]).to(model.device), list[Tensor]()

        def leave(_: nn.Module, __: Any, out: Any, stream: list[Tensor] = stream) -> None:
            stream.append(out[0] if isinstance(out, tuple) else out)

        hook = sites.blocks[-1].register_forward_hook(leave)
        try:
            cache = model.forward.state(ids, torch.tensor([0]))
        finally:
            hook.remove()
        end, own = stream[0][0, ends], ids[0, sources]
        plain = _decoded(model, end[None], own)
        for layer in sites.layers_with("head"):
            known = sites.per_layer[layer]
            assert known.projection is not None
            held = cache.layers[layer].values
            if held.shape[2] != len(row):
                raise AttentionError(f"layer {layer} of {model.name} caches only {held.shape[2]} of {len(row)} values")
            values = held[0, :, sources].transpose(0, 1)  # [token kv dim]
            values = values.repeat_interleave(known.heads // values.shape[1], 1)
            alone = torch.eye(known.heads, device=ids.device, dtype=values.dtype)[:, None, :, None] * values
            written = known.projection(alone.flatten(2)) - known.projection(torch.zeros_like(alone.flatten(2)[:1, :1]))
            if known.attn_out is not None and known.attn_out is not known.attention:  # a norm follows
                written = known.attn_out(written)
            raised = _decoded(model, end + known.multiplier * written, own) - plain  # [head token candidate]
            mine = raised.diagonal(dim1=1, dim2=2)[..., None]
            share = ((raised < mine).float().sum(-1) / (block - 1)).mean(-1).cpu().numpy()
            total[layer, : known.heads] += share
    return total / len(tokens)


def _decoded(
    model: LanguageModel, stream: Float[Tensor, "row token hidden"], candidates: Int[Tensor, " candidate"]
) -> Float[Tensor, "row token candidate"]:
    """Return the logits of some tokens, computed by the model from the output of its last block."""
    given = {x.block: (stream,) if x.returns_tuple else stream for x in model.sites.per_layer}
    with instead({block: lambda *_, out=out, **__: out for block, out in given.items()}):
        ids = torch.zeros(stream.shape[:2], dtype=torch.int64, device=stream.device)
        logits = model.forward.plain(ids, range(ids.shape[1]))
    return logits[..., candidates].float()
