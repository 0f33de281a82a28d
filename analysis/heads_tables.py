"""The files of a patching run: what a sweep becomes as a table, and a sweep again from its table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import polars as pl

from nextstate.agents.sites import Site
from nextstate.analysis.heads import Routing, routing
from nextstate.analysis.pairs import Direction, PatchError, TokenPair
from nextstate.analysis.recovery import Readout, Recovery, Sweep, table
from nextstate.analysis.tables import RunError
from nextstate.envs.contrast import Pair

PAIRS: dict[str, Any] = {
    "design": pl.String, "kind": pl.String, "pair": pl.Int64, "clean": pl.String, "corrupted": pl.String,
    "answer_clean": pl.String, "answer_corrupted": pl.String, "tokens": pl.Int64, "roles": pl.String,
    "pieces": pl.List(pl.String), "ids": pl.List(pl.Int64), "difference_clean": pl.Float64,
    "difference_corrupted": pl.Float64, "probability_clean": pl.Float64, "greedy_clean": pl.Boolean,
    "greedy_corrupted": pl.Boolean, "kept": pl.Boolean, "reason": pl.String,
}  # fmt: skip
WRONG = "the model prefers the wrong answer in one prompt or both"


class Job(NamedTuple):
    """One sweep of a run: which pairs, where, in which direction."""

    design: str
    kind: str
    site: Site
    direction: Direction
    where: str  # "last", "map" (each position or role by itself) or "all" (all positions at once)
    exact: bool = True

    @property
    def slug(self) -> str:
        """The name of its file."""
        return "-".join([*self[:5], *([] if self.exact else ["attribution"])])


def pair_rows(
    design: str,
    kind: str,
    pairs: Sequence[Pair],
    joined: Mapping[int, TokenPair],
    excluded: Mapping[int, str],
    base: tuple[Readout, Readout],
    words: Mapping[int, Sequence[str]],
) -> list[dict[str, Any]]:
    """Return a row a pair; `base` has an entry for each joined pair, `words` the clean tokens as text."""
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


def sweep_rows(job: Job, sweep: Sweep, found: Recovery, failed: int) -> pl.DataFrame:
    """Return one row a cell of a sweep over the pairs that were kept; `patched` has each pair's logit difference."""
    n = len(sweep.base.difference)
    patched = sweep.patched.difference.reshape(n, -1).T
    rows = table(sweep, found).with_columns(
        pl.lit(job.design).alias("design"), pl.lit(job.kind).alias("kind"), pl.lit(job.where).alias("where"),
        pl.lit(sweep.exact).alias("exact"), pl.lit(failed, dtype=pl.Int64).alias("failed"),
        pl.lit(sweep.control, dtype=pl.Float64).alias("control"),
        pl.Series("patched", patched.astype(np.float32).tolist(), dtype=pl.List(pl.Float32)),
    )  # fmt: skip
    for name in ("flips", "probability"):
        if name not in rows.columns:
            rows = rows.with_columns(pl.lit(None, dtype=pl.Float64).alias(name))
    return rows


def restored(rows: pl.DataFrame, pairs: pl.DataFrame) -> Sweep:
    """Return the sweep that `rows` was made of; `pairs` are the rows of its pairs. Probabilities are not restored."""
    mine = pairs.filter(pl.col("kept") & (pl.col("kind") == rows["kind"][0]) & (pl.col("design") == rows["design"][0]))
    sides = [mine[f"difference_{side}"].to_numpy() for side in ("clean", "corrupted")]
    base, source = sides[::-1] if rows["direction"][0] == "denoise" else sides
    layers, columns = (rows[k].unique(maintain_order=True).to_list() for k in ("layer", "position"))
    n, cells = len(mine), np.array(rows["patched"].to_list(), dtype=np.float64)
    patched = Readout.empty(n, len(layers), len(rows) // (len(layers) * len(columns)), len(columns))
    patched.difference[:] = cells.T.reshape(patched.difference.shape)
    empty = Readout.empty(n)
    return Sweep(
        cast(Site, rows["site"][0]), cast(Direction, rows["direction"][0]), tuple(layers), tuple(columns),
        Readout(base, empty.probability, empty.greedy), Readout(source, empty.probability, empty.greedy), patched,
        np.zeros(n, dtype=bool), np.ones(n, dtype=bool), (0,) * n, bool(rows["exact"][0]), float(rows["control"][0]),
    )  # fmt: skip


@dataclass(frozen=True)
class HeadsRun:
    """The folder of a patching run, read."""

    path: Path
    info: dict[str, Any]
    pairs: pl.DataFrame
    sweeps: Mapping[str, pl.DataFrame]  # by the slug of the job

    def get(self, design: str, kind: str, site: str, direction: str, where: str, exact: bool = True) -> Any:
        """Return the rows of a sweep, or None where there is none."""
        return self.sweeps.get(Job(design, kind, cast(Site, site), cast(Direction, direction), where, exact).slug)

    def sweep(self, *job: Any) -> Sweep | None:
        """Return a sweep of the run, or None where there is none."""
        rows = self.get(*job)
        return None if rows is None else restored(rows, self.pairs)

    def routing(self, design: str, site: str, direction: str = "denoise") -> Routing | None:
        """Return state against action at the answering token, or None where one of both was not swept."""
        state, action = (self.sweep(design, kind, site, direction, "last") for kind in ("state", "action"))
        if state is None or action is None:
            return None
        try:
            return routing(state, action, np.random.default_rng(self.info["seed"]))
        except PatchError:  # no scale in one of them
            return None

    @cached_property
    def counts(self) -> dict[tuple[str, str], dict[str, Any]]:
        """For each design and kind: how many pairs were drawn, are sound, and count; and how well the model does."""
        out: dict[tuple[str, str], dict[str, Any]] = {}
        for (design, kind), rows in self.pairs.group_by("design", "kind", maintain_order=True):
            sound = rows.filter(pl.col("tokens").is_not_null())
            greedy = pl.concat([sound["greedy_clean"], sound["greedy_corrupted"]]).mean() if len(sound) else None
            left = rows.filter(pl.col("tokens").is_null()).group_by("reason").len().sort("len", descending=True)
            out[str(design), str(kind)] = {
                "drawn": len(rows), "sound": len(sound), "kept": int(rows["kept"].sum()), "greedy": greedy,
                "failed": len(sound) - int(rows["kept"].sum()), "left_out": left.rows(),
            }  # fmt: skip
        return out


def load(path: Path) -> HeadsRun:
    """Read the folder of a patching run.

    Raises:
        RunError: it is none, or cannot be read.
    """
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
        pairs = pl.read_parquet(path / "pairs.parquet")
        sweeps = {p.stem: pl.read_parquet(p) for p in sorted((path / "sweeps").glob("*.parquet"))}
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise RunError(f"{path} is not the folder of a patching run: {error}") from error
    return HeadsRun(path, info, pairs, sweeps)
