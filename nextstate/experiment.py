"""An experiment: a grid of games, some agents, and a folder in which every question asked is a row."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import Field, NonNegativeInt, model_validator

from nextstate.agents.agent import Agent, AgentError
from nextstate.agents.config import Strict
from nextstate.agents.reference import SHORTCUT, Reference
from nextstate.agents.rollout import Grid, Road, episodes_of, live, replay, seeds_for
from nextstate.envs.game import Episode, Game, check_steps
from nextstate.envs.games import make_game
from nextstate.folder import ExperimentError, Progress, RunConfig, begin, now, slugify, write_json, write_parquet

REFERENCES = ("ideal", "chance")
_CHUNK = 64  # episodes whose trees are in memory at a time; fixed, so that rows do not depend on the batch size

SCHEMA: dict[str, Any] = {
    "agent": pl.String, "game": pl.String, "setting": pl.String, "size": pl.Int64, "variant": pl.String,
    "episode": pl.Int64, "step": pl.Int64, "question": pl.Int64, "variable": pl.String, "stem": pl.String,
    "choices": pl.List(pl.String), "truth": pl.String, "accepted": pl.List(pl.String), "greedy": pl.String,
    "greedy_correct": pl.Boolean, "choice": pl.String, "choice_correct": pl.Boolean,
    "choice_token_correct": pl.Boolean, "choice_byte_correct": pl.Boolean, "logprobs": pl.List(pl.Float32),
    "p_accepted": pl.Float64, "rank": pl.Int64, "ceiling": pl.Float64, "determined": pl.Boolean,
    "chance": pl.Float64, "prompt_tokens": pl.Int64,
}  # fmt: skip
TRANSCRIPTS: dict[str, Any] = {
    "episode": pl.Int64, "opening": pl.String, "feedback": pl.String,
    "told": pl.List(pl.String), "narrations": pl.List(pl.String), "closing": pl.List(pl.String),
    "outcomes": pl.List(pl.String),
}  # fmt: skip


class AgentConfig(Strict):
    """A language model and how to load it; a bare name in `agents` means all defaults."""

    name: str
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    batch_size: int = Field(default=64, ge=1)
    batch_tokens: int | None = Field(default=None, ge=1)


class GameConfig(Strict):
    """A game over a grid of settings."""

    game: str
    over: dict[str, list[Any]] = {}
    settings: dict[str, Any] = {}
    steps: int | list[int] = Field(10, description="at most so many; a list only with grid=cells")
    episodes: int = Field(50, ge=1, le=1_000_000)
    ask: int | Literal["all"] = 1


class InterveneConfig(Strict):
    """Heads to do without; every language model is then asked twice, as it is and without them."""

    heads: list[tuple[NonNegativeInt, NonNegativeInt]] = Field(min_length=1, description="layer and head, from 0")
    mode: Literal["zero", "mean", "resample"] = "zero"
    episodes: int = Field(16, ge=1, le=10_000, description="reference episodes of mean and resample")


def _is_reference(agent: str) -> bool:
    return agent in (*REFERENCES, "shortcuts") or agent.startswith(SHORTCUT)


class Config(RunConfig):
    """Everything that decides the rows of a run."""

    agents: list[str | AgentConfig] = Field(min_length=1)
    games: list[GameConfig] = Field(min_length=1)
    grid: Grid = "episodes"
    road: Road = "replay"
    intervene: InterveneConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> Config:
        for game in self.games:
            if isinstance(game.steps, list) != (self.grid == "cells"):
                raise ValueError(
                    f"{game.game}: steps={game.steps} does not fit grid={self.grid}: "
                    "'cells' takes a list, 'episodes' a number"
                )
            if self.road == "live" and (game.ask != 1 or self.grid == "cells"):
                raise ValueError(f"{game.game}: the live road asks one question after each step (ask=1, grid=episodes)")
        if self.intervene and all(isinstance(a, str) and _is_reference(a) for a in self.agents):
            raise ValueError("intervene: only language models have heads, and `agents` names none")
        return self


class Setting(NamedTuple):
    """One cell of the grid: a game, how long it is played, and how it is called."""

    slug: str
    game: Game
    variant: str
    steps: int
    ask: int | Literal["all"]
    seeds: range

    @property
    def size(self) -> int:
        """The value of the setting that says how large the state space is."""
        return int(getattr(self.game, self.game.size))

    def describe(self) -> dict[str, Any]:
        """Return what `run.json` says of it."""
        return {
            "slug": self.slug, "game": self.game.name, "settings": self.game.settings, "size_name": self.game.size,
            "size": self.size, "variant": self.variant, "steps": self.steps, "episodes": len(self.seeds),
        }  # fmt: skip


def settings_of(config: Config) -> list[Setting]:
    """Return the cells of the grid, in order.

    Raises:
        GameError: a game or setting that cannot be.
        ExperimentError: two cells with one name.
    """
    out: list[Setting] = []
    for entry in config.games:
        for values in product(*entry.over.values()):
            given = entry.settings | dict(zip(entry.over, values, strict=True))
            game = make_game(entry.game, **given)
            named = ", ".join(f"{k}={v}" for k, v in sorted(given.items()) if k != game.size)
            for steps in entry.steps if isinstance(entry.steps, list) else [entry.steps]:
                most = min(steps, game.max_steps or steps)
                check_steps(game, most)
                slug = "-".join([entry.game, *(f"{k}={v}" for k, v in given.items())])
                if config.grid == "cells":
                    slug += f"-steps={most}"
                slug = re.sub(r"[^A-Za-z0-9=._-]+", "_", slug)
                if config.grid == "cells" and out and out[-1].slug == slug:
                    continue  # beyond the longest episode of this game there is nothing new
                # Cells are drawn independently; settings that differ in size alone share seeds otherwise.
                seeds = seeds_for(config.seed, entry.episodes, len(out) if config.grid == "cells" else 0)
                out.append(Setting(slug, game, named, most, entry.ask, seeds))
    if len({s.slug for s in out}) < len(out):
        raise ExperimentError("two entries of `games` have the same settings; give each setting once")
    return out


def agents_for(config: Config, settings: list[Setting]) -> Iterator[tuple[str, Callable[[], Agent], list[Setting]]]:
    """Yield each agent's name, how to make it, and the settings it is asked about; "shortcuts" stands for all."""
    for entry in config.agents:
        if entry == "shortcuts":
            for name in dict.fromkeys(s for setting in settings for s in setting.game.shortcuts):
                mine = [s for s in settings if name in s.game.shortcuts]
                yield SHORTCUT + name, lambda name=name: Reference(SHORTCUT + name), mine  # type: ignore[misc]
        elif isinstance(entry, str) and (entry in REFERENCES or entry.startswith(SHORTCUT)):
            mine = [s for s in settings if entry in REFERENCES or entry.removeprefix(SHORTCUT) in s.game.shortcuts]
            if not mine:
                known = sorted({s for setting in settings for s in setting.game.shortcuts})
                raise ExperimentError(f"no game of this run has {entry!r}: expected one of {', '.join(known)}")
            yield entry, lambda name=entry: Reference(name), mine  # type: ignore[misc]
        else:
            model = AgentConfig(name=entry) if isinstance(entry, str) else entry
            yield (*_model(model), settings)
            if config.intervene:
                yield (*_intervened(model, config.intervene), settings)


