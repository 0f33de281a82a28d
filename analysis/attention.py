"""What heads attend to, from chosen tokens alone: exact, and without a matrix of all tokens by all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextstate.agents.language import LanguageModel


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
    with eager attention they are the model's own. A token sees the tokens of its own path and no others, so that
    position p of the weights is the token at position p of its prompt; after a token's own position come zeros.

    Args:
        model: with sdpa or eager attention.
        heads: for each layer, the heads.
        look: chooses the tokens of the pass that goes on.
        attend: gets layer and weights.
    """
    modules = {_attention(model, layer): layer for layer in heads}
    with ExitStack() as stack:
        if model.model.config._attn_implementation == "eager":
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
