"""Configuration of training: optimisation, shape and variant of a model. Does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nextstate.agents.config import ConfigError, Strict
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.perturb import Perturbation
from nextstate.envs.grammar.sizes import bounds

Architecture = Literal["absolute", "rotary", "relative", "position", "uniform", "masked"]
BEGIN, END, PAD, MASK = SPECIAL = ("<begin>", "<end>", "<pad>", "<mask>")  # of models that are trained on a grammar


class Optimisation(Strict):
    """Optimisation settings: AdamW with a learning rate that decays linearly to 0."""

    rows: int = Field(default=16, ge=1, description="rows per step, over all processes")
    steps: int = Field(default=9000, ge=1)
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.01
    evaluate_every: int = Field(default=500, ge=1)
    save_every: int = Field(default=500, ge=1)
    threads: int | None = None


class GrammarTraining(Optimisation):
    """Shape and optimisation of models trained on a grammar; the defaults are those of the paper."""

    hidden_size: int = Field(default=768, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    window: int = Field(default=512, ge=4, description="tokens per row, cut from concatenated strings")
    rows: int = Field(default=96, ge=1, description="rows per step, over all processes")
    steps: int = Field(default=100_000, ge=1)
    learning_rate: float = 3e-4
    warmup: int = 0
    weight_decay: float = 0.1
    evaluate_every: int = Field(default=2000, ge=1)
    evaluation_strings: int = Field(default=200, ge=1, description="strings generated and scored in each evaluation")


class PerturbationConfig(Strict):
    """How some training strings are perturbed; see `nextstate.envs.grammar.perturb.Perturbation`."""

    kind: Literal["token", "symbol", "permutation"]
    fraction: float = Field(ge=0, le=1)
    rate: float = Field(ge=0, le=1)


class ModelSpec(Strict):
    """One model of a grammar study.

    Args:
        architecture: one of `nextstate.agents.architectures.ARCHITECTURES`.
        untrained: keep the initial random weights, as a control for probes.
        perturbation: how some of its training strings are perturbed.
        name: its name in tables and figures; by default derived from the other arguments.
    """

    architecture: Architecture = "rotary"
    untrained: bool = False
    perturbation: PerturbationConfig | None = None
    name: str = ""

    @property
    def title(self) -> str:
        """The model's name."""
        if self.name or self.perturbation is None:
            return self.name or ("random" if self.untrained else self.architecture)
        given = self.perturbation
        return f"{self.architecture}, {given.fraction:g} with {given.kind} {given.rate:g}"

    @property
    def writes(self) -> bool:
        """Whether it is a trained causal model, which can write strings."""
        return self.architecture != "masked" and not self.untrained

    @property
    def perturbs(self) -> Perturbation | None:
        """The perturbation of its training strings, None if there is none."""
        return Perturbation(**self.perturbation.model_dump()) if self.perturbation else None


def check_training(config: GrammarTraining, grammar: Grammar) -> None:
    """Raise `ConfigError` if a window is shorter than a string, or a terminal has the name of a special token."""
    if taken := sorted(set(SPECIAL) & set(grammar.terminals)):
        raise ConfigError(f"terminals {', '.join(taken)} have names of special tokens; give them other names")
    longest = bounds(grammar)[0][1]
    if config.window < longest + 2:
        raise ConfigError(
            f"window={config.window} is shorter than a string: this grammar has strings of {longest:,} tokens, and two "
            f"more stand at their ends; expected at least {longest + 2}, or a grammar with shorter strings"
        )