def _model(entry: AgentConfig) -> tuple[str, Callable[[], Agent]]:
    def load() -> Agent:
        from nextstate.agents.language import LanguageModel  # torch and transformers take seconds to import

        return LanguageModel(**entry.model_dump())

    return entry.name, load


def _intervened(entry: AgentConfig, how: InterveneConfig) -> tuple[str, Callable[[], Agent]]:
    from nextstate.agents.intervene import Intervened, Intervention  # imports torch, as the model does

    what = Intervention(tuple(how.heads), how.mode, how.episodes)

    def load() -> Agent:
        from nextstate.agents.language import LanguageModel
        from nextstate.agents.sites import SiteError

        try:
            return Intervened(LanguageModel(**entry.model_dump()), what)
        except SiteError as error:
            raise AgentError(f"{entry.name} cannot be asked without these heads: {error}") from error

    return what.named(entry.name), load


def run(config: Config, out: Path, progress: Progress | None = None, command: str = "") -> Path:
    """Run an experiment, or finish one that was begun in `out`; return the report page.

    Raises:
        ExperimentError: `out` belongs to another config.
        GameError, AgentError: something asked for cannot be.
    """
    from nextstate.analysis import log, report, tables

    progress = progress or Progress()
    settings = settings_of(config)
    todo = list(agents_for(config, settings))
    record = begin(config, [s.describe() for s in settings], out, command)
    began = time.monotonic()
    before = float(record["seconds"])
    progress.begin(sum(_questions(s, config.grid) for _, _, mine in todo for s in mine))
    mirror = log.Log(config.wandb)
    mirror.start(out, config.name, config.model_dump())

    def note(**changes: Any) -> None:
        record.update(changes, seconds=round(before + time.monotonic() - began, 1))
        write_json(out / "run.json", record)

    for setting in settings:
        _write_transcripts(out, setting)
    for name, load, mine in todo:
        agent: Agent | None = None
        for setting in mine:
            progress.on(f"{name} on {setting.slug}")
            path = rows_path(out, name, setting)
            if not path.exists():
                try:
                    if agent is None:
                        agent = load()
                        note(agents=[a for a in record["agents"] if a["name"] != name] + [agent.describe()])
                    remark = agent.remark(episodes_of(setting.game, setting.seeds[:1], setting.steps)[0])
                    if remark and remark not in record["remarks"]:
                        progress.warn(remark)
                        note(remarks=[*record["remarks"], remark])
                    frame, left_out = _ask(agent, setting, config, progress)
                except AgentError as error:
                    frame, left_out = None, str(error)
                if left_out:
                    progress.warn(left_out)
                    affected = mine if agent is None else [setting]  # it cannot be loaded: the same for every setting
                    note(left_out=_noted(record["left_out"], name, affected, left_out))
                if frame is None:
                    progress.advance(sum(_questions(s, config.grid) for s in affected))
                    if agent is None:
                        break
                    continue
                write_parquet(path, frame)
            else:
                frame = pl.read_parquet(path)
                progress.advance(_questions(setting, config.grid))
            mirror.cell(log.cell_metrics(setting.describe(), name, frame))
    progress.on("report")
    note(finished=now())
    page = report.write(out)
    mirror.finish(tables.load(out))
    return page


