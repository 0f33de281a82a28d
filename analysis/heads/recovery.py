"""Outputs of patched runs, the share of the difference between two prompts that each patch recovers, and its test.

The recovery of a cell is a description: a ratio of means with bootstrap intervals. Whether a cell *carries* what the
prompts of the pairs differ in is decided by a test (`carried`): its effect from the other prompt of the pair must
exceed its effect from an unrelated prompt of the same layout. For a cell whose content says nothing of the answer the
two prompts are exchangeable, so the difference of the effects is symmetric around 0, however skewed they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextstate.agents.sites import Site
from nextstate.analysis import stats
from nextstate.analysis.heads.config import ADVISED_PAIRS, MIN_EFFECT
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
    the other prompt. Excluded pairs are NaN in `patched`. `control_patched` has the logit differences with the
    activations of each pair's control prompt instead, NaN for pairs without one; None if controls were not run.
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
    control: float  # largest error of the control runs, as a share of the range of the logits; NaN without them
    control_patched: Float[np.ndarray, "pair layer head column"] | None = None

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


class Carried(NamedTuple):
    """Result of the test of which cells carry what the prompts differ in; arrays have one element for each cell."""

    pairs: int  # pairs with a control, over which cells are tested
    p: Float[np.ndarray, ...]  # corrected for testing all cells; NaN for fewer pairs than `stats.FEWEST_PAIRS`
    carries: Bool[np.ndarray, ...]  # False if the cells were not tested

    @property
    def known(self) -> bool:
        """Whether the cells were tested."""
        return self.pairs >= stats.FEWEST_PAIRS


@dataclass(frozen=True)
class Recovery(stats.Band):
    """Share of the logit difference between the two prompts that each patch restores: 0 none, 1 all of it.

    All arrays have axes [layer head column]. Intervals and band describe the recovery; `test` is the decision.
    """

    pairs: int  # number of pairs that are counted
    failed: int  # pairs on which the model fails
    left_out: int  # pairs that are not counted
    test: Carried


def changes(sweep: Sweep) -> stats.Ratio:
    """Return, for each kept pair, patched - base of every cell, and source - base, of the logit differences.

    Raises:
        PatchError: the mean difference between the prompts is within noise, so recovery is undefined.
    """
    base, source = sweep.base.difference[sweep.kept], sweep.source.difference[sweep.kept]
    gap = source - base
    low, high = stats.student(gap)
    if not (low > 0 or high < 0):  # also raises for one pair, whose noise is not known
        raise PatchError(
            f"the mean logit difference of the source run minus that of the base run is {gap.mean():.3g} (95 % "
            f"interval {low:.3g} to {high:.3g}) over {len(gap)} {'pair' if len(gap) == 1 else 'pairs'}, which cannot "
            "be distinguished from 0: there is nothing to recover"
        )
    return sweep.patched.difference[sweep.kept] - base[:, None, None, None], gap


def recovery(sweep: Sweep, rng: np.random.Generator, *, level: float = stats.LEVEL, resamples: int = 2000) -> Recovery:
    """Return (patched - base) / (source - base) of the mean logit differences, with intervals over pairs.

    Intervals and band are those of `nextstate.analysis.stats.ratio_band`, which also describes the arguments; the test
    is that of `carried`.

    Raises:
        PatchError: the mean difference between the prompts is within noise, so recovery is undefined.
    """
    top, gap = changes(sweep)
    band = stats.ratio_band((top, gap), rng, level=level, draws=resamples)
    control, base = sweep.control_patched, sweep.base.difference[sweep.kept, None, None, None]
    test = carried(top, None if control is None else control[sweep.kept] - base, band.value, rng, level=level)
    kept = int(sweep.kept.sum())
    return Recovery(
        **vars(band), pairs=kept, failed=int(sweep.failed.sum()), left_out=len(sweep.kept) - kept, test=test
    )


def carried(
    effect: Float[np.ndarray, "pair ..."],
    control: Float[np.ndarray, "pair ..."] | None,
    value: Float[np.ndarray, ...],
    rng: np.random.Generator,
    *,
    level: float = stats.LEVEL,
) -> Carried:
    """Test which cells carry what the prompts of the pairs differ in.

    A cell carries it if the effect from the other prompt minus the effect from the control prompt differs from 0 by
    `nextstate.analysis.stats.sign_flip_test`, over all cells at once; if the former is the larger of the two in
    absolute value (a cell that merely breaks down on unrelated content has the larger effect from the control); and if
    its recovery is at least `MIN_EFFECT` in absolute value.

    Args:
        effect: change of the logit difference of each pair when the cell is patched from the pair's other prompt.
        control: the same from the pair's control prompt, NaN for pairs without one; None if there are no controls.
        value: the recovery of each cell.
        rng: draws the flips of signs.
        level: 1 - level is the largest probability that any cell is named that carries nothing.
    """
    rows = np.zeros(len(effect), dtype=bool)
    if control is not None:
        rows = np.isfinite(control).reshape(len(control), -1).all(1)
    if control is None or rows.sum() < stats.FEWEST_PAIRS:
        return Carried(int(rows.sum()), np.full(value.shape, np.nan), np.zeros(value.shape, dtype=bool))
    ours, theirs = effect[rows], control[rows]
    p = stats.sign_flip_test(ours - theirs, rng)
    larger = np.abs(ours.mean(0)) > np.abs(theirs.mean(0))
    return Carried(len(ours), p, (p <= 1 - level) & larger & (np.abs(value) >= MIN_EFFECT))


def too_few(tested: int) -> str:
    """Return what to say of a test over so few pairs; empty if they are enough."""
    if tested < stats.FEWEST_PAIRS:
        return (
            f"not enough pairs to test which heads carry anything: {tested} can be tested, at least "
            f"{stats.FEWEST_PAIRS} are needed and {ADVISED_PAIRS} advised"
        )
    if tested < stats.FEW_PAIRS:
        return (
            f"few pairs to test which heads carry anything: with {tested}, many heads of moderate effect are missed; "
            f"{ADVISED_PAIRS} are advised"
        )
    return ""


def table(sweep: Sweep, found: Recovery) -> pl.DataFrame:
    """Return one row for each cell: its place (head is null at sites without heads), its recovery and its test.

    `p` and `carries` are null if cells were not tested.
    """
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
        "p": found.test.p.ravel(),
        "carries": found.test.carries.ravel() if found.test.known else [None] * layer.size,
        "pairs": [found.pairs] * layer.size,
        "tested": [found.test.pairs] * layer.size,
        "failed": [found.failed] * layer.size,
    }
    if (sweep.patched.greedy[sweep.kept] >= 0).all():
        columns |= {"flips": sweep.flips.ravel(), "probability": sweep.probability.ravel()}
    frame = pl.DataFrame(columns, schema_overrides={"head": pl.Int64, "carries": pl.Boolean})
    return frame.with_columns(pl.col("p").fill_nan(None))


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
