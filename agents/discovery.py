"""Find the blocks of a model, and in each block the modules whose activations are read and patched.

Nothing is looked up by architecture. Blocks are the list of modules that a forward pass calls one after another with a
residual stream of one width. In a block, `agents.tracing` says which modules' outputs add up to what the block adds
to the stream, and which linear layer reads the concatenated heads of attention. Modules that cannot be verified in a
short forward pass are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nextstate.agents import tracing
from nextstate.agents.agent import AgentError
from nextstate.agents.residual import is_attention, layer_kind, residual_terms
from nextstate.agents.tracing import BlockCall, Call

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_head", "attention_heads")


class SiteError(AgentError):
    """A model has no such site, layer or head, or a named module does not have the expected role."""


@dataclass(frozen=True)
class ModuleMap:
    """The names of a model's modules, for models whose modules cannot be found automatically.

    Args:
        blocks: path of the list of decoder blocks in the model.
        attention: path of the attention module in a block; "" where there is none.
        projection: path of the output projection in the attention module; "" where heads cannot be read.
        mlp: path of the MLP, or of its last layer, in a block; "" where there is none.
        attn_out: path in a block of the module whose output is added to the residual stream; default: attention.
        mlp_out: likewise for the MLP; default: the MLP.
        adds: whether each block's output is `resid_pre + attn_out + mlp_out` (false where a norm follows the addition).
    """

    blocks: str
    attention: str
    projection: str
    mlp: str
    attn_out: str = ""
    mlp_out: str = ""
    adds: bool = True


@dataclass(frozen=True)
class LayerSites:
    """The sites of one layer.

    Attributes:
        kind: what mixes tokens in this layer: "attention", or for example "linear_attention", "mamba" or "conv".
        block: the decoder block.
        attention: the attention module; None where the layer has none.
        projection: attention's output projection, whose input is the heads side by side; None if that is not proved.
        heads: number of query heads; 0 without `projection`.
        head_dim: width of each head in the projection's input; 0 without `projection`.
        attn_out: the module whose output the mixer (attention or what stands in its place) adds to the residual
            stream, after a norm if there is one; None if that is not proved.
        mlp_out: likewise for the MLP.
        multiplier: the factor that both are multiplied by when they are added; usually 1.
        adds: whether the block's output is `resid_pre + multiplier * (attn_out + mlp_out)`.
        returns_tuple: whether the block returns a tuple that starts with the residual stream, not the stream itself.
    """

    kind: str
    block: nn.Module = field(repr=False)
    attention: nn.Module | None = field(repr=False)
    projection: nn.Module | None = field(repr=False)
    heads: int
    head_dim: int
    attn_out: nn.Module | None = field(repr=False)
    mlp_out: nn.Module | None = field(repr=False)
    multiplier: float
    adds: bool
    returns_tuple: bool


def discover(model: Any, names: ModuleMap | None) -> tuple[tuple[LayerSites, ...], int]:
    """Find and verify the sites of all layers; return them and the width of the residual stream.

    Args:
        model: a causal Hugging Face model.
        names: names of its modules; found automatically if None.

    Raises:
        SiteError: no list of blocks is found, or a module that `names` gives fails a check.
    """
    config = model.config.get_text_config()
    with tracing.quiet(model):
        blocks, calls = _blocks(model) if names is None else _named_blocks(model, names)
        found = list[LayerSites]()
        for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
            if names is None:
                found.append(_layer(config, index, block, call))
            else:
                found.append(_named_layer(config, names, index, block, call))
        assert calls[0].stream is not None
        return tuple(found), calls[0].stream.shape[-1]


def _blocks(model: Any) -> tuple[tuple[nn.Module, ...], list[BlockCall]]:
    config = model.config.get_text_config()
    counts = {n for key in _COUNTS if isinstance(n := getattr(config, key, None), int) and n}
    lists = {p: m for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) in counts}
    lists = {p: m for p, m in lists.items() if not any(p.startswith(f"{other}.") for other in lists)}
    modules = [block for blocks in lists.values() for block in blocks]
    calls = tracing.call_blocks(model, modules) if modules else []
    found, reasons, at = list[tuple[int, tuple[nn.Module, ...], list[BlockCall]]](), list[str](), 0
    for path, blocks in lists.items():
        own = [(i - at, call) for i, call in calls if at <= i < at + len(blocks)]
        at += len(blocks)
        problem = _problem(own, len(blocks))
        if problem:
            reasons.append(f"{path} {problem}")
        else:
            size = sum(p.numel() for p in blocks.parameters())
            found.append((size, tuple(blocks), [call for _, call in own]))
    if not found:
        why = "; ".join(reasons) or f"it has no list of {' or '.join(map(str, sorted(counts))) or 'its'} modules"
        raise SiteError(
            f"no decoder blocks found in {type(model).__name__} ({config.model_type}): {why}. If it has some, name "
            'its modules: Sites.of(model, ModuleMap(blocks="model.layers", attention="self_attn", projection="o_proj", '
            'mlp="mlp"))'
        )
    _, chosen, of_chosen = max(found, key=lambda f: f[0])
    return chosen, of_chosen


def _problem(calls: Sequence[tuple[int, BlockCall]], blocks: int) -> str:
    """Return why modules are not the decoder blocks of a model, or ""."""
    if [i for i, _ in calls] != list(range(blocks)):
        return "is not called one after another, each module once" if calls else "is never called"
    shapes = set[torch.Size]()
    for index, call in calls:
        out = tracing.first_tensor(call.output)
        if call.stream is None or out is None or not call.stream.is_floating_point():
            return f"does not hand hidden states on at {index}"
        shapes |= {call.stream.shape, out.shape}
    (shape, *others) = shapes
    if others or len(shape) != 3 or shape[:2] != (tracing.ROWS, tracing.TOKENS):
        words = ", ".join(str(list(s)) for s in sorted(shapes))
        return f"hands on no stream of [row, token, hidden], the same in all layers, but {words}"
    return ""


def _layer(config: Any, index: int, block: nn.Module, call: BlockCall) -> LayerSites:
    calls, after = tracing.record(block, call)
    assert call.stream is not None
    heads = _heads(block, calls)
    kind = layer_kind(config, index, block, calls, heads is not None)
    attention, projection, count = heads or (_attention(kind, calls), None, 0)
    width = 0 if projection is None or projection.read is None else projection.read.shape[-1]
    sums = residual_terms(block, config, calls, call.stream, after)
    return LayerSites(
        kind=kind,
        block=block,
        attention=attention.module if attention else None,
        projection=projection.module if projection else None,
        heads=count,
        head_dim=width // count if count else 0,
        attn_out=sums.attn_out,
        mlp_out=sums.mlp_out,
        multiplier=sums.multiplier,
        adds=sums.adds,
        returns_tuple=isinstance(call.output, tuple | list),
    )


# Heads


def _heads(block: nn.Module, calls: Sequence[Call]) -> tuple[Call, Call, int] | None:
    """Return a block's outermost attention module that ends in a projection of heads, the projection, and how many.

    Of the linear layers that return the stream's width the last one called must give attention's output. Heads are
    counted by silencing them.
    """
    found: list[tuple[Call, Call, int]] = []
    for attention in sorted(calls, key=lambda c: c.depth):
        inside = [c for c in calls if c.path.startswith(f"{attention.path}.") and tracing.is_linear(c.module)]
        inside = [c for c in inside if c.read is not None and c.output is not None]
        if not inside or attention.output is None or not is_attention(attention):
            continue
        last = max(inside, key=lambda c: c.end)
        if last.output is None or not tracing.close(attention.output, last.output):
            continue
        count = tracing.measured_heads(attention, last)
        if count and tracing.is_sum_of_heads(last, count) and all(last is not f[1] for f in found):
            found.append((attention, last, count))
    return found[0] if len(found) == 1 else None  # whose heads they are would be unclear with two


def _attention(kind: str, calls: Sequence[Call]) -> Call | None:
    """Return the outermost attention module of a layer of attention whose heads cannot be read."""
    found = [c for c in calls if kind == "attention" and is_attention(c)]
    return min(found, key=lambda c: c.depth, default=None)


# Modules that the user names


def _named_blocks(model: Any, names: ModuleMap) -> tuple[tuple[nn.Module, ...], list[BlockCall]]:
    blocks = tuple(_need(model, names.blocks).children())
    if not blocks:
        raise SiteError(f"{names.blocks!r} of {type(model).__name__} has no blocks in it")
    for path in filter(None, (names.attention, names.attn_out, names.mlp, names.mlp_out)):
        if all(_child(block, path) is None for block in blocks):
            _need(blocks[0], path)
    calls = tracing.call_blocks(model, blocks)
    problem = _problem(calls, len(blocks))
    if problem:
        raise SiteError(f"{names.blocks!r} of {type(model).__name__} {problem}")
    return blocks, [call for _, call in calls]


def _named_layer(config: Any, names: ModuleMap, index: int, block: nn.Module, call: BlockCall) -> LayerSites:
    calls, after = tracing.record(block, call)
    by_path: Mapping[str, Call] = {c.path: c for c in calls}
    where = f"{config.model_type}, layer {index}"
    attention = _child(block, names.attention) if names.attention else None
    projection, heads, width = None, 0, 0
    if attention is not None and names.projection:
        projection = _need(attention, names.projection)
        outer, inner = (_called(by_path, p, where) for p in (names.attention, f"{names.attention}.{names.projection}"))
        heads, width = _named_heads(config, names, outer, inner, where)
    attn_path = names.attn_out or (names.attention if attention is not None else "")
    mlp_path = names.mlp_out or names.mlp
    paths = [p for p in (attn_path, mlp_path) if p and (p == mlp_path or _child(block, p) is not None)]
    for path in paths:
        _need(block, path)
    terms = [_called(by_path, p, where).output for p in paths]
    multiplier = 1.0
    if names.adds:
        assert call.stream is not None
        factors = [1.0, float(getattr(config, "residual_multiplier", None) or 1.0)]
        sums = [m for m in factors if tracing.adds_up(call.stream, after, [t for t in terms if t is not None], m)]
        if not sums or any(t is None for t in terms):
            raise SiteError(
                f"{where}: resid_pre + attn_out + mlp_out is not the block's output (if a norm follows, say adds=False)"
            )
        multiplier = sums[0]
    return LayerSites(
        kind=layer_kind(config, index, block, calls, heads > 0),
        block=block,
        attention=attention,
        projection=projection,
        heads=heads,
        head_dim=width // heads if heads else 0,
        attn_out=_child(block, attn_path) if attn_path else None,
        mlp_out=_child(block, mlp_path) if mlp_path else None,
        multiplier=multiplier,
        adds=names.adds,
        returns_tuple=isinstance(call.output, tuple | list),
    )


def _named_heads(config: Any, names: ModuleMap, attention: Call, projection: Call, where: str) -> tuple[int, int]:
    if projection.read is None or projection.output is None or attention.output is None:
        raise SiteError(f"{where}: {names.projection!r} is no linear layer that returns the stream's width")
    if not tracing.close(attention.output, projection.output):
        raise SiteError(f"{where}: attention's output is not that of its output projection {names.projection!r}")
    width = projection.read.shape[-1]
    count = tracing.measured_heads(attention, projection)
    if count is None:  # attention by other means than torch's: how many heads there are is the config's to say
        given = (getattr(owner, key, None) for owner in (attention.module, config) for key in _HEADS)
        count = next((n for n in given if isinstance(n, int) and n > 0), 0)
    if not count or width % count:
        raise SiteError(f"{where}: what {names.projection!r} reads ({width} numbers) is not heads side by side")
    if not tracing.is_sum_of_heads(projection, count):
        raise SiteError(f"{where}: the sum of what heads contribute is not the output of {names.projection!r}")
    return count, width


def _called(calls: Mapping[str, Call], path: str, where: str) -> Call:
    if path not in calls:
        raise SiteError(f"{where}: {path!r} is not called exactly once in a forward pass; check the name")
    return calls[path]


def _child(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _need(root: nn.Module, path: str) -> nn.Module:
    found = _child(root, path)
    if found is None:
        names = ", ".join(n for n, _ in root.named_children()) or "nothing"
        raise SiteError(f"{type(root).__name__} has no module {path!r}: it holds {names}")
    return found
