"""Run the blocks of a model on a few tokens and record what their modules read and return.

What `agents.discovery` finds rests on the functions here: they compare recorded tensors and repeat parts of the pass.
Comparisons of sums are elementwise, within the rounding error of the numbers that are added.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ROWS, TOKENS = 2, 11  # of the pass that is recorded
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class BlockCall:
    """How a model called one of its blocks, and what came out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: Tensor | None  # the first tensor that it was given
    output: Any


@dataclass(frozen=True)
class Call:
    """What a module inside a block read and returned; the tensors are copies."""

    path: str  # in the block
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    read: Tensor | None
    output: Tensor | None
    start: int  # order of events in the block
    end: int

    @property
    def depth(self) -> int:
        """Return 1 for a direct child of the block, 2 for its children, and so on."""
        return self.path.count(".") + 1


def first_tensor(value: Any) -> Tensor | None:
    """Return the tensor that a module returned, or the first item where it returned several."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def stream_key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    """Return where the hidden states are among a module's arguments: an index, a keyword, or None."""
    if args and isinstance(args[0], Tensor):
        return 0
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    return next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()), None)


def given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden states among a module's arguments."""
    key = stream_key(args, kwargs)
    found = args[key] if isinstance(key, int) else None if key is None else kwargs[key]
    return found if isinstance(found, Tensor) else None


def with_stream(
    args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a module's arguments with other hidden states."""
    key = stream_key(args, kwargs)
    return ((stream, *args[1:]), kwargs) if key == 0 else (args, {**kwargs, str(key): stream})


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Disable dropout and gradients until the context is closed."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def call_blocks(model: Any, blocks: Sequence[nn.Module]) -> list[tuple[int, BlockCall]]:
    """Run a few tokens through the model; return the calls of `blocks`, by their index, in the order of the calls."""
    calls: list[tuple[int, BlockCall]] = []
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            begun: list[Tensor | None] = []

            def enter(
                _: nn.Module, args: Any, kwargs: Any, begun: list[Tensor | None] = begun
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                x = given(args, kwargs)
                begun.append(None if x is None else x.clone())
                return args, kwargs

            def leave(
                _: nn.Module, args: Any, kwargs: Any, out: Any, index: int = index, begun: list[Tensor | None] = begun
            ) -> None:
                calls.append((index, BlockCall(args, kwargs, begun.pop(), out)))

            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave, with_kwargs=True).remove)
        table = model.get_input_embeddings().weight
        ids = (torch.arange(ROWS * TOKENS, device=table.device) + 3).view(ROWS, TOKENS) % table.shape[0]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        known = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
        model(**{k: v for k, v in inputs.items() if open_ended or k in known})
    return calls


