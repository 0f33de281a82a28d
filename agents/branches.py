"""Trees of tokens: the transcript is the trunk, and each question is a branch that other branches cannot attend to.

One forward pass over a tree gives the same logits as separate passes over its root-to-leaf paths: each token has its
position on its own path, and a mask restricts its attention to its ancestors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from nextstate.agents.agent import Prompt
from nextstate.agents.text import WIDE, Cloze, Encoder
from nextstate.envs.game import Episode


class Tree:
    """Tokens with parent pointers. Paths with a common prefix share its nodes, so a tree is also a trie."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        # Children by parent and token, without those that directly follow their parent: most do, and need no entry.
        # A key is one whole number, `parent * WIDE + token`, since the garbage collector passes over numbers.
        self._forks: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def grow(self, parent: int, tokens: Sequence[int]) -> int:
        """Extend the path that ends in node `parent` (-1 for a new path) by `tokens`; return its new last node."""
        first = len(self.tokens)
        if parent != first - 1:  # it may have children
            known = self.follow(parent, tokens)
            if known:
                parent, tokens = known[-1], tokens[len(known) :]
            if tokens and parent != first - 1:
                self._forks[parent * WIDE + tokens[0]] = first
        if not tokens:
            return parent
        end, depth = first + len(tokens) - 1, self.depths[parent] + 1 if parent >= 0 else 0
        self.tokens.extend(tokens)
        self.parents.append(parent)
        self.parents.extend(range(first, end))
        self.depths.extend(range(depth, depth + len(tokens)))
        return end

    def graft(self, parent: int, cloze: Cloze) -> Branch:
        """Add a question whose prompt continues the path that ends in node `parent`."""
        node, first = self.grow(parent, cloze.stem), len(self.tokens)
        if not cloze.tokens:
            return Branch(node, cloze, (node,))
        if node != first - 1:  # the stem may have some of the nodes already
            nodes = [node]
            for token, above in zip(cloze.tokens, cloze.parents, strict=True):
                nodes.append(self.grow(nodes[above], (token,)))
            return Branch(node, cloze, nodes)
        depth = self.depths[node] if node >= 0 else -1
        self.tokens.extend(cloze.tokens)
        self.parents.extend([node + above for above in cloze.parents])
        self.depths.extend([depth + below for below in cloze.depths])
        for key, own in cloze.forks:
            self._forks[node * WIDE + key] = node + own
        return Branch(node, cloze, range(node, len(self.tokens)))

    def copy(self) -> Tree:
        """Return an independent copy."""
        out = Tree()
        out.tokens, out.parents, out.depths = list(self.tokens), list(self.parents), list(self.depths)
        out._forks = dict(self._forks)
        return out

    def cut(self, nodes: int) -> None:
        """Remove all but the first `nodes` nodes."""
        for node in range(nodes, len(self.tokens)):
            if self.parents[node] != node - 1:
                del self._forks[self.parents[node] * WIDE + self.tokens[node]]
        del self.tokens[nodes:], self.parents[nodes:], self.depths[nodes:]

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root to `node`."""
        out = []
        while node >= 0:
            out.append(node)
            node = self.parents[node]
        return out[::-1]

    def follow(self, node: int, tokens: Sequence[int]) -> list[int]:
        """Return the existing nodes that extend the path to `node` by `tokens`, up to the first missing one."""
        out: list[int] = []
        own, parents, end = self.tokens, self.parents, len(self.tokens)
        for token in tokens:
            child = node + 1
            if child == end or parents[child] != node or own[child] != token:
                found = self._forks.get(node * WIDE + token)
                if found is None:
                    break
                child = found
            out.append(child)
            node = child
        return out


class Choice(NamedTuple):
    """A choice in a tree: its tokens, and for each the node whose logits predict it."""

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]


class Branch(NamedTuple):
    """A question in a tree.

    Attributes:
        node: the last node of its prompt.
        cloze: its tokens.
        nodes: `node`, then the nodes of the trie of its choices; see `Cloze`.
    """

    node: int
    cloze: Cloze
    nodes: Sequence[int]

    def choice(self, index: int) -> Choice:
        """Return one of the choices."""
        end = int(self.cloze.lengths[: index + 1].sum())
        own = slice(end - int(self.cloze.lengths[index]), end)
        nodes = tuple([self.nodes[k] for k in self.cloze.at[own].tolist()])
        return Choice(nodes, tuple(self.cloze.wanted[own].tolist()))


class Trunk:
    """The transcript of one episode as a growing tree, with its questions as branches."""

    def __init__(self, encoder: Encoder, episode: Episode, tree: Tree | None = None) -> None:
        self.encoder, self.episode, self.tree = encoder, episode, Tree() if tree is None else tree
        self._ends = [self.tree.grow(-1, encoder.opening(episode.opening))]  # node at which each step begins
        self._asks: dict[int, list[int]] = {}  # for each step the nodes at which its questions begin, as far as known

    def _begin(self, step: int, question: int = 0) -> int:
        """Add the transcript up to a question's stem; return its last node."""
        ends, grow, piece = self._ends, self.tree.grow, self.encoder.piece
        inline = self.episode.game.feedback == "inline"
        while len(ends) <= step:
            t = len(ends) - 1
            now = self.episode.steps[t]
            ends.append(grow(self._begin(t, len(now.questions) if inline else 0), piece(now.outcome)))
        now, begins = self.episode.steps[step], self._asks.get(step)
        if begins is None:
            begins = self._asks[step] = [grow(ends[step], piece(now.narration))]
        if not inline:
            return begins[0]
        for q in now.questions[len(begins) - 1 : question]:
            begins.append(grow(begins[-1], piece(q.stem) + piece(q.choices[q.truth]) + piece(q.closing)))
        return begins[question]

    @property
    def end(self) -> int:
        """The node at which the last started step begins; all nodes on its path stay in the tree."""
        return self._ends[-1]

    def leads_to(self, episode: Episode) -> bool:
        """Return whether `episode` starts with the steps of this trunk and has at least one more."""
        steps = len(self._ends) - 1
        return len(episode.steps) > steps and episode.steps[:steps] == self.episode.steps[:steps]

    def go_on(self, episode: Episode) -> None:
        """Continue with `episode`, which extends this trunk; the branches of the last step are removed."""
        self.tree.cut(self._ends[-1] + 1)
        self._asks.pop(len(self._ends) - 1, None)
        self.episode = episode

    def add_question(self, step: int, question: int) -> Branch:
        """Add the prompt of a question and its choices to the tree, without tokens whose logits are not needed."""
        asked = self.episode.steps[step].questions[question]
        return self.tree.graft(self._begin(step, question), self.encoder.cloze(asked.stem, asked.choices))


