"""Standard names for the places inside a language model where activations are read and written.

Four sites, the same for all architectures:

- `resid_pre`: the residual stream as it enters a block.
- `head`: what each attention head hands to the output projection, so the *input* of that projection, cut into heads.
  (The projection's output is a sum over heads; slicing it gives nothing.) With grouped queries these are query heads.
- `attn_out`, `mlp_out`: what attention and MLP add to the residual stream. Where a block normalises their output before
  adding it (Gemma-2), these are the normalised outputs. In a parallel block (GPT-NeoX) both are computed from
  `resid_pre`; elsewhere the MLP also reads what attention has added.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

Site = Literal["resid_pre", "head", "attn_out", "mlp_out"]
SITES: tuple[Site, ...] = get_args(Site)
Activation = Float[Tensor, "row token head dim"]  # one head as wide as the model, at all sites but `head`
Edit = Callable[[Activation], Activation | None]  # returns what goes on instead, or None to leave it as it is

# Attention functions that take any mask, which is what branches need, by the names that transformers knows them by; and
# how many tensors as large as all attention weights they hold at once.
ATTENTIONS = {"sdpa": 3, "eager": 3, "nextstate_distances": 9}
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class SiteError(ValueError):
    """A model has no such site, layer or head, or its modules are not what their names say."""


@dataclass(frozen=True)
class Names:
    """How an architecture calls its modules.

    Args:
        blocks: the list of decoder blocks, by its path in the model.
        attention: the attention module, by its path in a block.
        projection: attention's output projection, by its path in the attention module.
        mlp: the MLP, or its last layer, by its path in a block; "" where there is none.
        attn_out: path in a block of the module whose output is added to the residual stream; attention by default.
        mlp_out: likewise; the MLP by default.
        adds: each block's output is `resid_pre + attn_out + mlp_out` (not so where a norm follows the addition).
    """

    blocks: str
    attention: str
    projection: str
    mlp: str
    attn_out: str = ""
    mlp_out: str = ""
    adds: bool = True


_LLAMA = Names("model.layers", "self_attn", "o_proj", "mlp")
KNOWN = {
    "gpt2": Names("transformer.h", "attn", "c_proj", "mlp"),
    "nextstate_distances": Names("transformer.h", "attn", "c_proj", "mlp"),
    "gpt_neox": Names("gpt_neox.layers", "attention", "dense", "mlp"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": replace(_LLAMA, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm"),
    "opt": Names("model.decoder.layers", "self_attn", "out_proj", "fc2"),
}


@dataclass(frozen=True)
class Sites:
    """The sites of one model, found by `Sites.of` and checked against a forward pass."""

    names: Names
    architecture: str
    layers: int
    heads: int  # query heads
    head_dim: int
    hidden: int
    blocks: tuple[nn.Module, ...] = field(repr=False, compare=False)

    @classmethod
    def of(cls, model: Any, names: Names | None = None) -> Sites:
        """Find the sites of a causal Hugging Face model.

        Args:
            model: the model itself.
            names: of its modules; needed where its architecture is not one of `KNOWN`.

        Raises:
            SiteError: the architecture is not known, a name leads nowhere, or a check fails: shapes; that attention's
                output is the projection's, which is the sum of what its heads contribute; that each block adds
                `attn_out` and `mlp_out` to the residual stream.
        """
        config = model.config.get_text_config()
        kind = str(config.model_type)
        if names is None:
            if kind not in KNOWN:
                raise SiteError(
                    f"architecture {kind!r} ({type(model).__name__}) is not known; expected one of "
                    f"{', '.join(sorted(KNOWN))}. Name its modules: agent.sites = Sites.of(agent.model, "
                    'Names(blocks="model.layers", attention="self_attn", projection="o_proj", mlp="mlp"))'
                )
            names = KNOWN[kind]
            if kind == "opt" and not config.do_layer_norm_before:
                names = replace(names, adds=False)
        blocks = tuple(_find(model, names.blocks).children())
        if not blocks:
            raise SiteError(f"{names.blocks!r} of {type(model).__name__} has no blocks in it")
        heads, width = int(config.num_attention_heads), _width(_find(blocks[0], names.attention, names.projection))
        own = getattr(_find(blocks[0], names.attention), "head_dim", width // heads)
        if width % heads or own != width // heads:
            raise SiteError(
                f"{names.projection!r} of {kind} reads {width} numbers, not {heads} heads of {own}; "
                "expected the projection that follows the heads, once they are side by side"
            )
        found = cls(names, kind, len(blocks), heads, width // heads, int(config.hidden_size), blocks)
        found._verify(model)
        return found

    def check(self, site: str, layer: int | None = None, head: int | None = None) -> None:
        """Raise `SiteError` where the model has no such site, layer or head."""
        if site not in SITES:
            raise SiteError(f"site={site!r} is not possible: expected one of {', '.join(SITES)}")
        if site == "mlp_out" and not self.names.mlp:
            raise SiteError(f"{self.architecture} has no mlp_out: its names say that its blocks have no MLP")
        if layer is not None and not 0 <= layer < self.layers:
            raise SiteError(f"layer={layer} is not possible: {self.architecture} has layers 0 to {self.layers - 1}")
        if head is not None and site != "head":
            raise SiteError(f"head={head} is not possible: {site} has no heads; ask for site='head'")
        if head is not None and not 0 <= head < self.heads:
            raise SiteError(f"head={head} is not possible: {self.architecture} has heads 0 to {self.heads - 1}")

    def shape(self, site: Site) -> tuple[int, int]:
        """Return the last two axes of an activation at `site`: (heads, head_dim), or (1, hidden)."""
        return (self.heads, self.head_dim) if site == "head" else (1, self.hidden)

    def hook(self, site: Site, layer: int, edit: Edit) -> ExitStack:
        """Call `edit` with the activation whenever the model gets there; until the returned context is closed.

        Args:
            site: one of `SITES`.
            layer: from 0.
            edit: gets a `Float[Tensor, "row token head dim"]`, and returns what goes on instead, or None to only look.

        Raises:
            SiteError: the model has no such site or layer.
        """
        self.check(site, layer)
        block, names, stack = self.blocks[layer], self.names, ExitStack()
        projection = _find(block, names.attention, names.projection)
        axes = self.shape(site)
        leading: list[torch.Size] = []  # (row, token), where a module has them flattened into one

        def edited(x: Tensor) -> Tensor:
            shape = x.shape[:-1] if x.ndim == 3 else leading[-1]
            new = edit(x.reshape(*shape, *axes))
            return x if new is None else new.reshape(x.shape)

        def resid(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (edited(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edited(kwargs["hidden_states"])}

        def entering(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (edited(args[0]), *args[1:])

        def leaving(_: nn.Module, __: tuple[Any, ...], out: Any) -> Any:
            return (edited(out[0]), *out[1:]) if isinstance(out, tuple) else edited(out)

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            leading[:] = [args[0].shape[:-1]]

        if site == "resid_pre":
            stack.callback(block.register_forward_pre_hook(resid, with_kwargs=True).remove)
        elif site == "head":
            stack.callback(projection.register_forward_pre_hook(entering).remove)
        elif site == "attn_out":
            stack.callback(_find(block, names.attn_out or names.attention).register_forward_hook(leaving).remove)
        else:
            stack.callback(projection.register_forward_pre_hook(note).remove)
            stack.callback(_find(block, names.mlp_out or names.mlp).register_forward_hook(leaving).remove)
        return stack

    @torch.no_grad()
    def _verify(self, model: Any) -> None:
        """Run a few tokens and compare what the sites say with what the model does."""
        names, seen = self.names, dict[tuple[Site, int], Tensor]()
        outputs: dict[tuple[str, int], Tensor] = {}
        with ExitStack() as stack:
            for layer, block in enumerate(self.blocks):
                for site in SITES if names.mlp else SITES[:3]:

                    def look(x: Tensor, key: tuple[Site, int] = (site, layer)) -> None:
                        seen[key] = x

                    stack.enter_context(self.hook(site, layer, look))
                for name in ("attention", "projection"):
                    path = (names.attention,) if name == "attention" else (names.attention, names.projection)

                    def keep(_: Any, __: Any, out: Any, key: tuple[str, int] = (name, layer)) -> None:
                        outputs[key] = out[0] if isinstance(out, tuple) else out

                    stack.callback(_find(block, *path).register_forward_hook(keep).remove)
            ids = (torch.arange(4, device=model.device) + 3)[None] % model.get_input_embeddings().weight.shape[0]
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        sites = len(SITES if names.mlp else SITES[:3])
        if len(seen) != sites * self.layers or len(outputs) != 2 * self.layers:
            quiet = sorted({f"{s} of layer {n}" for s in SITES[:sites] for n in range(self.layers)} - {
                f"{s} of layer {n}" for s, n in seen})  # fmt: skip
            raise SiteError(
                f"{self.architecture} never reaches {quiet[0] if quiet else 'its projection'}: wrong names?"
            )
        for layer, block in enumerate(self.blocks):
            projection, out = _find(block, names.attention, names.projection), outputs["projection", layer]
            z = seen["head", layer][0]
            alone = (
                torch.eye(self.heads, device=z.device, dtype=z.dtype)[:, None, :, None] * z
            )  # [head, token, head, dim]
            bias = projection(torch.zeros_like(z.flatten(1)))
            parts = (projection(alone.flatten(2)) - bias).sum(0) + bias
            self._same(parts, out[0], layer, "the sum of what its heads contribute is not the projection's output")
            self._same(
                outputs["attention", layer], out, layer, "attention's output is not that of its output projection"
            )
            if names.adds and layer + 1 < self.layers:
                total = seen["resid_pre", layer] + seen["attn_out", layer]
                total = total + seen["mlp_out", layer] if names.mlp else total
                words = "resid_pre + attn_out + mlp_out is not the next resid_pre (if a norm follows, say adds=False)"
                self._same(total, seen["resid_pre", layer + 1], layer, words)

    def _same(self, ours: Tensor, theirs: Tensor, layer: int, words: str) -> None:
        ours, theirs = ours.double(), theirs.double().view(ours.shape)
        apart, scale = float((ours - theirs).abs().max()), max(1.0, float(theirs.abs().max()))
        dtype = next(self.blocks[0].parameters()).dtype
        if not apart <= _TOLERANCE.get(dtype, 5e-2) * scale:
            raise SiteError(
                f"{self.architecture}, layer {layer}: {words}; apart by {apart:.2g} at a scale of {scale:.2g}"
            )


def _find(root: Any, *paths: str) -> Any:
    """Follow `paths` one after another from `root`."""
    for path in paths:
        try:
            root = root.get_submodule(path)
        except AttributeError as error:
            names = ", ".join(n for n, _ in root.named_children()) or "nothing"
            raise SiteError(f"{type(root).__name__} has no module {path!r}: it holds {names}") from error
    return root


def _width(projection: Any) -> int:
    """Return how many numbers a linear layer reads (GPT-2's Conv1D calls them nx)."""
    width = getattr(projection, "in_features", None) or getattr(projection, "nx", None)
    return int(width or projection.weight.shape[-1])
