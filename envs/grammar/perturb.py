"""Perturbed strings of a grammar, for training robust models and for prefixes that test robustness.

"Physics of Language Models: Part 1" (arXiv 2305.13673), Results 11 to 13, names three kinds and their rates. How
exactly symbols are replaced we could not read there; that is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from nextstate.envs.game import require
from nextstate.envs.grammar.derivation import Change, Derivation, sample
from nextstate.envs.grammar.grammar import Grammar

Kind = Literal["token", "symbol", "permutation"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Perturbation:
    """How training strings are perturbed.

    Args:
        kind: "token": terminals are replaced, each by one drawn from all of them. "symbol": so are the symbols of the
            level above, before terminals are drawn. "permutation": these symbols too, each by the one that follows it
            on its level, the last one by the first.
        fraction: fraction of strings that are perturbed, 0 to 1.
        rate: fraction of tokens, or symbols, that are replaced in a perturbed string, 0 to 1.
    """

    kind: Kind
    fraction: float
    rate: float

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        for name in ("fraction", "rate"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "a number from 0 to 1")

    def change(self, grammar: Grammar, rng: np.random.Generator, strings: int) -> Change:
        """Draw which of `strings` strings are perturbed; return the `change` for `derivation.sample` that does it."""
        chosen = rng.random(strings) < self.fraction
        at = len(grammar.levels) - (self.kind != "token")
        many = len(grammar.levels[at - 1])

        def change(level: int, symbols: np.ndarray, string: np.ndarray) -> np.ndarray:
            if level != at:
                return symbols
            hit = chosen[string] & (rng.random(len(symbols)) < self.rate)
            other = (symbols + 1) % many if self.kind == "permutation" else rng.integers(many, size=len(symbols))
            return np.where(hit, other, symbols)

        return change


def draw(
    grammar: Grammar, rng: np.random.Generator, n: int, perturbation: Perturbation | None = None
) -> list[Derivation]:
    """Draw `n` strings, some of them perturbed; their derivations are those of the unperturbed strings."""
    return sample(grammar, rng, n, perturbation.change(grammar, rng, n) if perturbation else None)


def corrupt(string: np.ndarray, rng: np.random.Generator, rate: float, terminals: int) -> np.ndarray:
    """Return the string with each token replaced, with probability `rate`, by one drawn from all terminals.

    The draw is conditional on at least one token being different: what a model writes after an unchanged prefix says
    nothing of its robustness. An empty string stays as it is.

    Raises:
        GameError: `rate` is not above 0, or there is only one terminal, so that no token can differ.
    """
    require(0 < rate <= 1, "rate", rate, "a number above 0, up to 1")
    require(terminals > 1, "terminals", terminals, "2 or more, so that a token can be another one")
    if not len(string):
        return string
    differs = rate * (terminals - 1) / terminals  # for each token, without the condition
    chances = differs * (1 - differs) ** np.arange(len(string))
    first = rng.choice(len(string), p=chances / chances.sum())
    place = np.arange(len(string))
    changed = (place == first) | ((place > first) & (rng.random(len(string)) < differs))
    return np.where(changed, (string + rng.integers(1, terminals, size=len(string))) % terminals, string)
