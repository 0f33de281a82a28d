"""The tables of a response run: rows from arrays, and statistics over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from nextstate.analysis.heads.config import MIN_EFFECT
from nextstate.analysis.response.bridge import COLUMNS as BRIDGE
from nextstate.analysis.response.config import CONDITIONS, KINDS, RANDOM, ResponseConfig, bridges_of
from nextstate.analysis.response.induction import excess, lost, means
from nextstate.analysis.response.measure import Response
from nextstate.analysis.response.window import of_kind, restored
from nextstate.analysis.run import Run
from nextstate.analysis.stats import Band, spearman

_ENDS = ("value", "low", "high", "band_low", "band_high")
EXACT: dict[str, Any] = {"kind": pl.String, "layer": pl.Int64, "level": pl.Float64, "apart": pl.Float64}
MATRIX: dict[str, Any] = {"layer": pl.Int64, "position": pl.Int64, "response": pl.List(pl.Float32)}
SIGNATURE: dict[str, Any] = {
    "prompt": pl.Int64, "layer": pl.Int64, "offset": pl.Int64, "response": pl.Float64, "relative": pl.Float64,
    "control": pl.Float64,
}  # fmt: skip
LEFT: dict[str, Any] = {"layer": pl.Int64, "head": pl.Int64, "left": pl.List(pl.Float64)}
SCORES: dict[str, Any] = {"layer": pl.Int64, "head": pl.Int64, "prefix": pl.Float64, "copying": pl.Float64}
BRIDGE_HEADS: dict[str, Any] = {
    "role": pl.String, "layer": pl.Int64, "head": pl.Int64, "state": pl.Float64, "action": pl.Float64,
    "whole": pl.List(pl.Float64), "left": pl.List(pl.Float64),
}  # fmt: skip


# --- from arrays


def matrix_rows(layers: Sequence[int], value: Float[np.ndarray, "prompt layer position target"]) -> pl.DataFrame:
    """Return the mean matrix over prompts: one row for each layer and pushed position, with a list over all targets."""
    mean = value.mean(0)
    rows = [(layer, j, [None if np.isnan(x) else float(x) for x in line])
            for layer, matrix in zip(layers, mean, strict=True) for j, line in enumerate(matrix)]  # fmt: skip
    return pl.DataFrame(rows, schema=MATRIX, orient="row")


def profile_rows(
    layers: Sequence[int],
    value: Float[np.ndarray, "prompt layer offset"],
    relative: Float[np.ndarray, "prompt layer offset"],
    control: float,
) -> pl.DataFrame:
    """Return a row for each prompt, layer and offset; `control` is `Response.control`."""
    prompt, layer, offset = (x.ravel() for x in np.indices(value.shape))
    columns = {"prompt": prompt, "layer": np.array(layers)[layer], "offset": offset + 1, "response": value.ravel(),
               "relative": relative.ravel(), "control": np.full(value.size, control)}  # fmt: skip
    return pl.DataFrame(columns).cast(pl.Schema(SIGNATURE))


def exact_rows(kind: str, limit: Response, found: Response | None) -> pl.DataFrame:
    """Return a row for each layer: the norm of the exact product, and the relative error of the measured response.

    Args:
        kind: kind of directions to use.
        limit: the exact product.
        found: responses to the same pushes at the strength used; None if there is no window.
    """
    own = of_kind(limit, kind)
    exact = limit.value[:, 0, own].astype(np.float64)
    level = np.nanmean(limit.total[:, 0, own].astype(np.float64), axis=(0, 1, 3))
    distance = [None] * len(level)
    if found is not None:
        axes = (0, 1, 3, 4)
        squared = np.nansum(np.square(found.value[:, 0, own] - exact), axes) / np.nansum(np.square(exact), axes)
        distance = np.sqrt(squared).tolist()
    rows = zip([kind] * len(level), limit.layers, level.tolist(), distance, strict=True)
    return pl.DataFrame(list(rows), schema=EXACT, orient="row")


def left_rows(layer: int, left: Float[np.ndarray, "prompt head"]) -> pl.DataFrame:
    """Return a row for each head: the signature of each prompt that remains without it."""
    columns = {"layer": [layer] * left.shape[1], "head": range(left.shape[1]), "left": left.T.tolist()}
    return pl.DataFrame(columns, schema=LEFT)


def score_rows(prefix: Float[np.ndarray, "layer head"], copying: Float[np.ndarray, "layer head"]) -> pl.DataFrame:
    """Return a row for each head; heads that a layer does not have (NaN scores) are omitted."""
    layer, head = (x.ravel() for x in np.indices(prefix.shape))
    rows = pl.DataFrame({"layer": layer, "head": head, "prefix": prefix.ravel(), "copying": copying.ravel()})
    return rows.filter(pl.col("prefix").is_not_nan()).cast(pl.Schema(SCORES))


def bridge_head_rows(
    heads: pl.DataFrame,
    found: Mapping[str, tuple[Float[np.ndarray, " transcript"], Float[np.ndarray, "transcript head"]]],
) -> pl.DataFrame:
    """Return a row for each role and head: the response of each transcript, with all heads and without this one.

    Args:
        heads: layer, head, and recovery by state and action pairs when it was patched.
        found: the result of `response_without`.
    """
    rows = [
        (role, *head, whole.tolist(), left[:, k].tolist())
        for role, (whole, left) in found.items() for k, head in enumerate(heads.iter_rows())
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=BRIDGE_HEADS, orient="row")


# --- statistics


def summaries(run: Run[ResponseConfig]) -> dict[str, pl.DataFrame]:
    """Return the statistics of a response run.

    - `windows`: the windows in each precision, the model's own first; `precisions`: the part common to
      most layers; `exact`: the limit at strength 0.
    - `matrices`: mean responses to random pushes, in the layers that have a window.
    - `signature`: for each kind of direction, the layer where the induction signature begins; `lines`, `added` and
      `offsets`: by layer, the response at its offsets, and its increase by repetition there and at each offset.
    - `heads`: the share of the signature that is lost without each head, with its scores. Where there is no signature,
      no loss is significant.
    - `edges`, `bridge`: windows and mean responses of transcripts; `bridge_heads`: the share that is lost without each
      head; `ranks`: its rank correlation with recovery by patching.

    In these tables `valid` is whether the strength is within the layer's window; the page shows only valid rows.
    """
    windows = pl.concat(run.tables("windows/*").values())
    precisions = precision_rows(windows)
    parts = [_signature(run, kind) for kind in KINDS if _measured(run, kind)]
    signature: dict[str, pl.DataFrame] = {
        name: pl.concat([part[name] for part in parts]) if parts else pl.DataFrame(schema=schema)
        for name, schema in _SIGNATURE.items()
    }
    bridge_heads = _bridge_heads(run)
    present = signature["signature"].filter(kind=RANDOM)["emerges"].is_not_null().any()
    return {
        "windows": windows,
        "precisions": precisions,
        "exact": run.table("exact") if run.has("exact") else pl.DataFrame(schema=EXACT),
        "matrices": _matrices(run),
        **signature,
        "heads": _heads(run, present),
        **_bridges(run),
        "bridge_heads": bridge_heads,
        "ranks": _ranks(bridge_heads),
    }


def precision_rows(windows: pl.DataFrame) -> pl.DataFrame:
    """Return a row for each precision and kind of direction: the strengths in the windows of most layers.

    `strength` is the middle one, at which responses are measured, and `layers` the number of layers whose window
    contains it; `weakest` and `strongest` say whether the window ends at the first or last measured strength.
    """
    schema = {
        "dtype": pl.String, "kind": pl.String, "low": pl.Float64, "high": pl.Float64, "strength": pl.Float64,
        "layers": pl.Int64, "of": pl.Int64, "weakest": pl.Boolean, "strongest": pl.Boolean,
    }  # fmt: skip
    rows = []
    for (dtype, kind), mine in windows.group_by("dtype", "kind", maintain_order=True):
        found = restored(mine)
        low, high = (found.common[0], found.common[-1]) if found.common else (None, None)
        held = 0 if found.middle is None else len(found.holds(found.middle))
        ends = (low == found.strengths[0], high == found.strengths[-1])
        rows.append((dtype, kind, low, high, found.middle, held, len(found.layers), *ends))
    return pl.DataFrame(rows, schema=schema, orient="row")


def _holds(run: Run[ResponseConfig], kind: str) -> tuple[int, ...]:
    """Return the layers whose window contains the strength used."""
    edges = restored(run.table("windows/own").filter(kind=kind))
    return () if edges.middle is None else edges.holds(edges.middle)


def _measured(run: Run[ResponseConfig], kind: str) -> bool:
    keys = [f"signature/{condition}-{kind}" for condition in CONDITIONS]
    return all(run.has(key) and not run.table(key).is_empty() for key in keys)


def _matrices(run: Run[ResponseConfig]) -> pl.DataFrame:
    named = {condition: f"matrix/{condition}-{RANDOM}" for condition in CONDITIONS}
    rows = [run.table(key).select(pl.lit(c).alias("condition"), pl.all()) for c, key in named.items() if run.has(key)]
    empty = pl.DataFrame(schema={"condition": pl.String, **MATRIX})
    return pl.concat([empty, *rows]).filter(pl.col("layer").is_in(_holds(run, RANDOM)))


_SIGNATURE: dict[str, dict[str, Any]] = {
    "signature": {
        "kind": pl.String, "prompts": pl.Int64, "emerges": pl.Int64, "deepest": pl.Int64, "control": pl.Float64,
    },
    "lines": {
        "kind": pl.String, "measure": pl.String, "condition": pl.String, "at": pl.String, "layer": pl.Int64,
        "valid": pl.Boolean, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    },
    "added": {
        "kind": pl.String, "at": pl.String, "layer": pl.Int64, "valid": pl.Boolean,
        **dict.fromkeys(_ENDS, pl.Float64), "significant": pl.Boolean,
    },
    "offsets": {
        "kind": pl.String, "layer": pl.Int64, "valid": pl.Boolean, "offset": pl.Int64, "added": pl.Float64,
    },
}  # fmt: skip
AT = ("before", "same", "others")  # offsets B - 1, B, and the mean of all others


def _signature(run: Run[ResponseConfig], kind: str) -> dict[str, pl.DataFrame]:
    """Return the tables of the induction signature in a kind of direction."""
    block, tables = run.config.block, {c: run.table(f"signature/{c}-{kind}") for c in CONDITIONS}
    layers = tables["repeated"]["layer"].unique(maintain_order=True).to_list()
    valid = [layer in _holds(run, kind) for layer in layers]
    where = {"layer": layers, "valid": valid}
    lines = []
    for measure in ("response", "relative"):
        for condition in CONDITIONS:
            values = _offsets(tables[condition], measure, block)
            others = excess(values, block)[1][..., None]
            band = _means(run, np.concatenate([values[..., block - 2 : block], others], -1))
            for k, at in enumerate(AT):
                names = {"kind": kind, "measure": measure, "condition": condition, "at": at}
                lines.append(_rows(names, where, {end: getattr(band, end)[:, 0, k] for end in _ENDS[:3]}))
    repeated, control = (_offsets(tables[c], "response", block) for c in CONDITIONS)
    band = _means(run, excess(repeated, block)[0] - excess(control, block)[0])
    increased = np.array(valid)[:, None] & (band.band_low[:, 0] > 0)
    added = [
        _rows({"kind": kind, "at": at}, where, {end: getattr(band, end)[:, 0, k] for end in _ENDS}
              | {"significant": increased[:, k]})
        for k, at in enumerate(AT[:2])
    ]  # fmt: skip
    increase = (repeated - control).mean(0)
    of, offset = (x.ravel() for x in np.indices(increase.shape))
    each = {"layer": np.array(layers)[of], "valid": np.array(valid)[of], "offset": offset + 1,
            "added": increase.ravel()}  # fmt: skip
    deepest = max(layer for layer, ok in zip(layers, valid, strict=True) if ok)
    one = (kind, len(repeated), emerges(added[0]), deepest, max(table["control"][0] for table in tables.values()))
    return {
        "signature": pl.DataFrame([one], schema=_SIGNATURE["signature"], orient="row"),
        "lines": pl.concat(lines),
        "added": pl.concat(added),
        "offsets": _rows({"kind": kind}, each, {}).cast(pl.Schema(_SIGNATURE["offsets"])),
    }  # fmt: skip


def _rows(names: Mapping[str, str], where: Mapping[str, Any], values: Mapping[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(dict(where) | dict(values)).select(*(pl.lit(v).alias(k) for k, v in names.items()), pl.all())


def _offsets(rows: pl.DataFrame, measure: str, block: int) -> Float[np.ndarray, "prompt layer offset"]:
    return rows[measure].to_numpy().reshape(rows["prompt"].n_unique(), -1, 2 * block - 1)


def _means(run: Run[ResponseConfig], values: Float[np.ndarray, "prompt layer column"]) -> Band:
    return means(values, np.random.default_rng(run.config.seed), resamples=run.config.resamples)


def emerges(added: pl.DataFrame) -> int | None:
    """Return the first layer from which on the increase is significant in all layers that have a window, if any.

    Everything that is said of the signature follows from this: there is one if there is such a layer, that is, if the
    increase is significant after the deepest layer that has a window.

    Args:
        added: increase by repetition at one offset: `layer`, in increasing order, `valid` and `significant`.
    """
    out = None
    for row in reversed(added.filter("valid").rows(named=True)):
        if not row["significant"]:
            break
        out = row["layer"]
    return out


def _lost(run: Run[ResponseConfig], whole: Float[np.ndarray, " unit"], rows: pl.DataFrame) -> Band | None:
    """Return the share of a response that is lost without each head, with the heads as one axis."""
    left = np.array(rows["left"].to_list()).T[:, :, None]
    return lost(whole[: len(left)], left, np.random.default_rng(run.config.seed), resamples=run.config.resamples)


def _heads(run: Run[ResponseConfig], present: bool) -> pl.DataFrame:
    """Return the table of heads; `present` is whether there is a signature."""
    empty = pl.DataFrame(schema={
        "layer": pl.Int64, "head": pl.Int64, "lost": pl.Float64, **dict.fromkeys(_ENDS[1:], pl.Float64),
        "significant": pl.Boolean, "prefix": pl.Float64, "copying": pl.Float64,
    })  # fmt: skip
    rows = pl.concat([pl.DataFrame(schema=LEFT), *run.tables("heads/*").values()]).sort("layer", "head")
    if rows.is_empty() or not run.has("scores") or not _measured(run, RANDOM):
        return empty
    offsets = _offsets(run.table(f"signature/repeated-{RANDOM}"), "response", run.config.block)
    gone = _lost(run, excess(offsets[:, -1], run.config.block)[0][:, 0], rows)
    if gone is None:
        return empty
    ends = {("lost" if end == "value" else end): getattr(gone, end).ravel() for end in _ENDS}
    significant = (gone.nonzero & np.isfinite(gone.low) & (np.abs(gone.value) >= MIN_EFFECT)).ravel() & present
    return (
        rows.drop("left").with_columns(**ends).with_columns(significant=pl.Series(significant))
        .join(run.table("scores"), on=["layer", "head"], how="left")
    )  # fmt: skip


def _bridges(run: Run[ResponseConfig]) -> dict[str, pl.DataFrame]:
    """Return `edges` and `bridge`: means over transcripts, by role and layer."""
    names = {"game": pl.String, "pairs": pl.String}
    edges = [pl.DataFrame(schema=names | {"strength": pl.Float64, "low": pl.Float64, "high": pl.Float64})]
    bridge = [pl.DataFrame(schema=names | {
        "role": pl.String, "layer": pl.Int64, "valid": pl.Boolean, "response": pl.Float64, "relative": pl.Float64,
        "low": pl.Float64, "high": pl.Float64, "transcripts": pl.Int64,
    })]  # fmt: skip
    for one in bridges_of(run.config):
        if not run.has(f"edges/{one.key}"):
            continue
        found, name = restored(run.table(f"edges/{one.key}")), (one.config.game, one.kind)
        ends = (found.common[0], found.common[-1]) if found.common else (None, None)
        edges.append(pl.DataFrame([(*name, found.middle, *ends)], schema=edges[0].schema, orient="row"))
        valid = found.holds(found.middle or math.nan)
        rows = run.table(f"bridge/{one.key}") if run.has(f"bridge/{one.key}") else pl.DataFrame(schema=BRIDGE)
        for (role,), mine in rows.group_by("role", maintain_order=True):
            layers = mine["layer"].unique(maintain_order=True).to_list()
            values = mine.select("response", "relative").to_numpy().reshape(-1, len(layers), 2)
            band = _means(run, values)
            columns = {
                "game": name[0], "pairs": name[1], "role": role, "layer": layers, "valid": [k in valid for k in layers],
                "response": band.value[:, 0, 0], "relative": band.value[:, 0, 1], "low": band.low[:, 0, 0],
                "high": band.high[:, 0, 0], "transcripts": len(values),
            }  # fmt: skip
            bridge.append(pl.DataFrame(columns).cast(bridge[0].schema))
    return {"edges": pl.concat(edges), "bridge": pl.concat(bridge)}


def _bridge_heads(run: Run[ResponseConfig]) -> pl.DataFrame:
    empty = pl.DataFrame(schema={"game": pl.String, "pairs": pl.String, **BRIDGE_HEADS}).drop("whole", "left")
    out = [empty.with_columns(pl.lit(0.0).alias(end) for end in ("lost", "low", "high"))]
    for one in bridges_of(run.config):
        key = f"bridge_heads/{one.key}"
        for (_,), mine in run.table(key).group_by("role", maintain_order=True) if run.has(key) else ():
            gone = _lost(run, np.array(mine["whole"][0]), mine)
            if gone is not None:
                ends = {"lost": gone.value.ravel(), "low": gone.low.ravel(), "high": gone.high.ravel()}
                names = (pl.lit(one.config.game).alias("game"), pl.lit(one.kind).alias("pairs"))
                out.append(mine.drop("whole", "left").select(*names, pl.all()).with_columns(**ends))
    return pl.concat(out)


def _ranks(bridge_heads: pl.DataFrame) -> pl.DataFrame:
    """Return the rank correlation of recovery by patching with the share of the response lost, over heads.

    State is compared on the state pairs of the first game that was patched, action on its action pairs.
    """
    rows = []
    for kind in ("state", "action"):
        mine = bridge_heads.filter(role=kind, pairs=kind)
        if len(mine):
            mine = mine.filter(game=mine["game"][0])
            rows.append((kind, spearman(mine[kind].to_numpy(), mine["lost"].to_numpy())))
    return pl.DataFrame(rows, schema={"kind": pl.String, "spearman": pl.Float64}, orient="row")
