"""The scale-invariant window: the strengths at which the response does not depend on the strength, for each layer.

Below the window rounding errors dominate the response; above it the network saturates. A layer's window is the longest
run of consecutive strengths over which the response is flat (the slope of its logarithm against the logarithm of the
strength is small) and keeps its direction (the cosine is about 1). The response to a push is that of all later tokens
as one vector; slope and cosine are means over pushes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float

from nextstate.analysis.response.branches import ResponseError
from nextstate.analysis.response.config import ALIKE, ALONG, FLAT, KINDS
from nextstate.analysis.response.measure import Response

MIN_STEPS = 2  # least number of steps between consecutive strengths in a window


@dataclass(frozen=True)
class Window:
    """Windows of all layers for one kind of direction. `low` and `high` are NaN where a layer has no window."""

    kind: str
    layers: tuple[int, ...]
    strengths: tuple[float, ...]
    level: Float[np.ndarray, "layer strength"]  # mean norm of the response of all later tokens
    slope: Float[np.ndarray, "layer neighbour"]  # mean |d log response / d log strength|
    cosine: Float[np.ndarray, "layer neighbour"]
    low: Float[np.ndarray, " layer"]
    high: Float[np.ndarray, " layer"]

    @property
    def common(self) -> tuple[float, ...]:
        """Strengths that are within the windows of most layers; () if no layer has a window."""
        inside = [int(((self.low <= s) & (s <= self.high)).sum()) for s in self.strengths]
        return tuple(s for s, n in zip(self.strengths, inside, strict=True) if n == max(inside) > 0)

    @property
    def middle(self) -> float | None:
        """Middle strength of `common`, at which to measure; None if there is no window."""
        return self.common[(len(self.common) - 1) // 2] if self.common else None

    def holds(self, strength: float) -> tuple[int, ...]:
        """Return the layers whose window contains a strength."""
        inside = (self.low <= strength) & (strength <= self.high)
        return tuple(layer for layer, ok in zip(self.layers, inside, strict=True) if ok)

    def table(self, dtype: str) -> pl.DataFrame:
        """Return a row for each layer and strength; slope and cosine are between it and the next strength."""
        rows = []
        for i, layer in enumerate(self.layers):
            for k, strength in enumerate(self.strengths):
                step = (float(self.slope[i, k]), float(self.cosine[i, k])) if k < self.slope.shape[1] else (None, None)
                rows.append((dtype, self.kind, layer, strength, float(self.level[i, k]), *step,
                             float(self.low[i]), float(self.high[i])))  # fmt: skip
        return pl.DataFrame(rows, schema=COLUMNS, orient="row").fill_nan(None)


COLUMNS = {
    "dtype": pl.String, "kind": pl.String, "layer": pl.Int64, "strength": pl.Float64, "level": pl.Float64,
    "slope": pl.Float64, "cosine": pl.Float64, "low": pl.Float64, "high": pl.Float64,
}  # fmt: skip


def of_kind(found: Response, kind: str) -> list[int]:
    """Return the indices of the directions of a kind, "along" or "random".

    Raises:
        ResponseError: the response has no directions of that kind.
    """
    chosen = [i for i, name in enumerate(found.directions) if (name == ALONG) == (kind == ALONG)]
    if kind not in KINDS or not chosen:
        raise ResponseError(f"kind={kind!r} is not possible: expected one of {', '.join(KINDS)}, with directions; "
                            f"the response has {', '.join(found.directions)}")  # fmt: skip
    return chosen


def window(found: Sequence[Response], kind: str = "random", *, flat: float = FLAT, alike: float = ALIKE) -> Window:
    """Find the scale-invariant window of each layer.

    Args:
        found: responses at the same strengths, at least three, to prompts of any length.
        kind: kind of directions to use, "along" or "random".
        flat: largest slope of log response against log strength.
        alike: smallest cosine between the responses to consecutive strengths.

    Raises:
        ResponseError: there are too few strengths, or no such directions.
    """
    strengths, layers = found[0].strengths, found[0].layers
    if len(strengths) <= MIN_STEPS:
        raise ResponseError(f"{len(strengths)} strengths are too few for a window: expected {MIN_STEPS + 1} or more")
    total, cosine = (
        np.concatenate([_pushes(getattr(one, name)[:, :, of_kind(one, kind)]) for one in found], -1)
        for name in ("total", "cosine")
    )  # [layer strength push]
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of empty slices, in layers that no push reaches
        log = np.log(np.where(total > 0, total, np.nan))
        slope = np.nanmean(np.abs(np.diff(log, axis=1)) / np.diff(np.log(strengths))[:, None], axis=-1)
        alignment, level = np.nanmean(cosine, axis=-1), np.nanmean(total, axis=-1)
    good = (slope <= flat) & (alignment >= alike)
    edges = np.array([_longest(row, strengths) for row in good])
    return Window(kind, layers, strengths, level, slope, alignment, edges[:, 0], edges[:, 1])


def _pushes(
    values: Float[np.ndarray, "prompt strength direction layer position"],
) -> Float[np.ndarray, "layer strength push"]:
    moved = values.transpose(3, 1, 0, 2, 4)
    return moved.reshape(*moved.shape[:2], -1)


def restored(rows: pl.DataFrame) -> Window:
    """Return the window that the rows of one dtype and kind were made of."""
    layers, strengths = (tuple(rows[c].unique(maintain_order=True).to_list()) for c in ("layer", "strength"))
    shape = (len(layers), len(strengths))
    level, slope, cosine, low, high = (
        rows[c].cast(pl.Float64).to_numpy().reshape(shape) for c in ("level", "slope", "cosine", "low", "high")
    )
    return Window(rows["kind"][0], layers, strengths, level, slope[:, :-1], cosine[:, :-1], low[:, 0], high[:, 0])


def _longest(good: Sequence[bool], strengths: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the longest run of good steps, the earlier of equals; NaN where it is too short."""
    best, begin = (0, 0), 0
    for k, ok in enumerate([*good, False]):
        if not ok:
            best = max(best, (k - begin, -begin))
            begin = k + 1
    steps, first = best[0], -best[1]
    return (strengths[first], strengths[first + steps]) if steps >= MIN_STEPS else (math.nan, math.nan)
