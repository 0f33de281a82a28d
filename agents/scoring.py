"""Scores of the choices of many questions at once, in arrays: what is read from a model, and its predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Float, Int

from nextstate.agents.agent import Predictions
from nextstate.agents.branches import Branch
from nextstate.agents.forward import Scores, Wants
from nextstate.envs.game import Question


@dataclass(frozen=True, eq=False)
class Queries:
    """What is read from a model to answer questions, which all have choices.

    Attributes:
        wanted: nodes of trees, sorted, each once, and the tokens of all choices, those of the first question first.
        last: the last node of each question's prompt, as an index into these nodes.
        lengths: number of tokens of each choice.
        sizes: number of bytes of each choice.
        counts: number of choices of each question.
    """

    wanted: Wants
    last: Int[np.ndarray, " question"]
    lengths: Int[np.ndarray, " choice"]
    sizes: Int[np.ndarray, " choice"]
    counts: Int[np.ndarray, " question"]

    @classmethod
    def of(cls, trees: Sequence[int], branches: Sequence[Branch]) -> Queries:
        """Return what is read to answer questions, given the index of the tree and the branch of each."""
        clozes = [b.cloze for b in branches]
        nodes = np.fromiter(chain.from_iterable([b.nodes for b in branches]), dtype=np.int64)
        lengths = np.array([len(b.nodes) for b in branches], dtype=np.int64)
        own = np.repeat(np.array(trees, dtype=np.int64), lengths)
        width = int(nodes.max(initial=0)) + 1
        keys, index = np.unique(own * width + nodes, return_inverse=True)
        begins = _begins(lengths)
        per_question = np.array([len(c.at) for c in clozes], dtype=np.int64)
        at = index[np.concatenate([c.at for c in clozes]) + np.repeat(begins, per_question)]
        tokens = np.concatenate([c.wanted for c in clozes])
        return cls(
            Wants(keys // width, keys % width, at, tokens), index[begins],
            np.concatenate([c.lengths for c in clozes]), np.concatenate([c.sizes for c in clozes]),
            np.array([len(c.lengths) for c in clozes], dtype=np.int64),
        )  # fmt: skip

    def predictions(
        self,
        questions: Sequence[Question],
        scores: Scores,
        decode: Callable[[int], str],
        prompt_tokens: Int[np.ndarray, " question"],
    ) -> Predictions:
        """Return the predictions of a model.

        Args:
            questions: the questions.
            scores: what was read.
            decode: returns the text of a token, for answers that are not a choice.
            prompt_tokens: number of tokens of each prompt.
        """
        begins = _begins(self.lengths)
        sums = np.add.reduceat(scores.logprobs.astype(np.float64), begins)
        # Greedy decoding produces a choice if each of its tokens is the most likely one. If one such choice is a prefix
        # of another, decoding continues to the longer one.
        hit = scores.argmax[self.wanted.at] == self.wanted.tokens
        matched = np.where(np.logical_and.reduceat(hit, begins), self.lengths, 0)
        longest, found = _first_largest(matched, self.counts)
        greedy = np.where(found > 0, longest, -1)
        other = np.flatnonzero(greedy < 0)
        written = dict(zip(other.tolist(), map(decode, scores.argmax[self.last[other]].tolist()), strict=True))
        best, per_token, per_byte = (
            _first_largest(x, self.counts)[0] for x in (sums, sums / self.lengths, sums / self.sizes)
        )
        return Predictions(questions, greedy, best, per_token, per_byte, sums, written, prompt_tokens)


def in_order(parts: Sequence[tuple[Sequence[int], Predictions]], questions: Sequence[Question]) -> Predictions:
    """Join predictions into one, in the order of the questions; each part comes with the indices of its questions."""
    nothing = np.zeros(0, dtype=np.int64)
    which = np.concatenate([nothing, *(np.array(indices, dtype=np.int64) for indices, _ in parts)])
    order = np.argsort(which)
    columns = {
        name: np.concatenate([nothing, *(getattr(p, name) for _, p in parts)])[order]
        for name in ("greedy", "choice", "choice_token", "choice_byte", "prompt_tokens")
    }
    counts = np.array([len(q.choices) for q in questions], dtype=np.int64)
    begins = _begins(counts[which])[order]
    logprobs = np.concatenate([np.zeros(0), *(p.logprobs for _, p in parts)])
    choices = np.repeat(begins - _begins(counts), counts) + np.arange(len(logprobs))
    written = {indices[k]: text for indices, p in parts for k, text in p.written.items()}
    return Predictions(questions, logprobs=logprobs[choices], written=written, **columns)


def _begins(lengths: Int[np.ndarray, " part"]) -> Int[np.ndarray, " part"]:
    """Return where parts of the given lengths begin."""
    return np.asarray(np.cumsum(lengths) - lengths)


def _first_largest(
    values: Float[np.ndarray, " choice"], counts: Int[np.ndarray, " question"]
) -> tuple[Int[np.ndarray, " question"], Float[np.ndarray, " question"]]:
    """Return the index of each question's largest value among its own, the first one of equals, and the value."""
    begins = _begins(counts)
    largest = np.maximum.reduceat(values, begins)
    places = np.flatnonzero(values == np.repeat(largest, counts))
    return places[np.searchsorted(places, begins)] - begins, largest
