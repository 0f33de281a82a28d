"""What agents did as players: success, score, commands beyond the fewest, illegal commands; each with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import polars as pl
from jaxtyping import Float

from nextstate.analysis import figures, stats, tables
from nextstate.analysis.figures import Style
from nextstate.analysis.page.page import FigureList
from nextstate.analysis.states import PER_DECADE
from nextstate.analysis.tables import Run
from nextstate.envs.aims import reply

Axis = Literal["size", "states"]

PLAYS: dict[str, pl.DataType] = {
    "agent": pl.String(), "game": pl.String(), "setting": pl.String(), "size": pl.Int64(), "variant": pl.String(),
    "episode": pl.Int64(), "states": pl.Int64(), "score": pl.Float64(), "max_score": pl.Float64(),
    "success": pl.Boolean(), "steps": pl.Int64(), "optimum": pl.Int64(), "steps_over": pl.Int64(),
    "illegal": pl.Int64(), "ended": pl.String(), "opening": pl.String(), "commands": pl.List(pl.String()),
    "legal": pl.List(pl.Boolean()), "observations": pl.List(pl.String()),
    "incomplete": pl.Boolean(),
}  # fmt: skip
LOOK = {"random": figures.REFERENCES["chance"], "walkthrough": figures.REFERENCES["ideal"]}
PLACE = ("game", "variant", "size", "setting")
SHOWN = 36  # played episodes that the page shows at most
STEPS = 60  # and commands of an episode


def load(run: Run) -> pl.DataFrame:
    """Return all episodes played in a run, a row each; none where nothing was played.

    Raises:
        RunError: where a table cannot be read.
    """
    files = sorted(run.path.glob("plays/*/*.parquet"))
    return pl.concat(
        [pl.LazyFrame(schema=PLAYS), *(tables.scan(f, run.info["command"], PLAYS) for f in files)]
    ).collect()


def mean(
    values: Sequence[float], rng: np.random.Generator, share: bool = False
) -> tuple[float | None, float | None, float | None]:
    """Return the mean over episodes and its 95 % bootstrap interval; the ends are None for fewer than two episodes.

    A `share`, in [0, 1], that is the same in every episode gets Wilson's interval. Without values all three are None.
    """
    if not values:
        return None, None, None
    x: Float[np.ndarray, " episode"] = np.asarray(values, dtype=np.float64)
    middle, ends = float(x.mean()), stats.mean_interval(x, rng)
    if share:
        ends = stats.wilson_where_flat(ends[:, None], np.array([middle]), np.array([float(len(x))]))[:, 0]
    elif len(x) == 1:
        return middle, None, None
    return middle, float(ends[0]), float(ends[1])


def table(plays: pl.DataFrame, by: Sequence[str] = ("agent", *PLACE)) -> pl.DataFrame:
    """Return a row a group of `by`: episodes, |Q| (mean), and four means with 95 % intervals over episodes.

    `success`: share won (Wilson's interval). `score`: share of the most there is. `over`: commands beyond the fewest,
    in won episodes whose fewest is known; `over_n` is how many these are. `illegal`: illegal commands an episode.
    `cut`: episodes that ended because their transcript was too long for the agent; they count as not won.
    Each has `_low` and `_high`, and is null where no episode has it.
    """
    rng = np.random.default_rng(0)
    out = []
    for place, part in plays.sort("episode").group_by(by, maintain_order=True):
        won = part["success"].to_numpy().astype(np.float64)
        low, high = stats.wilson(np.array([won.sum()]), np.array([float(len(won))]))[:, 0]
        reachable = part.filter(pl.col("max_score") > 0)
        found = {
            "success": (float(won.mean()), float(low), float(high)),
            "score": mean((reachable["score"] / reachable["max_score"]).to_list(), rng, share=True),
            "over": mean(part["steps_over"].drop_nulls().to_list(), rng),
            "illegal": mean(part["illegal"].to_list(), rng),
        }
        row: dict[str, Any] = dict(zip(by, place, strict=True)) | {"episodes": len(part)}
        row |= {"states": part["states"].mean(), "over_n": part["steps_over"].count()}
        row |= {"cut": int((part["ended"] == "context").sum())}
        for name, value in found.items():
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), value, strict=True))
        out.append(row)
    numbers = [f"{name}{end}" for name in ("success", "score", "over", "illegal") for end in ("", "_low", "_high")]
    whole = dict.fromkeys(("episodes", "over_n", "cut"), pl.Int64())
    schema = {name: PLAYS.get(name, pl.Int64()) for name in by} | whole | {"states": pl.Float64()}
    return pl.DataFrame(out, schema=schema | dict.fromkeys(numbers, pl.Float64()), orient="row")


def styles(run: Run) -> dict[str, Style]:
    """Return how each player is drawn: models as everywhere, random as chance, the walkthrough as the ideal reader."""
    return {agent: style for agent, style in figures.styles(run).items() if agent in run.models} | LOOK


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


def success(won: pl.DataFrame, game: str, variant: str, axis: Axis, look: Mapping[str, Style], name: str) -> go.Figure:
    """Draw success in play against `axis` for every player, with 95 % intervals; `won` comes from `curves`."""
    figure = figures.curve(won, game, variant, axis, look, name)
    return figure.update_layout(title_text=f"Success in play against {name}", yaxis_title_text="episodes won")


def accuracy(asked: pl.DataFrame, game: str, variant: str, axis: Axis, run: Run, name: str) -> go.Figure:
    """Draw next-state accuracy against `axis` for models, ideal reader and chance."""
    look = {a: s for a, s in figures.styles(run).items() if a in (*run.models, "ideal", "chance")}
    figure = figures.curve(asked, game, variant, axis, look, name)
    return figure.update_layout(title_text=f"Next-state accuracy against {name}")


def every(run: Run, plays: pl.DataFrame) -> dict[str, go.Figure]:
    """Draw success in every game and variant, by name."""
    if plays.is_empty():
        return {}
    won, look = curves(plays), styles(run)
    return {
        f"play {figures.place(game, variant)}": success(won, game, variant, "size", look, size_name)
        for game, variant, size_name in _places(run)
    }


def section(run: Run, plays: pl.DataFrame, asked: pl.DataFrame, drawn: FigureList) -> dict[str, Any] | None:
    """Return what the page's section about play needs; None where nothing was played.

    Args:
        run: the run.
        plays: its episodes, from `load`.
        asked: accuracy by size and by |Q|, from `tables.curves` and `states.curves`.
        drawn: takes the figures.
    """
    if plays.is_empty():
        return None
    found, won, look = table(plays), curves(plays), styles(run)
    pooled = table(plays, ("game", "agent"))
    games: dict[str, dict[str, Any]] = {}
    for game, variant, size_name in _places(run):
        panels = games.setdefault(game, {"name": game, "size_name": size_name, "panels": []})["panels"]
        here = found.filter((pl.col("game") == game) & (pl.col("variant") == variant))
        if here.is_empty():
            continue
        pairs = _pairs(run, asked, won, (game, variant), size_name)
        panels.append(
            {
                "variant": variant,
                "figures": [[drawn.add(f) for f in pair] for pair in pairs],
                "rows": _ordered(here, look, "size"),
            }
        )
    for game, entry in games.items():
        entry["pooled"] = _ordered(pooled.filter(pl.col("game") == game), look)
        present = {r["agent"] for r in entry["pooled"]}
        entry["legend"] = [(figures.label(a), style) for a, style in look.items() if a in present]
    written = any(s.get("writes") for s in run.info["plays"])
    shown = [game for game in games.values() if game["panels"]]
    return {"games": shown, "written": written, "cut": int(found["cut"].sum()), "episodes": sample(run, plays)}


def _pairs(
    run: Run, asked: pl.DataFrame, won: pl.DataFrame, place: tuple[str, str], size_name: str
) -> Iterator[list[go.Figure]]:
    """Yield accuracy, where there is any, and success beside it: against size, and against |Q| where that varies."""
    game, variant = place
    plain = variant.removesuffix("written").removesuffix(", ")  # as it is called where questions are asked
    axes: tuple[tuple[Axis, str], ...] = (("size", size_name), ("states", "|Q|"))
    for axis, name in axes:
        mine = (pl.col("game") == game) & (pl.col("axis") == axis)
        if axis == "states" and won.filter(mine & (pl.col("variant") == variant))["at"].n_unique() < 2:
            continue
        known = not asked.filter(mine & (pl.col("variant") == plain)).is_empty()
        left = [accuracy(asked, game, plain, axis, run, name)] if known else []
        yield [*left, success(won, game, variant, axis, styles(run), name)]


def sample(run: Run, plays: pl.DataFrame) -> list[dict[str, Any]]:
    """Return a few played episodes: of each game and variant the middle size, of each player one won and one not."""
    out: list[dict[str, Any]] = []
    for game, variant, size_name in _places(run):
        part = plays.filter((pl.col("game") == game) & (pl.col("variant") == variant))
        sizes = part["size"].unique().sort()
        for agent, won in product(styles(run), (True, False)):
            here = (pl.col("agent") == agent) & (pl.col("success") == won)
            few = part.filter(here & (pl.col("size") == sizes[len(sizes) // 2])).sort("episode").head(1)
            out += [{**row, "size_name": size_name, "turns": _turns(row)} for row in few.iter_rows(named=True)]
    return out[:SHOWN]


def _turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the commands of an episode and what was told after each."""
    turns = zip(row["commands"], row["legal"], row["observations"], strict=True)
    return [{"command": c, "legal": legal, "told": reply(c, told)} for c, legal, told in turns][:STEPS]


def _places(run: Run) -> list[tuple[str, str, str]]:
    named = {(s["game"], s["variant"]): s.get("size_name", "size") for s in run.info.get("plays", ())}
    return [(game, variant, size_name) for (game, variant), size_name in named.items()]


def _ordered(rows: pl.DataFrame, look: Mapping[str, Style], *first: str) -> list[dict[str, Any]]:
    order = {agent: i for i, agent in enumerate(look)}
    at = pl.col("agent").replace_strict(order, default=len(order), return_dtype=pl.Int64)
    return rows.sort([*first, at]).to_dicts()
