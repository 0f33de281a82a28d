"""Accuracy against the exact number of states, and accuracy of whole states that answers combine to."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from nextstate.analysis import stats
from nextstate.analysis.predict import statistics
from nextstate.analysis.predict.tables import QUESTION

PER_DECADE = 2  # bins of |Q| per decade
FORMS = {
    "state": "full state",
    "difference": "state difference",
    "changed": "what the last action changed",
    "unchanged": "what it did not change",
}
_NUMBERS = ("exact", "exact_low", "exact_high", "by_fact", "by_fact_low", "by_fact_high", "ceiling", "chance")
WHOLE: dict[str, Any] = {
    **dict.fromkeys(("agent", "game", "variant", "form"), pl.String), **dict.fromkeys(_NUMBERS, pl.Float64),
    "n": pl.Int64, "episodes": pl.Int64, "few": pl.Boolean,
}  # fmt: skip
_KEY = ("setting", "episode")
_OF_KIND = (("by_fact", "right"), ("ceiling", "ceiling"), ("chance", "chance"))
_SUMS = (("right", "greedy_correct"), ("asked", "one"), ("ceiling", "ceiling"), ("chance", "chance"))


def curves(answers: pl.DataFrame) -> pl.DataFrame:
    """Return accuracy against |Q|, in bins of half a decade, for games whose size is not |Q|.

    Columns as in `statistics.curves`, with axis "states"; `at` is the geometric mean of the episodes' |Q| in a bin.
    Empty if there is no such game.
    """
    known = answers.select(*_KEY, "size", "states").drop_nulls().unique()
    other = known.filter(pl.col("states") != pl.col("size")).select("setting").unique()
    known = known.join(other, on="setting", how="semi").with_columns(
        bin=(pl.col("states").log10() * PER_DECADE).floor().cast(pl.Int64)
    )
    joined = answers.join(known.select(*_KEY, "bin"), on=_KEY)
    if joined.is_empty():
        return pl.DataFrame()
    at = joined.group_by("game", "bin").agg(at=pl.col("states").log().mean().exp().round().cast(pl.Int64))
    table = statistics.pooled(joined.join(at, on=["game", "bin"]), ("agent", "game", "variant", "at"))
    return table.with_columns(axis=pl.lit("states"))


def whole(answers: pl.LazyFrame) -> pl.DataFrame:
    """Combine the answers of each step to a full state, and to the changes since the previous step.

    The first step of an episode is not counted. An agent's predicted state consists of its greedy answers; its
    predicted changes are the variables whose answer differs from that one step earlier (one fact
    became false, another true).

    Args:
        answers: from `tables.rows`, of cells in which all variables are asked after every step. Cells with one question
            per step, or with several about one variable, are omitted.

    Returns:
        One row for each agent, game, variant and form, with these columns:
        - exact: share of steps with the whole state, or the whole difference, right; null for the last two forms;
        - by_fact: share of variables right (of all, or of those that changed, or of the others); of differences the F1
          of the facts predicted to have become true or false;
        - ceiling, chance: of exact, for the full state, as if guesses were independent; of by_fact for the last two
          forms; null for differences (the ideal reader's own row has what it reaches);
        - n steps, episodes, few (whether there are fewer than `stats.FEW_EPISODES`), and 95 % intervals `*_low`,
          `*_high` over episodes, from `stats.accuracy`.
    """
    wanted = ["agent", "game", "variant", *QUESTION, "variable", "truth", "greedy", "greedy_correct"]
    rows = answers.select(*wanted, "ceiling", "chance").collect()
    asked = rows.group_by(*_KEY, "agent", "step").agg(n=pl.len(), kinds=pl.col("variable").n_unique())
    complete = asked.group_by("setting").agg(
        least=pl.col("n").min(), most=pl.col("n").max(), same=(pl.col("n") == pl.col("kinds")).all()
    )
    rows = rows.join(complete.filter((pl.col("least") > 1) & pl.col("same")), on="setting", how="semi")
    order = ["agent", "setting", "episode", "variable", "step"]
    before = [pl.col(c).shift(1).over(order[:-1]).alias(f"old_{c}") for c in ("truth", "greedy", "step")]
    rows = rows.sort(order).with_columns(before).filter(pl.col("old_step") == pl.col("step") - 1)
    changed, predicted = pl.col("truth") != pl.col("old_truth"), pl.col("greedy") != pl.col("old_greedy")
    rows = rows.with_columns(
        true=2 * changed.cast(pl.Int64),
        predicted=2 * predicted.cast(pl.Int64),
        hit=(changed & predicted & pl.col("greedy_correct")).cast(pl.Int64)
        + (changed & predicted & (pl.col("old_greedy") == pl.col("old_truth"))).cast(pl.Int64),
        same=(changed == predicted)
        & (~changed | (pl.col("greedy_correct") & (pl.col("old_greedy") == pl.col("old_truth")))),
    )
    kinds = {"changed": pl.col("true") > 0, "unchanged": pl.col("true") == 0}
    rows = rows.with_columns(one=pl.lit(1))
    steps = rows.group_by("agent", "game", "variant", *_KEY, "step", maintain_order=True).agg(
        state=pl.col("greedy_correct").all(), right=pl.col("greedy_correct").sum(), asked=pl.len(),
        ceiling=pl.col("ceiling").product(), chance=pl.col("chance").product(),
        difference=pl.col("same").all(), hit=pl.col("hit").sum(), facts=(pl.col("true") + pl.col("predicted")).sum(),
        **{f"{name}_{form}": pl.col(of).filter(which).sum() for form, which in kinds.items() for name, of in _SUMS},
    )  # fmt: skip
    sums = steps.group_by("agent", "game", "variant", *_KEY, maintain_order=True).agg(
        n=pl.len(), state=pl.col("state").sum(), right=pl.col("right").sum(), asked=pl.col("asked").sum(),
        ceiling=pl.col("ceiling").sum(), chance=pl.col("chance").sum(), difference=pl.col("difference").sum(),
        hit=2 * pl.col("hit").sum(), facts=pl.col("facts").sum(),
        **{f"{name}_{form}": pl.col(f"{name}_{form}").sum() for form in kinds for name, _ in _SUMS},
    ).sort("agent", "game", "variant", *_KEY)  # fmt: skip
    out = [
        {"agent": agent, "game": game, "variant": variant, "form": form, **_row(part, form)}
        for (agent, game, variant), part in sums.group_by("agent", "game", "variant", maintain_order=True)
        for form in FORMS
    ]
    return pl.DataFrame(out, schema=WHOLE).fill_nan(None)


def _row(part: pl.DataFrame, form: str) -> dict[str, Any]:
    """Return the numbers of one form; `part` has one row for each episode."""
    ratios = {
        "state": {
            "exact": ("state", "n"),
            "by_fact": ("right", "asked"),
            "ceiling": ("ceiling", "n"),
            "chance": ("chance", "n"),
        },
        "difference": {"exact": ("difference", "n"), "by_fact": ("hit", "facts")},
    }.get(form) or {name: (f"{top}_{form}", f"asked_{form}") for name, top in _OF_KIND}
    row: dict[str, Any] = dict.fromkeys(_NUMBERS)
    for name, pair in ratios.items():
        top, bottom = (part[column].to_numpy().astype(np.float64)[:, None] for column in pair)
        (row[name],), ((low,), (high,)) = stats.accuracy(top, bottom)
        if name in ("exact", "by_fact"):
            row |= {f"{name}_low": low, f"{name}_high": high}
    counts = {"n": int(part["n"].sum()), "episodes": len(part), "few": len(part) < stats.FEW_EPISODES}
    return row | counts