def size_of(trunks: Iterable[Trunk]) -> tuple[int, int]:
    """Return the length of the longest path, and the number of nodes of the largest tree."""
    trees = [t.tree for t in trunks]
    return 1 + max(max(t.depths) for t in trees), max(map(len, trees))


class Layout(NamedTuple):
    """The arrangement of the tokens of trees in a forward pass.

    Either each row is a whole tree and the columns of its tokens are in the order of its nodes (`cached` is given), or
    each row is one path of a tree and the column of a token is its position.
    """

    trees: tuple[int, ...]  # the tree of each row
    nodes: Int[np.ndarray, "row token"]  # the node of each token, -1 for padding
    cached: tuple[Sequence[int], ...] | None  # for each row the cache columns of nodes read in earlier passes
    width: int  # columns before those of this pass

    def columns(self, row: int, path: Sequence[int]) -> list[int]:
        """Return the attention columns of the nodes of a path from the root."""
        if self.cached is None:
            return list(range(len(path)))
        known = self.cached[row]
        return [known[n] if n < len(known) else self.width + n - len(known) for n in path]

    @property
    def total(self) -> int:
        """The number of columns, including cached ones."""
        return self.width + int(self.nodes.shape[1])


class Batch(NamedTuple):
    """A batch of trees for a forward pass; shorter rows are padded on the right.

    A token sees the column `k` if its own `enter` is at least `enter[k]` and less than `leave[k]`; padding sees itself
    only. `enter` and `leave` are None if every row is one path and there is no cache, so that plain causal attention is
    right.
    """

    tokens: Int[np.ndarray, "row token"]
    depths: Int[np.ndarray, "row column"]  # the position of each column's token on its path
    enter: Int[np.ndarray, "row column"] | None
    leave: Int[np.ndarray, "row column"] | None
    layout: Layout

    @property
    def seen(self) -> Bool[np.ndarray, "row token column"] | None:
        """What each token may attend to as a dense mask; None where plain causal attention is right."""
        if self.enter is None or self.leave is None:
            return None
        own = self.enter[:, self.layout.width :, None]
        return np.asarray((self.enter[:, None] <= own) & (own < self.leave[:, None]))


