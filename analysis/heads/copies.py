"""Patched copies of a run, resumed at the layer in which they are patched, with many copies in each call of a block.

A patch at one position of layer `l` changes one token of that layer. From the next layer on it changes all tokens from
that position on, and in the last layer only the last token is read. So a copy is

- one token in its own layer (all tokens from the position on, if all of them are patched);
- all tokens from the position on in later layers. In the first of these, the input of all but one of them is that of
  the base run, and so are the outputs of the projections before attention, which are not computed again;
- keys and values of these tokens, and everything for the last token alone, in the last layer.

The blocks are called directly, with the arguments that the model itself passes to them (`record_inputs`). All tokens of
all copies of a pair are one row, also where copies begin at different positions, so that a layer is one call. Only
attention needs to know which copy a token belongs to: while copies run, it is computed by `attention`, from the keys
and values of the base run (for all copies at once) and those of each copy. Models that compute attention on their own,
without the attention functions of transformers, are not supported. `nextstate.analysis.heads.sweep` compares a model
with plain hooks before using this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nextstate.agents.forward import instead, read_out
from nextstate.agents.language import LanguageModel
from nextstate.agents.masks import LOCK, Places
from nextstate.agents.sites import Activation, Site
from nextstate.agents.tracing import given, is_linear, with_stream


class Copy(NamedTuple):
    """The place that is patched in one run."""

    layer: int
    head: int  # 0 at sites without heads
    start: int  # the first position that is patched
    column: int = 0  # of the sweep


Values = Callable[[int, Copy], Activation]  # layer and copy -> [pair token head dim], for the patched positions
Overwrite = Callable[
    [Float[Tensor, "pair copy token head dim"], Bool[Tensor, "copy head"], Float[Tensor, "pair token head dim"]], None
]


class NotSupported(RuntimeError):
    """A model's blocks cannot be resumed with many copies in one call."""


class BlockInputs(NamedTuple):
    """The arguments of a block besides the residual stream, for tokens of the positions from `first` on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Bool[Tensor, "late position"] | None  # what tokens may not attend to, if that is not only what comes later


# --- recording


@contextmanager
def watch_projections(model: LanguageModel, late: Int[Tensor, " late"]) -> Iterator[list[dict[nn.Module, Tensor]]]:
    """Keep the outputs of all linear layers that run before the output projection of attention, in each block.

    Args:
        model: the language model.
        late: columns to keep.
    """
    found: list[dict[nn.Module, Tensor]] = [{} for _ in model.sites.per_layer]
    seen: list[set[nn.Module]] = [set() for _ in model.sites.per_layer]
    with ExitStack() as stack:
        for layer, own in enumerate(model.sites.per_layer):
            if own.projection is None:
                continue
            over: list[bool] = []

            def keep(module: nn.Module, _: Any, out: Any, layer: int = layer, over: list[bool] = over) -> None:
                if module in seen[layer]:
                    found[layer].pop(module, None)  # called twice: which call is meant cannot be known
                elif not over and isinstance(out, Tensor) and out.ndim == 3:
                    found[layer][module] = out[:, late]
                seen[layer].add(module)

            def end(*_: Any, over: list[bool] = over) -> None:
                over.append(True)

            stack.callback(own.projection.register_forward_pre_hook(end).remove)
            for module in own.block.modules():
                if is_linear(module) and module is not own.projection:
                    stack.callback(module.register_forward_hook(keep).remove)
        yield found


class _Stop(Exception):
    """Ends a call of a block once the keys and values are known."""


class _Own(DynamicCache):  # type: ignore[misc]
    """A cache that returns new keys and values alone; those of the base run are added by `attention`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.stops, self.last = length, False, (torch.empty(0), torch.empty(0))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.last = key_states, value_states
        if self.stops:
            raise _Stop
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def record_inputs(
    model: LanguageModel, tokens: Int[Tensor, "pair position"], first: int
) -> tuple[list[BlockInputs], _Own]:
    """Return the arguments that the model passes to its blocks for the tokens from `first` on, and the cache in them.

    Raises:
        NotSupported: the model does not call its blocks once each, or with other masks.
    """
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=model.device).tril()[first:]
    places = Places(causal[None], torch.arange(length, device=model.device)[None])
    cache, found = _Own(first), list[BlockInputs]()

    def recorder(as_tuple: bool) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            stream, mask = given(args, kwargs), kwargs.get("attention_mask")
            if stream is None or stream.shape[:2] != (len(tokens), length - first):
                raise NotSupported("a block has no residual stream among its arguments")
            hidden = None
            if isinstance(mask, Tensor):
                seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
                if mask.ndim != 4 or mask.shape[2:] != causal.shape or not (seen == seen[:1, :1]).all():
                    raise NotSupported("a block has a mask that is not the same for all rows and heads")
                hidden = None if torch.equal(seen[0, 0], causal) else ~seen[0, 0]
            found.append(BlockInputs(args, kwargs, hidden))
            return (stream,) if as_tuple else stream

        return record

    recorders = {x.block: recorder(x.returns_tuple) for x in model.sites.per_layer}
    with instead(recorders), read_out(model.model, lambda x: x[:1, :1]):
        model.forward.in_tree(tokens[:, first:], places, cache)
    if len(found) != model.sites.layers:
        raise NotSupported("blocks are not called once each")
    return found, cache


