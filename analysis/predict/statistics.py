"""Accuracy, ceiling and chance of questions and answers, each with a 95 % interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from nextstate.analysis import stats
from nextstate.analysis.predict import states
from nextstate.analysis.predict.sums import (
    SUMMED,
    Answers,
    Block,
    FrameBlock,
    Pile,
    Sums,
    all_steps,
    by_step,
    put,
)
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
AT_ONCE = 200_000  # episodes of groups whose intervals are computed at a time, which bounds the memory
_BOUNDS = [f"{name}_{end}" for name in BOUNDED for end in ("low", "high")]
_ORDER = [f"{name}{end}" for name in BOUNDED for end in ("", "_low", "_high")]
_ORDER += [m for m in MEANS.values() if m not in _ORDER]
_KEYS: dict[str, Any] = {"size": pl.Int64, "step": pl.Int64, "at": pl.Int64}  # other keys are text

Rows = pl.LazyFrame | pl.DataFrame


def table(pile: Pile, by: Sequence[str]) -> pl.DataFrame:
    """Return the averages of each group and subset of its questions, from sums; `by` names the parts of the keys.

    Subsets: all questions, the determined ones, the undetermined ones. Accuracies, lookup, ceiling, chance and
    p_accepted are means in [0, 1], rank a mean from 1; over_ceiling is a ratio of means and may exceed 1. `episodes`
    counts distinct seeds: episodes of settings with the same seeds are correlated, so they form one cluster; those of
    settings with different seeds count as one sample. `*_low`, `*_high` are 95 % intervals over episodes, from
    `stats.accuracy` and `stats.over_ceiling`; null for fewer than `stats.FEWEST_EPISODES` episodes. `few` marks groups
    of fewer than `stats.FEW_EPISODES`.
    """
    return _frame(_averages(pile), by)


def _averages(pile: Pile) -> list[dict[str, Any]]:
    """Return the columns of `table` in parts, with the keys of the groups as column "key"."""
    out: list[dict[str, Any]] = []
    waiting: list[tuple[Any, ...]] = []
    keys = sorted(pile, key=lambda key: len(pile[key].episodes))  # arrays of one shape together
    for i, key in enumerate(keys):
        waiting.append(key)
        size, after = len(pile[key].episodes), len(pile[keys[i + 1]].episodes) if i + 1 < len(keys) else -1
        if size != after or size * len(waiting) >= AT_ONCE:
            out.append(_part(waiting, [pile[key] for key in waiting]))
            waiting = []
    return out


def _frame(parts: Sequence[dict[str, Any]], by: Sequence[str]) -> pl.DataFrame:
    """Return the table of groups whose keys have the parts `by`."""
    keys = [key for part in parts for key in part["key"]]
    schema = {name: _KEYS.get(name, pl.String) for name in by} | {"subset": pl.String}
    schema |= {"n": pl.Int64, "episodes": pl.Int64, "few": pl.Boolean} | dict.fromkeys(_ORDER, pl.Float64)
    columns: dict[str, Any] = {name: [key[i] for key in keys] for i, name in enumerate(by)}
    for name in list(schema)[len(by) :]:
        columns[name] = np.concatenate([part[name] for part in parts]) if parts else []
    out = pl.DataFrame(columns, schema=schema).filter(pl.col("n") > 0)
    return out.with_columns(pl.col(*_ORDER).fill_nan(None)).sort(*by, "subset")


def _part(keys: Sequence[tuple[Any, ...]], groups: Sequence[Sums]) -> dict[str, Any]:
    """Return the averages of each subset of groups with equal numbers of episodes."""

    def subsets(parts: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        both = np.stack(parts, axis=-2)  # (..., group, undetermined or determined)
        out = np.stack([both.sum(-1), both[..., 1], both[..., 0]], axis=-1)
        return out.reshape(*out.shape[:-2], -1)

    total = dict(zip(SUMMED, subsets([sums.total for sums in groups]), strict=True))
    trials, right, choice, ceilings, squares = subsets([sums.each for sums in groups])
    episodes = (trials > 0).sum(0)
    ends = (stats.accuracy(right, trials)[1], stats.accuracy(choice, trials)[1],
            stats.over_ceiling(right, trials, ceilings, squares)[1])  # fmt: skip
    with np.errstate(invalid="ignore", divide="ignore"):
        means = {name: total[column] / total["n"] for column, name in MEANS.items()}
        means["over_ceiling"] = total["greedy_correct"] / total["ceiling"]
    return {
        "key": [key for key in keys for _ in SUBSETS], "subset": np.array(SUBSETS * len(keys), dtype=object),
        "n": total["n"].astype(np.int64), "episodes": episodes, "few": episodes < stats.FEW_EPISODES,
        **means, **dict(zip(_BOUNDS, np.concatenate(ends), strict=True)),
    }  # fmt: skip


def summed(blocks: Iterable[Block], alike: Iterable[str] | None = None) -> dict[str, pl.DataFrame]:
    """Return the statistics of all answers, as tables by name.

    - cells: by agent, game, variant, size and step;
    - totals: by agent, game and variant; by_game: by agent and game;
    - by_size: by agent, game and size;
    - curves: accuracy against size (pooled over steps) and against step (over sizes), and against |Q| for games whose
      size is not |Q|, in columns `axis` and `at`; of the last, `at` is the geometric mean of a bin of half a decade;
    - hard: see `on_hard`.

    The columns are those of `table`.

    Args:
        blocks: the answers.
        alike: the settings that count in by_size, those with comparable sizes; by default all.
    """
    only = None if alike is None else set(alike)
    place = ("agent", "game", "variant")
    small: dict[str, Pile] = {name: {} for name in ("totals", "by_game", "by_size", "size")}
    hard, shares = Pile(), dict[tuple[Any, ...], list[float]]()
    exact = states.Bins()
    by_cell, by_steps = list[dict[str, Any]](), list[dict[str, Any]]()
    for block in blocks:
        wrong: dict[str, dict[str, Any]] = {}
        for agent in sorted(block.agents, key=lambda name: not name.startswith("shortcut:")):
            here, steps = Pile(), Pile()
            for answers in block.answers(agent):
                cell, found = answers.asked.cell, by_step(answers)
                game, variant, size = (cell[name] for name in ("game", "variant", "size"))
                for step, sums in found.items():
                    put(here, (agent, game, variant, size, step), sums)
                    put(steps, (agent, game, variant, step), sums)
                every = all_steps(found)
                put(small["totals"], (agent, game, variant), every)
                put(small["by_game"], (agent, game), every)
                put(small["size"], (agent, game, variant, size), every)
                if only is None or cell["setting"] in only:
                    put(small["by_size"], (agent, game, size), every)
                exact.add(agent, answers, every)
                if agent.startswith("shortcut:"):
                    _note_wrong(wrong, shares, agent, answers)
                else:
                    _put_hard(hard, wrong.get(cell["setting"], {}), agent, answers)
            by_cell += _averages(here)  # these piles are as large as the answers, and are not kept
            by_steps += _averages(steps)
    out = {"cells": _frame(by_cell, (*place, "size", "step"))}
    out["totals"], out["by_game"] = table(small["totals"], place), table(small["by_game"], place[:2])
    out["by_size"] = table(small["by_size"], (*place[:2], "size"))
    curves = {"size": table(small["size"], (*place, "size")), "step": _frame(by_steps, (*place, "step"))}
    parts = [frame.rename({axis: "at"}).with_columns(axis=pl.lit(axis)) for axis, frame in curves.items()]
    parts.append(table(exact.pile(), (*place, "at")).with_columns(axis=pl.lit("states")))
    out["curves"] = pl.concat(parts)
    out["hard"] = _hard(hard, shares, out["totals"])
    return out


def pooled(rows: Rows, by: Sequence[str]) -> pl.DataFrame:
    """Average the questions of each group of columns `by` and each subset; see `table`.

    Args:
        rows: answers joined with their questions, from `tables.rows`.
        by: some of agent, game, variant, size and step.
    """
    pile = Pile()
    for block in in_memory(rows):
        for agent in block.agents:
            for answers in block.answers(agent):
                for step, sums in by_step(answers).items():
                    names = answers.asked.cell | {"agent": agent, "step": step}
                    put(pile, tuple(names[name] for name in by), sums)
    return table(pile, by)


def in_memory(rows: Rows) -> list[Block]:
    """Return the blocks of a table of answers joined with their questions."""
    parts = rows.lazy().collect().partition_by("game", "variant", maintain_order=True)
    return [FrameBlock(part) for part in parts]


def cells(rows: Rows) -> pl.DataFrame:
    """Return one row for each (agent, game, variant, size, step, subset), with the columns of `table`."""
    return summed(in_memory(rows))["cells"]


def curves(rows: Rows) -> pl.DataFrame:
    """Return accuracy against size, step and |Q|; see `summed`."""
    return summed(in_memory(rows))["curves"]


def on_hard(rows: Rows) -> pl.DataFrame:
    """Return each agent's accuracy on the determined questions that a shortcut gets wrong.

    One row for each (agent, game, variant, shortcut), with the columns of `table` and `share`, the share of determined
    questions that the shortcut gets wrong. Shortcuts themselves are omitted as agents. If a shortcut is never wrong, n
    is 0 and the accuracy is null.
    """
    return summed(in_memory(rows))["hard"]


def _note_wrong(
    wrong: dict[str, dict[str, Any]], shares: dict[tuple[Any, ...], list[float]], shortcut: str, answers: Answers
) -> None:
    """Note which determined questions of a cell a shortcut gets wrong, and how many of how many."""
    asked, row = answers.asked, answers.row
    missed = np.zeros(len(asked.keys), dtype=np.bool_)
    missed[row] = asked.determined[row] & (answers.numbers["greedy_correct"] == 0)
    wrong.setdefault(asked.cell["setting"], {})[shortcut] = missed
    counts = shares.setdefault((asked.cell["game"], asked.cell["variant"], shortcut), [0, 0])
    counts[0] += int(missed.sum())
    counts[1] += int(asked.determined[row].sum())


def _put_hard(pile: Pile, wrong: dict[str, Any], agent: str, answers: Answers) -> None:
    cell = answers.asked.cell
    for shortcut, missed in wrong.items():
        only = missed[answers.row]
        if only.any():
            put(pile, (agent, cell["game"], cell["variant"], shortcut), all_steps(by_step(answers, only)))


def _hard(pile: Pile, shares: dict[tuple[Any, ...], list[float]], totals: pl.DataFrame) -> pl.DataFrame:
    keys = ["agent", "game", "variant", "shortcut"]
    found = [(*place, wrong / n) for place, (wrong, n) in shares.items() if n]
    share = pl.DataFrame(found, schema=dict.fromkeys(keys[1:], pl.String) | {"share": pl.Float64}, orient="row")
    asked = totals.filter(~pl.col("agent").str.starts_with("shortcut:"), pl.col("subset") == "determined")
    every = asked.select(*keys[:3]).join(share, on=keys[1:3])
    right = table(pile, keys).filter(pl.col("subset") == "all").drop("subset")
    return every.join(right, on=keys, how="left").with_columns(pl.col("n", "episodes").fill_null(0)).sort(keys)


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
