"""The engine of patching: every patched run of a pair of prompts is a copy of its last tokens, all in one forward pass.

A prompt runs once. A run that differs from it only from position `start` on then costs the tokens from there on: a copy
of them, which a mask shows the keys and values before `start` and hides from all other copies. Below the layer in
which a copy is patched it equals the unpatched one, so it enters the network only there, as a duplicate of that one.
The logits are those of one forward pass a patch, to float error.

Two control copies go along in every pass and stop it with an error where they fail: one is left alone and must give the
logits of the base run; in the other everything is patched and must give those of the source run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from nextstate.agents.language import LanguageModel
from nextstate.agents.sites import Activation, Site
from nextstate.analysis.pairs import PatchError

_SLICE = 2048  # of the vocabulary
ROW_TOKENS = 1024  # most tokens of copies side by side in one row: each looks past all others, which costs their square
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Copy(NamedTuple):
    """A patched run: where its patch goes."""

    layer: int
    head: int  # 0 at sites without heads


@dataclass(frozen=True)
class Runs:
    """The base and the source run of pairs of one length: what their copies start from.

    Positions count from `first` where an axis is called `late`. `columns` are those of the source's positions among the
    cached keys; the base's are 0, 1, ...
    """

    tokens: Int[Tensor, "pair position"]
    cache: list[tuple[Float[Tensor, "pair kv column dim"], Float[Tensor, "pair kv column dim"]]]
    columns: Int[Tensor, " position"]
    first: int
    base: list[Activation]  # resid_pre for each layer, [pair late 1 hidden]
    source: list[Activation]
    taken: list[Activation]  # the swept site for each layer in the source run, [pair late head dim]
    base_logits: Float[Tensor, "pair vocab"]
    source_logits: Float[Tensor, "pair vocab"]

    def select(self, rows: Int[Tensor, " row"]) -> Runs:
        """Return those of some of the pairs."""
        return replace(
            self,
            tokens=self.tokens[rows],
            cache=[(k[rows], v[rows]) for k, v in self.cache],
            base=[x[rows] for x in self.base],
            source=[x[rows] for x in self.source],
            taken=[x[rows] for x in self.taken],
            base_logits=self.base_logits[rows],
            source_logits=self.source_logits[rows],
        )


class _Held(DynamicCache):  # type: ignore[misc]
    """Keys and values of the trunk; those of copies are used once and not kept."""

    def __init__(self, held: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.held = held

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.held[layer_idx]
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.held[layer_idx][0].shape[-2])


@torch.no_grad()
def run_pairs(
    model: LanguageModel,
    base: Int[np.ndarray, "pair position"],
    source: Int[np.ndarray, "pair position"],
    site: Site,
    first: int,
) -> Runs:
    """Run base and source prompts as one tree: what they begin with in common is computed once.

    Args:
        model: any.
        base: tokens that patches go into.
        source: tokens that agree with them up to where the first pair differs.
        site: what to keep of the source run.
        first: position from which activations are kept.
    """
    length = base.shape[1]
    shared = int((base == source).all(0).cumprod().sum())
    shared = min(shared, length - 1)  # each run has a last token of its own, whose logits we read
    columns = torch.cat([torch.arange(shared), torch.arange(length, 2 * length - shared)])
    width = 2 * length - shared
    visible = torch.zeros(width, width, dtype=torch.bool)
    visible[:length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
    visible[length:, columns] = torch.ones(length, length, dtype=torch.bool).tril()[shared:]
    positions = torch.cat([torch.arange(length), torch.arange(shared, length)])
    tokens = torch.from_numpy(np.concatenate([base, source[:, shared:]], 1)).to(model.device)
    late, moved = torch.arange(first, length), columns[first:].to(model.device)
    late = late.to(model.device)
    kept: dict[str, list[Tensor]] = {"base": [], "source": [], "taken": []}
    cache = DynamicCache()

    def resid(x: Tensor) -> None:
        kept["base"].append(x[:, late])
        kept["source"].append(x[:, moved])

    def take(x: Tensor) -> None:
        kept["taken"].append(x[:, moved])

    with ExitStack() as stack:
        for layer in range(model.sites.layers):
            stack.enter_context(model.sites.hook("resid_pre", layer, resid))
            stack.enter_context(model.sites.hook(site, layer, take))
        logits = _forward(model, tokens, positions, visible, cache, torch.tensor([length - 1, width - 1]))
    held = [(layer.keys, layer.values) for layer in cache.layers]
    start = tokens[:, :length]
    return Runs(start, held, columns, first, kept["base"], kept["source"], kept["taken"], logits[:, 0], logits[:, 1])


@torch.no_grad()
def site_values(model: LanguageModel, tokens: Int[np.ndarray, "pair position"], site: Site) -> list[Activation]:
    """Return the activations at a site, for each layer, in plain runs of `tokens`."""
    kept: list[Tensor] = []
    with ExitStack() as stack:
        for layer in range(model.sites.layers):
            stack.enter_context(model.sites.hook(site, layer, kept.append))
        n = tokens.shape[1]
        visible = torch.ones(n, n, dtype=torch.bool).tril()
        rows = torch.from_numpy(tokens).to(model.device)
        _forward(model, rows, torch.arange(n), visible, None, torch.tensor([n - 1]))
    return kept


@torch.no_grad()
def run_copies(
    model: LanguageModel,
    runs: Runs,
    site: Site,
    copies: Sequence[Copy],
    values: Sequence[Activation],
    start: int,
    whole: bool,
    only: Int[Tensor, "pair token"] | None = None,
) -> tuple[Float[Tensor, "pair copy vocab"], float]:
    """Run patched copies of the tokens from `start` on; return their logits and how far the controls are off.

    Args:
        model: any.
        runs: what they start from.
        site: what is patched.
        copies: where, in order of layers.
        values: what goes there, for each layer, from position `runs.first` on.
        start: position of the first token of a copy.
        whole: patch all its positions, instead of `start` alone.
        only: tokens of each pair to compute the logits of; by default the whole vocabulary.

    Raises:
        PatchError: a control is off by more than `TOLERANCE` (of the spread of the logits).
    """
    sites, span, n = model.sites, runs.tokens.shape[1] - start, 2 + len(copies)
    entry, late = copies[0].layer, start - runs.first
    layer_of = torch.tensor([c.layer for c in copies])
    ends = [2 + int((layer_of <= layer).sum()) for layer in range(sites.layers)]  # copies that have entered by then
    begins = [2 + int((layer_of < layer).sum()) for layer in range(sites.layers)]
    heads = sites.shape(site)[0]
    chosen = torch.nn.functional.one_hot(torch.tensor([c.head for c in copies]), heads).bool().to(model.device)
    visible = _visible(runs, start, span, n)
    deep = span if whole else 1
    fired: list[int] = []

    def enter(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer == entry:
                own = runs.base[layer][:, late:, 0]
                # At resid_pre the second control has to get there by patches.
                full = own if site == "resid_pre" else runs.source[layer][:, late:, 0]
                hidden = torch.cat([own, full], 1)
            new = ends[layer] - begins[layer]
            hidden = torch.cat([hidden, hidden[:, :span].repeat(1, new, 1)], 1)
            cut = _Cut(n * span, ends[layer] * span, visible.shape[1] - n * span)
            kwargs = {k: cut(v) for k, v in kwargs.items()}
            if args:
                return (hidden, *(cut(a) for a in args[1:])), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def edit(layer: int) -> Any:
        def patch(x: Activation) -> Activation:
            fired.append(layer)
            x = x.reshape(len(x), ends[layer], span, *x.shape[2:]).clone()
            x[:, 1] *= -1  # so that the second control is wrong wherever it is not patched
            everything = torch.ones(1, heads, dtype=torch.bool, device=x.device)
            overwrite(x[:, 1:2], everything, runs.taken[layer][:, late:])
            new = slice(begins[layer], ends[layer])
            which = chosen[begins[layer] - 2 : ends[layer] - 2]
            overwrite(x[:, new, :deep], which, values[layer][:, late : late + deep])
            return x.flatten(1, 2)

        return patch

    with ExitStack() as stack:
        stack.enter_context(_instead({block: _pass for block in sites.blocks[:entry]}))
        for layer in range(entry, sites.layers):
            hook = sites.blocks[layer].register_forward_pre_hook(enter(layer), with_kwargs=True)
            stack.callback(hook.remove)
            stack.enter_context(sites.hook(site, layer, edit(layer)))
        positions = torch.arange(start, start + span).repeat(n)
        tokens = runs.tokens[:, start:].repeat(1, n)
        ends_of = torch.arange(n) * span + span - 1
        logits = _forward(model, tokens, positions, visible, _Held(runs.cache), ends_of, only)
    if fired != list(range(entry, sites.layers)):
        raise PatchError(
            f"control failed: layers {fired} were patched, expected {entry} to {sites.layers - 1}, in order"
        )
    off = max(
        _control(model, "nothing", "base", logits[:, 0], runs.base_logits, only),
        _control(model, "everything", "source", logits[:, 1], runs.source_logits, only),
    )
    return logits, off


def overwrite(
    target: Float[Tensor, "pair copy token head dim"],
    chosen: Bool[Tensor, "copy head"],
    values: Float[Tensor, "pair token head dim"],
) -> None:
    """Write `values` into the chosen head of each copy, in place."""
    target.copy_(torch.where(chosen[None, :, None, :, None], values[:, None], target))


def _forward(
    model: LanguageModel,
    tokens: Int[Tensor, "row token"],
    positions: Int[Tensor, " token"],
    visible: Bool[Tensor, "token column"],
    cache: DynamicCache | None,
    ask: Int[Tensor, " asked"],
    only: Int[Tensor, "row token"] | None = None,
) -> Float[Tensor, "row asked vocab"]:
    """Run tokens under a mask that all rows share; the vocabulary, or `only` some of it, where asked alone."""
    dtype, ask, head = model.model.dtype, ask.to(model.device), model.model.get_output_embeddings()
    whole = head.forward
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min).to(model.device)
    with _instead({head: lambda x: _read_out(head, whole, x[:, ask], only)}):
        logits: Tensor = model.model(
            input_ids=tokens,
            position_ids=positions.to(model.device).expand(len(tokens), -1),
            attention_mask=mask.expand(len(tokens), 1, -1, -1),
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits
    return logits


def _read_out(
    head: nn.Module, whole: Callable[[Tensor], Tensor], x: Float[Tensor, "row asked hidden"], only: Tensor | None
) -> Float[Tensor, "row asked vocab"]:
    """Return what the output embeddings say, of `only` some tokens where these are given."""
    if type(head) is not nn.Linear:
        logits = whole(x)
        return logits if only is None else logits.gather(2, only[:, None].expand(-1, x.shape[1], -1))
    weight, bias = head.weight, head.bias
    if only is not None:
        some: Tensor = x @ weight[only].transpose(1, 2)
        return some if bias is None else some + bias[only][:, None]
    if x.device.type != "cpu" or x.shape[0] * x.shape[1] <= 8:
        return whole(x)
    # On a CPU, multiplying by a matrix as wide as a vocabulary is a third faster in slices.
    out = torch.cat([x @ part.T for part in torch.split(weight, _SLICE)], -1)
    return out if bias is None else out.add_(bias)


def _visible(runs: Runs, start: int, span: int, n: int) -> Bool[Tensor, "token column"]:
    """Return what copies see: before `start` the base run (the second control the source run), then each itself."""
    cached = runs.cache[0][0].shape[-2]
    seen = torch.zeros(n, span, cached + n * span, dtype=torch.bool)
    seen[:, :, :start] = True
    seen[1, :, :start] = False
    seen[1][:, runs.columns[:start]] = True
    own = torch.kron(torch.eye(n), torch.ones(span, span).tril()).bool()
    seen[:, :, cached:] = own.view(n, span, n * span)
    return seen.flatten(0, 1)


class _Cut(NamedTuple):
    """Cuts what a model gives to its blocks for all copies down to the tokens of those that have entered."""

    tokens: int
    alive: int
    cached: int

    def __call__(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self(v) for v in value)
        if not isinstance(value, Tensor) or self.alive == self.tokens:
            return value
        if value.ndim == 4 and value.shape[-2:] == (self.tokens, self.cached + self.tokens):
            return value[..., : self.alive, : self.cached + self.alive]
        return value[:, : self.alive] if value.ndim in (2, 3) and value.shape[1] == self.tokens else value


def _pass(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


@contextmanager
def _instead(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Let modules compute something else."""
    kept = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in kept.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


def _control(
    model: LanguageModel,
    what: str,
    whose: str,
    found: Float[Tensor, "pair token"],
    want: Float[Tensor, "pair vocab"],
    only: Int[Tensor, "pair token"] | None,
) -> float:
    spread = max(1.0, float(want.max() - want.min()))
    found, want = found.float(), (want if only is None else want.gather(1, only)).float()
    apart = float((found - want).abs().max()) / spread
    limit = TOLERANCE.get(model.model.dtype, 1e-1)
    if not apart <= limit:  # so also where it is not a number
        raise PatchError(
            f"control failed: {what} patched must give the {whose} run's logits, but they are apart by {apart:.2g} of "
            f"their spread (limit {limit:.0e} in {model.model.dtype}); {model.name} does something that patching on "
            f"branches does not know of"
        )
    return apart