# --- running copies


class _Entering(NamedTuple):
    """Copies side by side that enter a layer with the base run's tokens of some positions."""

    start: int
    tokens: int
    copies: int

    @property
    def positions(self) -> Int[np.ndarray, " token"]:
        """The position of each token."""
        return np.tile(np.arange(self.start, self.start + self.tokens), self.copies)


class _Call:
    """The tokens of a call of a block, and how its attention is computed.

    First come the tokens of the control that is patched everywhere, then those of copies that are `wide`: in both cases
    from a start to the end of the prompt, or the last one alone. Behind them come the tokens of copies that enter.

    Args:
        model: the language model.
        control: position of the first token of the control.
        starts: position of the first token of each wide copy.
        old: number of wide copies of which every input differs from the base run's; of others it is the first token's.
        entering: copies that enter, whose input is the base run's.
        length: tokens of a prompt.
        own: keys and values of the control and the wide copies, if only their last tokens are in the call.
    """

    def __init__(
        self,
        model: LanguageModel,
        control: int,
        starts: Int[np.ndarray, " copy"],
        old: int,
        entering: Sequence[_Entering],
        length: int,
        own: tuple[Float[Tensor, "pair kv token dim"], Float[Tensor, "pair kv token dim"]] | None = None,
    ) -> None:
        spans = length - starts
        ends = np.cumsum(spans)
        self.device, self.own, self.length, self.control = model.device, own, length, control
        self.first, self.last = ends - spans, ends - 1  # among the tokens of wide copies
        at, controls = np.arange(int(spans.sum())) - np.repeat(self.first - starts, spans), np.arange(control, length)
        if own is not None:
            at, controls = np.full(len(starts), length - 1), controls[-1:]
        enters = np.concatenate([at[:0], *(copies.positions for copies in entering)])
        self.controls, self.wide, self.entering = len(controls), len(at), len(enters)
        changed = int(ends[old - 1]) if old else 0
        self.changed = self.controls + changed  # tokens whose input differs from the base run's, and then
        self.new = self.first[old:] - changed  # ... the first tokens of new copies, among those that follow
        self.at = self.index(np.concatenate([controls, at, enters]))
        self.starts = [(start, len(list(same))) for start, same in groupby(starts.tolist())]  # copies side by side
        self.entered = entering

    def index(self, values: Int[np.ndarray, ...]) -> Tensor:
        """Return indices on the device."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Resumable:
    """The base and source runs of pairs, from which patched copies are resumed.

    Axes called `late` hold the positions from `first` on. In `keys`, columns 0, 1, ... are those of the base run.

    Attributes:
        model: the language model.
        tokens: the base prompts.
        first: the first position that may be patched.
        keys: keys and values of both runs, by layer.
        columns: columns of the source run in `keys`.
        base: residual stream of the base run before each layer.
        source: ... of the source run.
        projected: outputs of the projections before attention in the base run, by layer.
    """

    model: LanguageModel
    tokens: Int[Tensor, "pair position"]
    first: int
    keys: list[tuple[Float[Tensor, "pair kv column dim"], Float[Tensor, "pair kv column dim"]]]
    columns: Int[Tensor, " position"]
    base: list[Float[Tensor, "pair late hidden"]]
    source: list[Float[Tensor, "pair late hidden"]]
    projected: list[dict[nn.Module, Float[Tensor, "pair late out"]]]

    def select(self, rows: Int[Tensor, " row"]) -> Resumable:
        """Return the same for a selection of the pairs."""
        keys = [(k[rows], v[rows]) for k, v in self.keys]
        projected = [{module: x[rows] for module, x in layer.items()} for layer in self.projected]
        base, source = ([x[rows] for x in stream] for stream in (self.base, self.source))
        return replace(self, tokens=self.tokens[rows], keys=keys, base=base, source=source, projected=projected)

    @cached_property
    def inputs(self) -> tuple[list[BlockInputs], _Own]:
        """The arguments of the blocks, and the cache among them."""
        return record_inputs(self.model, self.tokens, self.first)

    def run(
        self,
        site: Site,
        copies: Sequence[Copy],
        values: Values,
        taken: Mapping[int, Activation],
        whole: bool,
        overwrite: Overwrite,
        only: Int[Tensor, "pair token"] | None = None,
    ) -> tuple[Float[Tensor, "pair copy vocab"], list[int]]:
        """Return the logits of two controls and of all copies, and the layers in which `site` was reached.

        The first control is a copy that is not patched, which begins at the first start. The second one begins at the
        last start and is patched everywhere, with what the source run has.

        Args:
            site: the site to patch.
            copies: the places to patch, ordered by layer and column; each of them can change the answer.
            values: activations to patch in.
            taken: the site in the source run, by layer, from position `first` on.
            whole: patch all positions from the start of a copy instead of that one alone. Then all starts are equal.
            overwrite: writes values into heads of copies.
            only: tokens of each pair to compute logits of; by default the whole vocabulary.

        Raises:
            NotSupported: blocks do not work in the way that this needs.
        """
        sites, length, entry = self.model.sites, self.tokens.shape[1], copies[0].layer
        end, earliest = sites.layers - 1, min(copies, key=lambda copy: copy.start)
        begin = max(copy.start for copy in copies)
        copies = [Copy(entry, -1, earliest.start, earliest.column), *copies]
        stream = site == "resid_pre"  # the input of a block is patched: there is no layer in which a copy is one token
        heads, reached, span = sites.shape(site, entry)[0], list[int](), length - begin
        every = torch.ones(1, heads, dtype=torch.bool, device=self.model.device)
        control = (self.base if stream else self.source)[entry][:, begin - self.first :]
        wide, starts = control[:, :0], np.zeros(0, dtype=np.int64)  # copies from their start to the end
        fresh, fresh_starts = wide, starts  # the first tokens of copies that become wide
        for layer in range(entry, end + 1):
            mine = [copy for copy in copies if copy.layer == layer]
            groups = [list(group) for _, group in groupby(mine, lambda copy: (copy.column, copy.start))]
            at = np.array([copy.start for copy in mine], dtype=np.int64)
            deep = span if whole and (stream or layer < end) else 1
            begins = [length - 1 if whole and deep < span else group[0].start for group in groups]
            enters = [_Entering(start, deep, len(group)) for start, group in zip(begins, groups, strict=True)]
            places = np.concatenate([at[:0], *(copies.positions for copies in enters)]) - self.first
            entered = self.base[layer].index_select(1, torch.from_numpy(places).to(self.model.device))
            if stream:
                reached.append(layer)
                control = control * -1  # makes it fail where it is not patched
                overwrite(control[:, None, :, None], every, taken[layer][:, begin - self.first :])
                self._patch(entered[:, :, None], layer, groups, values, overwrite)
                if whole:
                    wide, starts = torch.cat([wide, entered], 1), np.concatenate([starts, at])
                else:
                    fresh, fresh_starts = entered, at
                enters, entered = [], entered[:, :0]
            call = _Call(self.model, begin, np.concatenate([starts, fresh_starts]), len(starts), enters, length)
            first = self.base[layer].index_select(1, call.at[call.changed : call.controls + call.wide] - self.first)
            first[:, call.new] = fresh
            wide, starts = torch.cat([wide, first], 1), np.concatenate([starts, fresh_starts])
            if layer == end and length - min(call.control, *starts.tolist(), length) > 1:
                keys = self._keys(layer, torch.cat([control, wide], 1), call)
                control, wide = control[:, -1:], wide.index_select(1, call.index(call.last))
                call = _Call(self.model, begin, starts, len(starts), enters, length, keys)

            def patch(
                x: Activation, layer: int = layer, call: _Call = call, groups: list[list[Copy]] = groups
            ) -> Activation:
                reached.append(layer)
                x = x.clone()
                x[:, : call.controls] *= -1  # makes the control fail where it is not patched
                overwrite(x[:, None, : call.controls], every, taken[layer][:, -call.controls :])
                self._patch(x[:, call.controls + call.wide :], layer, groups, values, overwrite)
                return x

            hooked = not stream and layer in sites.layers_with(site)
            with sites.hook(site, layer, patch) if hooked else ExitStack():
                hidden = self._call(layer, torch.cat([control, wide, entered], 1), call)
            control, hidden = hidden[:, : call.controls], hidden[:, call.controls :]
            if whole and layer < end:
                wide, starts = hidden, starts if stream else np.concatenate([starts, at])
            else:
                wide, fresh = hidden[:, : call.wide], hidden[:, call.wide :]
                fresh_starts = at[: fresh.shape[1]]
        ends = torch.cat([wide, fresh], 1)
        return self._logits(torch.cat([ends[:, :1], control, ends[:, 1:]], 1), only), reached

    def _patch(
        self,
        entering: Float[Tensor, "pair token head dim"],
        layer: int,
        groups: Sequence[Sequence[Copy]],
        values: Values,
        overwrite: Overwrite,
    ) -> None:
        """Write values into the heads of copies that enter, in place."""
        low = 0
        for group in groups:
            new = values(layer, group[0])
            deep = min(new.shape[1], entering.shape[1] // sum(map(len, groups)))
            high = low + len(group) * deep
            chosen = torch.zeros(len(group), entering.shape[2], dtype=torch.bool)
            for row, copy in enumerate(group):
                chosen[row, copy.head] = copy.head >= 0  # the control is not patched
            target = entering[:, low:high].view(len(entering), len(group), deep, *entering.shape[2:])
            overwrite(target, chosen.to(entering.device), new[:, -deep:])
            low = high

    def _call(
        self, layer: int, hidden: Float[Tensor, "pair token hidden"], call: _Call
    ) -> Float[Tensor, "pair token hidden"]:
        """Run a block on the tokens of copies."""
        own, inputs = self.model.sites.per_layer[layer], self.inputs[0][layer]
        late = call.at[: hidden.shape[1]] - self.first
        args, kwargs = with_stream(self._cut(inputs.args, late), self._cut(inputs.kwargs, late), hidden)
        calls: list[nn.Module] = []

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **more: Any) -> Any:
            calls.append(module)
            return self._attend(layer, call, query, key, value, more.get("scaling"), more.get("softcap")), None

        with _attention_by(attend, self.model.forward.masks.attention), self._reusing(layer, call):
            out = own.block(*args, **kwargs)
        if len(calls) != 1:
            raise NotSupported("a block does not use the attention functions of transformers once")
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def _keys(self, layer: int, hidden: Float[Tensor, "pair token hidden"], call: _Call) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the control and the wide copies, [pair kv token dim]."""
        cache = self.inputs[1]
        cache.stops = True
        try:
            self._call(layer, hidden, call)
        except _Stop:
            return cache.last
        finally:
            cache.stops = False
        raise NotSupported("a block does not use its cache")

    def _logits(
        self, hidden: Float[Tensor, "pair copy hidden"], only: Int[Tensor, "pair token"] | None
    ) -> Float[Tensor, "pair copy vocab"]:
        """Apply what follows the last block."""
        model, n = self.model, hidden.shape[1]
        returned = {True: lambda *_, **__: (hidden,), False: lambda *_, **__: hidden}
        tokens = torch.zeros(len(hidden), n, dtype=torch.long, device=model.device)
        places = Places(torch.eye(n, dtype=torch.bool, device=model.device)[None], tokens[:1])
        blocks = {x.block: returned[x.returns_tuple] for x in model.sites.per_layer}
        with instead(blocks), read_out(model.model, lambda x: x, only):
            return model.forward.in_tree(tokens, places)

    def _cut(self, value: Any, late: Int[Tensor, " token"]) -> Any:
        """Return arguments of a block for tokens at some of the recorded positions."""
        if isinstance(value, tuple):
            return tuple([self._cut(v, late) for v in value])
        if isinstance(value, dict):
            return {k: self._cut(v, late) for k, v in value.items()}
        recorded = self.tokens.shape[1] - self.first
        if not isinstance(value, Tensor) or value.ndim > 3:
            return value  # masks too: `_attend` has them in `BlockInputs.hidden`
        if value.ndim > 1 and value.shape[1] == recorded:
            return value.index_select(1, late.to(value.device))
        return value[late.to(value.device)] if value.shape == (recorded,) else value

    @contextmanager
    def _reusing(self, layer: int, call: _Call) -> Iterator[None]:
        """Compute the projections before attention only for tokens whose input is not that of the base run."""
        n = call.changed if call.own is None else call.controls + call.wide
        if n == len(call.at):
            yield
            return
        late = call.at[n:] - self.first
        new = call.index(call.new + n)

        def reuse(whole: Callable[[Tensor], Tensor], base: Tensor) -> Callable[[Tensor], Tensor]:
            def project(x: Tensor) -> Tensor:
                if x.ndim != 3 or len(call.at) - x.shape[1] not in (0, call.entering):
                    return whole(x)
                computed = whole(torch.cat([x[:, :n], x.index_select(1, new)], 1))
                out = computed.new_empty(*x.shape[:2], computed.shape[2])
                out[:, :n] = computed[:, :n]
                torch.index_select(base, 1, late[: x.shape[1] - n], out=out[:, n:])
                out[:, new] = computed[:, n:]
                return out

            return project

        with instead({module: reuse(module.forward, base) for module, base in self.projected[layer].items()}):
            yield

    def _attend(
        self,
        layer: int,
        call: _Call,
        query: Float[Tensor, "pair head token dim"],
        key: Float[Tensor, "pair kv token dim"],
        value: Float[Tensor, "pair kv token dim"],
        scaling: float | None,
        softcap: float | None,
    ) -> Float[Tensor, "pair token head dim"]:
        """Return the attention of copies to the base run before them, and to their own tokens."""
        hidden, heads, length = self.inputs[0][layer].hidden, query.shape[1], self.tokens.shape[1]
        how = query.shape[-1] ** -0.5 if scaling is None else scaling, softcap
        key, value = (_repeated(x, heads) for x in (call.own or (key, value)))
        keys, values = (_repeated(x, heads) for x in self.keys[layer])
        hides = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)[self.first :]
        hides = hides if hidden is None else hidden

        # The control sees the source run's columns before it.
        m = length - call.control
        at = slice(call.control - self.first, None) if call.own is None else slice(-1, None)
        whole = [torch.cat([x[:, :, self.columns[:-m]], y[:, :, :m]], 2) for x, y in ((keys, key), (values, value))]
        out = [_partial(query[:, :, : call.controls], whole[0], whole[1], hides[at], False, *how)[0]]
        low, mine = call.controls, m
        for start, copies in call.starts:
            span = length - start
            deep = 1 if call.own is not None else span
            part = query[:, :, low : low + copies * deep]
            own = [_apart(x[:, :, mine : mine + copies * span], copies) for x in (key, value)]
            window = None if hidden is None else hidden[start - self.first :][-deep:]
            found, total = _partial(
                _apart(part, copies), own[0], own[1], None if window is None else window[:, start:],
                window is None and call.own is None, *how,
            )  # fmt: skip
            found, total = _together(found, copies), _together(total, copies)
            if start:
                hide = None if window is None else window[:, :start].repeat(copies, 1)
                more, other = _partial(part, keys[:, :, :start], values[:, :, :start], hide, False, *how)
                found = torch.lerp(found, more, torch.sigmoid(other - total)[..., None].to(found.dtype))
            out.append(found)
            low, mine = low + copies * deep, mine + copies * span
        for start, tokens, copies in call.entered:  # whose queries are equal
            part, end = query[:, :, low : low + tokens], start + tokens
            hide = hides[start - self.first : end - self.first, :end] if tokens > 1 or hidden is not None else None
            found, _ = _partial(part, keys[:, :, :end], values[:, :, :end], hide, False, *how)
            out.append(found.repeat(1, 1, copies, 1))
            low += copies * tokens
        return torch.cat(out, 2).transpose(1, 2)


