"""Accuracy against the exact number of states, and accuracy of whole states that answers combine to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl

from nextstate.analysis import stats
from nextstate.analysis.predict.sums import Answers, Pile, Sums, all_steps, by_step, put
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


class Bins:
    """Collects accuracy against |Q|, in bins of half a decade, for settings whose size is not |Q|."""

    def __init__(self) -> None:
        self._sums: Pile = {}
        self._logs: dict[tuple[str, int], Any] = {}  # by game and bin: sum of log |Q| over answers, and their number

    def add(self, agent: str, answers: Answers, every: Sums) -> None:
        """Add an agent's answers in a cell; `every` are the sums of all of them."""
        asked = answers.asked
        known = asked.states[~np.isnan(asked.states)]
        if not (known != asked.cell["size"]).any():
            return
        logs = np.log(asked.states[answers.row])
        bins = np.floor(np.log10(asked.states[answers.row]) * PER_DECADE)
        found = np.unique(bins[~np.isnan(bins)]).tolist()
        for one in found:
            inside = bins == one
            sums = every if inside.all() else all_steps(by_step(answers, inside))
            game = asked.cell["game"]
            put(self._sums, (agent, game, asked.cell["variant"], int(one)), sums)
            counted = np.array([logs[inside].sum(), inside.sum()])
            self._logs[game, int(one)] = self._logs.get((game, int(one)), 0) + counted

    def pile(self) -> Pile:
        """Return the sums by agent, game, variant and |Q|, the geometric mean over the answers of a bin."""
        at = {key: round(math.exp(logs / n)) for key, (logs, n) in self._logs.items()}
        out = Pile()
        for (agent, game, variant, one), sums in self._sums.items():
            put(out, (agent, game, variant, at[game, one]), sums)
        return out


def whole(answers: Iterable[pl.LazyFrame]) -> pl.DataFrame:
    """Combine the answers of each step to a full state, and to the changes since the previous step.

    The first step of an episode is not counted. An agent's predicted state consists of its greedy answers; its
    predicted changes are the variables whose answer differs from that one step earlier (one fact
    became false, another true).

    Args:
        answers: from `tables.rows`, of each cell in which all variables are asked after every step. Cells with one
            question per step, or with several about one variable, are omitted.

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
    parts = [part for part in map(_sums, answers) if part is not None]
    if not parts:
        return pl.DataFrame(schema=WHOLE)
    sums = pl.concat(parts).sort("agent", "game", "variant", *_KEY)
    out = [
        {"agent": agent, "game": game, "variant": variant, "form": form, **_row(part, form)}
        for (agent, game, variant), part in sums.group_by("agent", "game", "variant", maintain_order=True)
        for form in FORMS
    ]
    return pl.DataFrame(out, schema=WHOLE).fill_nan(None)


def _sums(answers: pl.LazyFrame) -> pl.DataFrame | None:
    """Return sums for each agent and episode of a cell; None if its answers do not combine to states."""
    wanted = ["agent", "game", "variant", *QUESTION, "variable", "truth", "greedy", "greedy_correct"]
    rows = answers.select(*wanted, "ceiling", "chance").collect()
    asked = rows.group_by(*_KEY, "agent", "step").agg(n=pl.len(), kinds=pl.col("variable").n_unique())
    if not len(rows) or asked["n"].min() == 1 or (asked["n"] != asked["kinds"]).any():
        return None
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
    return steps.group_by("agent", "game", "variant", *_KEY, maintain_order=True).agg(
        n=pl.len(), state=pl.col("state").sum(), right=pl.col("right").sum(), asked=pl.col("asked").sum(),
        ceiling=pl.col("ceiling").sum(), chance=pl.col("chance").sum(), difference=pl.col("difference").sum(),
        hit=2 * pl.col("hit").sum(), facts=pl.col("facts").sum(),
        **{f"{name}_{form}": pl.col(f"{name}_{form}").sum() for form in kinds for name, _ in _SUMS},
    )  # fmt: skip


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
