"""Accuracy, ceiling and chance of questions and answers, each with a 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from nextstate.analysis import stats
from nextstate.analysis.predict.tables import QUESTION

SUBSETS = ("all", "determined", "undetermined")
# Columns averaged in a cell -> their names in the tables. "accuracy" is that of the greedy answer.
MEANS = {
    "greedy_correct": "accuracy",
    "choice_correct": "choice",
    "choice_token_correct": "choice_token",
    "choice_byte_correct": "choice_byte",
    "lookup": "lookup",
    "ceiling": "ceiling",
    "chance": "chance",
    "p_accepted": "p_accepted",
    "rank": "rank",
}
BOUNDED = ("accuracy", "choice", "over_ceiling")  # values with intervals

Rows = pl.LazyFrame | pl.DataFrame


def pooled(rows: Rows, by: Sequence[str]) -> pl.DataFrame:
    """Average the questions of each group of columns `by` (which holds "agent" and "game") and each subset.

    Subsets: all questions, the determined ones, the undetermined ones. Accuracies, lookup, ceiling, chance and
    p_accepted are means in [0, 1], rank a mean from 1; over_ceiling is a ratio of means and may exceed 1. `episodes`
    counts distinct seeds: episodes of settings with the same seeds are correlated, so they form one cluster; those of
    settings with different seeds count as one sample. `*_low`, `*_high` are 95 % intervals over episodes, from
    `stats.accuracy` and `stats.over_ceiling`; null for fewer than `stats.FEWEST_EPISODES` episodes. `few` marks groups
    of fewer than `stats.FEW_EPISODES`.
    """
    subset = pl.when("determined").then(pl.lit("determined")).otherwise(pl.lit("undetermined")).alias("subset")
    totals = [pl.col(c).cast(pl.Float64).sum().alias(f"sum_{m}") for c, m in MEANS.items()]
    n, squares = pl.len().cast(pl.Float64).alias("n"), (pl.col("ceiling") ** 2).sum().alias("squares")
    parts = rows.lazy().group_by([*by, "episode", subset]).agg(n, squares, *totals).collect()
    keys = [*by, "subset"]
    both = parts.with_columns(subset=pl.lit("all")).group_by([*keys, "episode"]).agg(pl.exclude("subset").sum())
    sums = pl.concat([both, parts.select(both.columns)]).sort([*keys, "episode"])
    episodes = pl.len().cast(pl.Int64).alias("episodes")
    table = sums.group_by(keys, maintain_order=True).agg(episodes, pl.exclude("episode").sum())
    table = table.with_columns((pl.col(f"sum_{m}") / pl.col("n")).alias(m) for m in MEANS.values())
    table = table.with_columns(
        over_ceiling=pl.col("sum_accuracy") / pl.col("sum_ceiling"), few=pl.col("episodes") < stats.FEW_EPISODES
    )
    table = table.join(_intervals(sums, keys), on=keys, how="left", maintain_order="left")
    order = [f"{name}{end}" for name in BOUNDED for end in ("", "_low", "_high")]
    order += [m for m in MEANS.values() if m not in order]
    return table.select(
        *keys, pl.col("n").cast(pl.Int64), "episodes", "few", *(pl.col(c).fill_nan(None) for c in order)
    )


def _intervals(sums: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """Return each group's intervals; `sums` has one row for each group and episode."""
    block = [k for k in ("game", "variant", "size") if k in by]  # bounds the memory
    columns = ("n", "sum_accuracy", "sum_choice", "sum_ceiling", "squares")
    out = [sums.select(by).clear().with_columns(pl.lit(None, pl.Float64).alias(b) for b in _BOUNDS)]
    for part in sums.partition_by(block):
        groups = part.select(by).unique(maintain_order=True).with_row_index("group")
        group = part.join(groups, on=by, maintain_order="left")["group"].to_numpy()
        episode = part["episode"].rank("dense").to_numpy() - 1
        dense = np.zeros((len(columns), int(episode.max()) + 1, len(groups)))
        for i, name in enumerate(columns):
            dense[i, episode, group] = part[name].to_numpy()
        n, right, choice, ceilings, squares = dense
        found = (stats.accuracy(right, n)[1], stats.accuracy(choice, n)[1],
                 stats.over_ceiling(right, n, ceilings, squares)[1])  # fmt: skip
        out.append(groups.drop("group").with_columns(map(pl.Series, _BOUNDS, np.concatenate(found))))
    return pl.concat(out)


