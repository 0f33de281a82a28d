"""What patched runs say, and how much of the difference between two prompts each patch carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextstate.agents.sites import Site
from nextstate.analysis import stats
from nextstate.analysis.heads.pairs import Direction, PatchError


@dataclass(frozen=True)
class Readout:
    """What runs say of the next token, as arrays of one shape.

    `difference` is the logit of the clean prompt's answer minus that of the corrupted prompt's, `probability` that of
    the clean prompt's answer, `greedy` the likeliest token of the vocabulary (-1: not known).
    """

    difference: Float[np.ndarray, ...]
    probability: Float[np.ndarray, ...]
    greedy: Int[np.ndarray, ...]

    @classmethod
    def empty(cls, *shape: int) -> Readout:
        """Return one that nothing is known of."""
        return cls(np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, -1, dtype=np.int64))

    def put(self, where: Any, other: Readout) -> None:
        """Write `other` at index `where`."""
        self.difference[where] = other.difference
        self.probability[where] = other.probability
        self.greedy[where] = other.greedy


def read(
    logits: Float[Tensor, "pair copy vocab"],
    answer: Int[Tensor, " pair"],
    other: Int[Tensor, " pair"],
    vocabulary: bool = True,
) -> Readout:
    """Read logits; the vocabulary is in float32 for a few copies at a time only.

    Without `vocabulary` they are those of answer and other alone, in this order, and nothing else is known.
    """
    if not vocabulary:
        out = Readout.empty(*logits.shape[:2])
        out.difference[:] = (logits[..., 0].float() - logits[..., 1].float()).cpu().numpy()
        return out
    found = []
    for part in torch.split(logits, max(1, (32 if logits.device.type == "cpu" else 512) // len(logits)), 1):
        wide, n = part.float(), part.shape[1]
        right, wrong = (wide.gather(2, t[:, None, None].expand(-1, n, 1))[..., 0] for t in (answer, other))
        # log_softmax and not logsumexp, which takes ten times as long on a CPU.
        likely = wide.log_softmax(-1).gather(2, answer[:, None, None].expand(-1, n, 1))[..., 0]
        found.append((right - wrong, likely.exp(), part.argmax(-1)))
    difference, probability, greedy = (torch.cat(x, 1).cpu().numpy() for x in zip(*found, strict=True))
    return Readout(difference.astype(np.float64), probability.astype(np.float64), greedy)


@dataclass(frozen=True)
class Sweep:
    """What one patch at a time does to each pair.

    `patched` has axes [pair layer head column]; sites without heads have one. A column is a role, a position, or all
    positions together. `base` and `source` have the axis [pair]: base is the run that is patched, source that in which
    the other prompt is read. Pairs that were left out are NaN in `patched`.
    """

    site: Site
    direction: Direction
    layers: tuple[int, ...]
    columns: tuple[str, ...]
    base: Readout
    source: Readout
    patched: Readout
    failed: Bool[np.ndarray, " pair"]  # the model prefers the wrong one of both answers in one prompt or both
    kept: Bool[np.ndarray, " pair"]
    answers: tuple[int, ...]  # the clean prompt's, for each pair
    exact: bool  # False for a gradient's estimate
    control: float  # how far the controls were off at most, as a share of the spread of the logits; NaN without any

    @property
    def flips(self) -> Float[np.ndarray, "layer head column"]:
        """The share of kept pairs in which the patch decides whether the greedy token is the clean prompt's answer."""
        if (self.patched.greedy[self.kept] < 0).any():
            raise PatchError("greedy tokens are not known; for flips use the exact sweep, with vocabulary=True")
        answers = np.array(self.answers)[self.kept]
        before = self.base.greedy[self.kept] == answers
        after = self.patched.greedy[self.kept] == answers[:, None, None, None]
        return np.asarray((after != before[:, None, None, None]).mean(0), dtype=np.float64)

    @property
    def probability(self) -> Float[np.ndarray, "layer head column"]:
        """The mean change of the probability of the clean prompt's answer over the kept pairs."""
        before = self.base.probability[self.kept, None, None, None]
        return np.asarray((self.patched.probability[self.kept] - before).mean(0), dtype=np.float64)


