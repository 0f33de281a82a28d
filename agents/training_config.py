"""Configuration of training: optimisation, shape and variant of a model. Does not import torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from nextstate.agents.config import ConfigError, Strict
from nextstate.envs.grammar.grammar import Grammar
from nextstate.envs.grammar.perturb import Perturbation
from nextstate.envs.grammar.sizes import bounds

Precision = Literal["auto", "float32", "bfloat16"]
Architecture = Literal["absolute", "rotary", "relative", "position", "uniform", "masked"]
BEGIN, END, PAD, MASK = SPECIAL = ("<begin>", "<end>", "<pad>", "<mask>")  # of models that are trained on a grammar


class Optimisation(Strict):
    """Optimisation settings: AdamW with a learning rate that decays linearly to 0."""

    rows: int = Field(default=16, ge=1, description="in each step, over all processes")
    steps: int = Field(default=9000, ge=1, description="optimiser steps")
    learning_rate: float = Field(default=2e-3, description="at the end of the warm-up")
    warmup: int = Field(default=200, description="steps in which the learning rate rises")
    weight_decay: float = Field(default=0.01, description="of AdamW")
    evaluate_every: int = Field(default=500, ge=1, description="steps from one evaluation to the next")
    save_every: int = Field(default=500, ge=1, description="steps from one checkpoint to the next")
    threads: int = Field(default=1, ge=1, description="of the CPU; with another number, the weights differ")
    workers: int | None = Field(
        default=None,
        ge=0,
        description="processes that make batches ahead, for each process that trains; by default 2 with a GPU, else 0",
    )
    precision: Precision = Field(
        default="auto",
        description="of matrix products (autocast; weights are float32); auto: bfloat16 on a GPU that has it",
    )
    compile: bool = Field(default=False, description="compile the blocks of the model; needs a GPU")

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that decide the weights, in JSON types.

        Workers change nothing. Keys that were added later are left out at their defaults, so that the folders of
        earlier runs are still recognised.
        """
        added = {"precision", "compile"}
        unset = {key for key in added if getattr(self, key) == type(self).model_fields[key].default}
        return self.model_dump(mode="json", exclude={"workers", *unset})


class GrammarTraining(Optimisation):
    """Shape and optimisation of models trained on a grammar; the defaults are those of the paper."""

    hidden_size: int = Field(default=768, ge=1, description="width of the residual stream")
    layers: int = Field(default=12, ge=1, description="number of blocks")
    heads: int = Field(default=12, ge=1, description="of each block")
    window: int = Field(default=512, ge=4, description="tokens of a row, cut from strings one after another")
    rows: int = Field(default=96, ge=1, description="in each step, over all processes")
    steps: int = Field(default=100_000, ge=1, description="optimiser steps")
    learning_rate: float = Field(default=3e-4, description="at the end of the warm-up")
    warmup: int = Field(default=0, description="steps in which the learning rate rises")
    weight_decay: float = Field(default=0.1, description="of AdamW")
    evaluate_every: int = Field(default=2000, ge=1, description="steps from one evaluation to the next")
    evaluation_strings: int = Field(default=200, ge=1, description="written, and scored, each time")


class PerturbationConfig(Strict):
    """How some training strings are perturbed; see `nextstate.envs.grammar.perturb.Perturbation`."""

    kind: Literal["token", "symbol", "permutation"] = Field(description="what is changed")
    fraction: float = Field(ge=0, le=1, description="share of the strings that are changed")
    rate: float = Field(ge=0, le=1, description="share of the tokens or symbols of such a string that are changed")


class ModelSpec(Strict):
    """One model of a grammar study."""

    architecture: Architecture = Field(default="rotary", description="how attention knows where tokens are")
    untrained: bool = Field(default=False, description="keep the initial random weights, as a control for probes")
    perturbation: PerturbationConfig | None = Field(default=None, description="of some of its training strings")
    name: str = Field(default="", description="in tables and figures; by default made from the other keys")
    seed: int | None = Field(default=None, ge=0, description="of its weights and training data; by default the run's")

    @property
    def title(self) -> str:
        """The model's name; trainings of one family that differ in their seed have different ones."""
        return self.family if self.seed is None else f"{self.family}, seed {self.seed}"

    @property
    def family(self) -> str:
        """The model's name without its seed."""
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
