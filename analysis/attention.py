"""What heads attend to, from chosen tokens alone, without a matrix of all tokens by all tokens; what they copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from nextstate.agents.language import LanguageModel
from nextstate.analysis.sweep import _instead


class Look(NamedTuple):
    """Tokens of a forward pass: row and token of each, its node in the row's tree, and the columns of its path."""

    rows: list[int]
    tokens: list[int]
    nodes: list[int]
    columns: list[list[int]]


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
    modules = {_attention(model, layer): layer for layer in heads}
    with ExitStack() as stack:
        if model.model.config._attn_implementation != "sdpa":
            for module, layer in modules.items():

                def leave(_: nn.Module, __: Any, out: Any, layer: int = layer) -> None:
                    if look().rows:
                        attend(layer, _gather(look(), lambda row, tokens: out[1][row, heads[layer]][:, tokens]))

                stack.callback(module.register_forward_hook(leave).remove)
        elif modules:
            stack.enter_context(_listening(modules, heads, look, attend))
        yield


def _attention(model: LanguageModel, layer: int) -> nn.Module:
    return model.sites.blocks[layer].get_submodule(model.sites.names.attention)


@contextmanager
def _listening(
    modules: Mapping[nn.Module, int], heads: Mapping[int, Sequence[int]], look: Callable[[], Look], attend: Attend
) -> Iterator[None]:
    """Stand in for the attention function of transformers, and hand everything on to it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    before = FUNCTIONS["sdpa"]

    def listen(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module in modules and look().rows:
            layer = modules[module]
            own, group = list(heads[layer]), query.shape[1] // key.shape[1]
            scale = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale

            def scores(row: int, tokens: Sequence[int]) -> Tensor:
                q = query[row, own][:, tokens].float()
                k = key[row, [head // group for head in own]].float()
                found: Tensor = q @ k.transpose(1, 2) * scale
                return found

            attend(layer, _gather(look(), scores, softmax=True).to(query.dtype))
        return before(module, query, key, *args, **kwargs)

    FUNCTIONS["sdpa"] = listen
    try:
        yield
    finally:
        FUNCTIONS["sdpa"] = before


def _gather(
    look: Look, of: Callable[[int, list[int]], Float[Tensor, "head token column"]], softmax: bool = False
) -> Float[Tensor, "place head position"]:
    """Order the columns of each token by position; row by row, so that little is in memory at a time."""
    parts: dict[int, Tensor] = {}
    wide = max(map(len, look.columns))
    for row in dict.fromkeys(look.rows):
        places = [i for i, r in enumerate(look.rows) if r == row]
        values = of(row, [look.tokens[i] for i in places])
        own = [look.columns[i] for i in places]
        index = torch.tensor([c + [0] * (wide - len(c)) for c in own], device=values.device)
        beyond = torch.tensor([[False] * len(c) + [True] * (wide - len(c)) for c in own], device=values.device)
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
    """
    layers, heads, length = model.sites.layers, model.sites.heads, tokens.shape[1]
    asked = list(range(lead + block, length))
    where = torch.tensor(asked) - block + 1
    total = np.zeros((layers, heads))

    def attend(layer: int, weights: Float[Tensor, "place head position"]) -> None:
        matched = weights[torch.arange(len(asked)), :, where.to(weights.device)]
        total[layer] += matched.float().mean(0).cpu().numpy()

    look = Look([0] * len(asked), asked, asked, [list(range(i + 1)) for i in asked])
    with attention_hooks(model, {layer: list(range(heads)) for layer in range(layers)}, lambda: look, attend):
        for row in tokens:
            model.model(torch.from_numpy(row[None]).to(model.device), use_cache=False, logits_to_keep=1)
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
    sites, projected = model.sites, list[tuple[nn.Module, nn.Module | None]]()
    total = np.zeros((sites.layers, sites.heads))
    sources, ends = slice(lead, lead + block), slice(lead + block - 1, lead + 2 * block - 1)
    for module in sites.blocks:
        projection = module.get_submodule(f"{sites.names.attention}.{sites.names.projection}")
        normed = sites.names.attn_out not in ("", sites.names.attention)
        projected.append((projection, module.get_submodule(sites.names.attn_out) if normed else None))
    for row in tokens:
        ids, cache, stream = torch.from_numpy(row[None]).to(model.device), DynamicCache(), list[Tensor]()

        def leave(_: nn.Module, __: Any, out: Any, stream: list[Tensor] = stream) -> None:
            stream.append(out[0] if isinstance(out, tuple) else out)

        hook = sites.blocks[-1].register_forward_hook(leave)
        try:
            model.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            hook.remove()
        end, own = stream[0][0, ends], ids[0, sources]
        plain = _decoded(model, end[None], own)
        for layer, (projection, after) in enumerate(projected):
            values = cache.layers[layer].values[0, :, sources].transpose(0, 1)  # [token kv dim]
            values = values.repeat_interleave(sites.heads // values.shape[1], 1)
            alone = torch.eye(sites.heads, device=ids.device, dtype=values.dtype)[:, None, :, None] * values
            written = projection(alone.flatten(2)) - projection(torch.zeros_like(alone.flatten(2)[:1, :1]))
            written = written if after is None else after(written)
            raised = _decoded(model, end + written, own) - plain  # [head token candidate]
            mine = raised.diagonal(dim1=1, dim2=2)[..., None]
            total[layer] += ((raised < mine).float().sum(-1) / (block - 1)).mean(-1).cpu().numpy()
    return total / len(tokens)


def _decoded(
    model: LanguageModel, stream: Float[Tensor, "row token hidden"], candidates: Int[Tensor, " candidate"]
) -> Float[Tensor, "row token candidate"]:
    """Return the logits of some tokens that the model reads off a stream that leaves its last block."""
    with _instead({block: lambda *_, **__: stream for block in model.sites.blocks}):
        ids = torch.zeros(stream.shape[:2], dtype=torch.int64, device=stream.device)
        logits: Tensor = model.model(ids, use_cache=False).logits
    return logits[..., candidates].float()
