"""The config of a patching run, the minimal pairs that it draws, and its sweeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from nextstate.analysis.run import ModelRunConfig, RunError
from nextstate.envs.contrast import Pair
from nextstate.envs.game import Game

PAPER_STEPS = (6, 10, 14, 18, 22, 26, 30)  # lengths of the published state pairs
PAPER_DISTANCES = (1, 5, 10, 20, 40)  # distances of the published noop pairs
SHOWN = 12  # most heads whose attention is kept
PAPER_TRIALS = 5  # trials of each length in the published aggregation, of which at most one is patched
MIN_EFFECT = 0.02  # a head with a smaller recovery is never said to carry anything, however small its p
ADVISED_PAIRS = 48  # as the documentation says; 96 before saying that no head carries
CONTROL_ROUNDS = 20  # most fresh prompts drawn for each pair in search of a control of the same layout
EXAMPLES = 2  # pairs of each kind shown on the page
PATCHES = ("denoise", "noise")  # the other directions ablate
SITES = ("head", "resid_pre", "attn_out", "mlp_out")


class PatchConfig(ModelRunConfig):
    """Everything that determines the results of a patching run."""

    game: str = Field("DFA", description="name of a game, or pkg.module:Name")
    game_args: dict[str, Any] = Field({}, description="settings of the game")
    pairs: int = Field(
        64, ge=2, le=100_000, description="pairs of each kind and design; 48 are advised, and 96 before saying that no "
        "head carries"
    )  # fmt: skip
    kinds: list[Literal["state", "action", "name", "noop"]] = Field(
        default=["state", "action", "name", "noop"],
        min_length=1,
        description="kinds of pairs, of which those that the game has are used",
    )
    designs: list[Literal["balanced", "paper"]] = Field(
        default=["balanced"], min_length=1, description="our own design of pairs, or the published one"
    )
    aggregate: Literal["mean", "sum"] = Field(
        "mean", description="how effects of published pairs are added up: by our ratio of means over pairs, or also, "
        "beside it, as published: the sum of the scores of at most one patched trial for each length"
    )  # fmt: skip
    directions: list[Literal["denoise", "noise", "zero", "mean", "resample"]] = Field(
        default=["denoise", "noise"], min_length=1, description="zero, mean and resample ablate heads at all positions"
    )
    sites: list[Literal["head", "resid_pre", "attn_out", "mlp_out"]] = Field(
        default=["head", "resid_pre", "attn_out", "mlp_out"], min_length=1, description="what is patched"
    )
    steps: int | None = Field(None, ge=1, description="steps of an episode; noop pairs have `distance` more")
    distance: int | None = Field(None, ge=1, description="steps without effect that noop pairs insert")
    resamples: int = Field(2000, ge=100, le=100_000, description="of the bootstrap")
    max_gigabytes: float = Field(2.0, gt=0, description="bound on the memory of a sweep, in addition to the model")

    @model_validator(mode="after")
    def _once(self) -> PatchConfig:
        for name in ("kinds", "designs", "directions", "sites"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}={given} names one twice")
        if self.aggregate == "sum" and "paper" not in self.designs:
            raise ValueError(f"aggregate=sum is for published pairs, but designs={self.designs}: add paper to designs")
        return self


class Sweeping(NamedTuple):
    """One sweep of a run: over which pairs, at which sites and positions, in which direction."""

    design: str
    kind: str
    site: Any
    direction: Any
    where: str  # "last", "map" (each position or role by itself) or "all" (all positions at once)
    exact: bool = True

    @property
    def key(self) -> str:
        """The key of its table."""
        return "-".join([*self[:5], *([] if self.exact else ["attribution"])])

    @property
    def pairs(self) -> str:
        """The key of the table of its pairs."""
        return f"pairs/{self.design}-{self.kind}"

    @property
    def tested(self) -> bool:
        """Whether it is tested which heads carry anything, which doubles its cost."""
        return self[2:] == ("head", "denoise", "last", True)


def kinds_of(config: PatchConfig, game: Game) -> list[tuple[str, str]]:
    """Return the requested designs and kinds of pairs that the game has.

    Raises:
        RunError: the game has none of them.
    """
    found: list[tuple[str, str]] = [
        (d, k) for d in config.designs for k in config.kinds if d in game.contrasts.get(k, ())
    ]
    if not found:
        has = ", ".join(f"{k} ({' and '.join(d)})" for k, d in game.contrasts.items()) or "nothing"
        raise RunError(
            f"{game.name} has no {', '.join(config.designs)} pairs of kinds {', '.join(config.kinds)}; it has {has}"
        )
    return found


def published_sizes(kind: str) -> tuple[dict[str, int], ...]:
    """Return the published lengths of a kind of pairs, as arguments of `Game.contrast`."""
    if kind == "state":
        return tuple({"steps": steps} for steps in PAPER_STEPS)
    return tuple({"distance": distance} for distance in PAPER_DISTANCES)


def draw(config: PatchConfig, game: Game, design: str, kind: str, rng: np.random.Generator) -> list[Pair]:
    """Draw the pairs of one kind.

    Those of the published design go through its lengths in turn, and every second time their sides are exchanged, since
    the published aggregation also patches both sides of a pair into each other.

    Raises:
        GameError: the game cannot make such pairs.
    """
    return [draw_one(config, game, design, kind, rng, number) for number in range(config.pairs)]


def draw_one(
    config: PatchConfig, game: Game, design: str, kind: str, rng: np.random.Generator, number: int = 0
) -> Pair:
    """Draw a pair with the length (and, in the published design, the direction) of pair `number` of a run.

    Raises:
        GameError: the game cannot make such pairs.
    """
    if design == "paper":
        again, size = divmod(number, len(published_sizes(kind)))
        pair = game.contrast(rng, kind, design, **published_sizes(kind)[size])
        return pair.swapped() if again % 2 else pair
    steps, distance = config.steps, None
    if kind == "noop":
        distance = config.distance or min(5, (game.max_steps or 6) - 1)
        steps = None if steps is None or game.max_steps else steps + distance
    return game.contrast(rng, kind, design, steps=steps, distance=distance)


def sweeps_of(config: PatchConfig, kinds: Sequence[tuple[str, str]]) -> Iterator[Sweeping]:
    """Yield every sweep of a run, the most informative ones first."""
    patches = [d for d in config.directions if d in PATCHES]
    for site in config.sites:
        for direction in patches:
            yield from (Sweeping(*which, site, direction, "last") for which in kinds)
    if "head" in config.sites:
        if "denoise" in patches:
            yield from (Sweeping(*which, "head", "denoise", "last", exact=False) for which in kinds)
        for direction in config.directions:
            if direction not in PATCHES:
                yield from (Sweeping(*which, "head", direction, "all") for which in kinds)
    if "resid_pre" in config.sites:
        for direction in patches:
            yield from (Sweeping(*which, "resid_pre", direction, "map") for which in kinds)


def main_first(designs: Sequence[str]) -> list[str]:
    """Return the designs with `balanced` first, as the page shows them."""
    return sorted(designs, key=lambda d: d != "balanced")
