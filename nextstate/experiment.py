"""An experiment: a grid of games, some agents, and a folder in which each question and each episode played is a row."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from nextstate.agents.agent import Agent, AgentError
from nextstate.agents.config import AgentEntry, InterveneConfig
from nextstate.agents.failures import Broken, guarded, one_line
from nextstate.agents.play import Player
from nextstate.agents.registry import kind_of
from nextstate.agents.rollout import Grid, Road, episodes_of, live, replay, seeds_for
from nextstate.entrants import Entrant, participants
from nextstate.envs.game import Episode, GameError, check_steps
from nextstate.folder import (
    ExperimentError,
    ModelFailed,
    Progress,
    RunConfig,
    begin,
    now,
    remembered,
    slugify,
    write_json,
    write_parquet,
)
from nextstate.grid import GridConfig, Setting, games_of
from nextstate.playing import PlayConfig, play_cell, play_settings, plays_path

_CHUNK = 64  # episodes whose trees are in memory at a time; fixed, so that rows do not depend on the batch size

SCHEMA: dict[str, Any] = {
    "agent": pl.String, "game": pl.String, "setting": pl.String, "size": pl.Int64, "variant": pl.String,
    "episode": pl.Int64, "step": pl.Int64, "question": pl.Int64, "variable": pl.String, "stem": pl.String,
    "choices": pl.List(pl.String), "truth": pl.String, "accepted": pl.List(pl.String), "greedy": pl.String,
    "greedy_correct": pl.Boolean, "choice": pl.String, "choice_correct": pl.Boolean,
    "choice_token_correct": pl.Boolean, "choice_byte_correct": pl.Boolean, "logprobs": pl.List(pl.Float32),
    "p_accepted": pl.Float64, "rank": pl.Int64, "ceiling": pl.Float64, "determined": pl.Boolean,
    "chance": pl.Float64, "prompt_tokens": pl.Int64, "incomplete": pl.Boolean,
}  # fmt: skip
TRANSCRIPTS: dict[str, Any] = {
    "episode": pl.Int64, "opening": pl.String, "feedback": pl.String,
    "told": pl.List(pl.String), "narrations": pl.List(pl.String), "closing": pl.List(pl.String),
    "outcomes": pl.List(pl.String), "states": pl.Int64,
}  # fmt: skip


class GameConfig(GridConfig):
    """A game that questions are asked about, over a grid of settings."""

    steps: int | list[int] = Field(10, description="at most so many; a list only with grid=cells")
    episodes: int = Field(50, ge=1, le=1_000_000)
    ask: int | Literal["all"] = 1


class Config(RunConfig):
    """Everything that decides the rows of a run."""

    agents: list[AgentEntry] = Field(min_length=1)
    games: list[GameConfig] = []
    play: list[PlayConfig] = []
    players: list[Literal["random", "walkthrough"]] = Field(["random", "walkthrough"], description="beside the models")
    grid: Grid = "episodes"
    road: Road = "replay"
    intervene: InterveneConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if not self.games and not self.play:
            raise ValueError("`games` and `play` are both empty: give at least one game to ask about or to play")
        for game in self.games:
            if isinstance(game.steps, list) != (self.grid == "cells"):
                raise ValueError(
                    f"{game.game}: steps={game.steps} does not fit grid={self.grid}: "
                    "'cells' takes a list, 'episodes' a number"
                )
            if self.road == "live" and (game.ask != 1 or self.grid == "cells"):
                raise ValueError(f"{game.game}: the live road asks one question after each step (ask=1, grid=episodes)")
        if self.intervene and all(kind_of(a) != "model" for a in self.agents):
            raise ValueError("intervene: only language models have heads, and `agents` names none")
        return self


def settings_of(config: Config) -> list[Setting]:
    """Return the cells of the grid, in order.

    Raises:
        GameError: a game or setting that cannot be.
        ExperimentError: two cells with one name.
    """
    out: list[Setting] = []
    for entry in config.games:
        for name, game, variant in games_of(entry):
            for steps in entry.steps if isinstance(entry.steps, list) else [entry.steps]:
                most = min(steps, game.max_steps or steps)
                check_steps(game, most)
                slug = f"{name}-steps={most}" if config.grid == "cells" else name
                if config.grid == "cells" and out and out[-1].slug == slug:
                    continue  # beyond the longest episode of this game there is nothing new
                # Cells are drawn independently; settings that differ in size alone share seeds otherwise.
                seeds = seeds_for(config.seed, entry.episodes, len(out) if config.grid == "cells" else 0)
                out.append(Setting(slug, game, variant, most, entry.ask, seeds))
    if len({s.slug for s in out}) < len(out):
        raise ExperimentError("two entries of `games` have the same settings; give each setting once")
    return out


def run(config: Config, out: Path, progress: Progress | None = None, command: str = "") -> Path:
    """Run an experiment, or finish one that was begun in `out`; return the report page.

    What an agent cannot answer is left out, and said in `run.json` and on the page; the others go on.

    Raises:
        ExperimentError: `out` belongs to another config.
        ModelFailed: no agent answered anything; the message says why.
        GameError: something asked for cannot be; where that shows only when a game is made, its cells are left out.
    """
    from nextstate.analysis import log, report, tables

    progress = progress or Progress()
    settings = settings_of(config)
    plays = play_settings(config.play, config.seed)
    todo = participants(config.agents, config.players, config.intervene, settings, plays)
    record = begin(config, [s.describe() for s in settings], out, command)
    record["plays"] = [p.describe() for p in plays]
    began = time.monotonic()
    before = float(record["seconds"])
    progress.begin(sum(task.cost for e in todo for task in _tasks(e, config, out, progress)))
    mirror = log.Log(config.wandb)
    mirror.start(out, config.name, config.model_dump())

    def note(**changes: Any) -> None:
        record.update(changes, seconds=round(before + time.monotonic() - began, 1))
        write_json(out / "run.json", record)

    broken = _tell_stories(settings, out, progress)
    if broken and len(broken) == len(settings) and not plays:
        raise GameError(next(iter(broken.values())))
    for entrant in todo:
        turn = _Turn(entrant, record, progress, note)
        for task in _tasks(entrant, config, out, progress):
            progress.on(f"{entrant.name} on {task.label}")
            if task.label in broken:
                note(left_out=_noted(record["left_out"], entrant.name, task, broken[task.label]))
                continue
            if task.path.exists():
                frame: pl.DataFrame | None = pl.read_parquet(task.path)
                progress.advance(task.cost)
            elif (frame := turn.take(task)) is not None:
                write_parquet(task.path, frame)
            if frame is not None:
                mirror.cell(task.metrics(frame))
    progress.on("report")
    if not any(any(out.glob(f"{part}/*/*.parquet")) for part in ("rows", "plays")):
        mirror.close({})
        raise ModelFailed("; ".join(dict.fromkeys(x["reason"] for x in record["left_out"])) or "nothing was asked")
    note(finished=now())
    page = report.write(out)
    mirror.finish(tables.load(out))
    return page


class _Turn:
    """One agent's or player's part of a run: loaded once it is needed, asked until something unforeseen happens."""

    def __init__(self, entrant: Entrant, record: dict[str, Any], progress: Progress, note: Callable[..., None]) -> None:
        self.entrant, self.record, self.progress, self.note = entrant, record, progress, note
        self.agent: Agent | Player | None = None
        self.gone = ""  # why it is asked no more

    def take(self, task: Task) -> pl.DataFrame | None:
        """Do a task; return its table, or None where it is left out."""
        if self.gone:
            self._leave(task, self.gone, True)
            self.progress.advance(task.cost)
            return None
        name = self.entrant.name
        failed = False
        try:
            frame, reason = guarded(lambda: self._do(task), lambda error: f"{name} failed: {one_line(error)}")
        except (AgentError, GameError) as error:  # a game may break down while it is played
            frame, reason, failed = None, " ".join(str(error).split()), isinstance(error, AgentError)
            if self.agent is None or isinstance(error, Broken):
                self.gone = reason
            self.progress.failed(error)
        if reason:
            self.progress.warn(reason)
            self._leave(task, reason, failed)
        else:
            kept = [x for x in self.record["left_out"] if (x["agent"], x["setting"]) != (name, task.label)]
            if len(kept) < len(self.record["left_out"]):  # of an earlier try
                self.note(left_out=kept)
        if frame is None:
            self.progress.advance(task.cost)
        return frame

    def _do(self, task: Task) -> tuple[pl.DataFrame | None, str]:
        if self.agent is None:
            self.agent = self.entrant.load()
            self._describe()
            if isinstance(self.agent, Agent):
                self._remark("\n".join(self.agent.warnings()))
        self._remark(task.remark(self.agent))
        try:
            return task.do(self.agent)
        finally:
            self._describe()  # what was proved of a model is known once it has answered

    def _describe(self) -> None:
        if isinstance(self.agent, Agent):
            agents = self.record["agents"]
            found = remembered(agents, self.agent.describe())
            if found not in agents:
                by_name = {a["name"]: a for a in agents} | {found["name"]: found}
                self.note(agents=list(by_name.values()))

    def _remark(self, text: str) -> None:
        for line in text.splitlines():
            if line not in self.record["remarks"]:
                self.progress.warn(line)
                self.note(remarks=[*self.record["remarks"], line])

    def _leave(self, task: Task, reason: str, failed: bool) -> None:
        more = {"failed": True} if failed and self.entrant.model else {}
        self.note(left_out=_noted(self.record["left_out"], self.entrant.name, task, reason, **more))


class Task(NamedTuple):
    """A cell of a run and an agent or player: what is to be done, and which file has it once it is done."""

    label: str
    path: Path
    cost: int  # questions asked, or commands given
    remark: Callable[[Any], str]
    do: Callable[[Any], tuple[pl.DataFrame | None, str]]
    metrics: Callable[[pl.DataFrame], dict[str, float | None]]


def _tasks(entrant: Entrant, config: Config, out: Path, progress: Progress) -> list[Task]:
    from nextstate.analysis import log

    name = entrant.name
    asked = [
        Task(
            s.slug, rows_path(out, name, s), _questions(s, config.grid), partial(_remark, s),
            partial(_ask, s, config, progress), partial(log.cell_metrics, s.describe(), name),
        )
        for s in entrant.asked
    ]  # fmt: skip
    played = [
        Task(
            p.label, plays_path(out, name, p), len(p.setting.seeds) * p.setting.steps, lambda agent: "",
            partial(play_cell, p, progress.advance), partial(log.play_metrics, p.describe(), name),
        )
        for p in entrant.plays
    ]  # fmt: skip
    return asked + played


def _remark(setting: Setting, agent: Agent) -> str:
    return agent.remark(episodes_of(setting.game, setting.seeds[:1], setting.steps)[0])


def _noted(old: list[dict[str, Any]], agent: str, task: Task, reason: str, **more: bool) -> list[dict[str, Any]]:
    kept = [x for x in old if (x["agent"], x["setting"]) != (agent, task.label)]
    return [*kept, {"agent": agent, "setting": task.label, "reason": reason, **more}]


def rows_path(out: Path, agent: str, setting: Setting) -> Path:
    """Return where the rows of an agent on a setting lie."""
    return out / "rows" / slugify(agent) / f"{setting.slug}.parquet"


def _questions(setting: Setting, grid: Grid) -> int:
    per_step = setting.ask if isinstance(setting.ask, int) else 1
    return len(setting.seeds) * per_step * (1 if grid == "cells" else setting.steps)


def _ask(setting: Setting, config: Config, progress: Progress, agent: Agent) -> tuple[pl.DataFrame | None, str]:
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
    return frame_of(rows, {"agent": agent.name, "incomplete": bool(agent.incomplete), **setting.columns}), said[
        0
    ] if said else ""


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


def _tell_stories(settings: list[Setting], out: Path, progress: Progress) -> dict[str, str]:
    """Write the transcripts of all settings; return, for each whose game cannot be made or played, why."""
    broken = {}
    for setting in settings:
        progress.on(f"episodes of {setting.slug}")
        try:
            _write_transcripts(out, setting)
        except GameError as error:
            broken[setting.slug] = str(error)
            progress.warn(str(error))
    return broken


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
        "states": episode.game.size_of(episode.start),
    }