def record(block: nn.Module, call: BlockCall) -> tuple[list[Call], Tensor]:
    """Repeat a call of a block; return the calls inside it of modules called just once, and the block's output."""
    assert call.stream is not None
    calls: list[Call] = []
    clock, size = [0], call.stream.numel()

    def copy(x: Tensor | None, always: bool) -> Tensor | None:
        return x.clone() if x is not None and x.is_floating_point() and (always or x.numel() == size) else None

    with ExitStack() as stack:
        for path, module in block.named_modules():
            if not path:
                continue
            begun: list[tuple[int, Tensor | None]] = []

            def enter(
                module: nn.Module, args: Any, kwargs: Any, begun: list[tuple[int, Tensor | None]] = begun
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                begun.append((clock[0], copy(given(args, kwargs), is_linear(module))))
                clock[0] += 1
                return args, kwargs

            def leave(
                module: nn.Module,
                args: Any,
                kwargs: Any,
                out: Any,
                path: str = path,
                begun: list[tuple[int, Tensor | None]] = begun,
            ) -> None:
                start, read = begun.pop()
                calls.append(Call(path, module, args, kwargs, read, copy(first_tensor(out), False), start, clock[0]))
                clock[0] += 1

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        args, kwargs = with_stream(call.args, call.kwargs, call.stream.clone())
        out = first_tensor(block(*args, **kwargs))
    assert out is not None
    times = Counter(c.path for c in calls)
    return [c for c in calls if times[c.path] == 1], out.clone()


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer: of torch, GPT-2's Conv1D, or a quantized one."""
    return hasattr(module, "in_features") or (hasattr(module, "nx") and hasattr(module, "nf"))


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Say whether two tensors of as many numbers are the same up to what their dtype allows."""
    if ours.numel() != theirs.numel():
        return False
    tolerance = max(_TOLERANCE.get(dtype, 5e-2) for dtype in (ours.dtype, theirs.dtype))
    ours, theirs = _double(ours), _double(theirs)
    return bool((ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max())))


def adds_up(before: Tensor, after: Tensor, terms: Sequence[Tensor], multiplier: float = 1.0) -> bool:
    """Say whether `after` is `before` plus the multiplied terms, each element within its rounding error.

    Each addition and multiplication rounds by half an eps of its result; all of them together, by less than one eps of
    the sum of all magnitudes. Numbers much smaller than the mean are held to a thousandth of it.
    """
    eps = max(torch.finfo(t.dtype).eps for t in (before, after, *terms))
    total, scale = _double(before), _double(before).abs() + _double(after).abs()
    for term in terms:
        total, scale = total + multiplier * _double(term), scale + abs(multiplier) * _double(term).abs()
    scale = scale + 1e-3 * scale.mean()
    return bool(((total - _double(after)).abs() <= eps * scale).all())


def find_terms(
    before: Tensor, after: Tensor, calls: Sequence[Call], multipliers: Sequence[float]
) -> tuple[tuple[Call, ...], float] | None:
    """Return the shallowest one or two calls whose outputs, multiplied, lead from `before` to `after`.

    All pairs are compared at once by their inner products, weighted so that an element counts by its rounding error.
    Those that come as near as the nearest are then proved one by one, direct children of the block first.
    """
    if not calls:
        return None
    eps = max(torch.finfo(t.dtype).eps for t in (before, after))
    x, y = _double(before), _double(after)
    weight = 1 / (x.abs() + y.abs() + 1e-3 * y.abs().mean() + 1e-30)
    outputs = torch.stack([_double(c.output) * weight for c in calls if c.output is not None])
    change = (y - x) * weight
    gram, along, size = outputs @ outputs.T, outputs @ change, float(change @ change)
    own, n = gram.diagonal(), len(calls)
    scored: list[tuple[float, float, tuple[int, ...]]] = []
    for multiplier in multipliers:
        single = size + multiplier**2 * own - 2 * multiplier * along
        double = size + multiplier**2 * (own[:, None] + 2 * gram + own) - 2 * multiplier * (along[:, None] + along)
        scored += [(float(e), multiplier, (i,)) for i, e in enumerate(single)]
        scored += [(float(double[i, j]), multiplier, (i, j)) for i in range(n) for j in range(i + 1, n)]
    errors = [max(e, 0.0) / len(x) for e, _, _ in scored]
    least = max(2 * min(errors), eps**2)  # mean squares
    near = [(m, [calls[i] for i in which]) for e, (_, m, which) in zip(errors, scored, strict=True) if e <= least]
    near.sort(
        key=lambda f: (max(c.depth for c in f[1]), len(f[1]), sum(c.depth for c in f[1]), f[1][0].end, f[1][-1].end)
    )
    for multiplier, found in near[:64]:
        if adds_up(before, after, [c.output for c in found if c.output is not None], multiplier):
            return tuple(sorted(found, key=lambda c: c.end)), multiplier
    return None


class _Silence(TorchFunctionMode):
    """Count the heads of each attention over tokens, and let some of them attend to nothing."""

    def __init__(self, silent: Bool[Tensor, " head"] | None = None) -> None:
        super().__init__()
        self.silent, self.counts = silent, list[int]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention:
            return self._silenced(out)
        softmax = func in (torch.softmax, nn.functional.softmax, Tensor.softmax)
        return self._silenced(out) if softmax and out.ndim > 2 and out.shape[-1] >= TOKENS else out

    def _silenced(self, out: Tensor) -> Tensor:
        heads, left = divmod(out.numel(), ROWS * out.shape[-2] * out.shape[-1])
        if out.shape[-2] != TOKENS or left or out.shape[0] not in (ROWS, ROWS * heads):
            return out
        self.counts.append(heads)
        if self.silent is None or len(self.silent) != heads:
            return out
        return (
            out.reshape(ROWS, heads, *out.shape[-2:])
            .masked_fill(self.silent.to(out.device)[None, :, None, None], 0)
            .view(out.shape)
        )


def measured_heads(attention: Call, projection: Call) -> int | None:
    """Return the number of heads that are concatenated in the input of an attention module's projection.

    The attention module is repeated with some of its heads silenced: just their part of the input must become zero.

    Returns:
        The number; 0 where heads are mixed or in another order; None where no attention over tokens is seen.
    """

    def projected(silent: Bool[Tensor, " head"] | None) -> tuple[Tensor, list[int]]:
        seen: list[Tensor] = []
        with ExitStack() as stack:
            hook = projection.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
            stack.callback(hook.remove)
            mode = stack.enter_context(_Silence(silent))
            attention.module(*attention.args, **attention.kwargs)
        return seen[0].reshape(-1, seen[0].shape[-1]), mode.counts

    plain, counts = projected(None)
    if not counts:
        return None
    heads, width = counts[-1], plain.shape[-1]
    if projection.read is None or width % heads or not close(plain, projection.read):
        return 0
    owner, used = torch.arange(width, device=plain.device) // (width // heads), plain.ne(0).any(0)
    for bit in range(max(1, (heads - 1).bit_length())):
        for value in (0, 1):  # so that a column shared by two heads is detected
            silent = (torch.arange(heads, device=plain.device) >> bit) % 2 == value
            zero = projected(silent)[0].eq(0).all(0)
            if not torch.equal(zero[used], silent[owner][used]):
                return 0
    return heads


def is_sum_of_heads(projection: Call, heads: int) -> bool:
    """Say whether a projection's output is the sum of what it makes of each head alone."""
    assert projection.read is not None
    assert projection.output is not None
    z = projection.read.reshape(ROWS * TOKENS, heads, -1)[:TOKENS]
    alone = torch.eye(heads, device=z.device, dtype=z.dtype)[:, None, :, None] * z  # [head, token, head, dim]
    bias = projection.module(torch.zeros_like(z.flatten(1)))
    parts: Float[Tensor, "token hidden"] = (projection.module(alone.flatten(2)) - bias).sum(0) + bias
    return close(parts, projection.output.reshape(ROWS * TOKENS, -1)[:TOKENS])


def _double(x: Tensor | None) -> Float[Tensor, " number"]:
    assert x is not None
    return x.detach().cpu().double().flatten()