@dataclass(frozen=True)
class Recovery(stats.Band):
    """How much of the logit difference between both prompts each patch brings over: 0 nothing, 1 all of it.

    All arrays have axes [layer head column].
    """

    pairs: int  # that count
    failed: int  # on which the model is wrong
    left_out: int  # of all pairs

    @classmethod
    def of(cls, sweep: Sweep, band: stats.Band) -> Recovery:
        """Return the band of a sweep's recovery, with the numbers of its pairs."""
        kept = int(sweep.kept.sum())
        return cls(**vars(band), pairs=kept, failed=int(sweep.failed.sum()), left_out=len(sweep.kept) - kept)


def changes(sweep: Sweep) -> stats.Ratio:
    """Return, for each kept pair, patched - base of every cell and source - base, of the logit differences.

    Raises:
        PatchError: both prompts have the same mean logit difference, so that there is no scale.
    """
    base, source = sweep.base.difference[sweep.kept], sweep.source.difference[sweep.kept]
    gap = source - base
    if abs(gap.mean()) < 1e-9 * max(1.0, float(np.abs(base).max())):
        raise PatchError(f"base and source run have the same mean logit difference {base.mean():.3g} over {len(base)} "
                         "pairs: there is nothing to recover")  # fmt: skip
    return sweep.patched.difference[sweep.kept] - base[:, None, None, None], gap


def recovery(sweep: Sweep, rng: np.random.Generator, *, level: float = stats.LEVEL, resamples: int = 2000) -> Recovery:
    """Return (patched - base) / (source - base) of the mean logit differences, with intervals over pairs.

    Intervals and band are those of `nextstate.analysis.stats.ratio_band`, where the arguments are described too.

    Raises:
        PatchError: both prompts have the same mean logit difference, so that there is no scale.
    """
    return Recovery.of(sweep, stats.ratio_band(changes(sweep), rng, level=level, draws=resamples))


def table(sweep: Sweep, found: Recovery) -> pl.DataFrame:
    """Return one row a cell: where it is (head is null at sites without heads), and what was found."""
    layer, head, column = (x.ravel() for x in np.indices(found.value.shape))
    ends = ("low", "high", "band_low", "band_high")
    columns: dict[str, Any] = {
        "site": [sweep.site] * layer.size,
        "direction": [sweep.direction] * layer.size,
        "layer": np.array(sweep.layers)[layer],
        "head": [int(h) if sweep.site == "head" else None for h in head],
        "position": np.array(sweep.columns)[column].tolist(),
        "recovery": found.value.ravel(),
        **{end: getattr(found, end).ravel() for end in ends},
        "carries": found.nonzero.ravel(),
        "pairs": [found.pairs] * layer.size,
        "failed": [found.failed] * layer.size,
    }
    if (sweep.patched.greedy[sweep.kept] >= 0).all():
        columns |= {"flips": sweep.flips.ravel(), "probability": sweep.probability.ravel()}
    return pl.DataFrame(columns, schema_overrides={"head": pl.Int64})


def rank_agreement(one: Sweep, two: Sweep) -> float:
    """Return Spearman's rank correlation between the mean effects of two sweeps, over all cells.

    Raises:
        PatchError: they are not over the same cells.
    """
    same = (one.site, one.layers, one.columns) == (two.site, two.layers, two.columns)
    if not same:
        raise PatchError(f"sweeps of different cells: {one.site} at {one.columns} and {two.site} at {two.columns}")
    effects = [
        (s.patched.difference[s.kept] - s.base.difference[s.kept][:, None, None, None]).mean(0) for s in (one, two)
    ]
    return stats.spearman(effects[0].ravel(), effects[1].ravel())
