"""Forward passes of language models over trees of tokens, in one of four modes that give the same logits.

A transcript and its questions form a tree of tokens. Its logits can be computed in four modes:

- tree: one forward pass over all nodes, with masks and positions of each token's own path (`nextstate.agents.masks`);
- fork: the spine of the tree once; where branches leave it, they run as rows from a copy of the model's state;
- step: the same, token by token, for models whose state cannot be continued by several tokens at once;
- rows: one row for each path, without a cache.

`nextstate.agents.certificate` measures which of them agree with plain forward passes of the model at hand, and the
first one is used. Hooks are called in every pass; `ForwardContext` says which node of which tree each token is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from nextstate.agents import flex
from nextstate.agents.agent import AgentError, OutOfMemory
from nextstate.agents.branches import Batch, ForwardContext, Layout, Tree, pack, pack_row
from nextstate.agents.failures import one_line
from nextstate.agents.flex import FlexError
from nextstate.agents.loading import device_of
from nextstate.agents.masks import PathMasks, Places

if TYPE_CHECKING:
    from nextstate.agents.certificate import Certificate

    Certify = Callable[["Forward", int, int, bool, Certificate | None], Certificate]

Road = Literal["tree", "fork", "step", "rows"]
ROADS: tuple[Road, ...] = get_args(Road)
_SLICE = 2048  # of the vocabulary
_CACHES = ("past_key_values", "cache_params", "state")  # what architectures call the state that they hand on
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
Indices = Sequence[int] | Int[np.ndarray, " index"]
Picks = tuple[Indices, Indices]  # rows, columns
T = TypeVar("T")


def out_of_memory(error: Exception) -> bool:
    """Return whether an exception means that memory ran out; torch has a specific class for GPU memory only."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def context_of(config: Any) -> int | None:
    """Return the maximum number of tokens of a model; sliding windows of layers are not counted as a limit."""
    config = config.get_text_config()
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    known = [int(n) for n in limits if isinstance(n, int) and n > 0]
    return min(known) if known else None


class Want(NamedTuple):
    """A node at which logits are read."""

    tree: int
    node: int


