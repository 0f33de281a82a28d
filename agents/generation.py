"""How well a trained model knows a grammar: accuracy and diversity of its strings, and divergence of its next tokens.

Measures of "Physics of Language Models: Part 1" (arXiv 2305.13673), Results 1 to 3: accuracy from nothing and from a
prefix, entropy and distinct strings against the grammar's, Kullback-Leibler divergence per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from nextstate.envs.game import GameError, require_whole
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.inside import member, next_tokens

Strings = Sequence[Sequence[int] | np.ndarray]


@dataclass(frozen=True)
class TokenMap:
    """The tokens of a model that represent a grammar's terminals and the ends of strings.

    Args:
        begin: the token before every string.
        end: the token that closes a string; the two may be one.
        terminals: for each terminal of the grammar its token.
    """

    begin: int
    end: int
    terminals: tuple[int, ...]

    def __post_init__(self) -> None:
        if len({*self.terminals, self.begin}) <= len(self.terminals) or self.end in self.terminals:
            raise GameError(f"{self} is not possible: expected a token of its own for each terminal, and for the ends")

    def encode(self, string: Sequence[int] | np.ndarray) -> list[int]:
        """Return the tokens of the beginning and of terminals, given as their indices."""
        return [self.begin, *[self.terminals[t] for t in string]]

    def decode(self, tokens: Sequence[int]) -> np.ndarray | None:
        """Return the terminals before the first end token; None if there is no end, or another token before it."""
        index = {token: t for t, token in enumerate(self.terminals)}
        whole = list(tokens[: tokens.index(self.end)]) if self.end in tokens else [self.begin]
        return None if any(t not in index for t in whole) else np.array([index[t] for t in whole], dtype=np.int64)


def write(
    model: Any,
    codes: TokenMap,
    prefixes: Strings,
    rng: np.random.Generator,
    longest: int,
    temperature: float = 1.0,
    batch: int = 256,
) -> list[np.ndarray | None]:
    """Generate strings with a causal model of transformers, one for each prefix.

    Args:
        model: in evaluation mode.
        codes: its tokens.
        prefixes: indices of terminals; empty arrays to generate strings from scratch.
        rng: the generator to draw from.
        longest: maximum number of terminals of a string.
        temperature: sampling temperature; the distribution is not truncated.
        batch: number of strings generated at once.

    Returns:
        For each prefix the string including the prefix, or None if it has a token that is not a terminal, or no end.
    """
    require_whole("batch", batch, 1, 1_000_000)
    if not temperature > 0:
        raise GameError(f"temperature={temperature!r} is not possible: expected a number above 0")
    out: list[np.ndarray | None] = [None] * len(prefixes)
    by_length: dict[int, list[int]] = {}
    for k, prefix in enumerate(prefixes):
        by_length.setdefault(len(prefix), []).append(k)
    for length, rows in by_length.items():
        if length > longest:
            raise GameError(f"longest={longest} is not possible with a prefix of {length}: expected at least that")
        for low in range(0, len(rows), batch):
            some = rows[low : low + batch]
            ids = torch.tensor([codes.encode(prefixes[k]) for k in some], device=model.device)
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(int(rng.integers(2**63)))  # generate draws from torch's own generator only
                generated = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=longest - length + 1,
                    eos_token_id=codes.end,
                    pad_token_id=codes.end,
                )
            for k, row in zip(some, generated[:, 1:].tolist(), strict=True):
                out[k] = codes.decode(row)
    return out


def next_logs(
    model: Any, codes: TokenMap, strings: Strings, batch: int = 64
) -> Iterator[Float[np.ndarray, "position choice"]]:
    """Yield for each string the model's log-probabilities (nats) after each prefix: of each terminal, then of the end.

    They are normalised over the whole vocabulary, so their probabilities sum to less than 1.
    """
    kept = [*codes.terminals, codes.end]
    for low in range(0, len(strings), batch):
        some = [codes.encode(string) for string in strings[low : low + batch]]
        width = max(map(len, some))
        ids = torch.tensor([row + [codes.end] * (width - len(row)) for row in some], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in some], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
        logs = torch.log_softmax(logits, dim=-1)[:, :, kept].double().cpu().numpy()
        for row, log in zip(some, logs, strict=True):
            yield log[: len(row)]


def divergence(truth: Float[np.ndarray, "position choice"], logs: Float[np.ndarray, "position choice"]) -> float:
    """Return the Kullback-Leibler divergence of a model from the exact next tokens of a string, in nats a position."""
    seen = truth > 0
    return float((truth[seen] * (np.log(truth[seen]) - logs[seen])).sum() / len(truth))


def divergences(
    model: Any, codes: TokenMap, grammar: Grammar, strings: Strings, batch: int = 64
) -> Float[np.ndarray, " string"]:
    """Return for each string of a grammar the mean divergence of the model's next tokens from the exact ones, in nats.

    Raises:
        GameError: `codes` are those of another grammar.
    """
    if len(codes.terminals) != len(grammar.terminals):
        raise GameError(f"{codes} has {len(codes.terminals)} terminals: expected {len(grammar.terminals)}")
    exact = next_tokens(grammar, strings)
    predicted = next_logs(model, codes, strings, batch)
    return np.array([divergence(after.p, logs) for after, logs in zip(exact, predicted, strict=True)])


class Diversity(NamedTuple):
    """The diversity of strings that a model generates from scratch, whether right or not."""

    strings: int  # written
    bits: Float[
        np.ndarray, " ended"
    ]  # that the model itself gives to each of those with an end; their mean: its entropy
    distinct: int  # among those
    equal_pairs: int  # of strings, where both have an end


def diversity(model: Any, codes: TokenMap, written: Sequence[np.ndarray | None], batch: int = 64) -> Diversity:
    """Measure the diversity of strings that a model has generated from scratch.

    By the birthday paradox, n distinct strings suggest that the model can generate about n^2 / 2 strings.
    """
    ended = [x for x in written if x is not None]
    bits = [surprise(x, logs) for x, logs in zip(ended, next_logs(model, codes, ended, batch), strict=True)]
    many = Counter(tuple(x.tolist()) for x in ended)
    return Diversity(len(written), np.array(bits), len(many), sum(k * (k - 1) // 2 for k in many.values()))


def right(grammar: Grammar, written: Sequence[np.ndarray | None]) -> int:
    """Return how many of the strings belong to the grammar; strings without an end or with other tokens do not."""
    ended = [x for x in written if x is not None]
    return int(member(grammar, ended).sum()) if ended else 0


def surprise(string: np.ndarray, logs: Float[np.ndarray, "position choice"]) -> float:
    """Return the surprisal in bits of a whole string, including its end, under a model's next-token distributions."""
    chosen = np.append(string, logs.shape[1] - 1)
    return float(-logs[np.arange(len(chosen)), chosen].sum() / np.log(2))
