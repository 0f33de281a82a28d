"""How agents play: success, score, commands beyond the fewest, illegal commands; each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from nextstate.analysis import stats
from nextstate.analysis.play.config import PlayCell
from nextstate.analysis.play.tables import PLAYS
from nextstate.analysis.predict.states import PER_DECADE

PLAYERS = ("random", "walkthrough")  # in the order of the page, after the models
PLACE = ("game", "variant", "size", "setting")
SHOWN = 36  # played episodes that the page shows at most


def summaries(played: pl.DataFrame, plays: Sequence[PlayCell], agents: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Return the statistics of play.

    Args:
        played: from `load`.
        plays: the cells.
        agents: the agents of the run, in the order of the page.
    """
    return {
        "plays": table(played),
        "plays_by_game": table(played, ("game", "agent")),
        "play_curves": curves(played),
        "shown_plays": sample(played, plays, [*agents.filter(~pl.col("reference"))["agent"], *PLAYERS]),
    }


def share(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the mean over episodes of shares in [0, 1], and its 95 % interval; None without values."""
    if not values:
        return None, None, None
    x = np.asarray(values, dtype=np.float64)[:, None]
    (middle,), ((low,), (high,)) = stats.accuracy(x, np.ones_like(x))
    return (float(middle), None, None) if np.isnan(low) else (float(middle), float(low), float(high))


def mean(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the mean over episodes and Student's 95 % interval, cut at 0; None without values.

    The ends are None for fewer than `stats.FEWEST_EPISODES` episodes, and where all values agree, which says nothing
    about how much they vary.
    """
    if not values:
        return None, None, None
    x: Float[np.ndarray, " episode"] = np.asarray(values, dtype=np.float64)
    if len(x) < stats.FEWEST_EPISODES or x.min() == x.max():
        return float(x.mean()), None, None
    low, high = stats.student(x)
    return float(x.mean()), max(0.0, float(low)), float(high)


def table(plays: pl.DataFrame, by: Sequence[str] = ("agent", *PLACE)) -> pl.DataFrame:
    """Return one row for each group of `by`: episodes, |Q| (mean), and four means with 95 % intervals over episodes.

    `few`: whether there are fewer than `stats.FEW_EPISODES`; for fewer than `stats.FEWEST_EPISODES` there is no
    interval. `success`: share won. `score`: share of the maximum score. `over`: commands beyond the
    minimum, in the `over_n` won episodes whose minimum is known. `illegal`: illegal commands per episode.
    `cut`: episodes that ended because their transcript was too long for the agent; they count as not won.
    Each has `_low` and `_high`, and is null if it is defined for no episode.
    """
    out = []
    for place, part in plays.sort("episode", maintain_order=True).group_by(by, maintain_order=True):
        reachable = part.filter(pl.col("max_score") > 0)
        found = {
            "success": share(part["success"].cast(pl.Float64).to_list()),
            "score": share((reachable["score"] / reachable["max_score"]).to_list()),
            "over": mean(part["steps_over"].drop_nulls().to_list()),
            "illegal": mean(part["illegal"].to_list()),
        }
        row: dict[str, Any] = dict(zip(by, place, strict=True)) | {"episodes": len(part)}
        row["few"] = len(part) < stats.FEW_EPISODES
        row |= {"states": part["states"].mean(), "over_n": part["steps_over"].count()}
        row |= {"cut": int((part["ended"] == "context").sum())}
        for name, value in found.items():
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), value, strict=True))
        out.append(row)
    numbers = [f"{name}{end}" for name in ("success", "score", "over", "illegal") for end in ("", "_low", "_high")]
    whole = dict.fromkeys(("episodes", "over_n", "cut"), pl.Int64)
    schema = {name: PLAYS.get(name, pl.Int64) for name in by} | whole | {"few": pl.Boolean, "states": pl.Float64}
    return pl.DataFrame(out, schema=schema | dict.fromkeys(numbers, pl.Float64), orient="row")


def curves(plays: pl.DataFrame) -> pl.DataFrame:
    """Return success against size, and against |Q| where that is known and something else, for `figures.curve`.

    Columns are those of `tables.curves`, with success as the accuracy; |Q| (axis "states") is in bins of half a decade,
    `at` their geometric mean.
    """
    keys = ("agent", "game", "variant", "at")
    out = [table(plays.with_columns(at="size"), keys).with_columns(axis=pl.lit("size"))]
    other = plays.filter(pl.col("states") != pl.col("size")).select("setting").unique()
    known = plays.drop_nulls("states").join(other, on="setting", how="semi")
    if len(known):
        known = known.with_columns(bin=(pl.col("states").log10() * PER_DECADE).floor())
        at = pl.col("states").log().mean().over("game", "bin").exp().round().cast(pl.Int64)
        out.append(table(known.with_columns(at=at), keys).with_columns(axis=pl.lit("states")))
    bounds = {f"accuracy{end}": pl.col(f"success{end}") for end in ("", "_low", "_high")}
    return pl.concat(out).with_columns(n="episodes", subset=pl.lit("all"), **bounds)


def sample(played: pl.DataFrame, plays: Sequence[PlayCell], agents: Sequence[str]) -> pl.DataFrame:
    """Return a few played episodes: of each game and variant the middle size, of each agent one won and one not."""
    out = [played.clear()]
    for game, variant in dict.fromkeys((p.cell.game.name, p.cell.variant) for p in plays):
        part = played.filter(game=game, variant=variant)
        sizes = part["size"].unique().sort()
        for agent, won in product(agents, (True, False)) if len(sizes) else ():
            few = part.filter(agent=agent, success=won, size=sizes[len(sizes) // 2])
            out.append(few.sort("episode").head(1))
    return pl.concat(out).head(SHOWN)
