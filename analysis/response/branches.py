"""Batched forward passes for responses: many pushed copies of a prompt at a time.

A push at position j changes only the tokens from j on. On the tree road these tokens form a branch, which attends to
the keys and values of the prompt before j. A row holds branches of many positions and directions; a mask hides them
from each other. On all other roads a row is one branch: the whole prompt, pushed at one position. The same row is run
once for each strength, so that responses to consecutive strengths can be compared token by token. The first pass has
one more row without a push, a control: it must reproduce the residual stream of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from nextstate.agents.agent import AgentError
from nextstate.agents.forward import instead, out_of_memory, skipping
from nextstate.agents.language import LanguageModel
from nextstate.agents.sites import ATTENTIONS, Activation
from nextstate.analysis.heads.copies import watch_projections
from nextstate.analysis.heads.sweep import Held, tree_pass

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 5e-1}
LIMIT = (0.0,)  # the strengths of the exact product
_CPU_TOKENS = 512  # per pass: larger passes exceed the CPU cache and are slower per token


class ResponseError(AgentError):
    """A response cannot be measured; the message names the given value, the expected ones and what to do."""


class _Push(NamedTuple):
    """A pushed position, the direction, and the first column of its branch in a row."""

    position: int  # index into the positions
    direction: int
    start: int


class Row(NamedTuple):
    """The columns of a row: position and direction of the branch, token of the prompt, first column of each branch."""

    positions: Int[np.ndarray, " column"]
    directions: Int[np.ndarray, " column"]
    targets: Int[np.ndarray, " column"]
    first: Int[np.ndarray, " branch"]
    visible: Bool[Tensor, "column cached_or_column"] | None  # None if the row is one branch, the whole prompt


@dataclass(frozen=True)
class Base:
    """The run of the prompt without a push."""

    tokens: Int[Tensor, " token"]
    cache: list[tuple[Tensor, Tensor]]  # only on the tree road
    projected: dict[nn.Module, Float[Tensor, "1 token out"]]  # of projections before attention in the injected layer
    stream: list[Float[Tensor, "token hidden"]]  # from the injected layer on


def dtype_of(model: LanguageModel) -> str:
    """Return the name of the model's precision."""
    return str(model.model.dtype).removeprefix("torch.")


def difference_dtype(model: LanguageModel) -> torch.dtype:
    """Return the dtype in which differences are computed."""
    return torch.float64 if model.model.dtype == torch.float64 else torch.float32


def rows_of(spans: Sequence[int], ways: int, length: int) -> list[Row]:
    """Pack the branches of all positions and directions into few rows, longest first."""
    width = max(spans)
    rows: list[list[_Push]] = []
    room: list[int] = []
    for position in sorted(range(len(spans)), key=lambda p: -spans[p]):
        for direction in range(ways):
            at = next((r for r, left in enumerate(room) if left >= spans[position]), len(rows))
            if at == len(rows):
                rows.append([])
                room.append(width)
            rows[at].append(_Push(position, direction, width - room[at]))
            room[at] -= spans[position]
    return [_laid_out(row, spans, length) for row in rows]


def whole_rows(spans: Sequence[int], ways: int, length: int) -> list[Row]:
    """Return one row for each position and direction, with the whole prompt."""
    targets = np.arange(length)
    return [
        Row(np.full(length, p), np.full(length, d), targets, np.array([length - spans[p]]), None)
        for p in range(len(spans))
        for d in range(ways)
    ]


def _laid_out(row: Sequence[_Push], spans: Sequence[int], length: int) -> Row:
    width = max(spans)
    visible = torch.zeros(width, length + width, dtype=torch.bool)
    visible[torch.arange(width), length + torch.arange(width)] = True  # a column that attends to nothing would be NaN
    parts = []
    for push in row:
        span = spans[push.position]
        own = slice(push.start, push.start + span)
        visible[own, : length - span] = True
        visible[own, length + push.start : length + own.stop] = torch.ones(span, span, dtype=torch.bool).tril()
        parts.append(np.stack([np.full(span, push.position), np.full(span, push.direction),
                               np.arange(length - span, length)]))  # fmt: skip
    positions, directions, targets = np.concatenate(parts, 1)
    return Row(positions, directions, targets, np.array([p.start for p in row]), visible)


