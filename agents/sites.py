"""Standard names for the places inside a language model where activations are read and written.

Four sites, the same for all architectures:

- `resid_pre`: the residual stream as it enters a block.
- `head`: the output of each attention head before the output projection, that is, the *input* of the projection, split
  into heads. (The projection's output is a sum over heads and cannot be split.) With grouped queries: query heads.
- `attn_out`, `mlp_out`: what attention and MLP add to the residual stream. If a block normalises their output before
  the addition (Gemma-2), these are the normalised outputs; if it multiplies them (Granite), they are taken before the
  multiplication. In a parallel block (GPT-NeoX) both are computed from `resid_pre`; in others the MLP also reads the
  output of attention. In layers that mix tokens by other means (Mamba, convolution), `attn_out` is the output of those.

Each layer has its own sites: a layer without attention has no heads, and a site that cannot be proved is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextstate.agents.discovery import LayerSites, ModuleMap, SiteError, discover
from nextstate.agents.tracing import given, with_stream

__all__ = ["ATTENTIONS", "SITES", "Activation", "Edit", "LayerSites", "ModuleMap", "Site", "SiteError", "Sites"]

Site = Literal["resid_pre", "head", "attn_out", "mlp_out"]
SITES: tuple[Site, ...] = get_args(Site)
Activation = Float[Tensor, "row token head dim"]  # one head as wide as the model, at all sites but `head`
Edit = Callable[[Activation], Activation | None]  # returns the replacement, or None to leave it unchanged

# Attention functions that take any mask, which is what branches need, by the names that transformers knows them by; and
# how many tensors as large as all attention weights they hold at once.
# For the sake of dense masks `nextstate_flex` counts as SDPA, which reads them.
ATTENTIONS = {"sdpa": 3, "eager": 3, "nextstate_distances": 9, "nextstate_flex": 3, "flex_attention": 3}


@dataclass(frozen=True)
class Sites:
    """The sites of one model, found and proved by `Sites.of`.

    Attributes:
        architecture: the model's type, as its config has it.
        hidden: width of the residual stream.
        per_layer: the sites of each layer.
        names: of the modules, where they were given by hand.
    """

    architecture: str
    hidden: int
    per_layer: tuple[LayerSites, ...] = field(repr=False)
    names: ModuleMap | None = None

    @classmethod
    def of(cls, model: Any, names: ModuleMap | None = None) -> Sites:
        """Find the sites of a causal Hugging Face model, and verify them with a short forward pass.

        Args:
            model: the model.
            names: names of its modules; by default modules are found automatically.

        Raises:
            SiteError: no decoder blocks are found, or a named module does not have the role it is named for.
        """
        per_layer, hidden = discover(model, names)
        return cls(str(model.config.get_text_config().model_type), hidden, per_layer, names)

    @property
    def layers(self) -> int:
        """Return the number of blocks."""
        return len(self.per_layer)

    @property
    def heads(self) -> int:
        """Return the largest number of query heads in a layer; 0 if no layer has heads."""
        return max(layer.heads for layer in self.per_layer)

    @property
    def head_dim(self) -> int:
        """Return the width of the widest head; 0 if there are none."""
        return max(layer.head_dim for layer in self.per_layer)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """Return the decoder blocks."""
        return tuple(layer.block for layer in self.per_layer)

    def layers_with(self, site: Site) -> tuple[int, ...]:
        """Return the layers that have `site`."""
        return tuple(n for n, layer in enumerate(self.per_layer) if _has(layer, site))

    def check(self, site: str, layer: int | None = None, head: int | None = None) -> None:
        """Raise `SiteError` if the model has no such site, layer or head."""
        name = self.architecture
        if site not in SITES:
            raise SiteError(f"site={site!r} is not possible: expected one of {', '.join(SITES)}")
        known = self.layers_with(site)
        what = "heads" if site == "head" else site
        if not known:
            kinds = ", ".join(dict.fromkeys(layer.kind for layer in self.per_layer))
            raise SiteError(f"{name} has no verified {what} in any of its layers (of kind {kinds})")
        if layer is not None and not 0 <= layer < self.layers:
            raise SiteError(f"layer={layer} is not possible: {name} has layers 0 to {self.layers - 1}")
        if layer is not None and layer not in known:
            kind = self.per_layer[layer].kind
            why = f"it is {kind}" if kind != "attention" or site != "head" else "they could not be proved"
            raise SiteError(
                f"layer {layer} of {name} has no {what}: {why}; layers with {what}: {', '.join(map(str, known))}"
            )
        if head is not None and site != "head":
            raise SiteError(f"head={head} is not possible: {site} has no heads; use site='head'")
        heads = self.heads if layer is None else self.per_layer[layer].heads
        if head is not None and not 0 <= head < heads:
            which = name if layer is None else f"layer {layer} of {name}"
            raise SiteError(f"head={head} is not possible: {which} has heads 0 to {heads - 1}")

    def shape(self, site: Site, layer: int | None = None) -> tuple[int, int]:
        """Return the last two axes of an activation: (heads, head_dim) at `head`, else (1, hidden).

        Args:
            site: one of `SITES`.
            layer: from 0; if None, all layers that have the site, which must agree.

        Raises:
            SiteError: there is no such site or layer, or `layer` is None and layers differ.
        """
        self.check(site, layer)
        if site != "head":
            return 1, self.hidden
        shapes = {n: (self.per_layer[n].heads, self.per_layer[n].head_dim) for n in self.layers_with(site)}
        if layer is not None:
            return shapes[layer]
        if len(set(shapes.values())) > 1:
            words = ", ".join(f"layer {n}: {h} heads of {d}" for n, (h, d) in shapes.items())
            raise SiteError(f"the heads of {self.architecture} differ between layers, so give a layer: {words}")
        return next(iter(shapes.values()))

    def hook(self, site: Site, layer: int, edit: Edit) -> ExitStack:
        """Call `edit` with the activation in each forward pass, until the returned context is closed.

        Args:
            site: one of `SITES`.
            layer: from 0.
            edit: takes a `Float[Tensor, "row token head dim"]`; returns its replacement, or None to leave it unchanged.

        Raises:
            SiteError: the model has no such site or layer.
        """
        self.check(site, layer)
        own, stack, axes = self.per_layer[layer], ExitStack(), self.shape(site, layer)
        leading: list[torch.Size] = []  # (row, token) while the block runs

        def edited(x: Tensor) -> Tensor:
            new = edit(x.reshape(*leading[0], *axes))
            return x if new is None else new.reshape(x.shape)

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = given(args, kwargs)
            leading[:] = [] if stream is None else [stream.shape[:2]]

        def end(*_: Any) -> None:
            leading.clear()

        def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stream = given(args, kwargs)
            return with_stream(args, kwargs, edited(stream)) if leading and stream is not None else None

        def leaving(_: nn.Module, __: tuple[Any, ...], out: Any) -> Any:
            if not leading:  # a module that other blocks use too
                return None
            return type(out)((edited(out[0]), *out[1:])) if isinstance(out, tuple | list) else edited(out)

        stack.callback(own.block.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(own.block.register_forward_hook(end).remove)
        before = {"resid_pre": own.block, "head": own.projection}.get(site)
        after = {"attn_out": own.attn_out, "mlp_out": own.mlp_out}.get(site)
        if before is not None:
            stack.callback(before.register_forward_pre_hook(entering, with_kwargs=True).remove)
        if after is not None:
            stack.callback(after.register_forward_hook(leaving).remove)
        return stack


def _has(layer: LayerSites, site: Site) -> bool:
    modules = {"head": layer.projection, "attn_out": layer.attn_out, "mlp_out": layer.mlp_out}
    return site == "resid_pre" or modules.get(site) is not None
