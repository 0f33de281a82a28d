"""Trees of tokens: a transcript is a trunk, and everything asked about it a branch that other branches do not see.

One forward pass over a tree gives the logits that one pass for each root-to-leaf path would give: every token carries
the position it has on its own path, and a mask shows it its ancestors and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from nextstate.agents.agent import Prompt
from nextstate.agents.text import Encoder
from nextstate.envs.game import Episode


class Tree:
    """Tokens with parent pointers. Paths that begin alike share their tokens, so a tree is also a trie."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._child: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def grow(self, parent: int, tokens: Sequence[int]) -> int:
        """Continue the path that ends in node `parent` (-1: begin one) by `tokens`; return the node it ends in now."""
        for token in tokens:
            node = self._child.get((parent, token))
            if node is None:
                node = len(self.tokens)
                self._child[parent, token] = node
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
            parent = node
        return parent

    def copy(self) -> Tree:
        """Return an independent copy."""
        out = Tree()
        out.tokens, out.parents, out.depths = list(self.tokens), list(self.parents), list(self.depths)
        out._child = dict(self._child)
        return out

    def cut(self, nodes: int) -> None:
        """Keep the first `nodes` nodes alone."""
        for child in zip(self.parents[nodes:], self.tokens[nodes:], strict=True):
            del self._child[child]
        del self.tokens[nodes:], self.parents[nodes:], self.depths[nodes:]

    def path(self, node: int) -> list[int]:
        """Return the nodes from the beginning to `node`."""
        out = []
        while node >= 0:
            out.append(node)
            node = self.parents[node]
        return out[::-1]

    def follow(self, node: int, tokens: Sequence[int]) -> list[int]:
        """Return the nodes that continue the path that ends in `node` by `tokens`, as far as there are any."""
        out: list[int] = []
        for token in tokens:
            child = self._child.get((out[-1] if out else node, token))
            if child is None:
                break
            out.append(child)
        return out


class Choice(NamedTuple):
    """A choice in a tree: the node whose logits predict its first token, then those of its other tokens."""

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]


class Branch(NamedTuple):
    """A question in a tree: its choices, and the node at which it waits for an answer."""

    node: int
    choices: tuple[Choice, ...]


class Trunk:
    """The transcript of one episode as it grows in a tree, and the questions planted on it."""

    def __init__(self, encoder: Encoder, episode: Episode, tree: Tree | None = None) -> None:
        self.encoder, self.episode, self.tree = encoder, episode, Tree() if tree is None else tree
        self._ends = [self.tree.grow(-1, encoder.opening(episode.opening))]  # node at which each step begins

    def _add_step(self, step: int, questions: int | None = None) -> int:
        """Grow `step` up to question number `questions`, by default the whole step; return the node it ends in."""
        now, piece = self.episode.steps[step], self.encoder.piece
        node = self.tree.grow(self._begin(step), piece(now.narration))
        if self.episode.game.feedback == "inline":
            for q in now.questions[:questions]:
                for text in (q.stem, q.choices[q.truth], q.closing):
                    node = self.tree.grow(node, piece(text))
        return self.tree.grow(node, piece(now.outcome)) if questions is None else node

    def _begin(self, step: int) -> int:
        while len(self._ends) <= step:
            self._ends.append(self._add_step(len(self._ends) - 1))
        return self._ends[step]

    @property
    def end(self) -> int:
        """The node at which the last step that has begun begins; all nodes on its path stay in the tree."""
        return self._ends[-1]

    def leads_to(self, episode: Episode) -> bool:
        """Tell whether `episode` has the steps that this trunk has told, and one more at least."""
        steps = len(self._ends) - 1
        return len(episode.steps) > steps and episode.steps[:steps] == self.episode.steps[:steps]

    def go_on(self, episode: Episode) -> None:
        """Tell `episode` from now on, which this trunk leads to; all that was planted on the last step is cut off."""
        self.tree.cut(self._ends[-1] + 1)
        self.episode = episode

    def add_question(self, step: int, question: int) -> Branch:
        """Grow the prompt of a question and all choices; every token that no other path needs is left out."""
        asked = self.episode.steps[step].questions[question]
        node = self.tree.grow(self._add_step(step, question), self.encoder.piece(asked.stem))
        choices = []
        for text in asked.choices:
            tokens = self.encoder.piece(text)
            nodes = [node]
            for token in tokens[:-1]:
                nodes.append(self.tree.grow(nodes[-1], (token,)))
            choices.append(Choice(tuple(nodes), tokens))
        return Branch(node, tuple(choices))


def size_of(trunks: Iterable[Trunk]) -> tuple[int, int]:
    """Return the tokens of the longest path and the nodes of the largest of some trees."""
    trees = [t.tree for t in trunks]
    return 1 + max(max(t.depths) for t in trees), max(map(len, trees))


class Layout(NamedTuple):
    """Which token of which tree stands where in a forward pass.

    Either a row is a whole tree and the columns of its tokens are in the order of its nodes (`cached` is given), or a
    row is one path of a tree and the column of a token is its position.
    """

    trees: tuple[int, ...]  # the tree of each row
    nodes: Int[np.ndarray, "row token"]  # the node of each token, -1 for padding
    cached: tuple[Sequence[int], ...] | None  # for each row the columns of the nodes that were read before
    width: int  # columns before those of this pass

    def columns(self, row: int, path: Sequence[int]) -> list[int]:
        """Return the columns of the attention matrix that the nodes of a path from the root have."""
        if self.cached is None:
            return list(range(len(path)))
        known = self.cached[row]
        return [known[n] if n < len(known) else self.width + n - len(known) for n in path]

    @property
    def total(self) -> int:
        """The number of columns, those read before included."""
        return self.width + int(self.nodes.shape[1])


class Batch(NamedTuple):
    """Trees side by side, ready for a forward pass; shorter rows are padded on the right.

    `seen` is None where every tree is one path and there is no cache: plain causal attention does it.
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
    """Lay the nodes of each tree side by side that have not been read before.

    Args:
        trees: one a row.
        pad: token that fills up shorter rows.
        cached: for each row the columns of the nodes that were read before, which are the tree's first ones.
        width: number of columns in the cache. New nodes take the columns after these, in order.
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
    """A question that is answered now: its tree, and the node of the last token of its prompt (the answering token)."""

    tree: int
    node: int
    prompt: Prompt


@dataclass(frozen=True)
class ForwardContext:
    """What a model reads while it answers: transcripts with the questions planted on them, in one or more passes.

    Args:
        trunks: the transcripts, a tree each.
        asked: the questions.
        before: for each transcript how many nodes of its tree were read in earlier calls of a live session.
        live: whether a session reads on, with what it has read before in a cache.
        passes: the layouts of the forward passes that have been finished.
        layout: that of the forward pass that is running, None between passes.
    """

    trunks: tuple[Trunk, ...]
    asked: tuple[Asked, ...]
    before: tuple[int, ...]
    live: bool = False
    passes: tuple[Layout, ...] = ()
    layout: Layout | None = None

    @property
    def now(self) -> Layout:
        """The layout of the forward pass that is running."""
        assert self.layout is not None
        return self.layout

    @property
    def rows(self) -> list[Trunk]:
        """The transcript of each row of this pass. Several rows can be paths of one transcript."""
        return [self.trunks[tree] for tree in self.now.trees]

    @property
    def answering(self) -> tuple[list[int], list[int]]:
        """Rows and tokens of this pass at which questions wait for their answers, `x[rows, tokens]`.

        A question whose answering token is in several rows has all of them here; one that is not in this pass has none.
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
