"""The study behind `nextstate run`: agents are asked what the next state is, over a grid of games, and play them.

Tables: `questions/CELL` with one row for each question, `answers/AGENT/CELL` with one row for each answer, and
`plays/AGENT/CELL` with one row for each episode played.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from nextstate.agents.agent import Agent, AgentError
from nextstate.agents.columns import Asked, Grid, question_frame
from nextstate.agents.config import AgentConfig
from nextstate.agents.play import Player
from nextstate.agents.reference import Reference
from nextstate.agents.registry import BUILT_IN, REFERENCES, kind_of
from nextstate.agents.rollout import episodes_of, live, replay
from nextstate.analysis.grid import Cell, game_identity
from nextstate.analysis.play.config import PlayCell, play_cells
from nextstate.analysis.play.tables import play_cell
from nextstate.analysis.predict.config import Participant, PredictConfig, asked_cells, participants
from nextstate.analysis.predict.tables import ANSWERS, QUESTIONS
from nextstate.analysis.run import Run
from nextstate.analysis.study import Job, Study
from nextstate.analysis.table import Spool, Table
from nextstate.envs.files import slug
from nextstate.envs.game import Episode
from nextstate.envs.plugins import source_digest

if TYPE_CHECKING:
    from nextstate.analysis.page.page import Page

CHUNK = 64  # episodes that an agent is asked about at a time, at least; a GPU's batches are larger
MANY = 20_000  # steps of episodes that reference agents are asked about at a time
KEPT = 200_000  # steps and questions of episodes that stay in memory


class Given(NamedTuple):
    """What a job is about: a cell, and who is asked or plays (None where the questions are made).

    `read` names the beliefs of the cell's reference agents, which are read together with the questions.
    """

    cell: Cell
    who: Participant | None = None
    play: PlayCell | None = None
    read: tuple[str, ...] = ()


class Predict(Study[PredictConfig]):
    """Ask agents what the next state is, over a grid of games; let them play."""

    name = "run"
    config = PredictConfig

    def jobs(self, config: PredictConfig) -> list[Job]:
        cells, plays = asked_cells(config), play_cells(config.play, config.seed)
        who = participants(config, [cell.game for cell in cells], plays)
        jobs = []
        for cell in cells:  # references answer while the episodes of their cell are in memory
            cost = _planned(cell, config)
            references = [p for p in who if p.reference and p.spec.answers(cell.game)]
            given = Given(cell, read=tuple(p.name.removeprefix("shortcut:") for p in references))
            jobs.append(Job(f"questions/{cell.slug}", f"questions of {cell.slug}", cost, given))
            jobs += [_answers(p, cell, cost) for p in references]
        for p in who:  # one after the other, so that each is loaded once
            if not p.reference:
                jobs += [_answers(p, cell, _planned(cell, config)) for cell in cells if p.spec.answers(cell.game)]
                jobs += [_plays(p, where) for where in plays]
        return jobs

    def identity(self, job: Job, run: Run[PredictConfig]) -> dict[str, Any]:
        given: Given = job.given
        return game_identity(given.cell.game) | ({} if given.who is None else _agent_identity(given.who, run))

    def do(self, job: Job, run: Run[PredictConfig]) -> Table:
        cell, who, where, read = job.given
        if who is None:
            spool = Spool(QUESTIONS)
            with _uncollected():
                for asked in _asked(run, cell):
                    spool.add(question_frame(asked, () if _is_large(cell) else read))
            return spool.table()
        run.progress.on(f"{who.name} on {job.title}")
        agent = _made(run, who)
        if isinstance(agent, Agent):
            run.describe(agent.describe())
        frame: Table
        with _uncollected() if who.reference else nullcontext():
            frame, reason = play_cell(where, run.advance, agent) if where else _ask(run, agent, cell)
        if isinstance(agent, Agent):
            run.describe(agent.describe())  # with what was proved of a model while it answered
        if reason:
            run.progress.warn(reason)
            run.left_out(who.name, job.title, reason)
        return frame

    def metrics(self, job: Job, frame: Table) -> dict[str, float | None]:
        cell, who, where, _ = job.given
        head = [cell.game.name, f"{cell.game.size}={cell.size}", cell.variant, "" if who is None else who.name]
        if where:
            from nextstate.analysis.play.statistics import table

            (row,) = table(frame.lazy().collect()).to_dicts()
            names = {"success": "success", "score": "score", "over": "steps_over", "illegal": "illegal"}
            return {named("play", *head, name): row[key] for key, name in names.items()}
        columns = {"lookup": "lookup", "ceiling": "ceiling", "chance": "chance", "determined": "determined"}
        if who is not None:
            columns = {"accuracy": "greedy_correct", "choice_accuracy": "choice_correct", "p_accepted": "p_accepted"}
        means = frame.lazy().select(pl.col(c).cast(pl.Float64).mean().alias(name) for name, c in columns.items())
        return {named(*head, name): value for name, value in means.collect().row(0, named=True).items()}

    def summarise(self, run: Run[PredictConfig]) -> dict[str, pl.DataFrame]:
        from nextstate.analysis.predict.summary import summaries

        run.forget("episodes", "shared")
        return summaries(run)

    def headline(self, run: Run[PredictConfig]) -> pl.DataFrame:
        grid, asked, played = (run.summary(name) for name in ("grid", "by_game", "plays_by_game"))
        order = {game: i for i, game in enumerate(grid["game"].unique(maintain_order=True))}
        asked = asked.filter(subset="all").rename({"n": "questions"})
        asked = asked.select("game", "agent", "questions", "accuracy", "accuracy_low", "accuracy_high", "ceiling",
                             "lookup", "chance")  # fmt: skip
        played = played.select("game", "agent", "episodes", won="success", won_low="success_low",
                               won_high="success_high", over_fewest="over", illegal="illegal")  # fmt: skip
        found = asked.join(played, on=["game", "agent"], how="full", coalesce=True)
        found = found.select(c for c in found.columns if found[c].null_count() < len(found))
        best = [c for c in ("accuracy", "won") if c in found.columns]
        return found.sort(
            pl.col("game").replace_strict(order, return_dtype=pl.Int64), *best, "agent",
            descending=[False, *[True] * len(best), False], nulls_last=True,
        )  # fmt: skip

    def page(self, run: Run[PredictConfig]) -> Page:
        from nextstate.analysis.predict.page import page

        return page(run)


def _answers(who: Participant, cell: Cell, cost: int) -> Job:
    key = f"answers/{slug(who.name)}/{cell.slug}"
    return Job(key, cell.slug, cost, Given(cell, who), (f"questions/{cell.slug}",), who.name)


def _plays(who: Participant, where: PlayCell) -> Job:
    cell = where.cell
    key, cost = f"plays/{slug(who.name)}/{cell.slug}", len(cell.seeds) * cell.steps
    return Job(key, f"{cell.slug} (play)", cost, Given(cell, who, where), agent=who.name)


def _planned(cell: Cell, config: PredictConfig) -> int:
    per_step = cell.questions_per_step if isinstance(cell.questions_per_step, int) else 1
    return len(cell.seeds) * per_step * (1 if config.grid == "cells" else cell.steps)


def named(*parts: str) -> str:
    """Return the name of a metric, such as `DFA/states=6/density=min/nextstate-tiny/accuracy`."""
    return "/".join(slug(part) for part in parts if part)


def _agent_identity(who: Participant, run: Run[PredictConfig]) -> dict[str, Any]:
    """Return what decides an agent's answers beside the config and the code of nextstate."""
    if who.model:
        return run.asks(AgentConfig(**who.spec.arguments))
    if who.spec.kind in BUILT_IN:
        return {}
    return {"agent": source_digest(who.spec.maker)}


