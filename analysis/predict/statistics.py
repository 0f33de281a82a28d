"""Accuracy, ceiling and chance of questions and answers, each with a 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence

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
    "ceiling": "ceiling",
    "chance": "chance",
    "p_accepted": "p_accepted",
    "rank": "rank",
}
RATIOS = {"accuracy": "n", "choice": "n", "over_ceiling": "sum_ceiling"}  # values with intervals -> denominators

Rows = pl.LazyFrame | pl.DataFrame


def pooled(rows: Rows, by: Sequence[str], rng: np.random.Generator | None = None) -> pl.DataFrame:
    """Average the questions of each group of columns `by` (which holds "agent" and "game") and each subset.

    Subsets: all questions, the determined ones, the undetermined ones. Accuracies, ceiling, chance and p_accepted are
    means in [0, 1], rank a mean from 1; over_ceiling is a ratio of means and may exceed 1. `episodes` counts
    distinct seeds: episodes of settings with the same seeds are correlated, so they form one cluster. `*_low`, `*_high`
    are 95 % intervals over episodes: Wilson's if each episode has one question in a group, else a cluster bootstrap;
    if all its draws agree (all correct, all wrong), Wilson's with the number of episodes as n.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    subset = pl.when("determined").then(pl.lit("determined")).otherwise(pl.lit("undetermined")).alias("subset")
    totals = [pl.col(c).cast(pl.Float64).sum().alias(f"sum_{m}") for c, m in MEANS.items()]
    n = pl.len().cast(pl.Float64).alias("n")
    parts = _strata(rows).group_by([*by, "stratum", "episode", subset]).agg(n, *totals).collect()
    keys = [*by, "subset"]
    both = (
        parts.with_columns(subset=pl.lit("all")).group_by([*keys, "stratum", "episode"]).agg(pl.exclude("subset").sum())
    )
    sums = pl.concat([both, parts.select(both.columns)]).sort([*keys, "stratum", "episode"])
    most, episodes = pl.col("n").max().alias("most"), pl.len().cast(pl.Int64).alias("episodes")
    table = sums.group_by(keys, maintain_order=True).agg(most, episodes, pl.exclude("episode", "stratum").sum())
    table = table.with_columns((pl.col(f"sum_{m}") / pl.col("n")).alias(m) for m in MEANS.values())
    table = table.with_columns(over_ceiling=pl.col("sum_accuracy") / pl.col("sum_ceiling"))
    repeated = table.filter(pl.col("most") > 1).select(keys)
    bounds = [f"{name}_{end}" for name in RATIOS for end in ("low", "high")]
    if len(repeated):
        found = _bootstrap(sums.join(repeated, on=keys, how="semi"), keys, rng)
        table = table.join(found, on=keys, how="left", maintain_order="left")
    else:
        table = table.with_columns(pl.lit(None, pl.Float64).alias(b) for b in bounds)
    order = [f"{name}{end}" for name in RATIOS for end in ("", "_low", "_high")]
    order += [m for m in MEANS.values() if m not in order]
    table = _wilson_where_flat(table)
    return table.select(*keys, pl.col("n").cast(pl.Int64), "episodes", *(pl.col(c).fill_nan(None) for c in order))


def _bootstrap(sums: pl.DataFrame, by: Sequence[str], rng: np.random.Generator) -> pl.DataFrame:
    """Return each group's cluster-bootstrap intervals; `sums` has one row for each (group, stratum, episode).

    Episodes are resampled within their stratum, the same for all agents, steps and subsets.
    """
    columns = ["n", "sum_ceiling", "sum_accuracy", "sum_choice"]
    block = [k for k in ("game", "variant", "size") if k in by] or ["game"]
    out = []
    for part in sums.partition_by(block, maintain_order=True):
        groups = part.select(by).unique(maintain_order=True).with_row_index("group")
        part = part.join(groups, on=by)
        total = np.zeros((stats.DRAWS, len(groups), len(columns)))
        for stratum in part.partition_by("stratum", maintain_order=True):
            episode = stratum["episode"].rank("dense").to_numpy() - 1
            group, place = np.unique(stratum["group"].to_numpy(), return_inverse=True)
            dense = np.zeros((int(episode.max()) + 1, len(group), len(columns)))
            dense[episode, place] = stratum.select(columns).to_numpy()
            total[:, group] += stats.resampled_sums(dense, rng)
        found = groups.drop("group")
        for name, over in RATIOS.items():
            top = total[:, :, columns.index("sum_choice" if name == "choice" else "sum_accuracy")]
            with np.errstate(invalid="ignore", divide="ignore"):
                low, high = stats.percentiles(top / total[:, :, columns.index(over)])
            found = found.with_columns(pl.Series(f"{name}_low", low), pl.Series(f"{name}_high", high))
        out.append(found)
    return pl.concat(out)