def intervals(parents: Int[np.ndarray, " node"]) -> tuple[Int[np.ndarray, " node"], Int[np.ndarray, " node"]]:
    """Number the nodes of a forest in depth-first order, so that ancestry is a comparison of two integers.

    Args:
        parents: the parent of each node, which comes before it; -1 for a root.

    Returns:
        `enter` and `leave`: node `k` is `q` or an ancestor of it if and only if `enter[k] <= enter[q] < leave[k]`.
        (Tarjan 1974, Finding dominators in directed graphs: an interval for the descendants of each node.)
    """
    count = len(parents)
    if count == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # Chains of nodes with one child are contracted: a tree of text has few others.
    first = np.ones(count, dtype=bool)
    first[1:] = parents[1:] != np.arange(count - 1)
    left = parents[first]  # nodes where a chain begins elsewhere than at the next node
    left = left[(left >= 0) & (left < count - 1)] + 1
    first[left] = True
    chain, starts = np.cumsum(first) - 1, np.flatnonzero(first)
    n = len(starts)
    above = parents[starts]
    above = np.append(np.where(above < 0, n, chain[above]), n)  # chain n is above all roots
    lengths = np.diff(starts, append=count)
    # Pointers that double in length at each round: sums over descendants, then over ancestors.
    size, jump = np.append(lengths, 0), above
    while (jump[:n] < n).any():
        size = size + np.bincount(jump[:n], size[:n], n + 1).astype(np.int64)
        jump = jump[jump]
    order = np.argsort(above[:n], kind="stable")  # siblings side by side
    before = np.cumsum(size[order]) - size[order]
    group = np.flatnonzero(np.diff(above[order], prepend=-1))
    before -= np.repeat(before[group], np.diff(group, append=n))
    offset, jump = np.zeros(n + 1, np.int64), above
    offset[order] = before
    offset[:n] += np.append(lengths, 0)[above[:n]]
    while (jump[:n] < n).any():
        offset = offset + offset[jump]
        jump = jump[jump]
    enter = offset[chain] + np.arange(count) - starts[chain]
    return enter, (offset + size)[chain]