def _made(run: Run[PredictConfig], who: Participant) -> Agent | Player:
    """Return an agent or player. Language models and agents from other packages are kept until another is needed."""
    spec = who.spec
    if who.reference or (spec.kind in BUILT_IN and not who.model):
        return run.once(("made", who.name), spec.make)

    def make() -> Agent | Player:
        given = run.given if who.model and getattr(run.given, "name", None) == spec.name else None
        agent = given or spec.make()
        if isinstance(agent, Agent):
            run.warn("\n".join(agent.warnings()))
        return agent

    agent = run.load(spec.name, make)
    if who.without is None:
        return agent
    from nextstate.agents.intervene import Intervened  # imports torch, as the model does

    try:
        return Intervened(agent, who.without)  # type: ignore[arg-type]
    except AgentError as error:
        raise AgentError(f"{spec.name} cannot be asked without these heads: {error}") from error


class Episodes:
    """Episodes that were unrolled: those of the last cell, and of earlier ones as many as there is room for.

    Args:
        room: steps and questions of episodes that are kept.
    """

    def __init__(self, room: int) -> None:
        self.kept: dict[str, list[Episode]] = {}
        self.last: tuple[str, list[Episode]] = ("", [])
        self.room = room

    def of(self, cell: Cell) -> list[Episode]:
        """Return the episodes of a cell."""
        if cell.slug in self.kept:
            return self.kept[cell.slug]
        if self.last[0] != cell.slug:
            self.last = ("", [])  # frees the memory
            self.last = cell.slug, episodes_of(cell.game, cell.seeds, cell.steps, cell.questions_per_step)
            size = sum(1 + len(step.questions) for episode in self.last[1] for step in episode.steps)
            if size <= self.room:
                self.room -= size
                self.kept[cell.slug] = self.last[1]
        return self.last[1]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Switch off the search for reference cycles: episodes have none, and it takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Shared:
    """The questions of the last cell in columns, which its reference agents share."""

    def __init__(self) -> None:
        self.slug, self.asked = "", list[Asked]()

    def of(self, cell: Cell, chunks: Sequence[Sequence[Episode]], grid: Grid) -> list[Asked]:
        """Return the questions of a cell, from its episodes in chunks."""
        if self.slug != cell.slug:
            self.asked = []  # frees the memory
            self.slug, self.asked = cell.slug, [Asked.all_of(part, grid) for part in chunks]
        return self.asked