def _wilson_where_flat(table: pl.DataFrame) -> pl.DataFrame:
    n = table["episodes"].to_numpy().astype(np.float64)
    for name in RATIOS:
        share = table["choice" if name == "choice" else "accuracy"].to_numpy()
        # The ceiling is known, so over_ceiling is as uncertain as the accuracy.
        scale = table["ceiling"].to_numpy() if name == "over_ceiling" else np.ones(len(table))
        ends = table.select(f"{name}_low", f"{name}_high").to_numpy().T
        low, high = stats.wilson_where_flat(ends, share, n, scale)
        table = table.with_columns(pl.Series(f"{name}_low", low), pl.Series(f"{name}_high", high))
    return table


def _strata(rows: Rows) -> pl.LazyFrame:
    # Episodes of settings with the same seeds are correlated (same letters, same first moves), so each episode is one
    # cluster across these settings; settings with different seeds are strata.
    frame = rows.lazy()
    if "stratum" in frame.collect_schema().names():
        return frame
    return frame.with_columns(stratum=pl.col("episode").min().over("setting"))


def narrow(rows: Rows) -> pl.DataFrame:
    """Return the columns that the statistics need, so that the files are read only once for several of them."""
    return rows.lazy().select("agent", "game", "variant", "size", *QUESTION, "states", "determined", *MEANS).collect()


def cells(rows: Rows, rng: np.random.Generator | None = None) -> pl.DataFrame:
    """Return one row for each (agent, game, variant, size, step, subset), with the columns of `pooled`."""
    return pooled(rows, ("agent", "game", "variant", "size", "step"), rng)


def curves(rows: Rows, rng: np.random.Generator | None = None) -> pl.DataFrame:
    """Return accuracy against size (pooled over steps) and against step (over sizes); columns `axis` and `at`."""
    frames = {axis: pooled(rows, ("agent", "game", "variant", axis), rng) for axis in ("size", "step")}
    return pl.concat(
        frame.rename({axis: "at"}).with_columns(pl.col("at").cast(pl.Int64), axis=pl.lit(axis))
        for axis, frame in frames.items()
    )


def on_hard(rows: Rows, rng: np.random.Generator | None = None) -> pl.DataFrame:
    """Return each agent's accuracy on the determined questions that a shortcut gets wrong.

    One row for each (agent, game, variant, shortcut), with the columns of `pooled` and `share`, the share of determined
    questions that the shortcut gets wrong. Shortcuts themselves are omitted as agents. If a shortcut is never wrong, n
    is 0 and the accuracy is null.
    """
    determined, place = _strata(rows).filter("determined"), ["game", "variant"]
    reference = determined.filter(pl.col("agent").str.starts_with("shortcut:")).rename({"agent": "shortcut"})
    asked = determined.filter(~pl.col("agent").str.starts_with("shortcut:"))
    shares = reference.group_by([*place, "shortcut"]).agg(share=(~pl.col("greedy_correct")).mean())
    hard = reference.filter(~pl.col("greedy_correct")).select(*QUESTION, "shortcut")
    keys = ["agent", *place, "shortcut"]
    table = pooled(asked.join(hard, on=QUESTION), keys, rng).filter(pl.col("subset") == "all").drop("subset")
    every = asked.select("agent", *place).unique().join(shares, on=place).collect()
    return every.join(table, on=keys, how="left").with_columns(pl.col("n", "episodes").fill_null(0)).sort(keys)


def paired(
    rows: Rows,
    agent: str,
    other: str = "ideal",
    rng: np.random.Generator | None = None,
    by: Sequence[str] = ("game", "variant"),
) -> pl.DataFrame:
    """Return accuracy(agent) - accuracy(other) on the same questions, by game and variant, and by subset.

    Columns: accuracy and theirs (of the two agents), difference in [-1, 1], low, high (95 %, cluster bootstrap over
    episodes; if all its draws agree, the width of Wilson's interval for 0 of n episodes), n questions, episodes.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    hit = pl.col("greedy_correct").cast(pl.Float64)
    theirs = rows.lazy().filter(pl.col("agent") == other).select(*QUESTION, other=hit)
    both = _strata(rows).filter(pl.col("agent") == agent).join(theirs, on=QUESTION)
    gaps = both.select(*by, "stratum", *QUESTION, "determined", "other", hit=hit, gap=hit - pl.col("other")).collect()
    out = []
    for subset, frame in zip(
        SUBSETS, (gaps, gaps.filter("determined"), gaps.filter(~pl.col("determined"))), strict=True
    ):
        for place, part in frame.group_by(by, maintain_order=True):
            # A join has no fixed order of rows, and the resamples go by position.
            sums = part.group_by("stratum", "episode").agg(pl.col("gap").sum(), n=pl.len()).sort("stratum", "episode")
            total = np.zeros((stats.DRAWS, 2))
            for stratum in sums.partition_by("stratum", maintain_order=True):
                total += stats.resampled_sums(stratum.select("gap", "n").to_numpy().astype(np.float64), rng)
            low, high = stats.paired_interval(total[:, 0] / total[:, 1], len(sums)) if agent != other else (0.0, 0.0)
            means = [part[name].mean() for name in ("hit", "other", "gap")]
            out.append((*place, subset, *means, low, high, len(part), len(sums)))
    columns = [*by, "subset", "accuracy", "theirs", "difference", "low", "high", "n", "episodes"]
    return pl.DataFrame(out, schema=columns, orient="row").sort(*by, "subset")
