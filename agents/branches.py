"""Trees of tokens: the transcript is the trunk, and each question is a branch that other branches cannot attend to.

One forward pass over a tree gives the same logits as separate passes over its root-to-leaf paths: each token has its
position on its own path, and a mask restricts its attention to its ancestors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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

    `seen` is None if every tree is one path and there is no cache, so that plain causal attention is right.
    """

    tokens: Int[np.ndarray, "row token"]
    seen: Bool[np.ndarray, "row token column"] | None
    depths: Int[np.ndarray, "row column"]  # the position of each column's token on its path
    layout: Layout


def pack(
    trees: Sequence[Tree],
    pad: int = 0,
    cached: Sequence[Sequence[int]] | None = None,
    width: int = 0,
) -> Batch:
    """Arrange the nodes of each tree that have not been read yet in rows.

    Args:
        trees: one tree for each row.
        pad: padding token.
        cached: for each row the columns of the nodes that were read before, which are the first nodes of the tree.
        width: number of columns in the cache; new nodes get the following columns, in order.
    """
    known: Sequence[Sequence[int]] = [()] * len(trees) if cached is None else cached
    longest = max(len(t) - len(c) for t, c in zip(trees, known, strict=True))
    nodes = np.full((len(trees), longest), -1, dtype=np.int64)
    tokens = np.full((len(trees), longest), pad, dtype=np.int64)
    depths = np.zeros((len(trees), width + longest), dtype=np.int64)
    chains = cached is None and all(t.parents == list(range(-1, len(t) - 1)) for t in trees)
    seen = None if chains else np.zeros((len(trees), longest, width + longest), dtype=bool)
    for row, (tree, columns) in enumerate(zip(trees, known, strict=True)):
        begin, n = len(columns), len(tree) - len(columns)
        nodes[row, :n] = np.arange(begin, len(tree))
        tokens[row, :n] = tree.tokens[begin:]
        depths[row, columns] = tree.depths[:begin]
        depths[row, width : width + n] = tree.depths[begin:]
        if seen is not None:
            _fill(seen[row], tree, begin, columns, width)
            pads = np.arange(n, longest)
            seen[row, pads, width + pads] = True  # a token that sees nothing would be NaN
    layout = Layout(tuple(range(len(trees))), nodes, tuple(known), width)
    return Batch(tokens, seen, depths, layout)


def _fill(mask: Bool[np.ndarray, "node column"], tree: Tree, begin: int, columns: Sequence[int], width: int) -> None:
    parents, end = tree.parents, len(tree)
    node = begin
    while node < end:
        run = node + 1
        while run < end and parents[run] == run - 1:
            run += 1
        rows = slice(node - begin, run - begin)
        parent = parents[node]
        if parent >= begin:
            mask[rows] = mask[parent - begin]
        else:
            while parent >= 0:
                mask[rows, columns[parent]] = True
                parent = parents[parent]
        own = slice(width + node - begin, width + run - begin)
        mask[rows, own] |= np.tri(run - node, dtype=bool)
        node = run


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