@torch.no_grad()
def run_prompt(model: LanguageModel, tokens: Int[np.ndarray, " token"], layer: int, in_tree: bool) -> Base:
    """Run a prompt once; keep its residual stream from `layer` on, and in the tree its keys and values."""
    length, cache, stream, projected = len(tokens), DynamicCache(), list[Tensor](), dict[nn.Module, Tensor]()
    ids = torch.from_numpy(tokens).to(model.device)
    with ExitStack() as stack:
        for at in range(layer, model.sites.layers + 1):
            stack.enter_context(_stream(model, at, lambda x: stream.append(x[0])))
        if in_tree:
            visible = torch.ones(length, length, dtype=torch.bool).tril()
            columns = torch.arange(length, device=model.device)
            projected = stack.enter_context(watch_projections(model, columns))[layer]
            tree_pass(model, ids[None], visible[None], columns[None], cache, torch.tensor([0]), ids[:1, None])
        else:
            model.forward.plain(ids[None], [0], ids[:1, None])
    return Base(ids, [(held.keys, held.values) for held in cache.layers], projected, stream)


def _stream(model: LanguageModel, layer: int, look: Callable[[Float[Tensor, "row token hidden"]], None]) -> ExitStack:
    """Call `look` with the residual stream [row token hidden] before a block, or after the last one."""
    if layer < model.sites.layers:
        return model.sites.hook("resid_pre", layer, lambda x: look(x[:, :, 0]))
    stack = ExitStack()

    def leave(_: nn.Module, __: object, out: Tensor | tuple[Tensor, ...]) -> None:
        look(out[0] if isinstance(out, tuple) else out)

    stack.callback(model.sites.blocks[-1].register_forward_hook(leave).remove)
    return stack


def run_rows(
    model: LanguageModel,
    base: Base,
    rows: Sequence[Row],
    most: int,
    strengths: tuple[float, ...],
    push: Float[Tensor, "direction position hidden"],
    layer: int,
    value: Float[np.ndarray, "strength direction layer position target"],
    dots: Float[np.ndarray, "neighbour direction layer position target"],
) -> float:
    """Run all rows of a prompt; write the norms of differences, and their dot products with the next strength."""
    worst, k = 0.0, 0
    while k < len(rows):
        part = rows[k : k + most]
        try:
            worst = max(worst, _one_pass(model, base, part, strengths, push, layer, value, dots, k == 0))
            k += len(part)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if strengths == LIMIT and isinstance(error, NotImplementedError):
                first = str(error).splitlines()[0]
                raise ResponseError(
                    f"{model.name} cannot be differentiated: {first} Measure responses at finite strengths instead"
                ) from error
            if not out_of_memory(error):
                raise
            if len(part) == 1:
                raise ResponseError(
                    f"{model.name} runs out of memory on one row of {len(base.tokens):,} tokens at {len(strengths)} "
                    f"strengths on {model.device}; ask for fewer strengths"
                ) from error
            most = len(part) // 2
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
    return worst


