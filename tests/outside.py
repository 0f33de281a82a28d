"""Packages of other authors, one file each: game and agent of docs/extending.md, and a study of agreement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.documents import file

GAME, NGRAM = file("cups.py"), file("ngrams.py")
STUDY = '''
"""How often a model answers as another reader of the transcript does."""

import polars as pl

from nextstate.agents.rollout import episodes_of, prompts_of, seeds_for
from nextstate.analysis import stats
from nextstate.analysis.run import RunConfig
from nextstate.analysis.study import Job, Study
from nextstate.envs.games import make_game


class AgreementConfig(RunConfig):
    model: str = "nextstate/tiny"
    games: list[str]
    reader: str = "ideal"
    steps: int = 4
    episodes: int = 6


class Agreement(Study[AgreementConfig]):
    name = "agreement"
    config = AgreementConfig

    def jobs(self, config):
        return [Job(f"answers/{game}", game, given=make_game(game), agent=config.model) for game in config.games]

    def identity(self, job, run):
        return run.asks(run.config.model)

    def do(self, job, run):
        config = run.config
        episodes = episodes_of(job.given, seeds_for(config.seed, config.episodes), config.steps)
        prompts = [prompt for episode in episodes for prompt in prompts_of(episode)]
        beliefs = [p.episode.beliefs(config.reader)[p.step][p.question] for p in prompts]
        answers = run.model(config.model).predict(prompts)
        same = [belief[answer.choice] == max(belief) for belief, answer in zip(beliefs, answers)]
        return pl.DataFrame({"episode": [p.episode.seed for p in prompts], "same": same})

    def summarise(self, run):
        rows = []
        for game, table in run.tables("answers/*").items():
            cells = table.group_by("episode").agg(pl.col("same").sum(), pl.len()).sort("episode")
            hits, trials = (cells[name].to_numpy()[:, None].astype(float) for name in ("same", "len"))
            share, ends = stats.accuracy(hits, trials)
            rows.append((game, share[0], ends[0, 0], ends[1, 0]))
        return {"games": pl.DataFrame(rows, ["game", "same", "same_low", "same_high"], orient="row")}

    def headline(self, run):
        return run.summary("games")

    def page(self, run):
        from nextstate.analysis.page.page import Page, Section

        lead = f"How often {run.config.model} answers as the reader {run.config.reader} does."
        return Page("Agreement with a reader", [lead], [Section("Games", table=run.summary("games"))])
'''


def write_package(folder: Path, module: str, source: str, group: str, entries: Mapping[str, str]) -> Path:
    """Write a package of one module as an installer would, with the metadata that names its entry points.

    Args:
        folder: to be put on `sys.path`; is returned.
        module: its dotted name; the package is called as its first part, with hyphens.
        source: text of the module.
        group: of its entry points.
        entries: what the entry points mean, by name.
    """
    *parents, name = module.split(".")
    inside = folder.joinpath(*parents)
    inside.mkdir(parents=True, exist_ok=True)
    if parents:
        (inside / "__init__.py").write_text("")
    (inside / f"{name}.py").write_text(source, encoding="utf-8")
    package = module.partition(".")[0]
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    about = f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 1.0\n"
    (info / "METADATA").write_text(about, encoding="utf-8")
    lines = [f"[{group}]", *(f"{key} = {target}" for key, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_game(folder: Path, game: str = GAME, package: str = "cups_pkg", name: str = "Cups") -> Path:
    """Write a package whose module `package.game` has a game, a class called Cups; `name` is its entry point."""
    return write_package(folder, f"{package}.game", game, "nextstate.games", {name: f"{package}.game:Cups"})
