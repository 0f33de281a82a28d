"""Tables of a patching run: their schemas, conversion from and to sweeps, and the summary tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import polars as pl

from nextstate.agents.sites import Site
from nextstate.analysis.heads.config import EXAMPLES, SITES, Sweeping, main_first
from nextstate.analysis.heads.pairs import Direction, PatchError, TokenPair
from nextstate.analysis.heads.recovery import Carried, Readout, Recovery, Sweep, rank_agreement, table
from nextstate.analysis.heads.routing import Routing, head_table, routing
from nextstate.analysis.run import Run
from nextstate.envs.contrast import Pair

PAIRS: dict[str, Any] = {
    "design": pl.String, "kind": pl.String, "pair": pl.Int64, "clean": pl.String, "corrupted": pl.String,
    "answer_clean": pl.String, "answer_corrupted": pl.String, "tokens": pl.Int64, "roles": pl.String,
    "pieces": pl.List(pl.String), "ids": pl.List(pl.Int64), "difference_clean": pl.Float64,
    "difference_corrupted": pl.Float64, "probability_clean": pl.Float64, "greedy_clean": pl.Boolean,
    "greedy_corrupted": pl.Boolean, "kept": pl.Boolean, "reason": pl.String, "control_prompt": pl.String,
    "control_ids": pl.List(pl.Int64),
}  # fmt: skip
_ENDS = ("", "_low", "_high", "_band_low", "_band_high")
HEADS: dict[Any, Any] = {
    "layer": pl.Int64, "head": pl.Int64,
    **{f"{kind}{end}": pl.Float64 for kind in ("state", "action") for end in _ENDS},
    "state_p": pl.Float64, "state_carries": pl.Boolean, "action_p": pl.Float64, "action_carries": pl.Boolean,
    **{f"routing{end}": pl.Float64 for end in _ENDS},
    "share": pl.Float64, "carries": pl.String,
}  # fmt: skip
TESTS = ("state_p", "state_carries", "action_p", "action_carries", "carries")  # columns of heads, not of layers
LAYERS: dict[Any, Any] = {"site": pl.String, **{name: kind for name, kind in HEADS.items() if name not in TESTS}}
EFFECTS: dict[Any, Any] = {
    "design": pl.String, "kind": pl.String, "layer": pl.Int64, "head": pl.Int64, "exact": pl.Float64,
    "estimate": pl.Float64,
}  # fmt: skip
WRONG = "the model prefers the wrong answer in one prompt or both"
SWEEP: dict[str, Any] = {
    "site": pl.String, "direction": pl.String, "layer": pl.Int64, "head": pl.Int64, "position": pl.String,
    "recovery": pl.Float64, "low": pl.Float64, "high": pl.Float64, "band_low": pl.Float64, "band_high": pl.Float64,
    "p": pl.Float64, "carries": pl.Boolean, "pairs": pl.Int64, "tested": pl.Int64, "failed": pl.Int64,
    "flips": pl.Float64, "probability": pl.Float64, "design": pl.String, "kind": pl.String, "where": pl.String,
    "exact": pl.Boolean, "control": pl.Float64, "patched": pl.List(pl.Float32), "control_patched": pl.List(pl.Float32),
}  # fmt: skip
ATTENTION: dict[str, Any] = {
    "kind": pl.String, "layer": pl.Int64, "head": pl.Int64, "tokens": pl.List(pl.String),
    "weights": pl.List(pl.Float64), "roles": pl.String, "answer": pl.String,
}  # fmt: skip


def pair_rows(
    design: str,
    kind: str,
    pairs: Sequence[Pair],
    joined: Mapping[int, TokenPair],
    excluded: Mapping[int, str],
    base: tuple[Readout, Readout],
    words: Mapping[int, Sequence[str]],
) -> list[dict[str, Any]]:
    """Return one row for each pair; `base` has an entry for each joined pair, `words` the clean tokens as text."""
    rows = []
    order = {i: k for k, i in enumerate(joined)}
    for i, pair in enumerate(pairs):
        (clean, corrupted), answers = (side.prompt(-1, 0) for side in pair.sides), pair.answers
        row = dict.fromkeys(PAIRS) | {"design": design, "kind": kind, "pair": i, "clean": clean, "kept": False}
        row |= {"corrupted": corrupted, "answer_clean": answers[0], "answer_corrupted": answers[1]}
        if i in joined:
            one, k, (x, y) = joined[i], order[i], base
            right = bool(x.difference[k] > 0 > y.difference[k])
            row |= {
                "tokens": len(one.clean), "roles": json.dumps(dict(one.roles)), "pieces": list(words[i]),
                "ids": list(one.clean), "difference_clean": float(x.difference[k]),
                "difference_corrupted": float(y.difference[k]), "probability_clean": float(x.probability[k]),
                "greedy_clean": bool(x.greedy[k] == one.answer), "greedy_corrupted": bool(y.greedy[k] == one.other),
                "kept": right, "reason": "" if right else WRONG,
            }  # fmt: skip
        else:
            row["reason"] = excluded[i]
        rows.append(row)
    return rows


def sweep_rows(job: Any, sweep: Sweep, found: Recovery, failed: int) -> pl.DataFrame:
    """Return one row for each cell of a sweep over the kept pairs.

    `patched` has the logit difference of each pair, `control_patched` that with the activation of the pair's control
    prompt: NaN for pairs without one, null where no controls were run.

    Args:
        job: the `Sweeping` that was run.
        sweep: its result.
        found: its recovery, with intervals.
        failed: number of pairs on which the model fails.
    """
    n = len(sweep.base.difference)
    patched, control = (
        None if x is None else x.reshape(n, -1).T.astype(np.float32).tolist()
        for x in (sweep.patched.difference, sweep.control_patched)
    )  # fmt: skip
    lists = pl.List(pl.Float32)
    rows = table(sweep, found).with_columns(
        pl.lit(job.design).alias("design"), pl.lit(job.kind).alias("kind"), pl.lit(job.where).alias("where"),
        pl.lit(sweep.exact).alias("exact"), pl.lit(failed, dtype=pl.Int64).alias("failed"),
        pl.lit(sweep.control, dtype=pl.Float64).alias("control"),
        pl.Series("patched", patched, dtype=lists),
        pl.lit(None, lists).alias("control_patched") if control is None
        else pl.Series("control_patched", control, dtype=lists),
    )  # fmt: skip
    missing = [name for name in ("flips", "probability") if name not in rows.columns]
    return rows.with_columns(pl.lit(None, dtype=pl.Float64).alias(name) for name in missing).select(list(SWEEP))


def restored(rows: pl.DataFrame, pairs: pl.DataFrame) -> Sweep:
    """Return the sweep that `rows` was made from; `pairs` are the rows of its pairs. Probabilities are not restored."""
    mine = pairs.filter(pl.col("kept") & (pl.col("kind") == rows["kind"][0]) & (pl.col("design") == rows["design"][0]))
    sides = [mine[f"difference_{side}"].to_numpy() for side in ("clean", "corrupted")]
    base, source = sides[::-1] if rows["direction"][0] == "denoise" else sides
    layers, columns = (rows[k].unique(maintain_order=True).to_list() for k in ("layer", "position"))
    n = len(mine)
    patched = Readout.empty(n, len(layers), len(rows) // (len(layers) * len(columns)), len(columns))
    patched.difference[:] = _by_pair(rows["patched"], patched.difference.shape)
    control = None
    if rows["control_patched"].null_count() == 0:
        control = _by_pair(rows["control_patched"], patched.difference.shape)
    empty = Readout.empty(n)
    return Sweep(
        cast(Site, rows["site"][0]), cast(Direction, rows["direction"][0]), tuple(layers), tuple(columns),
        Readout(base, empty.probability, empty.greedy), Readout(source, empty.probability, empty.greedy), patched,
        np.zeros(n, dtype=bool), np.ones(n, dtype=bool), (0,) * n, bool(rows["exact"][0]), float(rows["control"][0]),
        control,
    )  # fmt: skip


def _by_pair(lists: pl.Series, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.array(lists.to_list(), dtype=np.float64).T.reshape(shape)


def recovered(rows: pl.DataFrame) -> Recovery:
    """Return the recovery that the rows of a sweep were made with, with its intervals and its test."""
    shape = (rows["layer"].n_unique(), -1, rows["position"].n_unique())
    names = ("recovery", "low", "high", "band_low", "band_high", "p")
    value, low, high, band_low, band_high, p = (rows[name].to_numpy().reshape(shape) for name in names)
    one = rows.row(0, named=True)
    carries = np.array([bool(x) for x in rows["carries"]]).reshape(shape)  # null is False
    test = Carried(one["tested"], p.astype(np.float64), carries)
    return Recovery(value, low, high, band_low, band_high, one["pairs"], one["failed"], 0, test)


def sweep_of(run: Run[Any], *job: Any) -> tuple[Sweep, Recovery] | None:
    """Return a sweep of a run and its recovery (arguments are those of `Sweeping`), or None if it has no cells."""
    one = Sweeping(*job)
    rows = run.table(f"sweeps/{one.key}") if run.has(f"sweeps/{one.key}") else None
    return None if rows is None or rows.is_empty() else (restored(rows, run.table(one.pairs)), recovered(rows))


def routing_of(run: Run[Any], design: str, site: str, direction: str = "denoise") -> Routing | None:
    """Return state against action at the answering token, or None if one of the two was not swept."""
    state, action = (sweep_of(run, design, kind, site, direction, "last") for kind in ("state", "action"))
    if state is None or action is None:
        return None
    try:
        return routing(state, action, np.random.default_rng(run.config.seed))
    except PatchError:  # one of them has no logit difference to recover
        return None


def counts_of(pairs: pl.DataFrame) -> pl.DataFrame:
    """Return one row for each design and kind: pairs drawn, usable, kept and failed, and the greedy accuracy."""
    usable = pl.col("tokens").is_not_null()
    greedy = (pl.col("greedy_clean").cast(pl.Float64) + pl.col("greedy_corrupted").cast(pl.Float64)).filter(usable)
    return pairs.group_by("design", "kind", maintain_order=True).agg(
        drawn=pl.len().cast(pl.Int64), sound=usable.sum().cast(pl.Int64), kept=pl.col("kept").sum().cast(pl.Int64),
        failed=(usable.sum().cast(pl.Int64) - pl.col("kept").sum().cast(pl.Int64)), greedy=greedy.mean() / 2,
    )  # fmt: skip


def summaries(run: Run[Any]) -> dict[str, pl.DataFrame]:
    """Return the statistics of a patching run.

    - `counts`: numbers of pairs; `excluded`: why pairs cannot be used; `examples`: a few pairs of each kind.
    - `sweeps`: every cell of every sweep; `effects`: exact and estimated effect of each head, in logits; `screens`:
      their rank correlation.
    - `heads`, `layers`: state against action, for each head and for each whole layer (see `head_table`). Heads are
      tested; the intervals and bands of layers are descriptions.
    - `published`: the rows of the trials that were patched as published, if any (see `published`).
    - `attention`: attention of the top heads in one example of each kind.
    """
    pairs = pl.concat(run.tables("pairs/*").values())
    unusable = pairs.filter(pl.col("tokens").is_null())
    first = pairs.sort("kept", descending=True, maintain_order=True).group_by("design", "kind", maintain_order=True)
    cells = [rows.drop("patched", "control_patched") for rows in run.tables("sweeps/*").values() if len(rows)]
    effects, screens = [], []
    for design, kind in pairs.select("design", "kind").unique(maintain_order=True).iter_rows():
        exact, estimate = (sweep_of(run, design, kind, "head", "denoise", "last", e) for e in (True, False))
        if exact is not None and estimate is not None:
            effects.append(effect_rows(design, kind, exact[0], estimate[0]))
            screens.append((design, kind, rank_agreement(exact[0], estimate[0])))
    schema = {"design": pl.String, "kind": pl.String, "spearman": pl.Float64}
    return {
        "counts": counts_of(pairs),
        "excluded": unusable.group_by("design", "kind", "reason", maintain_order=True).len("pairs").sort(
            "pairs", descending=True, maintain_order=True
        ),
        "examples": first.head(EXAMPLES),
        "sweeps": pl.concat(cells) if cells else pl.DataFrame(schema=SWEEP).drop("patched", "control_patched"),
        "effects": pl.concat(effects) if effects else pl.DataFrame(schema=EFFECTS),
        "screens": pl.DataFrame(screens, schema=schema, orient="row"),
        **_routed(run),
        "published": _published(run),
        "attention": pl.concat([pl.DataFrame(schema=ATTENTION), *run.tables("attention/*").values()]),
    }  # fmt: skip


def effect_rows(design: str, kind: str, exact: Sweep, estimate: Sweep) -> pl.DataFrame:
    """Return one row for each head: its mean effect in logits, exact and as estimated from the gradient."""
    right, up = (
        (s.patched.difference - s.base.difference[:, None, None, None]).mean(0)[..., 0] for s in (exact, estimate)
    )
    layer, head = (x.ravel() for x in np.indices(right.shape))
    columns = {"layer": np.array(exact.layers)[layer], "head": head, "exact": right.ravel(), "estimate": up.ravel()}
    rows = pl.DataFrame(columns).filter(pl.col("exact").is_not_nan())
    return rows.select(pl.lit(design).alias("design"), pl.lit(kind).alias("kind"), pl.all()).cast(EFFECTS)


def _published(run: Run[Any]) -> pl.DataFrame:
    from nextstate.analysis.heads.published import PUBLISHED

    return pl.concat([pl.DataFrame(schema=PUBLISHED), *run.tables("published/*").values()])


def _routed(run: Run[Any]) -> dict[str, pl.DataFrame]:
    """Return `heads` and `layers` of the first design that has state and action pairs; empty tables if none has."""
    empty, layers = pl.DataFrame(schema=HEADS), [pl.DataFrame(schema=LAYERS)]
    for design in main_first(run.config.designs):
        one = routing_of(run, design, "head")
        if one is None and not any(routing_of(run, design, site) for site in SITES[1:]):
            continue
        heads = empty if one is None else head_table(one, _layers(run, design, "head"))
        for site in SITES[1:]:
            if (found := routing_of(run, design, site)) is not None:
                rows = head_table(found, range(found.value.shape[0])).with_columns(pl.lit(site).alias("site"))
                layers.append(rows.select(list(LAYERS)).cast(LAYERS))
        return {"heads": heads.select(list(HEADS)).cast(HEADS), "layers": pl.concat(layers)}
    return {"heads": empty, "layers": layers[0]}


def _layers(run: Run[Any], design: str, site: str) -> list[int]:
    rows = run.table(f"sweeps/{Sweeping(design, 'state', site, 'denoise', 'last').key}")
    return rows["layer"].unique(maintain_order=True).to_list()