_BOUNDS = [f"{name}_{end}" for name in BOUNDED for end in ("low", "high")]


def narrow(rows: Rows) -> pl.DataFrame:
    """Return the columns that the statistics need, so that the files are read only once for several of them."""
    return rows.lazy().select("agent", "game", "variant", "size", *QUESTION, "states", "determined", *MEANS).collect()


def cells(rows: Rows) -> pl.DataFrame:
    """Return one row for each (agent, game, variant, size, step, subset), with the columns of `pooled`."""
    return pooled(rows, ("agent", "game", "variant", "size", "step"))


def curves(rows: Rows) -> pl.DataFrame:
    """Return accuracy against size (pooled over steps) and against step (over sizes); columns `axis` and `at`."""
    frames = {axis: pooled(rows, ("agent", "game", "variant", axis)) for axis in ("size", "step")}
    return pl.concat(
        frame.rename({axis: "at"}).with_columns(pl.col("at").cast(pl.Int64), axis=pl.lit(axis))
        for axis, frame in frames.items()
    )


def on_hard(rows: Rows) -> pl.DataFrame:
    """Return each agent's accuracy on the determined questions that a shortcut gets wrong.

    One row for each (agent, game, variant, shortcut), with the columns of `pooled` and `share`, the share of determined
    questions that the shortcut gets wrong. Shortcuts themselves are omitted as agents. If a shortcut is never wrong, n
    is 0 and the accuracy is null.
    """
    determined, place = rows.lazy().filter("determined"), ["game", "variant"]
    reference = determined.filter(pl.col("agent").str.starts_with("shortcut:")).rename({"agent": "shortcut"})
    asked = determined.filter(~pl.col("agent").str.starts_with("shortcut:"))
    shares = reference.group_by([*place, "shortcut"]).agg(share=(~pl.col("greedy_correct")).mean())
    hard = reference.filter(~pl.col("greedy_correct")).select(*QUESTION, "shortcut")
    keys = ["agent", *place, "shortcut"]
    table = pooled(asked.join(hard, on=QUESTION), keys).filter(pl.col("subset") == "all").drop("subset")
    every = asked.select("agent", *place).unique().join(shares, on=place).collect()
    return every.join(table, on=keys, how="left").with_columns(pl.col("n", "episodes").fill_null(0)).sort(keys)


def paired(rows: Rows, agent: str, other: str = "ideal", by: Sequence[str] = ("game", "variant")) -> pl.DataFrame:
    """Return accuracy(agent) - accuracy(other) on the same questions, by game and variant, and by subset.

    Columns: accuracy and theirs (of the two agents), difference in [-1, 1], low, high (95 %, over episodes, from
    `stats.paired_difference`; null for fewer than `stats.FEWEST_EPISODES` episodes), p (two-sided, that both agents are
    equal, from `stats.sign_flip`), n questions, episodes, and few (whether there are fewer than `stats.FEW_EPISODES`).
    """
    hit = pl.col("greedy_correct").cast(pl.Int64)
    theirs = rows.lazy().filter(pl.col("agent") == other).select(*QUESTION, other=hit)
    both = rows.lazy().filter(pl.col("agent") == agent).join(theirs, on=QUESTION)
    gaps = both.select(*by, *QUESTION, "determined", "other", hit=hit, gap=hit - pl.col("other")).collect()
    out = []
    for subset, frame in zip(
        SUBSETS, (gaps, gaps.filter("determined"), gaps.filter(~pl.col("determined"))), strict=True
    ):
        for place, part in frame.group_by(by, maintain_order=True):
            sums = part.group_by("episode").agg(pl.col("gap").sum(), n=pl.len()).sort("episode")
            totals, n = (sums[name].to_numpy()[:, None] for name in ("gap", "n"))
            (difference,), ((low,), (high,)) = stats.paired_difference(totals, n)
            means = [part[name].mean() for name in ("hit", "other")]
            found = (*means, difference, low, high, stats.sign_flip(totals[:, 0]), len(part), len(sums))
            out.append((*place, subset, *found, len(sums) < stats.FEW_EPISODES))
    schema: dict[str, Any] = dict.fromkeys((*by, "subset"), pl.String)
    schema |= dict.fromkeys(("accuracy", "theirs", "difference", "low", "high", "p"), pl.Float64)
    schema |= {"n": pl.Int64, "episodes": pl.Int64, "few": pl.Boolean}
    return pl.DataFrame(out, schema=schema, orient="row").fill_nan(None).sort(*by, "subset")
