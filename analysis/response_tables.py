"""The files of a response run: arrays as tables, tables as what the report says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from nextstate.analysis import stats
from nextstate.analysis.heads.routing import carriers
from nextstate.analysis.response import Response
from nextstate.analysis.response_induction import excess, lost, means
from nextstate.analysis.response_window import Window, of_kind, restored
from nextstate.analysis.tables import RunError

CONDITIONS = ("repeated", "control")
LAST = "random"  # the kind of direction that heads and bridge go by


def matrix_rows(layers: Sequence[int], value: Float[np.ndarray, "prompt layer position target"]) -> pl.DataFrame:
    """Return the mean matrix over prompts: a row a layer and pushed position, with the list of all targets."""
    mean = value.mean(0)
    rows = [(layer, j, [None if np.isnan(x) else float(x) for x in line])
            for layer, matrix in zip(layers, mean, strict=True) for j, line in enumerate(matrix)]  # fmt: skip
    return pl.DataFrame(rows, schema={"layer": pl.Int64, "position": pl.Int64, "response": pl.List(pl.Float32)},
                        orient="row")  # fmt: skip


def profile_rows(
    layers: Sequence[int],
    value: Float[np.ndarray, "prompt layer offset"],
    relative: Float[np.ndarray, "prompt layer offset"],
) -> pl.DataFrame:
    """Return one row a prompt, layer and offset."""
    prompt, layer, offset = (x.ravel() for x in np.indices(value.shape))
    return pl.DataFrame({"prompt": prompt, "layer": np.array(layers)[layer], "offset": offset + 1,
                         "response": value.ravel(), "relative": relative.ravel()})  # fmt: skip


def exact_rows(kind: str, limit: Response, found: Response | None) -> pl.DataFrame:
    """Return one row a layer: the norm of the exact product, and how far what was measured is from it.

    Args:
        kind: of the directions that count.
        limit: the exact product.
        found: the same pushes at the strength that is used, None where none is.
    """
    own = of_kind(limit, kind)
    exact = limit.value[:, 0, own].astype(np.float64)
    level = np.nanmean(limit.total[:, 0, own].astype(np.float64), axis=(0, 1, 3))
    apart = [None] * len(level)
    if found is not None:
        axes = (0, 1, 3, 4)
        off = np.nansum(np.square(found.value[:, 0, own] - exact), axes) / np.nansum(np.square(exact), axes)
        apart = np.sqrt(off).tolist()
    schema = {"kind": pl.String, "layer": pl.Int64, "level": pl.Float64, "apart": pl.Float64}
    rows = zip([kind] * len(level), limit.layers, level.tolist(), apart, strict=True)
    return pl.DataFrame(list(rows), schema=schema, orient="row")


def left_rows(layer: int, left: Float[np.ndarray, "prompt head"]) -> pl.DataFrame:
    """Return one row a head: what is left of the signature of each prompt without it."""
    return pl.DataFrame({"layer": [layer] * left.shape[1], "head": range(left.shape[1]), "left": left.T.tolist()})


def score_rows(prefix: Float[np.ndarray, "layer head"], copying: Float[np.ndarray, "layer head"]) -> pl.DataFrame:
    """Return one row a head; NaN stands where a layer has no such head."""
    layer, head = (x.ravel() for x in np.indices(prefix.shape))
    rows = pl.DataFrame({"layer": layer, "head": head, "prefix": prefix.ravel(), "copying": copying.ravel()})
    return rows.filter(pl.col("prefix").is_not_nan())


def bridge_head_rows(
    name: str,
    heads: Sequence[tuple[int, int]],
    found: Mapping[str, tuple[Float[np.ndarray, " transcript"], Float[np.ndarray, "transcript head"]]],
) -> pl.DataFrame:
    """Return one row a role and head: the response of each transcript, whole and without the head."""
    rows = [
        (name, role, *heads[k], whole.tolist(), left[:, k].tolist())
        for role, (whole, left) in found.items() for k in range(len(heads))
    ]  # fmt: skip
    schema: dict[str, Any] = {"bridge": pl.String, "role": pl.String, "layer": pl.Int64, "head": pl.Int64,
              "whole": pl.List(pl.Float64), "left": pl.List(pl.Float64)}  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


@dataclass(frozen=True)
class Signature:
    """Responses at offsets by layer, repeated and control; and what the repetition adds at B - 1 and at B."""

    layers: tuple[int, ...]
    valid: tuple[bool, ...]  # the strength is within the layer's window; what is not must not be shown
    block: int
    offsets: Mapping[str, Float[np.ndarray, "prompt layer offset"]]  # by condition
    added: stats.Band  # (excess over other offsets when repeated) - (the same in the control); axes [layer 1 two]
    lines: Mapping[str, stats.Band]  # means by condition, axes [layer 1 three]: at B - 1, at B, over all others

    @property
    def prompts(self) -> int:
        """Number of prompts of each condition."""
        return len(self.offsets["repeated"])

    def emerges(self, column: int = 0) -> int | None:
        """Return the first layer from which on, in all layers that count, the band of `added` is above 0."""
        above = [bool(self.added.band_low[k, 0, column] > 0) for k, ok in enumerate(self.valid) if ok]
        counted = [layer for layer, ok in zip(self.layers, self.valid, strict=True) if ok]
        run = 0
        while run < len(above) and above[len(above) - 1 - run]:
            run += 1
        return counted[len(counted) - run] if run else None


@dataclass(frozen=True)
class ResponseRun:
    """The folder of a response run, read."""

    path: Path
    info: dict[str, Any]
    tables: Mapping[str, pl.DataFrame]  # by the name of the file

    @property
    def config(self) -> dict[str, Any]:
        """What the run was asked for."""
        config: dict[str, Any] = self.info["config"]
        return config

    @property
    def dtype(self) -> str:
        """The model's own precision."""
        return str(self.info["agents"][0]["dtype"])

    @cached_property
    def windows(self) -> dict[tuple[str, str], Window]:
        """Windows by precision and kind of direction, the model's own precision first."""
        named = {name.removeprefix("windows-"): t for name, t in self.tables.items() if name.startswith("windows-")}
        order = sorted(named, key=lambda d: (d != self.dtype, d == "bfloat16"))
        return {(d, k): restored(named[d].filter(kind=k)) for d in order for k in ("random", "along")}

    def holds(self, kind: str) -> tuple[int, ...]:
        """The layers within whose window the strength is that a kind was measured at."""
        edges = self.windows[self.dtype, kind]
        return () if edges.middle is None else edges.holds(edges.middle)

    def signature(self, kind: str = LAST, relative: bool = False) -> Signature | None:
        """Return the induction signature in a kind of direction, None where it was not measured."""
        tables = [self.tables.get(f"signature-{c}-{kind}") for c in CONDITIONS]
        if any(t is None for t in tables):
            return None
        block, offsets = int(self.config["block"]), {}
        for condition, rows in zip(CONDITIONS, tables, strict=True):
            assert rows is not None
            layers = rows["layer"].unique(maintain_order=True).to_list()
            shape = (rows["prompt"].n_unique(), len(layers), 2 * block - 1)
            offsets[condition] = rows["relative" if relative else "response"].to_numpy().reshape(shape)
        found = {c: excess(x, block) for c, x in offsets.items()}
        draws = {"resamples": int(self.config["resamples"])}
        added = means(found["repeated"][0] - found["control"][0], self._rng(), **draws)
        three = {c: np.concatenate([x[..., block - 2 : block], found[c][1][..., None]], -1) for c, x in offsets.items()}
        lines = {c: means(x, self._rng(), **draws) for c, x in three.items()}
        valid = tuple(layer in self.holds(kind) for layer in layers)
        return Signature(tuple(layers), valid, block, offsets, added, lines)

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.info["seed"])

    @cached_property
    def heads(self) -> pl.DataFrame | None:
        """A row a head: the share of the signature that is lost without it, and its scores; None where not measured."""
        parts = [t for name, t in self.tables.items() if name.startswith("left-")]
        found = self.signature()
        layers = int(self.info["agents"][0]["layers_with_heads"])
        if found is None or not layers or len(parts) < layers or "scores" not in self.tables:
            return None
        table = pl.concat(parts).sort("layer", "head")
        left = np.array(table["left"].to_list()).T.reshape(-1, layers, len(table) // layers)
        whole = excess(found.offsets["repeated"][: len(left), -1], found.block)[0][:, 0]
        gone = lost(whole, left, self._rng(), resamples=int(self.config["resamples"]))
        if gone is None:
            return None
        ends = {name: getattr(gone, name).ravel() for name in ("value", "low", "high", "band_low", "band_high")}
        return (
            table.drop("left").with_columns(**{("lost" if k == "value" else k): v for k, v in ends.items()})
            .with_columns(carries=pl.Series(carriers(gone).ravel() & np.isfinite(ends["low"])))
            .join(self.tables["scores"], on=["layer", "head"], how="left")
        )  # fmt: skip

    @cached_property
    def edges(self) -> dict[str, Window]:
        """The windows on the transcripts of each game and kind."""
        named = {name.removeprefix("edges-"): t for name, t in self.tables.items() if name.startswith("edges-")}
        return {name: restored(rows) for name, rows in named.items()}

    @cached_property
    def bridge(self) -> dict[str, pl.DataFrame]:
        """For each game and kind a row a role and layer: the mean response over transcripts, with intervals.

        `valid` tells whether the strength is within the layer's window on these transcripts.
        """
        out = {}
        for name, rows in self.tables.items():
            if not name.startswith("bridge-"):
                continue
            layers, parts = rows["layer"].unique(maintain_order=True).to_list(), []
            edges = self.edges[name.removeprefix("bridge-")]
            holds = edges.holds(edges.middle or math.nan)
            valid = [layer in holds for layer in layers]
            for (role,), mine in rows.group_by("role", maintain_order=True):
                values = mine.select("response", "relative").to_numpy().reshape(-1, len(layers), 2)
                found = means(values, self._rng(), resamples=int(self.config["resamples"]))
                ends = {end: getattr(found, end)[:, 0, 0] for end in ("low", "high")}
                parts.append(pl.DataFrame({"role": [role] * len(layers), "layer": layers, "valid": valid,
                                           "response": found.value[:, 0, 0], "relative": found.value[:, 0, 1], **ends,
                                           "transcripts": [len(values)] * len(layers)}))  # fmt: skip
            out[name.removeprefix("bridge-")] = pl.concat(parts)
        return out

    @cached_property
    def bridge_heads(self) -> dict[str, pl.DataFrame]:
        """For each game and kind a row a role and head: the share of the answering token's response lost."""
        out = {}
        for name, rows in self.tables.items():
            if not name.startswith("bridgeheads-"):
                continue
            parts = []
            for (_,), mine in rows.group_by("role", maintain_order=True):
                left = np.array(mine["left"].to_list()).T[:, :, None]
                gone = lost(np.array(mine["whole"][0]), left, self._rng(), resamples=int(self.config["resamples"]))
                if gone is not None:
                    ends = {("lost" if k == "value" else k): getattr(gone, k).ravel() for k in ("value", "low", "high")}
                    parts.append(mine.drop("whole", "left").with_columns(**ends))
            if parts:
                out[name.removeprefix("bridgeheads-")] = pl.concat(parts)
        return out


def load(path: Path) -> ResponseRun:
    """Read the folder of a response run.

    Raises:
        RunError: it is none, or cannot be read.
    """
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
        tables = {p.stem: pl.read_parquet(p) for p in sorted((path / "response").glob("*.parquet"))}
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise RunError(f"{path} is not the folder of a response run: {error}") from error
    if not any(name.startswith("windows-") for name in tables) or not info.get("agents"):
        raise RunError(f"{path} is not the folder of a response run: there is no window in it; run it again")
    return ResponseRun(path, info, tables)