@torch.no_grad()
def _one_pass(
    model: LanguageModel,
    base: Base,
    rows: Sequence[Row],
    strengths: tuple[float, ...],
    push: Float[Tensor, "direction position hidden"],
    layer: int,
    value: Float[np.ndarray, "strength direction layer position target"],
    dots: Float[np.ndarray, "neighbour direction layer position target"],
    control: bool,
) -> float:
    width, s, device = _width(rows), len(strengths), model.device
    limit = strengths == LIMIT
    targets = torch.zeros(len(rows), width, dtype=torch.int64)
    for r, row in enumerate(rows):
        targets[r, : len(row.targets)] = torch.from_numpy(row.targets)
    # With the control, the last row is a copy of the first one without a push.
    order = torch.cat([torch.arange(len(rows)).repeat_interleave(s), torch.zeros(int(control), dtype=torch.int64)])
    where = targets[order]
    start = base.stream[0][where.to(device)]
    moved = torch.zeros(len(rows), width, start.shape[-1], dtype=push.dtype, device=device)
    for r, row in enumerate(rows):
        first = torch.from_numpy(row.first)
        moved[r, first.to(device)] = push[row.directions[row.first], row.positions[row.first]]
    size = torch.tensor([1.0] if limit else strengths, dtype=push.dtype, device=device)
    moved = (moved[:, None] * size[:, None, None]).flatten(0, 1)
    moved = torch.cat([moved, torch.zeros_like(moved[: int(control)])])
    seen, worst = list[int](), 0.0

    def enter(x: Activation) -> Activation:
        if limit:
            dual: Tensor = forward_ad.make_dual(start, moved.to(start.dtype))  # type: ignore[no-untyped-call]
            return dual[:, :, None]
        return (start.to(moved.dtype) + moved).to(start.dtype)[:, :, None]

    def look(at: int, x: Float[Tensor, "row token hidden"]) -> None:
        nonlocal worst
        own = base.stream[at - layer][where.to(device)].to(moved.dtype)
        plain, tangent = forward_ad.unpack_dual(x) if limit else (x, None)  # type: ignore[no-untyped-call]
        change = plain.to(moved.dtype) - own
        if control:
            error = change[-1].norm(dim=-1) / own[-1].norm(dim=-1).clamp_min(1e-30)
            worst = max(worst, float(error[: len(rows[0].targets)].max()))
        if limit:
            change = torch.zeros_like(change) if tangent is None else tangent.to(change.dtype)
        change = change[: len(rows) * s].unflatten(0, (len(rows), s))
        sizes = change.norm(dim=-1).cpu().numpy()
        products = (change[:, :-1] * change[:, 1:]).sum(-1).cpu().numpy()
        for r, row in enumerate(rows):
            begin = 0 if row.visible is not None else int(row.first[0])  # before the push there is no response
            n, after = slice(begin, len(row.targets)), at - layer - 1
            place = (row.directions[begin:], after, row.positions[begin:], row.targets[begin:])
            value[:, *place] = sizes[r, :, n]
            dots[:, *place] = products[r, :, n]
        seen.append(at - 1)

    with ExitStack() as stack:
        if limit:
            stack.enter_context(forward_ad.dual_level())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if base.cache:
            stack.enter_context(skipping({x.block: x.returns_tuple for x in model.sites.per_layer[:layer]}))
        stack.enter_context(model.sites.hook("resid_pre", layer, enter))
        for at in range(layer + 1, model.sites.layers + 1):
            stack.enter_context(_stream(model, at, partial(look, at)))
        if base.cache:
            held = [(k.expand(len(order), -1, -1, -1), v.expand(len(order), -1, -1, -1)) for k, v in base.cache]
            visible = torch.stack([row.visible for row in rows if row.visible is not None])[order]
            depths = torch.cat([torch.arange(len(base.tokens)).expand(len(order), -1), where], 1)
            if not limit:
                stack.enter_context(_reusing(base.projected, where.to(device), [rows[r].first for r in order.tolist()]))
            tokens = base.tokens[where.to(device)]
            tree_pass(model, tokens, visible, depths, Held(held), torch.tensor([0]), tokens[:, :1])
        else:
            tokens = base.tokens[where.to(device)]
            model.forward.plain(tokens, [0], tokens[:, :1])
    limits = TOLERANCE.get(model.model.dtype, 5e-1)
    if seen != list(range(layer, model.sites.layers)) or not worst <= limits:
        raise ResponseError(
            f"control failed: branches without a push must equal the prompt after layers {layer} to "
            f"{model.sites.layers - 1}, but after layers {seen} they differ by {worst:.2g} of its norm (limit "
            f"{limits:.0e} in {dtype_of(model)}); {model.name} has an operation that branches do not support"
        )
    return worst


def _reusing(
    projected: dict[nn.Module, Float[Tensor, "1 token out"]],
    targets: Int[Tensor, "row column"],
    first: Sequence[Int[np.ndarray, " branch"]],
) -> AbstractContextManager[None]:
    """Compute projections before attention for the pushed tokens alone; for others they are those of the prompt."""
    rows = torch.arange(len(first)).repeat_interleave(torch.tensor([len(own) for own in first])).to(targets.device)
    columns = torch.from_numpy(np.concatenate(first)).to(targets.device)

    def reuse(whole: Callable[[Tensor], Tensor], base: Tensor) -> Callable[[Tensor], Tensor]:
        def project(x: Tensor) -> Tensor:
            if x.shape[:2] != targets.shape:
                return whole(x)
            out = base[0][targets]
            out[rows, columns] = whole(x[rows, columns][None])[0]
            return out

        return project

    return instead({module: reuse(module.forward, base) for module, base in projected.items()})


def _width(rows: Sequence[Row]) -> int:
    return len(rows[0].targets) if rows[0].visible is None else rows[0].visible.shape[0]


def fitting(model: LanguageModel, length: int, rows: Sequence[Row], strengths: int, max_bytes: int) -> int:
    """Return the number of rows, each at all strengths, that fit into one pass."""
    config, sites, width = model.model.config.get_text_config(), model.sites, _width(rows)
    size, columns = model.model.dtype.itemsize, length + width
    mlp_width = max([4 * sites.hidden, *(getattr(config, k, None) or 0 for k in ("intermediate_size", "n_inner"))])
    token = size * (12 * sites.hidden + 4 * mlp_width) + 16 * sites.hidden
    scores = ATTENTIONS.get(model.model.config._attn_implementation, 3) * max(1, sites.heads) * width * columns
    copy = width * token + size * scores + 4 * size * columns * sites.heads * sites.head_dim
    tokens: int = min(model.batch_tokens, _CPU_TOKENS) if model.device.type == "cpu" else model.batch_tokens
    return max(1, int(min(max_bytes // (strengths * copy), tokens // (strengths * width))))
