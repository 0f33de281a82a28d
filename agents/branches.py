"""Trees of tokens: a transcript is a trunk, and everything asked about it a branch that other branches do not see.

One forward pass over a tree gives the logits that one pass for each root-to-leaf path would give: every token carries
the position it has on its own path, and a mask shows it its ancestors and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Planted(NamedTuple):
    """A question in a tree: its choices, and the node at which it waits for an answer."""

    node: int
    choices: tuple[Choice, ...]


class Trunk:
    """The transcript of one episode as it grows in a tree, and the questions planted on it."""

    def __init__(self, encoder: Encoder, episode: Episode, tree: Tree | None = None) -> None:
        self.encoder, self.episode, self.tree = encoder, episode, Tree() if tree is None else tree
        self._ends = [self.tree.grow(-1, encoder.opening(episode.opening))]  # node at which each step begins

    def _told(self, step: int, questions: int | None = None) -> int:
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
            self._ends.append(self._told(len(self._ends) - 1))
        return self._ends[step]

    def leads_to(self, episode: Episode) -> bool:
        """Tell whether `episode` has the steps that this trunk has told, and one more at least."""
        told = len(self._ends) - 1
        return len(episode.steps) > told and episode.steps[:told] == self.episode.steps[:told]

    def go_on(self, episode: Episode) -> None:
        """Tell `episode` from now on, which this trunk leads to; all that was planted on the last step is cut off."""
        self.tree.cut(self._ends[-1] + 1)
        self.episode = episode

    def plant(self, step: int, question: int) -> Planted:
        """Grow the prompt of a question and all choices; every token that no other path needs is left out."""
        asked = self.episode.steps[step].questions[question]
        node = self.tree.grow(self._told(step, question), self.encoder.piece(asked.stem))
        choices = []
        for text in asked.choices:
            tokens = self.encoder.piece(text)
            nodes = [node]
            for token in tokens[:-1]:
                nodes.append(self.tree.grow(nodes[-1], (token,)))
            choices.append(Choice(tuple(nodes), tokens))
        return Planted(node, tuple(choices))


@dataclass(frozen=True)
class Batch:
    """Trees side by side, ready for a forward pass; shorter rows are padded on the right.

    `mask` is None where every tree is one path, so that plain causal attention does.
    """

    tokens: Int[np.ndarray, "row node"]
    positions: Int[np.ndarray, "row node"]
    mask: Bool[np.ndarray, "row node column"] | None


def pack(
    trees: Sequence[Tree],
    pad: int = 0,
    start: Sequence[int] | None = None,
    columns: Sequence[Sequence[int]] | None = None,
    width: int = 0,
) -> Batch:
    """Lay the nodes of each tree from `start` on (default: all) side by side.

    Args:
        trees: one a row.
        pad: token that fills up shorter rows.
        start: for each row the first node that is new; the keys and values of older ones are cached.
        columns: for each row the cache column of each older node.
        width: number of columns in the cache. New nodes take the columns after these, in order.
    """
    first = [0] * len(trees) if start is None else list(start)
    longest = max(len(t) - s for t, s in zip(trees, first, strict=True))
    tokens = np.full((len(trees), longest), pad, dtype=np.int64)
    positions = np.zeros((len(trees), longest), dtype=np.int64)
    chains = width == 0 and all(t.parents == list(range(-1, len(t) - 1)) for t in trees)
    mask = None if chains else np.zeros((len(trees), longest, width + longest), dtype=bool)
    for row, (tree, begin) in enumerate(zip(trees, first, strict=True)):
        n = len(tree) - begin
        tokens[row, :n] = tree.tokens[begin:]
        positions[row, :n] = tree.depths[begin:]
        if mask is not None:
            _fill(mask[row], tree, begin, [] if columns is None else columns[row], width)
            pads = np.arange(n, longest)
            mask[row, pads, width + pads] = True  # a token that sees nothing would be NaN
    return Batch(tokens, positions, mask)


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
    """A question that a forward pass answers, and the place of the last token of its prompt (the answering token)."""

    row: int
    token: int
    prompt: Prompt


@dataclass(frozen=True)
class Reading:
    """What a forward pass reads: an episode a row; token i of row r is node `start[r] + i` of `trunks[r].tree`.

    Rows are padded on the right.

    Args:
        trunks: the transcript of each row's episode, with the questions planted on it.
        asked: the questions of this pass.
        start: for each row the first node that is new; live sessions have the keys and values of older ones cached.
        columns: for each row the cache column of each older node.
        width: number of columns in the cache.
    """

    trunks: tuple[Trunk, ...]
    asked: tuple[Asked, ...]
    start: tuple[int, ...]
    columns: tuple[Sequence[int], ...] = ()
    width: int = 0

    @classmethod
    def of(
        cls,
        trunks: Sequence[Trunk],
        asked: Sequence[tuple[int, int, Planted]],
        prompts: Sequence[Prompt],
        start: Sequence[int] | None = None,
        columns: Sequence[Sequence[int]] = (),
        width: int = 0,
    ) -> Reading:
        """Return what is read where `asked` has row, index of the prompt, and place in the tree of each question."""
        first = (0,) * len(trunks) if start is None else tuple(start)
        questions = tuple([Asked(row, q.node - first[row], prompts[i]) for row, i, q in asked])
        return cls(tuple(trunks), questions, first, tuple(columns), width)

    @property
    def live(self) -> bool:
        """Whether a session reads on, with keys and values of what it has read before."""
        return bool(self.columns)

    @property
    def answering(self) -> tuple[list[int], list[int]]:
        """Rows and tokens at which the questions of this pass wait for their answers: `x[rows, tokens]`."""
        return [a.row for a in self.asked], [a.token for a in self.asked]

    @property
    def positions(self) -> Int[np.ndarray, "row token"]:
        """Each token's position in its own prompt, from 0; padding has 0."""
        depths = [t.tree.depths[s:] for t, s in zip(self.trunks, self.start, strict=True)]
        out = np.zeros((len(depths), max(map(len, depths))), dtype=np.int64)
        for row, own in enumerate(depths):
            out[row, : len(own)] = own
        return out

    def path(self, asked: Asked) -> list[int]:
        """Return the nodes of a question's prompt, by position."""
        return self.trunks[asked.row].tree.path(self.start[asked.row] + asked.token)

    def seen(self, row: int, nodes: Sequence[int]) -> list[int]:
        """Return the columns of the attention matrix in which some nodes of a row are."""
        start = self.start[row]
        return [self.columns[row][n] if n < start else self.width + n - start for n in nodes]
