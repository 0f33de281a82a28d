"""Programs that do our jobs without us: the strongest that we could write, and those that people use today.

Each file is one program with a docstring that says who would write it so. They get tokens and a GPT-2 of transformers,
and use nothing of nextstate. `tests/test_peers.py` compares their answers with ours, `benchmarks` their speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

Tokens = tuple[int, ...]


class Request(NamedTuple):
    """One question: the tokens of its prompt, and of each choice."""

    context: Tokens
    choices: tuple[Tokens, ...]


class Answer(NamedTuple):
    """The log-probability of each choice, summed over its tokens, and the choice that greedy decoding gives, or -1."""

    logprobs: list[float]
    greedy: int


class Pairs(NamedTuple):
    """Pairs of prompts of one length: patches take activations of `clean` into runs of `corrupted`."""

    clean: Tensor  # [pair token]
    corrupted: Tensor  # [pair token]
    answer: Tensor  # token of the right answer to the clean prompt, [pair]
    other: Tensor  # ... to the corrupted prompt, [pair]


def answers(requests: Sequence[Request], places: Mapping[tuple[int, Tokens], int], logits: Tensor) -> list[Answer]:
    """Return the answers, given the row of `logits` that follows each request's context and beginning of a choice.

    Args:
        requests: the questions.
        places: the row for (index of the request, tokens of a choice so far).
        logits: over the vocabulary, [row vocab].
    """
    needed = [(places[i, c[:j]], c[j]) for i, r in enumerate(requests) for c in r.choices for j in range(len(c))]
    rows, tokens = (list(x) for x in zip(*needed, strict=True))
    values = (logits[rows, tokens] - logits.logsumexp(-1)[rows]).tolist()
    best = logits.argmax(-1).tolist()
    found, at = [], 0
    for request in requests:
        sums, hits = [], []
        for choice in request.choices:
            end = at + len(choice)
            sums.append(sum(values[at:end]))
            hits.append(all(best[row] == token for row, token in needed[at:end]))
            at = end
        found.append(Answer(sums, longest_hit(request, hits)))
    return found


def longest_hit(request: Request, hits: Sequence[bool]) -> int:
    """Return the longest choice of which each token is the most likely one, the first of these, or -1."""
    chosen = [c for c, hit in enumerate(hits) if hit]
    return max(chosen, key=lambda c: len(request.choices[c]), default=-1)