@dataclass(frozen=True, eq=False)
class Wants(Sequence[Want]):
    """Nodes at which logits are read, in columns; as a sequence it holds a `Want` for each.

    Attributes:
        tree, node: the nodes.
        at: of each token whose log-probability is needed, the index of its node.
        tokens: these tokens.
    """

    tree: Int[np.ndarray, " node"]
    node: Int[np.ndarray, " node"]
    at: Int[np.ndarray, " token"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    tokens: Int[np.ndarray, " token"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @classmethod
    def of(cls, wanted: Sequence[Want]) -> Wants:
        """Return nodes in columns."""
        if isinstance(wanted, Wants):
            return wanted
        return cls(*np.array(wanted, dtype=np.int64).reshape(-1, 2).T)

    def __len__(self) -> int:
        return len(self.tree)

    @overload
    def __getitem__(self, index: int) -> Want: ...
    @overload
    def __getitem__(self, index: slice) -> list[Want]: ...
    def __getitem__(self, index: int | slice) -> Want | list[Want]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Want(int(self.tree[index]), int(self.node[index]))

    def __iter__(self) -> Iterator[Want]:
        return map(Want, self.tree.tolist(), self.node.tolist())


class Scores(NamedTuple):
    """What is read from logits: the most likely token at each wanted node, and log-probabilities of tokens ."""

    argmax: Int[np.ndarray, " node"]
    logprobs: Float[np.ndarray, " token"]


class State(NamedTuple):
    """The cached state of a model after the first `tokens` tokens of a spine."""

    cache: Any
    tokens: int


@dataclass
class Memory:
    """Cached state of trees from earlier calls, so that a live session only computes new tokens."""

    road: Road
    columns: list[list[int]]  # tree: for each tree the cache column of each node that was read
    states: list[State | None]  # fork and step: for each tree how far its spine was read
    read: list[int]  # for each tree how many of its nodes were read
    cache: DynamicCache = field(default_factory=DynamicCache)  # keeps all columns, whatever windows a model has
    width: int = 0

    @classmethod
    def of(cls, road: Road, trees: int) -> Memory:
        """Return the empty memory of trees that have not been read."""
        return cls(road, [[] for _ in range(trees)], [None] * trees, [0] * trees)

    def keep(self, trees: Sequence[int], nodes: Sequence[int]) -> None:
        """Drop all trees except `trees`, and all but the first `nodes` nodes of each, which contain its spine."""
        if self.width and len(trees) < len(self.columns):
            self.cache.batch_select_indices(torch.tensor(trees))
        self.columns = [self.columns[tree][:n] for tree, n in zip(trees, nodes, strict=True)]
        self.states = [self.states[tree] for tree in trees]
        self.read = [min(self.read[tree], n) for tree, n in zip(trees, nodes, strict=True)]
        width = max((own[-1] + 1 for own in self.columns if own), default=0)
        self.cache.crop(width - self.width)  # a negative length removes columns from the end
        self.width = width


class Forward:
    """Runs a model.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        name: the model's name in error messages.
        certify: finds a mode that agrees with plain forward passes (`nextstate.agents.certificate.certify`).
        pad: padding token.
        batch_tokens: maximum number of tokens in one forward pass of `fork` and `rows`.
    """

    def __init__(self, model: Any, name: str, certify: Certify, pad: int = 0, batch_tokens: int = 8192) -> None:
        self.model, self.name, self.pad, self.batch_tokens = model, name, pad, batch_tokens
        self.certify = certify
        self.device = device_of(model)  # where tokens go in
        self.masks = PathMasks(model)
        self.reading: ForwardContext | None = None  # what is read now, for hooks
        self.finished: ForwardContext | None = None  # what was read last, with all its passes
        self.certificates: dict[bool, Certificate] = {}  # of replay and of live sessions
        # At which depth and columns the model was refused, with which attention functions, and why.
        self._refused: dict[bool, tuple[int, int, tuple[str, ...], AgentError]] = {}
        self.proving = False  # hooks leave the model as it is while it is measured
        self.hooked = 0  # how many hooks look at rows, each of which is one tree then
        self.fallback = ""  # why block-sparse attention is not used, where it should have been
        parameters = inspect.signature(model.forward).parameters
        self._cache = next((name for name in _CACHES if name in parameters), None)
        self._positions = "position_ids" in parameters
        self._any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def not_finite(self) -> AgentError:
        """Return the error for a model whose logits are NaN or infinite."""
        return AgentError(
            f"{self.name} gives logits that are not finite in {self.model.dtype} on {self.device}; "
            "load it with dtype=float32, or check its weights"
        )

    @property
    def in_one_row(self) -> bool:
        """Whether all trees of a pass share one row: attention is block-sparse, and no hook looks at rows."""
        return self.masks.sparse and not self.hooked

    def require(self, depth: int, columns: int, live: bool = False, row: int = 0) -> Road:
        """Return the mode for trees with paths of up to `depth` tokens and `columns` nodes, verified at that size.

        Args:
            depth: number of tokens of the longest path.
            columns: number of nodes of the largest tree.
            live: whether it is for live sessions, which cache what they have read.
            row: number of nodes of all trees that share a row, where they do.

        Raises:
            AgentError: no mode agrees with plain forward passes.
        """
        known = self.certificates.get(live)
        if known is not None and known.attention != self.masks.attention:
            known = None
        if known is None or depth > known.depth or (row if self.in_one_row else columns) > known.columns:
            refused = self._refused.get(live)
            same = refused is not None and refused[2] == self.masks.attention
            if refused is not None and same and depth >= refused[0] and columns >= refused[1]:
                raise refused[3]
            self.proving = True
            try:
                known = self.certificates[live] = self._certified(depth, columns, live, row, known)
            except OutOfMemory:  # less at once may fit
                raise
            except AgentError as error:
                self._refused[live] = (depth, columns, self.masks.attention, error)
                raise
            finally:
                self.proving = False
        return known.road

    def _certified(self, depth: int, columns: int, live: bool, row: int, known: Certificate | None) -> Certificate:
        """Return a certificate, without FlexAttention where only that is in the way of reading trees."""
        try:
            found = self.certify(self, depth, max(columns, row) if self.in_one_row else columns, live, known)
            why = found.tried.get("tree", "")
        except OutOfMemory:
            raise
        except (AgentError, FlexError) as error:
            found, why = None, one_line(error)
            if not self.without_flex(why):
                raise
        if found is None or (why and self.without_flex(why)):
            found = self.certify(self, depth, columns, live, None)
            if found.road != "tree":
                self.fallback = ""  # it was not to blame
        return found

    def scores(
        self,
        road: Road,
        trees: Sequence[Tree],
        spines: Sequence[int],
        wanted: Sequence[Want],
        reading: ForwardContext | None = None,
        memory: Memory | None = None,
    ) -> Callable[[], Scores]:
        """Read trees for the most likely tokens at the wanted nodes, and log-probabilities of some tokens.

        Results are copied from the device once, at the end, so that it does not wait for the host in between.

        Returns:
            A function that waits for the device and returns the scores; call it once.

        Args:
            road: the mode in which the model is run.
            trees: the trees to read.
            spines: for each tree the last node of its spine; other nodes are run as branches (fork, step).
            wanted: the nodes at which logits are read, and tokens; full logits are computed at these nodes only.
            reading: the context for hooks.
            memory: cached state of earlier calls; updated in place.

        Raises:
            AgentError: the logits are not finite; raised by the returned function.
        """
        wanted = Wants.of(wanted)
        at, tokens = wanted.at, wanted.tokens
        order = np.argsort(at, kind="stable")
        ends = np.cumsum(np.bincount(at, minlength=len(wanted)))
        begins = np.concatenate([[0], ends[:-1]])
        places, parts = list[tuple[Int[np.ndarray, " node"], Int[np.ndarray, " token"]]](), list[Tensor]()
        for which, logits in self.logits(road, trees, spines, wanted, reading, memory):
            if not len(which):  # a pass that only reads on
                continue
            own = np.array(which)
            counts = ends[own] - begins[own]
            mine = order[_ranges(begins[own], counts)]
            places.append((own, mine))
            parts.append(_read_off(logits, np.repeat(np.arange(len(own)), counts), tokens[mine]))
        numbers_of = _fetched(torch.cat(parts)) if parts else lambda: np.zeros(0, dtype=np.int32)

        def read() -> Scores:
            numbers = numbers_of()
            argmax, norm = np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.float32)
            found = np.zeros(len(tokens), dtype=np.float32)
            for own, mine in places:
                n, m = len(own), 2 * len(own)
                argmax[own], norm[own] = numbers[:n], numbers[n:m].view(np.float32)
                found[mine] = numbers[m : m + len(mine)].view(np.float32)
                numbers = numbers[m + len(mine) :]
            if not (np.isfinite(found).all() and np.isfinite(norm).all()):
                raise self.not_finite()
            return Scores(argmax, found - norm[at])

        return read

    @torch.inference_mode()
    def logits(
        self,
        road: Road,
        trees: Sequence[Tree],
        spines: Sequence[int],
        wanted: Sequence[Want],
        reading: ForwardContext | None = None,
        memory: Memory | None = None,
    ) -> Iterator[tuple[Indices, Float[Tensor, "node vocabulary"]]]:
        """Yield logits as they are computed, with the indices into `wanted` that they belong to; see `scores`."""
        self.reading, self.finished = reading, None
        wanted = Wants.of(wanted)
        try:
            if road == "tree":
                yield from self._trees(trees, spines, wanted, memory)
            elif road == "rows":
                yield from self._rows(trees, wanted)
            else:
                for t in range(len(trees)):
                    yield from self._fork(t, trees[t], spines[t], wanted, memory, road == "step")
            if memory is not None:
                memory.read = [len(tree) for tree in trees]
            self.finished = self.reading
        finally:
            self.reading = None

    def _trees(
        self, trees: Sequence[Tree], spines: Sequence[int], wanted: Wants, memory: Memory | None
    ) -> Iterator[tuple[Indices, Tensor]]:
        tree, node, reading = wanted.tree, wanted.node, self.reading
        if memory is None and self.masks.sparse:
            try:
                found = self._in_blocks(trees, spines, tree, node)
            except FlexError as error:
                if out_of_memory(error) or not self.without_flex(str(error)):
                    raise
                self.reading = reading
            else:
                yield np.arange(len(wanted)), found
                return
        alone = self.masks.one_layout and memory is None
        for some in [[t] for t in range(len(trees))] if alone else [list(range(len(trees)))]:
            which = np.flatnonzero(tree == some[0]) if alone else np.arange(len(wanted))
            yield which, self._in_rows(some, trees, tree[which] - some[0], node[which], memory)

    def _in_blocks(
        self,
        trees: Sequence[Tree],
        spines: Sequence[int],
        tree: Int[np.ndarray, " want"],
        node: Int[np.ndarray, " want"],
    ) -> Float[Tensor, "want vocabulary"]:
        """Read trees by block-sparse attention: all in one row, or each in a row of its own for hooks."""
        total, longest = sum(map(len, trees)), max(map(len, trees))
        length = flex.length_of(total)
        chains = all(path.depths[-1] == len(path) - 1 for path in trees)
        if not self.in_one_row or (chains and len(trees) * longest <= length):  # plain causal rows need no mask
            return self._in_rows(range(len(trees)), trees, tree, node, None, multiple=flex.BLOCK)
        row = pack_row(trees, spines, self.pad, length)
        picks = np.zeros_like(node), row.columns[row.begins[tree] + node]
        tokens, depths, enter, leave = self._sent(row.tokens, row.depths, row.enter, row.leave)[:, None]
        self.reading = None  # several trees in a row: no context describes it
        with self._picked(picks) as picked:
            places = Places.of_intervals(enter, leave, depths)
            return self._taken(self.in_tree(tokens, places), picked)

    def _in_rows(
        self,
        some: Sequence[int],
        trees: Sequence[Tree],
        row: Int[np.ndarray, " want"],
        node: Int[np.ndarray, " want"],
        memory: Memory | None,
        multiple: int = 1,
    ) -> Float[Tensor, "want vocabulary"]:
        """Read some trees, one in each row."""
        own = [trees[t] for t in some]
        batch = (
            pack(own, self.pad, multiple=multiple)
            if memory is None
            else pack(own, self.pad, memory.columns, memory.width)
        )
        layout = batch.layout._replace(trees=tuple(some), cached=tuple(list(c) for c in batch.layout.cached or ()))
        begins = np.array([len(c) for c in layout.cached or ()], dtype=np.int64)
        logits = self._columns(batch, layout, (row, node - begins[row]), None if memory is None else memory.cache)
        if memory is not None:
            for tree, columns in zip(own, memory.columns, strict=True):
                columns.extend(range(memory.width, memory.width + len(tree) - len(columns)))
            memory.width += batch.tokens.shape[1]
        return logits

    def _columns(self, batch: Batch, layout: Layout, picks: Picks, cache: DynamicCache | None) -> Tensor:
        tokens = self._sent(batch.tokens)[0]
        if batch.enter is None or batch.leave is None:
            return self._pass(tokens, layout, picks)[0]
        depths, enter, leave = self._sent(batch.depths, batch.enter, batch.leave)
        places = Places.of_intervals(enter, leave, depths, layout.width)
        with self._noted(layout), self._picked(picks) as picked:
            return self._taken(self.in_tree(tokens, places, cache), picked)

    def _sent(self, *arrays: Int[np.ndarray, "*row column"]) -> Int[Tensor, "array *row column"]:
        """Return arrays of one shape on the model's device, by one transfer that the host does not wait for."""
        found = torch.from_numpy(np.stack(arrays))
        return (found.pin_memory() if self.device.type == "cuda" else found).to(self.device, non_blocking=True)

    def without_flex(self, why: str) -> bool:
        """Use the attention that transformers chooses in place of FlexAttention; return False if it was not used."""
        if not flex.give_up(self.model):
            return False
        self.fallback = f"{self.name} is run without FlexAttention, by {', '.join(self.masks.attention)}: {why}"
        return True

    def in_tree(
        self, tokens: Int[Tensor, "row token"], places: Places, cache: Any = None
    ) -> Float[Tensor, "row token vocabulary"]:
        """Run tokens that attend to each other according to `places`; returns the output of the (patched) head."""
        ones = torch.ones(len(tokens), places.depths.shape[1], dtype=torch.long, device=tokens.device)
        given: dict[str, Any] = {"attention_mask": ones, "use_cache": cache is not None}
        if self._positions or self._any:
            given["position_ids"] = places.own.expand(len(tokens), -1)
        if cache is not None:
            given["past_key_values"] = cache
        with self.masks(places):
            found: Tensor = self.model(input_ids=tokens, **given).logits
        return found

    def plain(
        self,
        tokens: Int[Tensor, "row token"],
        ask: Sequence[int],
        only: Int[Tensor, "row token"] | None = None,
    ) -> Float[Tensor, "row asked vocabulary"]:
        """Run rows of equal length by the model's own forward pass: no cache, and no custom masks or positions.

        Args:
            tokens: the tokens to read.
            ask: positions at which logits are read.
            only: tokens of each row to compute the logits of; by default the whole vocabulary.
        """
        with read_out(self.model, lambda x: x[:, list(ask)], only):
            found: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return found

    def state(self, tokens: Int[Tensor, "row token"], rows: Int[Tensor, " copy"]) -> Any:
        """Read rows of equal length and return a copy of the model's state for each of `rows`."""
        with read_out(self.model, lambda x: x[:, :1]):
            return _rows_of(getattr(self.model(input_ids=tokens, use_cache=True), self._cache or "", None), rows)

    def resumed(
        self,
        tokens: Int[Tensor, "row token"],
        state: Any,
        at: int,
        ask: Sequence[int],
        only: Int[Tensor, "row token"] | None = None,
    ) -> Float[Tensor, "row asked vocabulary"]:
        """Continue rows of one length from a state, which holds `at` tokens; arguments as of `plain`."""
        given: dict[str, Any] = {self._cache or "": state, "use_cache": True}
        if self._positions:
            given["position_ids"] = (at + torch.arange(tokens.shape[1], device=tokens.device)).expand(len(tokens), -1)
        with read_out(self.model, lambda x: x[:, list(ask)], only):
            found: Tensor = self.model(input_ids=tokens, **given).logits
        return found

    def _fork(
        self, t: int, tree: Tree, spine_end: int, wanted: Sequence[Want], memory: Memory | None, stepwise: bool
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Read a tree's spine as far as it is needed, and branches from copies of the state where they leave it."""
        spine = tree.path(spine_end)
        place = {node: i for i, node in enumerate(spine)}
        state = State(None, 0) if memory is None else memory.states[t] or State(None, 0)
        mine: dict[int, list[int]] = {}
        for k, want in enumerate(wanted):
            if want.tree == t:
                mine.setdefault(want.node, []).append(k)
        leaving: dict[int, list[list[int]]] = {}  # number of tokens of the spine before -> nodes of each branch
        for leaf in _leaves(tree, [node for node in mine if node not in place]):
            path = tree.path(leaf)
            shared = next(i for i, node in enumerate(path) if node not in place)
            leaving.setdefault(shared, []).append(path[shared:])
        last = max((place[node] + 1 for node in mine if node in place), default=0)
        stops = sorted({*leaving, last} if last else leaving)
        for k, stop in enumerate(stops):
            if stop > state.tokens:
                own = np.array([spine[state.tokens : stop]])
                picks = [(0, i, mine[node]) for i, node in enumerate(own[0].tolist()) if node in mine]
                which, logits, cache = self._go_on(t, tree, own, state, picks, stepwise)
                state = State(cache, stop)
                yield which, logits
            if stop in leaving:
                ahead = spine[stop : stops[k + 1]] if k + 1 < len(stops) else []
                state = yield from self._branches(t, tree, leaving[stop], ahead, state, mine, stepwise)
            if memory is not None:
                memory.states[t] = state

    def _branches(
        self,
        t: int,
        tree: Tree,
        branches: Sequence[list[int]],
        ahead: list[int],
        state: State,
        mine: Mapping[int, list[int]],
        stepwise: bool,
    ) -> Generator[tuple[list[int], Tensor], None, State]:
        """Read branches from copies of a state, and the next piece of the spine beside them if none is longer.

        A shorter piece would be padded, which spoils the state of a recurrent layer. Branches may be padded, and those
        of one token are: some models continue by one token on a way of their own, which is not exact (RWKV's state with
        several rows, Zamba-2 and Nemotron-H a little). Returns the state after what was read of the spine.
        """
        found: set[int] = set()
        context = context_of(self.model.config)
        least = 1 if stepwise or (context is not None and state.tokens + 2 > context) else 2
        ordered = sorted(branches, key=len, reverse=True)
        most = max(1, self.batch_tokens // (state.tokens + max(len(ahead), len(ordered[0]))))
        if state.cache is not None and len(ahead) >= max(least, len(ordered[0])) and len(ordered) < most:
            ordered = [ahead, *ordered]
        after = [state]

        def run(some: Sequence[list[int]]) -> tuple[list[int], Tensor]:
            nodes = np.full((len(some), max(least, *map(len, some))), -1, dtype=np.int64)
            picks, new = [], set[int]()
            for row, branch in enumerate(some):
                nodes[row, : len(branch)] = branch
                picks += [(row, i, mine[n]) for i, n in enumerate(branch) if n in mine and n not in found | new]
                new.update(branch)
            forked = State(_forked(state.cache, len(some)), state.tokens)
            which, logits, cache = self._go_on(t, tree, nodes, forked, picks, stepwise)
            found.update(new)
            if some[0] is ahead:
                after[0] = State(_rows_of(cache, torch.tensor([0])), state.tokens + len(ahead))
            return which, logits

        for k in range(0, len(ordered), most):
            yield from _halving(run, ordered[k : k + most])
        return after[0]

    def _go_on(
        self,
        t: int,
        tree: Tree,
        nodes: Int[np.ndarray, "row token"],
        state: State,
        picks: Sequence[tuple[int, int, list[int]]],
        stepwise: bool,
    ) -> tuple[list[int], Tensor, Any]:
        """Continue rows from a state; return the places among the wanted, logits at `picks`, and the new state."""
        table = np.array([*tree.tokens, self.pad])
        cache, parts, which, at = state.cache, list[Tensor](), list[int](), state.tokens
        width = 1 if stepwise and cache is not None else nodes.shape[1]
        for low in range(0, nodes.shape[1], width):
            own = nodes[:, low : low + width]
            here = [(row, i - low, ks) for row, i, ks in picks if low <= i < low + width]
            layout = Layout((t,) * len(own), own, None, at + low)
            logits, cache = self._pass(
                torch.from_numpy(table[own]).to(self.device), layout,
                ([row for row, _, ks in here for _ in ks], [i for _, i, ks in here for _ in ks]), cache, keep=True,
            )  # fmt: skip
            parts.append(logits)
            which += [k for _, _, ks in here for k in ks]
        return which, torch.cat(parts), cache

    def _rows(self, trees: Sequence[Tree], wanted: Sequence[Want]) -> Iterator[tuple[list[int], Tensor]]:
        """Run one row a path. Rows of a pass are equally long, so that no model has to cope with padding."""
        mine: dict[tuple[int, int], list[int]] = {}
        for k, want in enumerate(wanted):
            mine.setdefault((want.tree, want.node), []).append(k)
        paths: dict[int, list[tuple[int, list[int]]]] = {}  # by length
        for t, tree in enumerate(trees):
            for leaf in _leaves(tree, [node for own, node in mine if own == t]):
                path = tree.path(leaf)
                paths.setdefault(len(path), []).append((t, path))
        done: set[tuple[int, int]] = set()

        def run(some: Sequence[tuple[int, list[int]]]) -> tuple[list[int], Tensor]:
            nodes = np.array([path for _, path in some])
            tokens = np.array([[trees[t].tokens[n] for n in path] for t, path in some])
            which, rows, columns = list[int](), list[int](), list[int]()
            new = set(done)
            for row, (t, path) in enumerate(some):
                for i, node in enumerate(path):
                    if (t, node) in mine and (t, node) not in new:
                        new.add((t, node))
                        which += mine[t, node]
                        rows += [row] * len(mine[t, node])
                        columns += [i] * len(mine[t, node])
            layout = Layout(tuple(t for t, _ in some), nodes, None, 0)
            logits = self._pass(torch.from_numpy(tokens).to(self.device), layout, (rows, columns))[0]
            done.update(new)
            return which, logits

        for length in sorted(paths, reverse=True):
            most = max(1, self.batch_tokens // length)
            for k in range(0, len(paths[length]), most):
                yield from _halving(run, paths[length][k : k + most])

    def _pass(
        self,
        tokens: Int[Tensor, "row token"],
        layout: Layout,
        picks: Picks,
        cache: Any = None,
        keep: bool = False,
    ) -> tuple[Float[Tensor, "pick vocabulary"], Any]:
        """Run rows that are paths, from a state or from the beginning."""
        given: dict[str, Any] = {"use_cache": keep}
        if cache is not None:
            assert self._cache is not None
            given[self._cache] = cache
            if self._positions:
                where = layout.width + torch.arange(tokens.shape[1], device=tokens.device)
                given["position_ids"] = where.expand(len(tokens), -1)
        with self._noted(layout), self._picked(picks) as picked:
            out = self.model(input_ids=tokens, **given)
        state = getattr(out, self._cache or "", None) if keep else None
        if keep and state is None:
            raise TypeError(f"{type(self.model).__name__} hands on no state")
        return self._taken(out.logits, picked), state

    @contextmanager
    def _noted(self, layout: Layout) -> Iterator[None]:
        """Set the layout of the running pass, for hooks."""
        before = self.reading
        if before is None:
            yield
            return
        self.reading = replace(before, layout=layout)
        try:
            yield
        except BaseException:
            self.reading = before
            raise
        self.reading = replace(before, passes=(*before.passes, layout))

    @contextmanager
    def _picked(self, picks: Picks) -> Iterator[int]:
        """Compute logits at some tokens only; gives their number."""
        count = len(picks[0])
        # At least one, since models may fail on none.
        rows, columns = self._sent(*(np.array(x if count else [0], dtype=np.int64) for x in picks))
        with read_out(self.model, lambda x: x[rows.to(x.device), columns.to(x.device)][None]):
            yield count

    @staticmethod
    def _taken(logits: Tensor, count: int) -> Float[Tensor, "pick vocabulary"]:
        """Return the logits of the picks."""
        assert logits.shape[:2] == (1, max(1, count))
        return logits[0, :count]


def _ranges(begins: Int[np.ndarray, " part"], lengths: Int[np.ndarray, " part"]) -> Int[np.ndarray, " item"]:
    """Return the numbers of several ranges, one range after the other."""
    return np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def _fetched(numbers: Int[Tensor, " number"]) -> Callable[[], Int[np.ndarray, " number"]]:
    """Begin to copy numbers to the host; return a function that waits for them."""
    if numbers.device.type != "cuda":
        return lambda: np.asarray(numbers.cpu())
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.current_stream(numbers.device).record_event()

    def wait() -> Int[np.ndarray, " number"]:
        arrived.synchronize()
        return host.numpy()

    return wait


def _read_off(
    logits: Float[Tensor, "node vocabulary"], rows: Int[np.ndarray, " token"], tokens: Int[np.ndarray, " token"]
) -> Int[Tensor, " number"]:
    """Return the argmax and log-normaliser of each row, then the logits of tokens at rows, on the device of the logits.

    Floats are given by their bits, so that one tensor holds all of them and is copied to the host at once.
    """
    pieces = torch.split(logits, 512)  # what is copied in float32, and a size that suits the caches of a CPU
    argmax = [part.argmax(-1).int() for part in pieces]
    norm = [part.float().logsumexp(-1).view(torch.int32) for part in pieces]
    where = torch.from_numpy(np.stack([rows, tokens])).to(logits.device, non_blocking=True)
    return torch.cat([*argmax, *norm, logits[where[0], where[1]].float().view(torch.int32)])


def _forked(cache: Any, rows: int) -> Any:
    """Return the state of one row, repeated for `rows` rows."""
    return None if cache is None else _rows_of(copy.deepcopy(cache), torch.zeros(rows, dtype=torch.long))


def _rows_of(cache: Any, rows: Int[Tensor, " row"]) -> Any:
    """Return some rows of a state; the state may be modified."""
    if isinstance(cache, list | tuple):
        return [x[rows.to(x.device)] for x in cache]
    if cache is None or not hasattr(cache, "reorder_cache"):
        raise TypeError(f"a state of type {type(cache).__name__} cannot be copied into rows")
    cache.reorder_cache(rows)
    return cache


def _leaves(tree: Tree, nodes: Sequence[int]) -> list[int]:
    """Return those of the nodes that are not on the path of another one, in their order."""
    above: set[int] = set()
    for node in nodes:
        parent = tree.parents[node]
        while parent >= 0 and parent not in above:
            above.add(parent)
            parent = tree.parents[parent]
    return [node for node in dict.fromkeys(nodes) if node not in above]


def _halving(work: Callable[[Sequence[Any]], T], items: Sequence[Any]) -> Iterator[T]:
    """Apply `work` to the items; if memory runs out, to each half of them."""
    try:
        found = [work(items)]
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not out_of_memory(error) or len(items) == 1:
            raise
        found = []
    if found:
        yield found[0]
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for half in (items[: len(items) // 2], items[len(items) // 2 :]):
        yield from _halving(work, half)


@contextmanager
def instead(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward methods of modules until the context is closed."""
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


@contextmanager
def read_out(
    model: Any,
    pick: Callable[[Float[Tensor, "row token hidden"]], Float[Tensor, "row asked hidden"]],
    only: Int[Tensor, "row token"] | None = None,
) -> Iterator[None]:
    """Let a model compute logits at some positions or for some tokens only, until the context is closed.

    Args:
        model: a causal language model with output embeddings.
        pick: selects positions of the hidden states that enter the output embeddings.
        only: tokens of each row to compute the logits of.
    """
    head = model.get_output_embeddings()
    whole = head.forward
    wrapped = "forward" in head.__dict__  # by accelerate, which may hold the weights elsewhere
    with instead({head: lambda x: _logits(head, whole, pick(x), only, wrapped)}):
        yield


def _logits(
    head: nn.Module,
    whole: Callable[[Tensor], Tensor],
    x: Float[Tensor, "row asked hidden"],
    only: Int[Tensor, "row token"] | None,
    wrapped: bool,
) -> Float[Tensor, "row asked vocabulary"]:
    if type(head) is not nn.Linear or wrapped:
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


def skipping(blocks: Mapping[nn.Module, bool]) -> ExitStack:
    """Replace blocks by the identity; the value is True for blocks that return a tuple."""
    stack = ExitStack()
    passes = {
        False: lambda hidden_states, *_, **__: hidden_states,
        True: lambda hidden_states, *_, **__: (hidden_states,),
    }
    stack.enter_context(instead({block: passes[as_tuple] for block, as_tuple in blocks.items()}))
    return stack
