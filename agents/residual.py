"""Find out what mixes tokens in a block, and which modules' outputs it adds to the residual stream."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nextstate.agents import tracing
from nextstate.agents.tracing import Call

_KINDS = ("layers_block_type", "layer_types", "block_types")
_ATTENTION = re.compile(r"attention|attn|MLA$", re.IGNORECASE)
_NO_MIXER = re.compile(r"norm|mlp|moe|feed_?forward|expert|rotary", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|moe", re.IGNORECASE)
# What else mixes tokens, by the names of classes: the kind of layer they make.
_MIXERS = {
    "linear_attention": re.compile(r"linear_?att|lightning|delta", re.IGNORECASE),
    "mamba": re.compile(r"mamba|ssm|ssd", re.IGNORECASE),
    "recurrent": re.compile(r"rwkv|recurrent|lstm|rglru", re.IGNORECASE),
    "conv": re.compile(r"shortconv", re.IGNORECASE),
}
_LAST = sys.maxsize  # when a block returns
_IDLE = (nn.Dropout, nn.Identity)  # do nothing in a model that is not being trained


def layer_kind(config: Any, index: int, block: nn.Module, calls: Sequence[Call], heads: bool) -> str:
    """Return what mixes tokens in a layer, as the classes of its modules say it, or else the config.

    The config comes second since its lists call all that keeps a state "linear_attention", Mamba too.
    """
    listed = next((v for v in (getattr(config, key, None) for key in _KINDS) if v), None)
    own = str(listed[index]) if listed is not None and len(listed) > index else ""
    if heads or own == "hybrid":
        return own if own == "hybrid" else "attention"
    mixers = sorted((c for c in calls if _is_mixer(block, c)), key=lambda c: c.depth)
    called = [f"{_own_name(block, c)} {c.path}" for c in mixers] + [type(c.module).__name__ for c in mixers]
    found = [kind for name in called for kind, words in _MIXERS.items() if words.search(name)]
    if found:
        return found[0]
    if not mixers:
        return "mlp"
    return "attention" if _ATTENTION.search(own) and "linear" not in own else own or "attention"


def _own_name(block: nn.Module, call: Call) -> str:
    """Return a module's class name without the architecture's name, which may itself speak of mixers or experts."""
    name = type(call.module).__name__
    own, outer = list(name), list(type(block).__name__)
    while own and outer and own[0] == outer[0]:
        own, outer = own[1:], outer[1:]
    return "".join(own)


def is_attention(call: Call) -> bool:
    """Say whether a module is attention, by its class's name or because it holds projections for query, key, value."""
    if _ATTENTION.search(type(call.module).__name__):
        return True
    return {"q_proj", "k_proj", "v_proj"} <= {name for name, _ in call.module.named_children()}


def _is_mixer(block: nn.Module, call: Call) -> bool:
    if _NO_MIXER.search(_own_name(block, call)):
        return False
    name = type(call.module).__name__
    return is_attention(call) or "Mixer" in name or any(words.search(name) for words in _MIXERS.values())


# What is added to the stream


@dataclass(frozen=True)
class Terms:
    """The modules whose outputs a block adds to the stream, as `agents.discovery.LayerSites` has them."""

    attn_out: nn.Module | None = None
    mlp_out: nn.Module | None = None
    multiplier: float = 1.0
    adds: bool = False


def residual_terms(block: nn.Module, config: Any, calls: Sequence[Call], before: Tensor, after: Tensor) -> Terms:
    """Return the modules whose outputs a block adds to the stream."""
    own = {float(v) for v in vars(block).values() if isinstance(v, float) and v}
    multipliers = [1.0, *sorted((own | {float(getattr(config, "residual_multiplier", None) or 1.0)}) - {1.0})]
    reads = [(c.start, c.read) for c in calls if c.read is not None and c.read.numel() == before.numel()]
    calls = sorted((c for c in calls if c.output is not None and not isinstance(c.module, _IDLE)), key=lambda c: c.end)
    mixing = {c.path for c in calls if _mixes(block, c, calls)}
    found = tracing.find_terms(before, after, calls, multipliers)
    if found is not None:
        terms, multiplier = found
        mixers, others = [c for c in terms if c.path in mixing], [c for c in terms if c.path not in mixing]
        if len(mixers) < 2 and len(others) < 2:
            others = others or [c for c in calls if c.depth == 1 and _is_silent_mlp(c)][:1]
            attn_out, mlp_out = (c[0].module if c else None for c in (mixers, others))
            return Terms(attn_out, mlp_out, multiplier, True)
    return _steps(block, calls, mixing, [(-1, before), *reads, (_LAST, after)], multipliers)


def _is_silent_mlp(call: Call) -> bool:
    """Say whether a call is an MLP's that returned zeros, so that the sum holds with it as well as without."""
    name = f"{type(call.module).__name__} {call.path}"
    return _MLP.search(name) is not None and call.output is not None and not call.output.any()


def _mixes(block: nn.Module, call: Call, calls: Sequence[Call]) -> bool:
    """Say whether a call is a mixer's, contains or is inside one, or reads just what such a call returned."""
    for mixer in calls:
        if _is_mixer(block, mixer) and (
            call.path == mixer.path or call.path.startswith(f"{mixer.path}.") or mixer.path.startswith(f"{call.path}.")
        ):
            return True
    if call.read is None:
        return False
    earlier = (
        c for c in calls if c.end < call.start and c.output is not None and c.output.numel() == call.read.numel()
    )
    return any(
        torch.equal(c.output.flatten(), call.read.flatten()) and _mixes(block, c, calls)
        for c in earlier
        if c.output is not None
    )


def _steps(
    block: nn.Module,
    calls: Sequence[Call],
    mixing: set[str],
    states: Sequence[tuple[int, Tensor]],
    multipliers: Sequence[float],
) -> Terms:
    """Return what is added where a block's output is not the sum (a norm follows, or there are more terms).

    A term is proved if it leads from one state of the stream to another. States are the block's input and output, and
    what modules in it read, with the times of reading.
    """
    mixers = [c for c in calls if _is_mixer(block, c)]
    mixers = [c for c in mixers if not any(c.path.startswith(f"{other.path}.") for other in mixers)]
    if len({type(c.module) for c in mixers}) < len(mixers):
        return Terms()  # two of a kind: which of them would be meant is unclear

    def leads(call: Call, starts: Sequence[tuple[int, Tensor]], multiplier: float) -> bool:
        ends = [(at, x) for at, x in states if at > call.end]
        return call.output is not None and any(
            at <= call.start and tracing.adds_up(x.flatten(), y.flatten(), [call.output.flatten()], multiplier)
            for at, x in starts
            for _, y in ends
        )

    ordered = sorted(calls, key=lambda c: (c.depth, c.end))
    for multiplier in multipliers:
        mixer = next((c for c in ordered if c.path in mixing and leads(c, states, multiplier)), None)
        begin = mixer.end if mixer else -1
        rest = [c for c in ordered if c.path not in mixing and c.start > begin]
        starts = [(at, x) for at, x in states if at >= begin]
        mlp = next((c for c in rest if leads(c, starts, multiplier)), None)
        if mixer or mlp:
            return Terms(mixer.module if mixer else None, mlp.module if mlp else None, multiplier)
    return Terms()
