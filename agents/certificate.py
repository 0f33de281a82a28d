"""Check on the model itself that a mode of running it agrees with plain forward passes, before it answers.

A tree of random tokens, as large as the actual input, is read in each mode and compared with plain forward passes of
its paths, by the model's own code (no cache, no custom masks or positions). The first mode whose largest difference is
within the tolerance is used. There is no list of architectures.

Tolerances are those of rounding: on 166 architectures (docs/architectures.md) errors of correct modes are at most 5e-5
of the standard deviation of log-probabilities in float32, and mostly 3e-6; those of wrong ones 0.09 and more. In half
precision rounding hides small errors, so the choice is made on a copy in float32 of a few layers, at least one of each
type, and then confirmed as it is; a rounding may send single tokens to other experts there, so that the largest error
is that of nine nodes in ten.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextstate.agents.agent import AgentError, OutOfMemory
from nextstate.agents.branches import Tree
from nextstate.agents.failures import one_line
from nextstate.agents.forward import ROADS, Forward, Memory, Road, Want, context_of, out_of_memory

TRUNK, COLUMNS = 48, 120  # of the smallest tree that is measured
_BASE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 2e-2}
_MEAN = {torch.bfloat16: 0.03, torch.float16: 5e-3}  # a mean difference, where single ones are mostly rounding
_FLIPPED = 0.1  # share of nodes that may be far off in half precision, where a rounding can choose other experts
_RULED_OUT = -100.0  # nats
_COMPARED = 96  # nodes of a path whose logits are compared, at most


@dataclass(frozen=True)
class Certificate:
    """The verified mode of a model. Errors are differences of log-probabilities in nats."""

    road: Road
    live: bool  # of sessions that read on with a cache, else of replay
    error: float  # the largest one found; in half precision the largest of nine nodes in ten
    tolerance: float
    depth: int  # tokens of the longest path, for which it holds
    columns: int  # nodes of a tree, for which it holds
    attention: tuple[str, ...]  # the attention functions that were used
    seconds: float
    tried: dict[str, str]  # the roads that were not taken, and why

    def describe(self) -> dict[str, Any]:
        """Return the entry of `run.json`."""
        numbers = {"error": float(f"{self.error:.2g}"), "tolerance": float(f"{self.tolerance:.2g}")}
        where: dict[str, Any] = {
            "road": self.road,
            "live": self.live,
            **numbers,
            "depth": self.depth,
            "columns": self.columns,
        }
        where["attention"] = ", ".join(self.attention)
        return {**where, "seconds": round(self.seconds, 2), "tried": self.tried}


@dataclass(frozen=True)
class Sample:
    """A tree to measure on: its spine, and the ends of the paths that are compared."""

    tree: Tree
    spine: int
    ends: tuple[int, ...]


def certify(forward: Forward, depth: int, columns: int, live: bool, known: Certificate | None) -> Certificate:
    """Find the first mode that agrees with plain forward passes on a tree of the given size.

    Args:
        forward: the model.
        depth: number of tokens of the longest path to be read.
        columns: number of nodes of the largest tree.
        live: verify live sessions, which cache what they have read, instead of replay.
        known: the certificate for smaller trees, if there is one.

    Raises:
        AgentError: the model is not causal, or no mode agrees; the message has the error of each.
    """
    if known is None:
        return _certify(forward, depth, columns, live, ROADS, {})
    roads = ROADS[ROADS.index(known.road) :]  # what was wrong before is wrong now
    depth, columns = max(depth, known.depth), max(columns, known.columns)
    with suppress(AgentError):  # a little beyond, so that episodes that grow step by step do not ask each time
        beyond = max(depth, known.depth * 3 // 2), max(columns, known.columns * 3 // 2)
        return _certify(forward, *beyond, live, roads, known.tried)
    return _certify(forward, depth, columns, live, roads, known.tried)


def _certify(
    forward: Forward, depth: int, columns: int, live: bool, roads: Sequence[Road], tried: Mapping[str, str]
) -> Certificate:
    began = time.perf_counter()
    context = context_of(forward.model.config)
    depth = max(depth, TRUNK) if context is None else min(max(depth, TRUNK), context)
    columns = max(columns, COLUMNS, depth + 24)
    try:
        with torch.inference_mode():
            _check_causal(forward)
            ladder = _Ladder(forward, live)
            ladder.tried.update(tried)
            if not ladder.exact:
                roads = _exact_roads(forward, live, depth, columns, roads, ladder)
            found = ladder.climb(depth, columns, roads)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, AgentError) or not out_of_memory(error):
            raise
        raise OutOfMemory(
            f"{forward.name} runs out of memory on a tree of {columns:,} tokens on {forward.device}"
        ) from error
    return replace(found, seconds=time.perf_counter() - began)


def _exact_roads(
    forward: Forward, live: bool, depth: int, columns: int, roads: Sequence[Road], ladder: _Ladder
) -> Sequence[Road]:
    """Return the roads that can be right for a model in half precision, whose rounding hides small errors.

    They are those from the first one on that is right for a copy in float32. Where there can be no copy (quantised
    layers), it is the tree alone, if no token changes with tokens off its path, not even in the last digit.
    """
    twin = _float_copy(forward)
    if twin is None:
        if ladder.leak(_sample(forward, TRUNK, COLUMNS, 0)) == 0:
            return ("tree",)
        raise AgentError(
            f"{forward.name} in {forward.model.dtype} is refused: its layers cannot be copied to float32, to prove how "
            "it is run; load it with dtype=float32"
        )
    _check_causal(twin)
    shallow = _Ladder(twin, live).climb(min(depth, 256), min(columns, 640), roads)
    ladder.tried.update(shallow.tried)
    if twin.fallback:
        forward.without_flex(twin.fallback)
    return ROADS[ROADS.index(shallow.road) :]


class _Ladder:
    """Tries one mode after another."""

    def __init__(self, forward: Forward, live: bool) -> None:
        self.forward, self.live = forward, live
        self.dtype = forward.model.dtype
        self.exact = self.dtype in (torch.float32, torch.float64)
        self.tried: dict[str, str] = {}
        self.noise = 0.0  # of plain passes of several lengths, for models in float64 that have parts in float32

    def climb(self, depth: int, columns: int, roads: Sequence[Road]) -> Certificate:
        reach = [] if depth <= TRUNK and columns <= COLUMNS else [_sample(self.forward, depth, columns, 2)]
        further = [(reach, *self._truth(reach))] if reach else []
        jobs: dict[bool, list[tuple[list[Sample], list[Want], Float[Tensor, "want vocabulary"]]]] = {}
        for road in roads:
            in_rows = road != "tree"  # these modes read branches as separate rows
            if in_rows not in jobs:
                first = _sample(self.forward, min(depth, TRUNK), COLUMNS, 0, whole=in_rows)
                small = [first, _sample(self.forward, min(depth, 30), 70, 1)]
                jobs[in_rows] = [(small, *self._truth(small)), *further]
            if self.live and road == "tree" and self.forward.masks.one_layout:
                self.tried[road] = "its ALiBi has no row for each episode"
                continue
            error, bound = -1.0, 1.0
            try:
                for some, wanted, truth in jobs[in_rows]:
                    largest, mean, finite = self._difference(road, some, wanted, truth)
                    own, mean_own = self._bounds(some, wanted, truth, max(largest, mean))
                    error, bound = max((error, bound), (largest, own), key=lambda x: x[0] / x[1])
                    if not finite or largest > own or mean > mean_own:
                        why = "" if in_rows else self._why(jobs[in_rows][0][0][0])
                        self.tried[road] = f"off by {largest:.2g} nats{why}"
                        break
                else:
                    names = self.forward.masks.attention
                    return Certificate(road, self.live, error, bound, depth, columns, names, 0.0, dict(self.tried))
            except Exception as error_:
                if isinstance(error_, RuntimeError | MemoryError) and out_of_memory(error_):
                    raise
                self.tried[road] = one_line(error_)[:150]
        reasons = "; ".join(f"{road}: {why}" for road, why in self.tried.items())
        raise AgentError(
            f"{self.forward.name} is refused: no way of running it gives what plain forward passes give ({reasons})"
        )

    def _truth(self, some: Sequence[Sample]) -> tuple[list[Want], Float[Tensor, "want vocabulary"]]:
        """Return the truth of samples, in which all paths that share a node must agree about it.

        Raises:
            AgentError: it is not finite, or at this depth the model changes with tokens that come later.
        """
        wanted, truth, largest, mean = _truth(self.forward, some)
        if not torch.isfinite(truth).all():
            raise self.forward.not_finite()
        bound, mean_bound = self._bounds(some, wanted, truth, max(largest, mean))
        if largest > 2 * max(bound, _BASE[torch.float32] * float(truth.std()), 1e-6) or mean > 2 * mean_bound:
            depth = max(max(one.tree.depths) for one in some) + 1
            raise AgentError(
                f"{self.forward.name} is refused at {depth:,} tokens: log-probabilities change by up to {largest:.2g} "
                "nats with the tokens that come later, as those of rotations that depend on the length of a text do; "
                "ask for fewer steps"
            )
        if self.dtype == torch.float64:
            self.noise = max(self.noise, largest)
        return wanted, truth

    def _difference(
        self, road: Road, some: Sequence[Sample], wanted: Sequence[Want], truth: Float[Tensor, "want vocabulary"]
    ) -> tuple[float, float, bool]:
        """Return the largest difference from the truth, the mean one, and whether all numbers are finite."""
        worst, total, finite = list[Tensor](), 0.0, True
        for which, logits in self._read(road, some, wanted):
            for rows, part in zip(np.array_split(np.array(which), max(1, len(which) // 64)),
                                  logits.tensor_split(max(1, len(which) // 64)), strict=True):  # fmt: skip
                differences = (_logs(part) - truth[torch.from_numpy(rows)].to(part.device)).abs()
                finite &= bool(torch.isfinite(differences).all())
                worst.append(differences.amax(-1).cpu())
                total += float(differences.sum())
        return _largest(torch.cat(worst), self.dtype), total / truth.numel(), finite

    def _read(self, road: Road, some: Sequence[Sample], wanted: Sequence[Want]) -> Any:
        trees, spines = [s.tree for s in some], [s.spine for s in some]
        if not self.live:
            yield from self.forward.logits(road, trees, spines, wanted)
            return
        # As a session does it: half of the trees first, and the rest from what was kept.
        memory = Memory.of(road, len(trees))
        halves = [_first_half(tree) for tree in trees]
        early = [k for k, w in enumerate(wanted) if w.node < len(halves[w.tree])]
        stop = [max(n for n in s.tree.path(s.spine) if n < len(half)) for s, half in zip(some, halves, strict=True)]
        late = [k for k in range(len(wanted)) if k not in set(early)]
        for given, part, ends in ((halves, early, stop), (trees, late, spines)):
            for which, logits in self.forward.logits(road, given, ends, [wanted[k] for k in part], memory=memory):
                yield [part[k] for k in which], logits

    def _bounds(
        self, some: Sequence[Sample], wanted: Sequence[Want], truth: Float[Tensor, "want vocabulary"], largest: float
    ) -> tuple[float, float]:
        """Return the largest and the mean difference that pass; what batching alone does is measured if needed."""
        scale = max(float(truth.std()), 1e-6)
        bound, mean = _BASE.get(self.dtype, 0.15) * scale, _MEAN.get(self.dtype, np.inf) * scale
        if largest <= bound and (self.exact or largest <= mean):
            return bound, mean
        floor, floor_mean = _floor(self.forward, some, wanted)
        times = 4 if self.exact else 3
        return max(bound, times * max(floor, self.noise)), max(mean, 8 * floor_mean)

    def _why(self, one: Sample) -> str:
        """Say what kind of error the tree makes: what it does when tokens off a path, or their order, change."""
        if self.leak(one) > 1e-3:
            return ": tokens of other branches leak into a path"
        wanted = [Want(0, n) for n in one.tree.path(one.ends[-1])]
        turned, where = _turned(one.tree, one.spine)
        there = [Want(0, where[w.node]) for w in wanted]
        if float((self._tree(one.tree, one.spine, wanted) - self._tree(turned, one.spine, there)).abs().max()) > 1e-3:
            return ": it takes columns for positions"
        return ": its masks are not those of a path"

    def leak(self, one: Sample) -> float:
        """Return by how much the longest path of a tree changes with tokens that are not on it: 0 where all is well."""
        path = set(one.tree.path(one.ends[-1]))
        wanted, other = [Want(0, n) for n in sorted(path)], one.tree.copy()
        vocabulary = _vocabulary(self.forward.model)
        other.tokens = [t if n in path else 3 + (t + 4) % (vocabulary - 3) for n, t in enumerate(other.tokens)]
        return float((self._tree(other, one.spine, wanted) - self._tree(one.tree, one.spine, wanted)).abs().max())

    def _tree(self, tree: Tree, spine: int, wanted: Sequence[Want]) -> Float[Tensor, "want vocabulary"]:
        parts = [logits for _, logits in self.forward.logits("tree", [tree], [spine], wanted)]
        return _logs(torch.cat(parts))


def _check_causal(forward: Forward) -> None:
    length = min(40, context_of(forward.model.config) or 40)
    tokens = torch.tensor([_tokens(forward, np.random.default_rng(5), length)], device=forward.device)
    half = tokens.shape[1] // 2
    one = _logs(forward.plain(tokens, range(half))[0])
    two = _logs(forward.plain(tokens[:, :half], range(half))[0])
    if not torch.isfinite(one).all() or not torch.isfinite(two).all():
        raise forward.not_finite()
    share = max(_BASE.get(forward.model.dtype, 0.15), _BASE[torch.float32])  # models in float64 have parts in float32
    largest, limit = _largest((one - two).abs().amax(-1), forward.model.dtype), 2 * share * float(one.std())
    if largest > max(limit, 1e-6):
        raise AgentError(
            f"{forward.name} is refused: it is not causal. Its log-probabilities change by up to {largest:.2g} nats "
            "with the tokens that come later, so it cannot say what comes next"
        )


def _truth(
    forward: Forward, some: Sequence[Sample]
) -> tuple[list[Want], Float[Tensor, "want vocabulary"], float, float]:
    """Return nodes on the compared paths of samples, and their log-probabilities by one plain forward pass a path.

    Also by how much passes differ at nodes that paths share, at most and in the mean.
    """
    wanted, differences = dict[Want, Tensor](), list[tuple[float, float]]()
    for t, one in enumerate(some):
        asked = set[int]()  # nodes
        for end in one.ends:
            path = one.tree.path(end)
            ask = sorted({*np.linspace(0, len(path) - 1, _COMPARED).astype(int).tolist(),
                          *range(max(0, len(path) - 8), len(path)),
                          *(i for i, node in enumerate(path) if node in asked)})  # fmt: skip
            asked.update(path[i] for i in ask)
            tokens = torch.tensor([[one.tree.tokens[n] for n in path]], device=forward.device)
            found = _logs(forward.plain(tokens, ask)[0])
            for i, row in zip(ask, found, strict=True):
                known = wanted.setdefault(Want(t, path[i]), row)
                if known is not row:
                    largest = (row - known).abs()
                    differences.append((float(largest.max()), float(largest.mean())))
    worst, means = torch.tensor(differences or [(0.0, 0.0)]).T
    return list(wanted), torch.stack(list(wanted.values())), _largest(worst, forward.model.dtype), float(means.mean())


def _logs(logits: Float[Tensor, "*any vocabulary"]) -> Float[Tensor, "*any vocabulary"]:
    """Return log-probabilities; those of tokens that a model rules out are cut off, since they can be infinite."""
    return logits.float().log_softmax(-1).clamp_min(_RULED_OUT)


def _largest(differences: Float[Tensor, " node"], dtype: torch.dtype) -> float:
    """Return the largest of some nodes' differences; in half precision that of nine nodes in ten.

    There a rounding can send a token to other experts, in plain passes of another shape too. Wrong roads are far off
    at most nodes, and at the others they raise the mean.
    """
    share = 1.0 if dtype in (torch.float32, torch.float64) else 1 - _FLIPPED
    return float(torch.quantile(differences.float(), share)) if len(differences) else 0.0


def _floor(forward: Forward, some: Sequence[Sample], wanted: Sequence[Want]) -> tuple[float, float]:
    """Return the largest and mean difference of the model from itself when rows are read side by side."""
    place = {(w.tree, w.node) for w in wanted}
    worst, total, count = list[Tensor](), 0.0, 0
    for t, one in enumerate(some):
        for end in one.ends:
            path = one.tree.path(end)
            ask = [i for i, n in enumerate(path) if (t, n) in place]
            row = torch.tensor([one.tree.tokens[n] for n in path], device=forward.device)
            rows = torch.stack([row, row.flip(0), row.roll(1)])
            differences = (_logs(forward.plain(rows, ask)[0]) - _logs(forward.plain(row[None], ask)[0])).abs()
            worst.append(differences.amax(-1))
            total, count = total + float(differences.sum()), count + differences.numel()
    return _largest(torch.cat(worst), forward.model.dtype), total / max(1, count)


def _sample(forward: Forward, depth: int, columns: int, seed: int, whole: bool = False) -> Sample:
    """Draw a tree whose longest path has `depth` tokens: a spine, left by long and short branches at several places.

    Branches stand between the pieces of the spine, so that no column of a later one is a position. The spine, the
    shallowest branch and the deepest are compared; with `whole` also branches of one place, of unlike lengths and of
    one token each, which other roads read as rows side by side.
    """
    rng, tree = np.random.default_rng([11, seed]), Tree()
    longest = min(max(depth // 3, 4), max(4, columns - depth))
    spine = depth - longest
    cuts = (*(round(share * spine) for share in (0.12, 0.4, 0.7, 0.85)), spine - 1, spine)
    extra = max(0, columns - depth - 3 * longest // 2 - 20)
    lengths: list[tuple[int, ...]] = [(5, longest), (3, 11, 2, 1), (longest // 2 + 1,), (13, 4, depth), (1, 1), (1, 1)]
    end, at, leaves, separate = -1, 0, list[tuple[int, int]](), list[int]()
    for i, (cut, branches) in enumerate(zip(cuts, lengths, strict=True)):
        n = max(1, cut) - at
        end, at = tree.grow(end, _tokens(forward, rng, n)), at + n
        count = extra // (3 - i) if i < 3 else 0  # nodes of further branches
        extra -= count
        most = max(1, depth - at)
        more = [min(most, count - k) for k in range(0, count, most)]
        for length in (*branches, *more):
            length = min(length, depth - at)
            leaf = tree.grow(end, _tokens(forward, rng, length))
            leaves.append((tree.depths[leaf], leaf))
            if whole and i in (1, 4, 5) and length != 3:  # unlike lengths side by side, and one token each
                separate.append(leaf)
    return Sample(tree, end, tuple(dict.fromkeys((min(leaves)[1], end, *separate, max(leaves)[1]))))


def _tokens(forward: Forward, rng: np.random.Generator, n: int) -> list[int]:
    """Draw tokens, none of them special."""
    config, vocabulary = forward.model.config.get_text_config(), _vocabulary(forward.model)
    special = {getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    usual = [t for t in range(min(vocabulary, 5000)) if t not in special]
    return [usual[i] for i in rng.integers(len(usual), size=n).tolist()]


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _first_half(tree: Tree) -> Tree:
    half = tree.copy()
    half.cut(len(tree) // 2)
    return half


def _turned(tree: Tree, spine_end: int) -> tuple[Tree, dict[int, int]]:
    """Return the same paths with all branches behind the spine, and where each node is there."""
    spine = tree.path(spine_end)
    order = [*spine, *sorted(set(range(len(tree))) - set(spine))]
    where = {-1: -1} | {node: place for place, node in enumerate(order)}
    out = Tree()
    out.tokens = [tree.tokens[n] for n in order]
    out.parents = [where[tree.parents[n]] for n in order]
    out.depths = [tree.depths[n] for n in order]
    return out, where


class _Skipped(nn.Module):
    """Stands for a block that is left out; it has the plain attributes that a model may ask a block for."""

    def __init__(self, block: nn.Module, as_tuple: bool) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in vars(block).items() if isinstance(v, str | int | float) and k[0] != "_"})
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """Return the stream as it is."""
        return (hidden_states,) if self.as_tuple else hidden_states


def _float_copy(forward: Forward) -> Forward | None:
    """Return a copy in float32 of a model: whole where it is small, else of its first block of each type, and one more.

    None where its layers cannot be copied, as those of quantised models cannot.
    """
    from nextstate.agents.sites import SiteError, Sites

    model = forward.model
    if getattr(model, "is_quantized", False):
        return None
    kept: dict[tuple[nn.ModuleList, int], nn.Module] = {}
    try:
        if sum(p.numel() for p in model.parameters()) > 50_000_000:
            with suppress(SiteError):
                sites = Sites.of(model)
                holder = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and tuple(m) == sites.blocks)
                kinds = [
                    (type(x.block).__name__, x.kind, *_types(model.config, i)) for i, x in enumerate(sites.per_layer)
                ]
                first = {kinds.index(kind) for kind in kinds} | {1}
                for i, layer in enumerate(sites.per_layer):
                    if i not in first:
                        kept[holder, i] = layer.block
                        holder[i] = _Skipped(layer.block, layer.returns_tuple)
        twin = copy.deepcopy(model).float().eval()
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        if out_of_memory(error):
            raise
        return None
    finally:
        for (holder, i), block in kept.items():
            holder[i] = block
    return Forward(twin, forward.name, certify, forward.pad, forward.batch_tokens)


def _types(config: Any, layer: int) -> list[str]:
    """Return what a config says of the type of a layer."""
    config = config.get_text_config()
    lists = [getattr(config, name, None) for name in ("layer_types", "layers_block_type", "attention_layers")]
    return [str(found[layer]) for found in lists if found is not None and len(found) > layer]
