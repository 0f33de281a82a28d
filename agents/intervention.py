"""The description of an intervention on heads of a model; does not import torch, so that configs load fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from nextstate.agents.sites import Sites

Mode = Literal["zero", "mean", "resample"]
MODES: tuple[Mode, ...] = get_args(Mode)
_NAMED = 4  # maximum number of heads listed in a name


class InterventionError(ValueError):
    """An argument of an intervention is not possible; the message names it and what is expected."""


@dataclass(frozen=True)
class Intervention:
    """An ablation of heads: their input to the output projection is replaced at every token.

    Heads of several layers are ablated together. Modes:
    - "zero": zeros.
    - "mean": the mean of the head over the tokens of reference episodes, one vector for each head.
    - "resample": the output of the head at a random token of the reference episodes, drawn for each episode and
      position; the draw is the same for all heads and batches, live and in replay.

    Reference episodes have the same game, settings and length, and seeds that no experiment uses; they are read
    without intervention, up to the last question that fits into the model's context.

    Args:
        heads: (layer, head) of each, both from 0.
        mode: "zero", "mean" or "resample".
        episodes: number of reference episodes (mean and resample).

    Raises:
        InterventionError: no heads, or no such mode, or no episodes.
    """

    heads: tuple[tuple[int, int], ...]
    mode: Mode = "zero"
    episodes: int = 16

    def __post_init__(self) -> None:
        pairs = [tuple(map(int, head)) for head in self.heads]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise InterventionError(f"heads={self.heads!r} is not possible: expected (layer, head) of at least one")
        if self.mode not in MODES:
            raise InterventionError(f"mode={self.mode!r} is not possible: expected one of {', '.join(MODES)}")
        if self.episodes < 1:
            raise InterventionError(f"episodes={self.episodes} is not possible: expected at least 1")
        object.__setattr__(self, "heads", tuple(dict.fromkeys(pairs)))

    def check(self, sites: Sites) -> None:
        """Raise `SiteError` if the model does not have these layers and heads."""
        for layer, head in self.heads:
            sites.check("head", layer, head)

    @property
    def by_layer(self) -> dict[int, list[int]]:
        """The heads of each layer."""
        out: dict[int, list[int]] = {}
        for layer, head in sorted(self.heads):
            out.setdefault(layer, []).append(head)
        return out

    def named(self, model: str) -> str:
        """Return the name of a model with this intervention, such as "nextstate/tiny [without 3.1, 2.5]"."""
        heads = ", ".join(f"{layer}.{head}" for layer, head in self.heads[:_NAMED])
        more = f" and {len(self.heads) - _NAMED} more" if len(self.heads) > _NAMED else ""
        return f"{model} [without {heads}{more}{'' if self.mode == 'zero' else f': {self.mode}'}]"

    def describe(self) -> dict[str, Any]:
        """Return the entry of `run.json`."""
        reference = {} if self.mode == "zero" else {"episodes": self.episodes}
        return {"heads": [list(head) for head in self.heads], "mode": self.mode, **reference}
