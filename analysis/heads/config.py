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
MIN_EFFECT = 0.02  # recoveries of smaller size are never significant, however narrow their band
EXAMPLES = 2  # pairs of each kind shown on the page
PATCHES = ("denoise", "noise")  # the other directions ablate
SITES = ("head", "resid_pre", "attn_out", "mlp_out")


class PatchConfig(ModelRunConfig):
    """Everything that determines the results of a patching run."""

    game: str = Field("DFA", description="name of a game, or pkg.module:Name")
    game_args: dict[str, Any] = Field({}, description="settings of the game")
    pairs: int = Field(64, ge=2, le=100_000, description="pairs of each kind; published designs have fixed numbers")
    kinds: list[Literal["state", "action", "name", "noop"]] = Field(
        default=["state", "action", "name", "noop"],
        min_length=1,
        description="kinds of pairs, of which those that the game has are used",
    )
    designs: list[Literal["balanced", "paper"]] = Field(
        default=["balanced"], min_length=1, description="our own design of pairs, or the published one"
    )
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


def draw(config: PatchConfig, game: Game, design: str, kind: str, rng: np.random.Generator) -> list[Pair]:
    """Draw the pairs of one kind. There is one published pair for each length, used in both directions.

    Raises:
        GameError: the game cannot make such pairs.
    """
    if design == "paper":
        sizes = [{"steps": s} for s in PAPER_STEPS] if kind == "state" else [{"distance": d} for d in PAPER_DISTANCES]
        pairs = [game.contrast(np.random.default_rng(0), kind, design, **size) for size in sizes]
        return [p for pair in pairs for p in (pair, pair.swapped())]
    steps, distance = config.steps, None
    if kind == "noop":
        distance = config.distance or min(5, (game.max_steps or 6) - 1)
        steps = None if steps is None or game.max_steps else steps + distance
    return [game.contrast(rng, kind, design, steps=steps, distance=distance) for _ in range(config.pairs)]


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
