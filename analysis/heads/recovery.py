"""Outputs of patched runs, and the share of the difference between two prompts that each patch recovers."""

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
    """Predictions of the next token in a set of runs, as arrays of one shape.

    `difference` is the logit of the clean prompt's answer minus that of the corrupted prompt's, `probability` the
    probability of the clean prompt's answer, `greedy` the most likely token of the vocabulary (-1 if not computed).
    """

    difference: Float[np.ndarray, ...]
    probability: Float[np.ndarray, ...]
    greedy: Int[np.ndarray, ...]

    @classmethod
    def empty(cls, *shape: int) -> Readout:
        """Return a readout filled with NaN and -1."""
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
    """Return the readout of logits, converted to float32 a few copies at a time to bound memory.

    Without `vocabulary`, `logits` has only the columns answer and other, in this order; probability and greedy token
    are then not computed.
    """
    if not vocabulary:
        out = Readout.empty(*logits.shape[:2])
        out.difference[:] = (logits[..., 0].float() - logits[..., 1].float()).cpu().numpy()
        return out
    found = []
    for part in torch.split(logits, max(1, (32 if logits.device.type == "cpu" else 512) // len(logits)), 1):
        full, n = part.float(), part.shape[1]
        right, wrong = (full.gather(2, t[:, None, None].expand(-1, n, 1))[..., 0] for t in (answer, other))
        # log_softmax and not logsumexp, which takes ten times as long on a CPU.
        likely = full.log_softmax(-1).gather(2, answer[:, None, None].expand(-1, n, 1))[..., 0]
        found.append((right - wrong, likely.exp(), part.argmax(-1)))
    difference, probability, greedy = (torch.cat(x, 1).cpu().numpy() for x in zip(*found, strict=True))
    return Readout(difference.astype(np.float64), probability.astype(np.float64), greedy)


@dataclass(frozen=True)
class Sweep:
    """Result of patching one site at a time, for each pair.

    `patched` has axes [pair layer head column]; sites without heads have one head. A column is a role, a position, or
    all positions together. `base` and `source` have the axis [pair]: base is the run that is patched, source the run on
    the other prompt. Excluded pairs are NaN in `patched`.
    """

    site: Site
    direction: Direction
    layers: tuple[int, ...]
    columns: tuple[str, ...]
    base: Readout
    source: Readout
    patched: Readout
    failed: Bool[np.ndarray, " pair"]  # the model prefers the wrong one of the two answers in one prompt or both
    kept: Bool[np.ndarray, " pair"]
    answers: tuple[int, ...]  # token that answers the clean prompt, for each pair
    exact: bool  # False for a gradient-based estimate
    control: float  # largest error of the controls, as a share of the range of the logits; NaN without controls

    @property
    def flips(self) -> Float[np.ndarray, "layer head column"]:
        """Share of kept pairs in which the patch changes whether the greedy token is the clean prompt's answer."""
        if (self.patched.greedy[self.kept] < 0).any():
            raise PatchError("greedy tokens were not computed; flips need an exact sweep with vocabulary=True")
        answers = np.array(self.answers)[self.kept]
        before = self.base.greedy[self.kept] == answers
        after = self.patched.greedy[self.kept] == answers[:, None, None, None]
        return np.asarray((after != before[:, None, None, None]).mean(0), dtype=np.float64)

    @property
    def probability(self) -> Float[np.ndarray, "layer head column"]:
        """Mean change of the probability of the clean prompt's answer, over the kept pairs."""
        before = self.base.probability[self.kept, None, None, None]
        return np.asarray((self.patched.probability[self.kept] - before).mean(0), dtype=np.float64)


@dataclass(frozen=True)
class Recovery(stats.Band):
    """Share of the logit difference between the two prompts that each patch restores: 0 none, 1 all of it.

    All arrays have axes [layer head column].
    """

    pairs: int  # number of pairs that are counted
    failed: int  # pairs on which the model fails
    left_out: int  # pairs that are not counted

    @classmethod
    def of(cls, sweep: Sweep, band: stats.Band) -> Recovery:
        """Return the band of a sweep's recovery, with the numbers of its pairs."""
        kept = int(sweep.kept.sum())
        return cls(**vars(band), pairs=kept, failed=int(sweep.failed.sum()), left_out=len(sweep.kept) - kept)


def changes(sweep: Sweep) -> stats.Ratio:
    """Return, for each kept pair, patched - base of every cell, and source - base, of the logit differences.

    Raises:
        PatchError: both prompts have the same mean logit difference, so recovery is undefined.
    """
    base, source = sweep.base.difference[sweep.kept], sweep.source.difference[sweep.kept]
    gap = source - base
    if abs(gap.mean()) < 1e-9 * max(1.0, float(np.abs(base).max())):
        raise PatchError(f"base and source run have the same mean logit difference {base.mean():.3g} over {len(base)} "
                         "pairs: there is nothing to recover")  # fmt: skip
    return sweep.patched.difference[sweep.kept] - base[:, None, None, None], gap


def recovery(sweep: Sweep, rng: np.random.Generator, *, level: float = stats.LEVEL, resamples: int = 2000) -> Recovery:
    """Return (patched - base) / (source - base) of the mean logit differences, with intervals over pairs.

    Intervals and band are those of `nextstate.analysis.stats.ratio_band`, which also describes the arguments.

    Raises:
        PatchError: both prompts have the same mean logit difference, so recovery is undefined.
    """
    return Recovery.of(sweep, stats.ratio_band(changes(sweep), rng, level=level, draws=resamples))


def table(sweep: Sweep, found: Recovery) -> pl.DataFrame:
    """Return one row for each cell: its place (head is null at sites without heads) and its recovery."""
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
        "significant": found.nonzero.ravel(),
        "pairs": [found.pairs] * layer.size,
        "failed": [found.failed] * layer.size,
    }
    if (sweep.patched.greedy[sweep.kept] >= 0).all():
        columns |= {"flips": sweep.flips.ravel(), "probability": sweep.probability.ravel()}
    return pl.DataFrame(columns, schema_overrides={"head": pl.Int64})


def rank_agreement(one: Sweep, two: Sweep) -> float:
    """Return Spearman's rank correlation between the mean effects of two sweeps, over all cells.

    Raises:
        PatchError: the sweeps do not have the same cells.
    """
    same = (one.site, one.layers, one.columns) == (two.site, two.layers, two.columns)
    if not same:
        raise PatchError(f"sweeps of different cells: {one.site} at {one.columns} and {two.site} at {two.columns}")
    effects = [
        (s.patched.difference[s.kept] - s.base.difference[s.kept][:, None, None, None]).mean(0) for s in (one, two)
    ]
    return stats.spearman(effects[0].ravel(), effects[1].ravel())