def _asked(run: Run[PredictConfig], cell: Cell, chunk: int | None = None) -> Iterator[Asked]:
    """Yield the questions of a cell in chunks of episodes; by default in those that reference agents share.

    The episodes of a very large cell are unrolled chunk by chunk, and not kept.
    """
    size = chunk or max(CHUNK, MANY // cell.steps)
    parts = [cell.seeds[k : k + size] for k in range(0, len(cell.seeds), size)]
    if _is_large(cell):
        for part in parts:
            yield Asked.all_of(episodes_of(cell.game, part, cell.steps, cell.questions_per_step), run.config.grid)
        return
    found = run.once("episodes", lambda: Episodes(_room(run.config))).of(cell)
    chunks = [found[k : k + size] for k in range(0, len(found), size)]
    if chunk:
        yield from (Asked.all_of(part, run.config.grid) for part in chunks)
    else:
        yield from run.once("shared", Shared).of(cell, chunks, run.config.grid)


def _room(config: PredictConfig) -> int:
    """Return how many steps and questions are kept for other agents; reference agents are asked cell by cell."""
    return KEPT if any(kind_of(entry) not in REFERENCES for entry in config.agents) else 0


def _is_large(cell: Cell) -> bool:
    return len(cell.seeds) * cell.steps > KEPT


def _ask(run: Run[PredictConfig], agent: Agent | Player, cell: Cell) -> tuple[Table, str]:
    """Ask an agent all questions of a cell; return its answers, and why some are missing ("" if none are)."""
    assert isinstance(agent, Agent)
    constant = {"agent": agent.name, "incomplete": bool(agent.incomplete)}
    spool, reasons = Spool(ANSWERS), list[str]()
    planned = _planned(cell, run.config) / len(cell.seeds)
    done = 0
    for asked in _asked(run, cell, None if isinstance(agent, Reference) else max(CHUNK, agent.batch_size)):
        episodes = asked.episodes
        if not done:
            run.warn(agent.episode_warnings(episodes[0]))
        if run.config.mode == "live":
            result = live(agent, cell.game, cell.seeds[done : done + len(episodes)], cell.steps)
        else:
            result = replay(agent, asked)
        done += len(episodes)
        spool.add(result.frame.select(*(pl.lit(constant[c]).alias(c) if c in constant else c for c in ANSWERS)))
        reasons.extend(filter(None, [result.left_out]))
        run.advance(round(planned * len(episodes)))
    return spool.table(), next(iter(reasons), "")
