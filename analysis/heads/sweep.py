"""Batched forward passes for patching: many patched runs of pairs of prompts at a time.

On the tree road, all patched runs share one forward pass. A patched run differs from the base run only from position
`start` on, so only the tokens from there on are copied; a mask lets each copy attend to the keys and values before
`start` and to itself, but not to other copies. Below the layer in which it is patched, a copy equals the base run, so
it is added to the pass only in that layer. Before this is used, a small sweep is compared with plain hooks. If they
disagree, and on all other roads, every patched run is a row of its own (on the fork road from a copied state of the
tokens before `start`). Both ways give the logits of one forward pass for each patch, up to rounding.

Two controls are part of every pass and raise an error if they fail: one is not patched and must give the logits of the
base run; the other is patched everywhere and must give the logits of the source run.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from nextstate.agents.forward import out_of_memory, read_out, skipping
from nextstate.agents.language import LanguageModel
from nextstate.agents.masks import Places
from nextstate.agents.sites import Activation, Site
from nextstate.analysis.heads.pairs import PatchError

ROW_TOKENS = 1024  # most tokens of copies in one row: the cost of masked attention is quadratic in them
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Copy(NamedTuple):
    """The place that is patched in one run."""

    layer: int
    head: int  # 0 at sites without heads


@dataclass(frozen=True)
class Trunks:
    """Keys, values and residual stream of base and source runs in one tree, from which copies start."""

    cache: list[tuple[Float[Tensor, "pair kv column dim"], Float[Tensor, "pair kv column dim"]]]
    depths: Int[Tensor, " column"]  # the position of each cached column
    columns: Int[Tensor, " position"]  # columns of the source run; those of the base run are 0, 1, ...
    base: list[Activation]  # resid_pre for each layer, [pair late 1 hidden]
    source: list[Activation]

    def select(self, rows: Int[Tensor, " row"]) -> Trunks:
        """Return the same for a selection of the pairs."""
        cache = [(k[rows], v[rows]) for k, v in self.cache]
        return replace(self, cache=cache, base=[x[rows] for x in self.base], source=[x[rows] for x in self.source])


@dataclass(frozen=True)
class Runs:
    """The base and source runs of pairs of one length, from which patched copies start.

    Axes called `late` hold the positions from `first` on.
    """

    tokens: Int[Tensor, "pair position"]
    source_tokens: Int[Tensor, "pair position"]
    first: int
    taken: dict[int, Activation]  # the swept site in the source run, by layer, [pair late head dim]
    base_logits: Float[Tensor, "pair vocab"]
    source_logits: Float[Tensor, "pair vocab"]
    trunks: Trunks | None = None  # set if copies run in one tree

    def select(self, rows: Int[Tensor, " row"]) -> Runs:
        """Return the same for a selection of the pairs."""
        return replace(
            self,
            tokens=self.tokens[rows],
            source_tokens=self.source_tokens[rows],
            taken={layer: x[rows] for layer, x in self.taken.items()},
            base_logits=self.base_logits[rows],
            source_logits=self.source_logits[rows],
            trunks=None if self.trunks is None else self.trunks.select(rows),
        )


class Held(DynamicCache):  # type: ignore[misc]
    """A cache with the keys and values of the trunk; those of copies are not stored."""

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
    in_tree: bool | None = None,
) -> Runs:
    """Run base and source prompts.

    Args:
        model: the language model.
        base: tokens of the runs to patch.
        source: tokens of the runs from which activations are taken; equal to `base` before `first`.
        site: site whose activations in the source run are kept.
        first: position from which activations are kept.
        in_tree: whether copies run in one tree; by default if that is verified for this model.
    """
    length = base.shape[1]
    copied = max(ROW_TOKENS, 3 * (length - first))  # a pass holds at least one copy and both controls
    if fast(model, site, length, 2 * length + copied) if in_tree is None else in_tree:
        return _run_trunks(model, base, source, site, first)
    rows = [torch.from_numpy(x).to(model.device) for x in (base, source)]
    taken = {layer: x[:, first:] for layer, x in site_values(model, source, site).items()}
    logits = [model.forward.plain(x, [base.shape[1] - 1])[:, 0] for x in rows]
    return Runs(rows[0], rows[1], first, taken, logits[0], logits[1])


def _run_trunks(
    model: LanguageModel,
    base: Int[np.ndarray, "pair position"],
    source: Int[np.ndarray, "pair position"],
    site: Site,
    first: int,
) -> Runs:
    """Run base and source prompts as one tree, so that their common prefix is computed once."""
    length = base.shape[1]
    shared = int((base == source).all(0).cumprod().sum())
    shared = min(shared, length - 1)  # each run needs its own last token, whose logits are read
    columns = torch.cat([torch.arange(shared), torch.arange(length, 2 * length - shared)])
    width = 2 * length - shared
    visible = torch.zeros(width, width, dtype=torch.bool)
    visible[:length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
    visible[length:, columns] = torch.ones(length, length, dtype=torch.bool).tril()[shared:]
    depths = torch.cat([torch.arange(length), torch.arange(shared, length)])
    tokens = torch.from_numpy(np.concatenate([base, source[:, shared:]], 1)).to(model.device)
    late, moved = torch.arange(first, length), columns[first:].to(model.device)
    late = late.to(model.device)
    base_stream, source_stream, taken = list[Tensor](), list[Tensor](), dict[int, Tensor]()
    cache = DynamicCache()

    def resid(x: Tensor) -> None:
        base_stream.append(x[:, late])
        source_stream.append(x[:, moved])

    with ExitStack() as stack:
        for layer in range(model.sites.layers):
            stack.enter_context(model.sites.hook("resid_pre", layer, resid))
        for layer in model.sites.layers_with(site):

            def take(x: Tensor, layer: int = layer) -> None:
                taken[layer] = x[:, moved]

            stack.enter_context(model.sites.hook(site, layer, take))
        logits = tree_pass(model, tokens, visible[None], depths[None], cache, torch.tensor([length - 1, width - 1]))
    held = [(layer.keys, layer.values) for layer in cache.layers]
    whole = torch.from_numpy(source).to(model.device)
    trunks = Trunks(held, depths, columns, base_stream, source_stream)
    return Runs(tokens[:, :length], whole, first, taken, logits[:, 0], logits[:, 1], trunks)


@torch.no_grad()
def site_values(model: LanguageModel, tokens: Int[np.ndarray, "pair position"], site: Site) -> dict[int, Activation]:
    """Return the activations at a site in plain runs of `tokens`, by layer."""
    kept: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in model.sites.layers_with(site):

            def keep(x: Tensor, layer: int = layer) -> None:
                kept[layer] = x

            stack.enter_context(model.sites.hook(site, layer, keep))
        model.forward.plain(torch.from_numpy(tokens).to(model.device), [0])
    return kept


_PROVED: WeakKeyDictionary[LanguageModel, dict[Site, bool]] = WeakKeyDictionary()


def fast(model: LanguageModel, site: Site, length: int, columns: int) -> bool:
    """Return whether copies may run in one tree. This is verified once for each model and site.

    Args:
        model: the language model.
        site: the site that is patched.
        length: tokens of a prompt.
        columns: columns of the tree, including copies.

    Raises:
        AgentError: no road reproduces the plain forward passes of the model.
    """
    if model.forward.require(length, columns) != "tree":
        return False
    known = _PROVED.setdefault(model, {})
    if site not in known:
        known[site] = len(model.sites.layers_with("resid_pre")) == model.sites.layers and _agrees(model, site)
    return known[site]


def _agrees(model: LanguageModel, site: Site) -> bool:
    """Compare a small sweep in one tree with plain hooks: one head per layer, at the last and at all late tokens."""
    rng, length, first = np.random.default_rng(3), 12, 5
    base = rng.integers(3, min(1000, model.model.get_input_embeddings().weight.shape[0]), (2, length))
    source = base.copy()
    source[:, first] = np.roll(source[:, first], 1) + (source[0, first] == source[1, first])
    copies = [Copy(layer, model.sites.shape(site, layer)[0] - 1) for layer in model.sites.layers_with(site)]
    found: dict[bool, list[Tensor]] = {}
    try:
        for in_tree in (True, False):
            runs = run_pairs(model, base, source, site, first, in_tree)
            found[in_tree] = [
                run_copies(model, runs, site, copies, runs.taken, start, whole)[0][:, 2:]
                for start, whole in ((length - 1, False), (first, True))
            ]
    except Exception as error:
        if isinstance(error, RuntimeError | MemoryError) and out_of_memory(error):
            raise
        return False
    limit = TOLERANCE.get(model.model.dtype, 1e-1)
    spread = max(float(x.float().std()) for x in found[False])
    return all(
        float((one - two).float().abs().max()) <= 8 * limit * max(spread, 1e-6)
        for one, two in zip(found[True], found[False], strict=True)
    )


@torch.no_grad()
def run_copies(
    model: LanguageModel,
    runs: Runs,
    site: Site,
    copies: Sequence[Copy],
    values: Mapping[int, Activation],
    start: int,
    whole: bool,
    only: Int[Tensor, "pair token"] | None = None,
) -> tuple[Float[Tensor, "pair copy vocab"], float]:
    """Run patched copies of the tokens from `start` on; return their logits and the largest error of the controls.

    Args:
        model: the language model.
        runs: the base and source runs.
        site: the site to patch.
        copies: the places to patch, ordered by layer.
        values: activations to patch in, by layer, from position `runs.first` on.
        start: position of the first token of a copy.
        whole: patch all positions from `start` on instead of `start` alone.
        only: tokens of each pair to compute logits of; by default the whole vocabulary.

    Raises:
        PatchError: the error of a control exceeds `TOLERANCE` times the range of the logits.
    """
    run = _copies_in_rows if runs.trunks is None else _copies_in_tree
    logits = run(model, runs, site, copies, values, start, whole, only)
    error = max(
        _control(model, "nothing", "base", logits[:, 0], runs.base_logits, only),
        _control(model, "everything", "source", logits[:, 1], runs.source_logits, only),
    )
    return logits, error


def _copies_in_rows(
    model: LanguageModel,
    runs: Runs,
    site: Site,
    copies: Sequence[Copy],
    values: Mapping[int, Activation],
    start: int,
    whole: bool,
    only: Int[Tensor, "pair token"] | None,
) -> Float[Tensor, "pair copy vocab"]:
    """Run every copy as a row of its own: on the fork road from a copied state at `start`, else from the beginning."""
    sites, (pairs, length), n = model.sites, runs.tokens.shape, 2 + len(copies)
    rows = runs.tokens[:, None].repeat(1, n, 1)
    rows[:, 1] = runs.source_tokens
    rows = rows.flatten(0, 1)
    forked = start > 0 and model.forward.require(length, 2 * length) == "fork"
    begin, late = start if forked else 0, start - runs.first
    wanted = None if only is None else only.repeat_interleave(n, 0)
    state = None
    if forked:  # states of base runs, then of source runs; row 1 of each pair starts from the source run
        before = torch.cat([runs.tokens[:, :start], runs.source_tokens[:, :start]])
        pair = torch.arange(pairs)[:, None].repeat(1, n)
        pair[:, 1] += pairs
        state = model.forward.state(before, pair.flatten())

    layers, here = [copy.layer for copy in copies], start - begin
    heads = torch.tensor([copy.head for copy in copies], device=model.device)

    def edit(layer: int) -> Any:
        mine = slice(bisect_left(layers, layer), bisect_right(layers, layer))
        every = torch.arange(sites.shape(site, layer)[0], device=model.device)

        def patch(x: Activation) -> Activation:
            x = x.reshape(pairs, n, *x.shape[1:]).clone()
            x[:, 1, here:] *= -1  # makes the second control fail wherever it is not patched
            overwrite(x[:, 1:2, here:], torch.ones_like(every, dtype=torch.bool)[None], runs.taken[layer][:, late:])
            end = None if whole else 1
            mine_in = x[:, 2:][:, mine, here : None if whole else here + 1]
            overwrite(mine_in, every == heads[mine, None], values[layer][:, late:][:, :end])
            return x.flatten(0, 1)

        return patch

    with ExitStack() as stack:
        for layer in sites.layers_with(site):
            stack.enter_context(sites.hook(site, layer, edit(layer)))
        if state is None:
            logits = model.forward.plain(rows, [length - 1], wanted)
        else:
            logits = model.forward.resumed(rows[:, start:], state, start, [length - 1 - start], wanted)
    return logits.reshape(pairs, n, -1)


def _copies_in_tree(
    model: LanguageModel,
    runs: Runs,
    site: Site,
    copies: Sequence[Copy],
    values: Mapping[int, Activation],
    start: int,
    whole: bool,
    only: Int[Tensor, "pair token"] | None,
) -> Float[Tensor, "pair copy vocab"]:
    """Run all copies in one forward pass, each added in the layer in which it is patched."""
    assert runs.trunks is not None
    sites, trunks, span, n = model.sites, runs.trunks, runs.tokens.shape[1] - start, 2 + len(copies)
    entry, late = copies[0].layer, start - runs.first
    layer_of = torch.tensor([c.layer for c in copies])
    ends = [2 + int((layer_of <= layer).sum()) for layer in range(sites.layers)]  # copies present after each layer
    begins = [2 + int((layer_of < layer).sum()) for layer in range(sites.layers)]
    heads = sites.shape(site, entry)[0]
    patched = [layer for layer in sites.layers_with(site) if layer >= entry]
    chosen = torch.nn.functional.one_hot(torch.tensor([c.head for c in copies]), heads).bool().to(model.device)
    visible = _visible(trunks, start, span, n)
    deep = span if whole else 1
    fired: list[int] = []

    def enter(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer == entry:
                own = trunks.base[layer][:, late:, 0]
                # At resid_pre the second control starts from the base run: only its patches make it the source run.
                full = own if site == "resid_pre" else trunks.source[layer][:, late:, 0]
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
            x[:, 1] *= -1  # makes the second control fail wherever it is not patched
            everything = torch.ones(1, heads, dtype=torch.bool, device=x.device)
            overwrite(x[:, 1:2], everything, runs.taken[layer][:, late:])
            new = slice(begins[layer], ends[layer])
            which = chosen[begins[layer] - 2 : ends[layer] - 2]
            overwrite(x[:, new, :deep], which, values[layer][:, late : late + deep])
            return x.flatten(1, 2)

        return patch

    with ExitStack() as stack:
        stack.enter_context(skipping({x.block: x.returns_tuple for x in sites.per_layer[:entry]}))
        for layer in range(entry, sites.layers):
            hook = sites.blocks[layer].register_forward_pre_hook(enter(layer), with_kwargs=True)
            stack.callback(hook.remove)
        for layer in patched:
            stack.enter_context(sites.hook(site, layer, edit(layer)))
        depths = torch.cat([trunks.depths, torch.arange(start, start + span).repeat(n)])
        tokens = runs.tokens[:, start:].repeat(1, n)
        ends_of = torch.arange(n) * span + span - 1
        logits = tree_pass(model, tokens, visible[None], depths[None], Held(trunks.cache), ends_of, only)
    if fired != patched:
        raise PatchError(f"control failed: layers {fired} were patched, expected {patched}")
    return logits


def overwrite(
    target: Float[Tensor, "pair copy token head dim"],
    chosen: Bool[Tensor, "copy head"],
    values: Float[Tensor, "pair token head dim"],
) -> None:
    """Write `values` into the chosen head of each copy, in place."""
    target.copy_(torch.where(chosen[None, :, None, :, None], values[:, None], target))


def tree_pass(
    model: LanguageModel,
    tokens: Int[Tensor, "row token"],
    visible: Bool[Tensor, "mask token column"],
    depths: Int[Tensor, "mask column"],
    cache: DynamicCache,
    ask: Int[Tensor, " asked"],
    only: Int[Tensor, "row token"] | None = None,
) -> Float[Tensor, "row asked vocab"]:
    """Run tokens with one mask for each row, or one for all rows; return the logits at the tokens `ask`.

    Logits of the vocabulary, or of the tokens `only`, are computed at these tokens alone.
    """
    ask, places = ask.to(model.device), Places(visible.to(model.device), depths.to(model.device))
    with read_out(model.model, lambda x: x[:, ask], only):
        return model.forward.in_tree(tokens, places, cache)


def _visible(trunks: Trunks, start: int, span: int, n: int) -> Bool[Tensor, "token column"]:
    """Return the mask of copies: each sees the base run before `start` (control 2: the source run) and itself."""
    cached = len(trunks.depths)
    seen = torch.zeros(n, span, cached + n * span, dtype=torch.bool)
    seen[:, :, :start] = True
    seen[1, :, :start] = False
    seen[1][:, trunks.columns[:start]] = True
    own = torch.kron(torch.eye(n), torch.ones(span, span).tril()).bool()
    seen[:, :, cached:] = own.view(n, span, n * span)
    return seen.flatten(0, 1)


class _Cut(NamedTuple):
    """Cuts the arguments that a model passes to its blocks down to the tokens of the copies present so far."""

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
        if value.ndim == 3 and value.shape[1:] == (1, self.cached + self.tokens):  # ALiBi
            return value[..., : self.cached + self.alive]
        return value[:, : self.alive] if value.ndim in (2, 3) and value.shape[1] == self.tokens else value


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
    error = float((found - want).abs().max()) / spread
    limit = TOLERANCE.get(model.model.dtype, 1e-1)
    if not error <= limit:  # also raises for NaN
        raise PatchError(
            f"control failed: with {what} patched, the logits must be those of the {whose} run, but differ by "
            f"{error:.2g} of their range (limit {limit:.0e} in {model.model.dtype}); {model.name} has an operation "
            f"that patching on branches does not support"
        )
    return error
