"""Plain forward passes with bare hooks of torch: the truth that patching, ablation and recording are held to.

How each architecture calls its modules is written down here a second time, as paths from the model, so that nothing of
what finds them by structure is trusted. One row a pass, no cache, no masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from nextstate.agents.identity import BUILT_IN
from nextstate.agents.language import LanguageModel
from nextstate.analysis.heads.pairs import TokenPair
from tests.zoo import build

HEADS, WIDTH = 4, 16  # of every attention layer of the zoo


class Paths(NamedTuple):
    """Paths of modules, from the model and from a block."""

    block: str
    projection: str  # what its heads go into
    mixers: tuple[str, ...]  # what gives attention's part of the stream, whichever a block has
    attention: str  # what returns the weights in eager mode


_DECODER = Paths("model.layers.{}", "self_attn.o_proj", ("self_attn",), "self_attn")
_GEMMA = _DECODER._replace(mixers=("post_attention_layernorm",))
PATHS = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "qwen3": _DECODER,
    "phi3": _DECODER,
    "llama4_text": _DECODER,
    "gpt_neo": Paths("transformer.h.{}", "attn.attention.out_proj", ("attn",), "attn.attention"),
    "mpt": Paths("transformer.blocks.{}", "attn.out_proj", ("attn",), "attn"),
    "bloom": Paths("transformer.h.{}", "", ("self_attention.dense",), "self_attention"),
    "bamba": _DECODER._replace(mixers=("mamba", "self_attn")),
    "lfm2": _DECODER._replace(projection="self_attn.out_proj", mixers=("conv", "self_attn")),
    "qwen3_next": _DECODER._replace(mixers=("linear_attn", "self_attn")),
    "jamba": _DECODER._replace(mixers=("mamba", "self_attn")),
    "recurrent_gemma": Paths("model.layers.{}", "temporal_block.o_proj", ("temporal_block",), "temporal_block"),
    "minimax": _DECODER,
}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUILT_IN["nextstate/tiny"])


def agent_of(model: Any, name: str = "model", **more: Any) -> LanguageModel:
    """Return an agent around a model that has been made by hand."""
    return LanguageModel(name, loaded=(model, tokenizer()), **more)


def zoo_agent(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Return an agent of the zoo, the same one each time."""
    return _zoo_agent(name, dtype)


@cache
def _zoo_agent(name: str, dtype: torch.dtype) -> LanguageModel:
    return agent_of(build(name, len(tokenizer())).to(dtype), name)


def made_pairs(shapes: Sequence[tuple[int, int]], seed: int = 0) -> list[TokenPair]:
    """Pairs of random tokens, given by length and first difference; the last token is the same in both prompts.

    Their role "middle" lies two tokens behind the first difference.
    """
    rng, out = np.random.default_rng(seed), []
    for length, first in shapes:
        clean = rng.integers(5, 400, length)
        corrupted = clean.copy()
        corrupted[first:-1] = (clean[first:-1] + rng.integers(1, 100, length - 1 - first)) % 400
        answer, other = rng.choice(400, 2, replace=False).tolist()
        out.append(TokenPair(tuple(clean.tolist()), tuple(corrupted.tolist()), answer, other, {"middle": first + 2}))
    return out


Values = Callable[[Tensor], Tensor | None]  # of [token head width]: what goes on instead, None to only look


class Plain:
    """A model of the zoo, one row a pass, with hooks on modules that are called by their names."""

    def __init__(self, model: Any, paths: Paths) -> None:
        self.model, self.paths = model, paths

    @property
    def layers(self) -> int:
        """Return the number of blocks."""
        return len(self.model.get_submodule(self.paths.block.removesuffix(".{}")))

    def has(self, site: str) -> tuple[int, ...]:
        """Return the layers with a site; heads are where the projection is."""
        every = tuple(range(self.layers))
        if site != "head":
            return every
        names = {name for name, _ in self.model.named_modules()}
        return tuple(n for n in every if self.paths.projection and self._path(self.paths.projection, n) in names)

    def _path(self, inside: str, layer: int) -> str:
        return f"{self.paths.block.format(layer)}.{inside}"

    def module(self, site: str, layer: int) -> Any:
        block = self.model.get_submodule(self.paths.block.format(layer))
        if site == "attn_out":
            return next(m for m in map(dict(block.named_modules()).get, self.paths.mixers) if m is not None)
        inside = {"resid_pre": "", "head": self.paths.projection, "attention": self.paths.attention}[site]
        return block.get_submodule(inside)

    @contextmanager
    def hooked(self, *edits: tuple[str, int, Values]) -> Iterator[None]:
        """Call each edit with [token head width] when its site and layer are reached."""
        with ExitStack() as stack:
            for site, layer, edit in edits:
                stack.callback(self._hook(site, layer, edit).remove)
            yield

    def _hook(self, site: str, layer: int, edit: Values) -> Any:
        def changed(x: Tensor) -> Tensor:
            own = x.reshape(-1, *((HEADS, WIDTH) if site == "head" else (1, x.shape[-1])))
            new = edit(own.clone())
            return x if new is None else new.reshape(x.shape)

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (changed(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

        def after(_: Any, __: Any, out: Any) -> Any:
            return (changed(out[0]), *out[1:]) if isinstance(out, tuple) else changed(out)

        module = self.module(site, layer)
        if site == "attn_out":
            return module.register_forward_hook(after)
        return module.register_forward_pre_hook(before, with_kwargs=True)

    @torch.no_grad()
    def run(self, tokens: Sequence[int], *edits: tuple[str, int, Values]) -> Tensor:
        """Return logits [token vocabulary]."""
        with self.hooked(*edits):
            found: Tensor = self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return found

    def values(self, tokens: Sequence[int], *sites: str) -> dict[tuple[str, int], Tensor]:
        """Return what is at some sites, [token head width], by site and layer."""
        seen: dict[tuple[str, int], Tensor] = {}
        looks = [
            (site, layer, lambda x, key=(site, layer): seen.update({key: x}))  # type: ignore[misc]
            for site in sites
            for layer in self.has(site)
        ]
        self.run(tokens, *looks)
        return seen

    @torch.no_grad()
    def attention(self, tokens: Sequence[int]) -> dict[int, Tensor]:
        """Return the weights [head token token] of each layer, as the model's own modules return them."""
        seen, stack = dict[int, Tensor](), ExitStack()
        with stack:
            for layer in self.has("head"):

                def keep(_: Any, __: Any, out: Any, layer: int = layer) -> None:
                    seen[layer] = out[1][0]

                stack.callback(self.module("attention", layer).register_forward_hook(keep).remove)
            self.model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
        return seen

    def patched(
        self, tokens: Sequence[int], site: str, layer: int, head: int, at: Sequence[int], new: Tensor
    ) -> Tensor:
        """Return the last token's logits with one head at some positions overwritten."""

        def put(x: Tensor) -> Tensor:
            x[list(at), head] = new
            return x

        return self.run(tokens, (site, layer, put))[-1]
