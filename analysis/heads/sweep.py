"""Batched forward passes for patching: many patched runs of pairs of prompts at a time.

There are three ways of running them, which give the logits of one forward pass for each patch, up to rounding:

- layers: copies of the tokens that a patch changes are resumed at the layer in which they are patched, many in each
  call of a block (`nextstate.analysis.heads.copies`);
- fork: each patched run is a row that continues the model's own state before the first patched token;
- rows: each patched run is a row of its own.

The first one that agrees with rows in a small sweep is used. Two controls are part of every pass and raise an error if
they fail: one is not patched and must give the logits of the base run; the other is patched everywhere and must give
the logits of the source run.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from nextstate.agents.forward import out_of_memory, read_out
from nextstate.agents.language import LanguageModel
from nextstate.agents.masks import Places
from nextstate.agents.sites import Activation, Site
from nextstate.analysis.heads.copies import Copy, Resumable, Values, watch_projections
from nextstate.analysis.heads.pairs import PatchError

Way = Literal["layers", "fork", "rows"]
PASS_TOKENS = 1024  # most tokens of copies in one pass on a CPU: larger ones leave its cache
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


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
    way: Way = "rows"
    resumable: Resumable | None = None  # on the way "layers"

    def values(self, whole: bool) -> Values:
        """Return what the source run has at the patched positions."""

        def taken(layer: int, copy: Copy) -> Activation:
            late = copy.start - self.first
            return self.taken[layer][:, late : None if whole else late + 1]

        return taken

    def select(self, rows: Int[Tensor, " row"]) -> Runs:
        """Return the same for a selection of the pairs."""
        return replace(
            self,
            tokens=self.tokens[rows],
            source_tokens=self.source_tokens[rows],
            taken={layer: x[rows] for layer, x in self.taken.items()},
            base_logits=self.base_logits[rows],
            source_logits=self.source_logits[rows],
            resumable=None if self.resumable is None else self.resumable.select(rows),
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
    way: Way | None = None,
) -> Runs:
    """Run base and source prompts.

    Args:
        model: the language model.
        base: tokens of the runs to patch.
        source: tokens of the runs from which activations are taken; equal to `base` before `first`.
        site: site whose activations in the source run are kept.
        first: position from which activations are kept.
        way: how copies are run; by default the fastest one that is verified for this model.

    Raises:
        AgentError: no road reproduces the plain forward passes of the model.
    """
    way = way_of(model, site, base.shape[1]) if way is None else way
    if way == "layers":
        return _run_together(model, base, source, site, first)
    rows = [torch.from_numpy(x).to(model.device) for x in (base, source)]
    taken = {layer: x[:, first:] for layer, x in site_values(model, source, site).items()}
    logits = [model.forward.plain(x, [base.shape[1] - 1])[:, 0] for x in rows]
    return Runs(rows[0], rows[1], first, taken, logits[0], logits[1], way)


def _run_together(
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
    columns = columns.to(model.device)
    late, moved = torch.arange(first, length, device=model.device), columns[first:]
    base_stream, source_stream, taken = list[Tensor](), list[Tensor](), dict[int, Tensor]()
    cache = DynamicCache()

    def resid(x: Activation) -> None:
        base_stream.append(x[:, late, 0])
        source_stream.append(x[:, moved, 0])

    with ExitStack() as stack:
        for layer in range(model.sites.layers):
            stack.enter_context(model.sites.hook("resid_pre", layer, resid))
        for layer in model.sites.layers_with(site):

            def take(x: Tensor, layer: int = layer) -> None:
                taken[layer] = x[:, moved]

            stack.enter_context(model.sites.hook(site, layer, take))
        projected = stack.enter_context(watch_projections(model, late))
        logits = tree_pass(model, tokens, visible[None], depths[None], cache, torch.tensor([length - 1, width - 1]))
    keys = [(layer.keys, layer.values) for layer in cache.layers]
    whole, own = torch.from_numpy(source).to(model.device), tokens[:, :length]
    resumable = Resumable(model, own, first, keys, columns, base_stream, source_stream, projected)
    return Runs(own, whole, first, taken, logits[:, 0], logits[:, 1], "layers", resumable)


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


_PROVED: WeakKeyDictionary[LanguageModel, dict[Site, Way]] = WeakKeyDictionary()


def way_of(model: LanguageModel, site: Site, length: int) -> Way:
    """Return how copies are run. This is measured once for each model and site.

    Args:
        model: the language model.
        site: the site that is patched.
        length: tokens of a prompt.

    Raises:
        AgentError: no road reproduces the plain forward passes of the model.
    """
    road = model.forward.require(length, 2 * length)
    if road not in ("tree", "fork"):
        return "rows"
    known = _PROVED.setdefault(model, {})
    if site not in known:
        possible: list[Way] = ["layers", "fork"] if road == "tree" else ["fork"]
        known[site] = next((way for way in possible if _agrees(model, site, way)), "rows")
    return known[site]


def _agrees(model: LanguageModel, site: Site, way: Way) -> bool:
    """Compare a small sweep with rows: one head per layer, at the last, the first and at all late tokens."""
    if way == "layers" and len(model.sites.layers_with("resid_pre")) < model.sites.layers:
        return False
    rng, length, first = np.random.default_rng(3), 12, 5
    base = rng.integers(3, min(1000, model.model.get_input_embeddings().weight.shape[0]), (2, length))
    source = base.copy()
    source[:, first] = np.roll(source[:, first], 1) + (source[0, first] == source[1, first])
    heads = {layer: model.sites.shape(site, layer)[0] for layer in model.sites.layers_with(site)}
    found: dict[Way, list[Tensor]] = {}
    try:
        for one in (way, "rows"):
            runs, found[one] = run_pairs(model, base, source, site, first, one), []
            for starts, whole in (((first, length - 1), False), ((first,), True)):
                copies = [Copy(n, heads[n] - 1, start, c) for n in heads for c, start in enumerate(starts)]
                logits = runs.base_logits[:, None].repeat(1, len(copies), 1)
                for part in passes(runs, copies):
                    some = effective(model, runs, site, part, whole)
                    got = run_copies(model, runs, site, some, runs.values(whole), whole)[0]
                    logits[:, [copies.index(copy) for copy in some]] = got[:, 2:]
                found[one].append(logits)
    except Exception as error:
        if isinstance(error, RuntimeError | MemoryError) and out_of_memory(error):
            raise
        return False
    limit = TOLERANCE.get(model.model.dtype, 1e-1)
    spread = max(float(x.float().std()) for x in found["rows"])
    return all(
        float((one - two).float().abs().max()) <= 8 * limit * max(spread, 1e-6)
        for one, two in zip(found[way], found["rows"], strict=True)
    )


def passes(runs: Runs, copies: Sequence[Copy], fits: Callable[[Sequence[Copy]], bool] = bool) -> Iterator[list[Copy]]:
    """Divide copies into those of one pass each, which on some ways must all begin at one position.

    Args:
        runs: the base and source runs.
        copies: all copies.
        fits: whether some copies can be run in one pass; a single copy always is.
    """
    together = runs.resumable is not None
    part: list[Copy] = []
    for copy in sorted(copies, key=lambda c: (c.layer, c.column, c.head) if together else (c.column, c.layer, c.head)):
        if part and not ((together or copy.start == part[0].start) and fits([*part, copy])):
            yield part
            part = []
        part.append(copy)
    if part:
        yield part


def effective(model: LanguageModel, runs: Runs, site: Site, copies: Sequence[Copy], whole: bool) -> list[Copy]:
    """Return the copies that are to be run: all whose patch can change the answer.

    What a head or MLP of the last block adds to an earlier token is read by no other token. `way_of` verifies this.
    """
    if runs.resumable is None or whole or site == "resid_pre":
        return list(copies)
    last, answering = model.sites.layers - 1, runs.tokens.shape[1] - 1
    return [copy for copy in copies if copy.layer < last or copy.start == answering]


@torch.no_grad()
def run_copies(
    model: LanguageModel,
    runs: Runs,
    site: Site,
    copies: Sequence[Copy],
    values: Values,
    whole: bool,
    only: Int[Tensor, "pair token"] | None = None,
) -> tuple[Float[Tensor, "pair copy vocab"], float]:
    """Run patched copies; return the logits of two controls and of the copies, and the largest error of the controls.

    Args:
        model: the language model.
        runs: the base and source runs.
        site: the site to patch.
        copies: the places to patch, from `effective`; some that are run in one pass, from `passes`.
        values: activations to patch in.
        whole: patch all positions from the start of a copy instead of that one alone.
        only: tokens of each pair to compute logits of; by default the whole vocabulary.

    Raises:
        PatchError: the error of a control exceeds `TOLERANCE` times the range of the logits.
    """
    expected = list(model.sites.layers_with(site))
    if runs.resumable is None:
        logits, reached = _copies_in_rows(model, runs, site, copies, values, whole, only)
    else:
        logits, reached = runs.resumable.run(site, copies, values, runs.taken, whole, overwrite, only)
        expected = [layer for layer in expected if layer >= copies[0].layer]
    if reached != expected:
        raise PatchError(f"control failed: layers {reached} were patched, expected {expected}")
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
    values: Values,
    whole: bool,
    only: Int[Tensor, "pair token"] | None,
) -> tuple[Float[Tensor, "pair copy vocab"], list[int]]:
    """Run every copy as a row of its own: from a copied state at its start ("fork"), or from the beginning.

    Returns the logits, and the layers in which `site` was reached.
    """
    sites, (pairs, length), n, start = model.sites, runs.tokens.shape, 2 + len(copies), copies[0].start
    rows = runs.tokens[:, None].repeat(1, n, 1)
    rows[:, 1] = runs.source_tokens
    rows = rows.flatten(0, 1)
    forked = start > 0 and runs.way == "fork"
    begin, late = start if forked else 0, start - runs.first
    wanted = None if only is None else only.repeat_interleave(n, 0)
    state = None
    if forked:  # states of base runs, then of source runs; row 1 of each pair starts from the source run
        before = torch.cat([runs.tokens[:, :start], runs.source_tokens[:, :start]])
        pair = torch.arange(pairs)[:, None].repeat(1, n)
        pair[:, 1] += pairs
        state = model.forward.state(before, pair.flatten())

    layers, here, reached = [copy.layer for copy in copies], start - begin, list[int]()
    heads = torch.tensor([copy.head for copy in copies], device=model.device)

    def edit(layer: int) -> Any:
        mine = slice(bisect_left(layers, layer), bisect_right(layers, layer))
        every = torch.arange(sites.shape(site, layer)[0], device=model.device)

        def patch(x: Activation) -> Activation:
            reached.append(layer)
            x = x.reshape(pairs, n, *x.shape[1:]).clone()
            x[:, 1, here:] *= -1  # makes the second control fail wherever it is not patched
            overwrite(x[:, 1:2, here:], torch.ones_like(every, dtype=torch.bool)[None], runs.taken[layer][:, late:])
            if copies[mine]:
                new = values(layer, copies[mine][0])
                target = x[:, 2:][:, mine, here : here + new.shape[1]]
                overwrite(target, every == heads[mine, None], new)
            return x.flatten(0, 1)

        return patch

    with ExitStack() as stack:
        for layer in sites.layers_with(site):
            stack.enter_context(sites.hook(site, layer, edit(layer)))
        if state is None:
            logits = model.forward.plain(rows, [length - 1], wanted)
        else:
            logits = model.forward.resumed(rows[:, start:], state, start, [length - 1 - start], wanted)
    return logits.reshape(pairs, n, -1), reached


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
