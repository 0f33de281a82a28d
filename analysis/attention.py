"""What heads attend to, from chosen tokens alone, without a matrix of all tokens by all tokens; what they copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextstate.agents.forward import instead
from nextstate.agents.language import LanguageModel


class Look(NamedTuple):
    """Tokens of a forward pass: row and token of each, and the columns of its path."""

    rows: list[int]
    tokens: list[int]
    columns: list[list[int]]
    total: int  # columns of the pass, those read before included


Attend = Callable[[int, Float[Tensor, "place head position"]], None]


@contextmanager
def attention_hooks(
    model: LanguageModel, heads: Mapping[int, Sequence[int]], look: Callable[[], Look], attend: Attend
) -> Iterator[None]:
    """Call `attend` in each forward pass with each layer's attention, from the tokens that `look` chooses.

    With sdpa, the weights are computed again from the queries and keys that the model gives its attention function;
    otherwise they are the model's own. A token sees the tokens of its own path and no others, so that
    position p of the weights is the token at position p of its prompt; after a token's own position come zeros.

    Args:
        model: with sdpa attention, or one that returns its weights.
        heads: for each layer, the heads.
        look: chooses the tokens of the pass that goes on.
        attend: gets layer and weights.
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
    with _listening(modules, heads, look, attend) as heard, ExitStack() as stack:
        for module, layer in modules.items():

            def leave(module: nn.Module, _: Any, out: Any, layer: int = layer) -> None:
                if module in heard or not look().rows:
                    return
                weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
                if weights is None or weights.ndim != 4:
                    raise AttentionError(
                        f"layer {layer} of {model.name} gives no attention weights; load it with "
                        "attn_implementation='eager', or record without attention"
                    )
                attend(layer, _gather(look(), lambda row, tokens: weights[row, heads[layer]][:, tokens]))

            stack.callback(module.register_forward_hook(leave).remove)
        yield


class AttentionError(ValueError):
    """A model does not tell what its heads attend to."""


@contextmanager
def _listening(
    modules: Mapping[nn.Module, int], heads: Mapping[int, Sequence[int]], look: Callable[[], Look], attend: Attend
) -> Iterator[set[nn.Module]]:
    """Stand in for the attention function of transformers, and hand everything on to it; yield who has called it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    before, heard = FUNCTIONS["sdpa"], set[nn.Module]()

    def listen(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if module in modules:
            heard.add(module)
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
                    seen = mask[row if len(mask) > 1 else 0][own if mask.shape[1] > 1 else [0]][:, tokens]
                    return found.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else found + seen.float()

                attend(layer, _gather(look(), scores, softmax=True).to(query.dtype))
        return before(module, query, key, value, mask, *args, **kwargs)

    FUNCTIONS["sdpa"] = listen
    try:
        yield heard
    finally:
        FUNCTIONS["sdpa"] = before


def _gather(
    look: Look, of: Callable[[int, list[int]], Float[Tensor, "head token column"]], softmax: bool = False
) -> Float[Tensor, "place head position"]:
    """Order the columns of each token by position; row by row, so that little is in memory at a time.

    A cache of a layer with a window may have let the first columns go; nothing is attended to there.
    """
    parts: dict[int, Tensor] = {}
    wide = max(map(len, look.columns))
    for row in dict.fromkeys(look.rows):
        places = [i for i, r in enumerate(look.rows) if r == row]
        values = of(row, [look.tokens[i] for i in places])
        gone = look.total - values.shape[2]
        own = [[c - gone for c in look.columns[i]] for i in places]
        index = torch.tensor([[max(0, x) for x in c] + [0] * (wide - len(c)) for c in own], device=values.device)
        beyond = torch.tensor([[x < 0 for x in c] + [True] * (wide - len(c)) for c in own], device=values.device)
        found = values.gather(2, index.expand(len(values), *index.shape))
        if softmax:
            found = found.masked_fill(beyond, -torch.inf).softmax(-1)
        parts.update(zip(places, found.masked_fill(beyond, 0).unbind(1), strict=True))
    return torch.stack([parts[i] for i in range(len(look.rows))])


@torch.no_grad()
def prefix_matching(
    model: LanguageModel, tokens: Int[np.ndarray, "prompt token"], block: int, lead: int
) -> Float[np.ndarray, "layer head"]:
    """Return each head's mean attention from a token to what came after the same token one block before.

    Olsson et al. 2022, "In-context Learning and Induction Heads", define the score on a repeated sequence of random
    tokens; 1 is an induction head that looks nowhere else.

    Args:
        model: with sdpa attention, or one that returns its weights.
        tokens: prompts of a repeated block.
        block: tokens in the block.
        lead: tokens before the first block.

    Returns:
        the scores; NaN where a layer has no such head.
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
    """Return how well each head's value at a token raises that token's own logit, by what it adds to the stream.

    The head's value at a token of the first block, as its projection writes it into the stream (where the block norms
    what attention adds, that too), is added to the stream that leaves the last block one block later, at the token
    before the same one. The score is the share of the block's other tokens whose logits rise less than its own:
    1 copies, 1/2 does not care, 0 names anything else. (After the copying score of Olsson et al. 2022; ours is a rank,
    so that heads of any scale compare.)
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
                raise AttentionError(f"layer {layer} of {model.name} keeps {held.shape[2]} of {len(row)} values")
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
    """Return the logits of some tokens that the model reads off a stream that leaves its last block."""
    given = {x.block: (stream,) if x.returns_tuple else stream for x in model.sites.per_layer}
    with instead({block: lambda *_, out=out, **__: out for block, out in given.items()}):
        ids = torch.zeros(stream.shape[:2], dtype=torch.int64, device=stream.device)
        logits = model.forward.plain(ids, range(ids.shape[1]))
    return logits[..., candidates].float()
