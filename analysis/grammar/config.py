"""The config of a grammar study. Importing it does not import torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from nextstate.agents.config import Strict
from nextstate.agents.training_config import GrammarTraining, ModelSpec
from nextstate.analysis.run import RunConfig

REACHES = {"full": None, "tridiagonal": 1, "diagonal": 0}  # tokens on either side that a probe reads


class Writing(Strict):
    """Generation of strings: their number, prefixes and temperatures."""

    strings: int = Field(default=1000, ge=1, description="number of strings for each kind of prefix and temperature")
    prefix: int = Field(default=50, ge=1, description="tokens of a prefix; of shorter strings all but the last token")
    kinds: list[Literal["nothing", "clean", "corrupted"]] = Field(
        default=["nothing", "clean"], min_length=1, description="what a string begins with"
    )
    temperatures: list[float] = Field(default=[1.0], min_length=1, description="at which tokens are sampled")
    corruption: float = Field(
        default=0.15, gt=0, le=1,
        description="probability with which a token of a corrupted prefix is drawn anew, given that at least one token "
        "changes; continuations are judged with the original prefix",
    )  # fmt: skip


class ProbeConfig(Strict):
    """How probes are trained and tested; the defaults are the paper's, except for the number of test strings.

    The optimiser is AdamW with betas (0.9, 0.98) and a constant learning rate.
    """

    heads: int = Field(16, ge=1, description="of the probe")
    dim: int = Field(1024, ge=1, description="size of the vector of a position, in each head")
    steps: int = Field(30_000, ge=1, description="optimiser steps")
    rows: int = Field(60, ge=2, description="strings in each step")
    learning_rate: float = Field(0.003, gt=0, description="of the probe")
    weight_decay: float = Field(0.001, ge=0, description="of the probe")
    strings: int = Field(200, ge=2, description="held out, to test on")


class Probing(ProbeConfig):
    """Probes for the ancestors of tokens and the ends of constituents."""

    layers: list[int] = Field(default=[-1], min_length=1, description="0 is the embedding, -1 the last layer")
    reaches: list[Literal["full", "tridiagonal", "diagonal"]] = Field(
        default=["full", "tridiagonal", "diagonal"], min_length=1, description="which tokens a probe may look at"
    )
    shuffled: bool = Field(default=True, description="whether to also train probes on shuffled labels, as a control")


class Attending(Strict):
    """Which models' attention is measured, and on how many strings."""

    strings: int = Field(default=100, ge=1, description="on which attention is measured")
    models: list[str] = Field(default=[], description="names of models, without seeds; all by default")


class GrammarConfig(RunConfig):
    """Everything that determines the results of a grammar study."""

    grammar: dict[str, Any] = Field(default={}, description="arguments of the game CFG")
    models: list[ModelSpec] = Field(default=[ModelSpec()], min_length=1, description="what is trained")
    seeds: int = Field(default=1, ge=1, description="trainings of each model; their seeds are seed, seed + 1, ...")
    models_of: str = Field(
        default="", description="folder of an earlier run whose trained models are measured; nothing is trained"
    )
    training: GrammarTraining = Field(GrammarTraining(), description="shape of the models, and how they are trained")
    writing: Writing = Field(Writing(), description="what the models write")
    probes: Probing | None = Field(None, description="what probes read off the states; by default nothing")
    attention: Attending | None = Field(None, description="where attention goes; by default it is not measured")

    @model_validator(mode="after")
    def _names_are_unique(self) -> GrammarConfig:
        seeded = [spec.title for spec in self.models if spec.seed is not None]
        if self.seeds > 1 and seeded:
            raise ValueError(f"seeds={self.seeds} trains all models with several seeds: remove the seed of {seeded[0]}")
        titles = [spec.title for spec in self.models]
        twice = sorted({t for t in titles if titles.count(t) > 1})
        if twice:
            raise ValueError(f"models has {', '.join(twice)} more than once: give each a different name")
        families = dict.fromkeys(spec.family for spec in self.models)
        unknown = sorted(set(self.attention.models if self.attention else ()) - set(families))
        if unknown:
            raise ValueError(f"attention.models names {', '.join(unknown)}: expected some of {'; '.join(families)}")
        for part, name in ((self.writing, "kinds"), (self.writing, "temperatures"), (self.probes, "layers"),
                           (self.probes, "reaches")):  # fmt: skip
            given = getattr(part, name, [])
            if len(set(given)) < len(given):
                raise ValueError(f"{name}={given} names one twice")
        return self

    @property
    def trainings(self) -> list[ModelSpec]:
        """Every model with each of its seeds; with one seed, `models` itself."""
        if self.seeds == 1:
            return self.models
        seeds = range(self.seed, self.seed + self.seeds)
        return [spec.model_copy(update={"seed": seed}) for spec in self.models for seed in seeds]

    def seed_of(self, spec: ModelSpec) -> int:
        """Return the seed of the weights and the training data of a model."""
        return self.seed if spec.seed is None else spec.seed

    def attends(self, spec: ModelSpec) -> bool:
        """Whether the attention of this model is measured."""
        return self.attention is not None and (not self.attention.models or spec.family in self.attention.models)