def pack(
    trees: Sequence[Tree],
    pad: int = 0,
    cached: Sequence[Sequence[int]] | None = None,
    width: int = 0,
    multiple: int = 1,
) -> Batch:
    """Arrange the nodes of each tree that have not been read yet in a row of its own.

    Args:
        trees: one tree for each row.
        pad: padding token.
        cached: for each row the columns of the nodes that were read before, which are the first nodes of the tree.
        width: number of columns in the cache; new nodes get the following columns, in order.
        multiple: rows are padded to a multiple of this length.
    """
    known: Sequence[Sequence[int]] = [()] * len(trees) if cached is None else cached
    longest = max(len(t) - len(c) for t, c in zip(trees, known, strict=True))
    longest = -(-longest // multiple) * multiple
    begins, parents = _forest(trees)
    chains = cached is None and not (np.delete(parents, begins) - np.delete(np.arange(len(parents)), begins) + 1).any()
    forest = None if chains else intervals(parents)
    nodes = np.full((len(trees), longest), -1, dtype=np.int64)
    tokens = np.full((len(trees), longest), pad, dtype=np.int64)
    depths, enter, leave = (np.zeros((len(trees), width + longest), dtype=np.int64) for _ in range(3))
    for row, (tree, columns, first) in enumerate(zip(trees, known, begins, strict=True)):
        begin, count = len(columns), len(tree)
        n = count - begin
        nodes[row, :n] = np.arange(begin, count)
        tokens[row, :n] = tree.tokens[begin:]
        places: Any = slice(0, n)
        if begin or width:
            places = np.concatenate([np.asarray(columns, dtype=np.int64), np.arange(width, width + n)])
        depths[row, places] = tree.depths
        if forest is not None:
            enter[row, places], leave[row, places] = (numbers[first : first + count] for numbers in forest)
            pads = len(parents) + np.arange(longest - n)  # a token that sees nothing would be NaN
            enter[row, width + n :], leave[row, width + n :] = pads, pads + 1
    layout = Layout(tuple(range(len(trees))), nodes, tuple(known), width)
    return Batch(tokens, depths, None if chains else enter, None if chains else leave, layout)


class Packed(NamedTuple):
    """Trees one after the other in a single row, the spine of each before its branches.

    So the columns of a block are mostly of one kind: text that all later questions see, or one question's own. Padding
    at the end, up to a multiple of a length, sees itself only.
    """

    tokens: Int[np.ndarray, " token"]
    depths: Int[np.ndarray, " token"]
    enter: Int[np.ndarray, " token"]
    leave: Int[np.ndarray, " token"]
    begins: Int[np.ndarray, " tree"]  # the number of nodes of the trees before each tree
    columns: Int[np.ndarray, " node"]  # the column of each node, nodes of the trees one after the other


def pack_row(trees: Sequence[Tree], spines: Sequence[int], pad: int = 0, length: int = 0) -> Packed:
    """Arrange the nodes of all trees in one row without padding between them.

    Args:
        trees: the trees.
        spines: for each tree the last node of its spine.
        pad: padding token.
        length: the least length of the row.
    """
    begins, parents = _forest(trees)
    count = len(parents)
    enter, leave = intervals(parents)
    tree_of = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
    ends = enter[begins + np.asarray(spines)][tree_of]
    branch = (ends < enter) | (leave <= ends)  # neither the spine's end nor an ancestor of it
    order = np.lexsort((branch, tree_of))
    columns = np.empty(count, dtype=np.int64)
    columns[order] = np.arange(count)
    pads = np.arange(count, max(length, count))

    def row(values: Int[np.ndarray, " node"], more: Int[np.ndarray, " pad"]) -> Int[np.ndarray, " token"]:
        return np.concatenate([values[order], more])

    tokens, depths = (np.concatenate([getattr(tree, name) for tree in trees]) for name in ("tokens", "depths"))
    return Packed(
        row(tokens, np.full(len(pads), pad)), row(depths, 0 * pads), row(enter, pads), row(leave, pads + 1),
        begins, columns,
    )  # fmt: skip


def _forest(trees: Sequence[Tree]) -> tuple[Int[np.ndarray, " tree"], Int[np.ndarray, " node"]]:
    """Return the number of nodes before each tree, and the parents of all nodes, one tree after the other."""
    sizes = np.array([len(tree) for tree in trees])
    begins = np.cumsum(sizes) - sizes
    parents = np.concatenate([tree.parents for tree in trees])
    return begins, np.where(parents < 0, -1, parents + np.repeat(begins, sizes))


class Asked(NamedTuple):
    """A question to answer: its tree, and the node of the last token of its prompt (the answering token)."""

    tree: int
    node: int
    prompt: Prompt


@dataclass(frozen=True)
class ForwardContext:
    """The input of a model while it answers: transcripts with their questions, in one or more forward passes.

    Args:
        trunks: the transcripts, one tree each.
        asked: the questions.
        before: for each transcript, the number of nodes that were read in earlier calls of a live session.
        live: whether this is a live session, which caches what it has read.
        passes: the layouts of the completed forward passes.
        layout: the layout of the running forward pass, None between passes.
    """

    trunks: tuple[Trunk, ...]
    asked: tuple[Asked, ...]
    before: tuple[int, ...]
    live: bool = False
    passes: tuple[Layout, ...] = ()
    layout: Layout | None = None

    @property
    def now(self) -> Layout:
        """The layout of the running forward pass."""
        assert self.layout is not None
        return self.layout

    @property
    def rows(self) -> list[Trunk]:
        """The transcript of each row of this pass. Several rows can be paths of one transcript."""
        return [self.trunks[tree] for tree in self.now.trees]

    @property
    def answering(self) -> tuple[list[int], list[int]]:
        """Rows and columns of the answering tokens in this pass, for indexing as `x[rows, tokens]`.

        A question is listed once for each row that has its answering token, and not at all if it is in another pass.
        """
        waiting: dict[int, list[int]] = {}
        for asked in self.asked:
            waiting.setdefault(asked.tree, []).append(asked.node)
        rows, tokens = [], []
        for row, (tree, nodes) in enumerate(zip(self.now.trees, self.now.nodes, strict=True)):
            found = np.flatnonzero(np.isin(nodes, waiting.get(tree, [])))
            rows += [row] * len(found)
            tokens += found.tolist()
        return rows, tokens

    @property
    def positions(self) -> Int[np.ndarray, "row token"]:
        """Each token's position in its own prompt, from 0; padding has 0."""
        out = np.zeros_like(self.now.nodes)
        for row, (trunk, nodes) in enumerate(zip(self.rows, self.now.nodes, strict=True)):
            real = nodes >= 0
            out[row, real] = np.array(trunk.tree.depths)[nodes[real]]
        return out

    def path(self, asked: Asked) -> list[int]:
        """Return the nodes of a question's prompt, by position."""
        return self.trunks[asked.tree].tree.path(asked.node)