@contextmanager
def _attention_by(attend: Callable[..., Any], names: Sequence[str]) -> Iterator[None]:
    """Let models compute attention by another function instead of those of transformers of some names."""
    with LOCK, ExitStack() as stack:
        local = ALL_ATTENTION_FUNCTIONS._local_mapping
        for name in names:
            before = local.get(name)
            local[name] = attend
            stack.callback(local.pop, name) if before is None else stack.callback(local.__setitem__, name, before)
        yield


def _repeated(x: Float[Tensor, "pair kv token dim"], heads: int) -> Float[Tensor, "pair head token dim"]:
    """Return keys or values for each query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _apart(x: Float[Tensor, "pair head token dim"], copies: int) -> Float[Tensor, "row head token dim"]:
    """Return the tokens of copies side by side, one copy in each row."""
    pairs, heads, _, dim = x.shape
    return x.reshape(pairs, heads, copies, -1, dim).transpose(1, 2).flatten(0, 1)


def _together(x: Float[Tensor, "row head token ..."], copies: int) -> Float[Tensor, "pair head token ..."]:
    """Undo `_apart`."""
    return x.reshape(-1, copies, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def _partial(
    query: Float[Tensor, "row head token dim"],
    key: Float[Tensor, "row head column dim"],
    value: Float[Tensor, "row head column out"],
    hide: Bool[Tensor, "*row token column"] | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Tensor, "row head token out"], Float[Tensor, "row head token"]]:
    """Return attention to some columns, and the logarithm of the sum over them, by which several can be combined.

    Args:
        query: queries.
        key: keys.
        value: values.
        hide: the columns that each token may not attend to.
        causal: hide later columns; tokens and columns are the same.
        scale: factor of the scores.
        softcap: bound of the scores, as Gemma-2 has it.
    """
    hide = hide if hide is None or hide.ndim == 2 else hide[:, None]
    if query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]:
        mask = None if hide is None else torch.zeros(hide.shape, dtype=query.dtype).masked_fill_(hide, -math.inf)
        mask = mask if mask is None or mask.ndim == 4 else mask[None, None]
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, total = attend(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    else:
        scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
        scores = scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)
        if causal:
            scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1), -math.inf)
        if hide is not None:
            scores.masked_fill_(hide, -math.inf)
        total = scores.logsumexp(-1)
        out = (scores - total[..., None]).exp_().nan_to_num_().to(value.dtype) @ value
    if hide is not None and hide[..., 0].any():  # not so in most calls
        total = total.masked_fill(hide.all(-1), -math.inf)
    return out, total
