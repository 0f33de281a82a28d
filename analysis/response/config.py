"""The config of a response run, and the game transcripts that it uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from nextstate.agents.config import Strict
from nextstate.analysis.run import ModelRunConfig, Run, RunError
from nextstate.analysis.study import open_run
from nextstate.envs.contrast import Pair
from nextstate.envs.files import slug
from nextstate.envs.games import make_game

ALONG, RANDOM = KINDS = ("along", "random")  # directions of pushes; heads and games are measured in random ones
CONDITIONS = ("repeated", "control")
PRECISIONS = ("own", "float32", "bfloat16")  # in which windows are measured; "own" is the dtype of the model
HALF = ("bfloat16", "float16")
STRENGTHS = tuple(float(x) for x in np.geomspace(1e-4, 1, 8))
FLAT = 0.05  # largest slope of log response against log strength within a window
ALIKE = 0.99  # smallest cosine between responses to consecutive strengths within a window


class BridgeConfig(Strict):
    """Transcripts of a game: the clean sides of its minimal pairs."""

    game: str = Field(description="name of a game, or pkg.module:Name")
    game_args: dict[str, Any] = Field({}, description="settings of the game")
    kinds: list[Literal["state", "action", "name", "noop"]] = Field(
        default=["state"], min_length=1, description="kinds of pairs"
    )
    pairs: int = Field(16, ge=2, le=100_000, description="number of pairs of each kind")
    steps: int | None = Field(None, ge=1, description="length of an episode; by default what suits the game")


class ResponseConfig(ModelRunConfig):
    """Everything that decides the results of a response run."""

    block: int = Field(24, ge=3, description="number of distinct random tokens in a block")
    repeats: int = Field(2, ge=2, description="how often a block occurs in a prompt")
    prompts: int = Field(16, ge=2, le=10_000, description="number of prompts with repeated blocks, and of controls")
    alphabet: list[str] = Field(default=[], description="texts of one token each to draw from; by default all tokens")
    layer: int = Field(0, ge=0, description="layer whose input is pushed; 0 is the embedding")
    directions: int = Field(3, ge=1, le=1000, description="number of random directions for each prompt")
    strengths: list[float] = Field(
        default=[float(f"{x:.4g}") for x in STRENGTHS], min_length=3,
        description="sizes of pushes relative to the norm of the pushed vector, in increasing order",
    )  # fmt: skip
    window_prompts: int = Field(2, ge=1, description="number of prompts on which windows are measured")
    head_prompts: int = Field(8, ge=2, description="largest number of prompts on which heads are ablated")
    flat: float = Field(FLAT, gt=0, description="largest slope of log response against log strength in a window")
    alike: float = Field(ALIKE, gt=0, le=1, description="smallest cosine between responses to consecutive strengths")
    ablation: Literal["mean", "zero"] = Field("mean", description="what replaces the output of a head that is left out")
    bridge: list[BridgeConfig] = Field([], description="games on whose transcripts responses are measured too")
    patching: str | None = Field(None, description="folder of a patching run of the same model to compare heads with")
    resamples: int = Field(2000, ge=100, le=100_000, description="of the bootstrap")
    max_gigabytes: float = Field(2.0, gt=0, description="bound on the memory a pass takes in addition to the model")

    @model_validator(mode="after")
    def _fits(self) -> ResponseConfig:
        if self.strengths != sorted(set(self.strengths)) or self.strengths[0] <= 0:
            raise ValueError(f"strengths={self.strengths} are not possible: expected increasing values above 0")
        if self.window_prompts > self.prompts:
            raise ValueError(f"window_prompts={self.window_prompts} is more than prompts={self.prompts}")
        return self

    @property
    def max_bytes(self) -> int:
        """`max_gigabytes` in bytes."""
        return int(self.max_gigabytes * 2**30)


class Bridge(NamedTuple):
    """Pairs of one kind of one game, whose clean sides are the transcripts."""

    config: BridgeConfig
    kind: str

    @property
    def name(self) -> str:
        """Name that seeds the random numbers."""
        return f"{self.config.game}-{self.kind}"

    @property
    def title(self) -> str:
        """Title for people to read."""
        return f"{self.config.game}, {self.kind} pairs"

    @property
    def key(self) -> str:
        """The last part of the keys of its tables."""
        return slug(self.name)

    def draw(self, rng: np.random.Generator, pairs: int | None = None) -> list[Pair]:
        """Draw the pairs, by default as many as the config asks for.

        Raises:
            GameError: the game cannot make such pairs.
        """
        game = make_game(self.config.game, **self.config.game_args)
        return [game.contrast(rng, self.kind, steps=self.config.steps) for _ in range(pairs or self.config.pairs)]


def bridges_of(config: ResponseConfig) -> list[Bridge]:
    """Return the games and kinds of pairs that a config asks for.

    Raises:
        RunError: it asks for one of them twice.
    """
    found = [Bridge(entry, kind) for entry in config.bridge for kind in entry.kinds]
    names = [one.name for one in found]
    for one in found:
        if names.count(one.name) > 1:
            raise RunError(f"bridge asks for {one.kind} pairs of {one.config.game} twice; give each once")
    return found


def patched(config: ResponseConfig, files: str | None = None) -> Run[Any] | None:
    """Open the patching run that `patching` names; return None if the config names none.

    Args:
        config: config of the response run.
        files: digest of the files of its model. If given, the patching run must have the same digest.

    Raises:
        RunError: the folder is not a run of the study `patch`, has another model, or has no table of heads.
    """
    if config.patching is None:
        return None
    folder = Path(config.patching)
    study, run = open_run(folder, "")
    if study.name != "patch":
        raise RunError(f"patching={folder} is a run of the study {study.name!r}, expected one of 'patch'")
    if run.config.agent != config.agent:
        raise RunError(f"patching={folder} is a run of {run.config.agent}, expected one of {config.agent}")
    asked = {about["identity"].get("model", {}).get("files") for about in run.about.values()} - {None}
    if files and asked - {files}:
        raise RunError(f"patching={folder} used other files of {config.agent} than the present ones; run it again")
    run.summary("heads")  # raises if the table is missing
    return run