def _noted(old: list[dict[str, str]], agent: str, settings: list[Setting], reason: str) -> list[dict[str, str]]:
    slugs = {s.slug for s in settings}
    kept = [x for x in old if x["agent"] != agent or x["setting"] not in slugs]
    return kept + [{"agent": agent, "setting": slug, "reason": reason} for slug in sorted(slugs)]


def rows_path(out: Path, agent: str, setting: Setting) -> Path:
    """Return where the rows of an agent on a setting lie."""
    return out / "rows" / slugify(agent) / f"{setting.slug}.parquet"


def _questions(setting: Setting, grid: Grid) -> int:
    per_step = setting.ask if isinstance(setting.ask, int) else 1
    return len(setting.seeds) * per_step * (1 if grid == "cells" else setting.steps)


def _ask(agent: Agent, setting: Setting, config: Config, progress: Progress) -> tuple[pl.DataFrame | None, str]:
    rows: list[dict[str, Any]] = []
    said: list[str] = []
    seeds = setting.seeds
    planned = _questions(setting, config.grid) / len(seeds)
    for k in range(0, len(seeds), _CHUNK):
        chunk = seeds[k : k + _CHUNK]
        if config.road == "live":
            result = live(agent, setting.game, chunk, setting.steps)
        else:
            result = replay(agent, episodes_of(setting.game, chunk, setting.steps, setting.ask), config.grid)
        rows.extend(result.rows)
        said.extend(filter(None, [result.left_out]))
        progress.advance(round(planned * len(chunk)))
    if not rows:
        return None, said[0] if said else "no questions"
    constant = {
        "agent": agent.name,
        "game": setting.game.name,
        "setting": setting.slug,
        "size": setting.size,
        "variant": setting.variant,
    }
    return frame_of(rows, constant), said[0] if said else ""


def frame_of(rows: list[dict[str, Any]], constant: dict[str, Any]) -> pl.DataFrame:
    """Return rows as a table, with the same values of `constant` in each."""
    columns: dict[str, Any] = {}
    for name, dtype in SCHEMA.items():
        if name in constant:
            columns[name] = pl.repeat(constant[name], len(rows), dtype=dtype, eager=True)
        elif isinstance(dtype, pl.List):  # built flat: a Series for each row would take most of the run
            lists = [r[name] for r in rows]
            flat = pl.Series("flat", [x for one in lists for x in one], dtype=dtype.inner)
            row = pl.Series("row", np.repeat(np.arange(len(lists)), [len(one) for one in lists]))
            columns[name] = pl.DataFrame([row, flat]).group_by("row", maintain_order=True).agg("flat")["flat"]
        else:
            columns[name] = pl.Series(name, [r[name] for r in rows], dtype=dtype)
    return pl.DataFrame(columns)


def _write_transcripts(out: Path, setting: Setting) -> None:
    path = out / "transcripts" / f"{setting.slug}.parquet"
    if path.exists():
        return
    episodes = episodes_of(setting.game, setting.seeds, setting.steps, setting.ask)
    write_parquet(path, pl.DataFrame([transcript(e) for e in episodes], schema=TRANSCRIPTS))


def transcript(episode: Episode) -> dict[str, Any]:
    """Return the row of `transcripts/*.parquet` for an episode."""
    return {
        "episode": episode.seed,
        "opening": episode.opening,
        "feedback": episode.game.feedback,
        "told": list(episode.told),
        "narrations": [s.narration for s in episode.steps],
        "closing": [s.questions[-1].closing for s in episode.steps],
        "outcomes": [s.outcome for s in episode.steps],
    }
