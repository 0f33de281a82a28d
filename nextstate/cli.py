"""The command line: `nextstate run | patch | response | report | play | train | list`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from nextstate import __version__
from nextstate.folder import Progress, answered, left_out

app = typer.Typer(
    name="nextstate",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Overrides, such as [cyan]seed=3 games.0.episodes=20[/].", metavar="[KEY=VALUE]..."),
]


@dataclass
class Options:
    """What is given before the command."""

    debug: bool = False


options = Options()


def _version(asked: bool) -> None:
    if asked:
        console.print(f"nextstate {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def before(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of whatever goes wrong.")] = False,
) -> None:
    """Does a language model know what state a system is in? Games, agents, and one report page."""
    options.debug = debug


class Drawn(Progress):
    """Progress as a bar with the time left."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.task = bar, bar.add_task("start")

    def begin(self, questions: int) -> None:
        self.bar.update(self.task, total=questions)

    def on(self, what: str) -> None:
        self.bar.update(self.task, description=escape(what))

    def advance(self, questions: int) -> None:
        self.bar.advance(self.task, questions)

    def warn(self, message: str) -> None:
        self.bar.console.print(Text(f"note: {message}", style="yellow"), soft_wrap=True)

    def failed(self, error: BaseException) -> None:
        if options.debug:
            self.bar.console.print(Text(_traceback(error)), soft_wrap=True)


@app.command(epilog="Example:  nextstate run configs/quickstart.yaml games.0.episodes=20 --out runs/short")
def run(
    config: Annotated[str, typer.Argument(help="A YAML file, or a packaged config (see `nextstate list configs`).")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/NAME.")] = None,
) -> None:
    """Run an experiment, or finish one that was cut off: the same command again resumes it."""
    from nextstate import experiment
    from nextstate.agents.config import read_config

    read = read_config(config, overrides or [], experiment.Config)
    folder = out or Path("runs") / read.name
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("answers"),
        TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console) as bar:
        page = experiment.run(read, folder, Drawn(bar), " ".join(["nextstate", *sys.argv[1:]]))
    missing = left_out(folder)
    _summary(folder)
    console.print(f"Report: [bold]{escape(str(page))}[/]", soft_wrap=True)
    if missing:
        errors.print(
            Text(f"{len(missing)} cells were left out or asked in part; the report says which and why.", style="yellow")
        )
        failed = [x for x in missing if x.get("failed") or not answered(folder, x["agent"])]
        told = dict.fromkeys(
            x["reason"] if x["agent"] in x["reason"] else f"{x['agent']}: {x['reason']}" for x in failed
        )
        for line in told:
            errors.print(Text(line, style="red"), soft_wrap=True)
        if failed:
            raise typer.Exit(1)


@app.command(epilog="Example:  nextstate patch configs/heads/quickstart.yaml pairs=32 --out runs/heads")
def patch(
    config: Annotated[str, typer.Argument(help="A YAML file, or a packaged config (see `nextstate list configs`).")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/NAME.")] = None,
) -> None:
    """Find the heads that carry state, by activation patching; the same command again resumes it."""
    from nextstate import patching
    from nextstate.agents.config import read_config

    read = read_config(config, overrides or [], patching.PatchConfig)
    folder = out or Path("runs") / read.name
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console) as bar:
        page = patching.run(read, folder, Drawn(bar), " ".join(["nextstate", *sys.argv[1:]]))
    _heads(folder)
    console.print(f"Report: [bold]{escape(str(page))}[/]", soft_wrap=True)
    missing = left_out(folder)
    if missing:
        errors.print(Text("\n".join(f"{x['setting']}: {x['reason']}" for x in missing), style="yellow"))
        raise typer.Exit(1)


def _heads(folder: Path) -> None:
    import polars as pl

    if not (folder / "heads.parquet").is_file():
        return
    table = Table("head", "state", "95 %", "action", "95 %", "routing", "carries", box=box.SIMPLE_HEAD)
    found = pl.read_parquet(folder / "heads.parquet").filter(pl.col("carries") != "")
    for row in found.sort(pl.max_horizontal("state", "action"), descending=True).head(12).iter_rows(named=True):
        numbers = [row[f"{kind}{end}"] for kind in ("state", "action") for end in ("", "_low", "_high")]
        a, b, c, d, e, f, g = (f"{round(x, 2) + 0.0:.2f}" for x in (*numbers, row["routing"]))
        table.add_row(f"{row['layer']}.{row['head']}", a, f"{b} to {c}", d, f"{e} to {f}", g, row["carries"])
    console.print(table if len(found) else "No head stands out.")


def _summary(folder: Path) -> None:
    from nextstate.analysis import plays, tables

    loaded = tables.load(folder)
    summary = tables.pooled(loaded.rows, ("game", "agent")).filter(subset="all")
    for (game,), rows in summary.group_by("game", maintain_order=True):
        table = Table(str(game), "questions", "accuracy", "95 %", "ceiling", "chance", box=box.SIMPLE_HEAD)
        for row in rows.sort("accuracy", descending=True).iter_rows(named=True):
            interval = f"{row['accuracy_low']:.3f}-{row['accuracy_high']:.3f}"
            numbers = (f"{row[k]:.3f}" for k in ("ceiling", "chance"))
            table.add_row(escape(row["agent"]), f"{row['n']:,}", f"{row['accuracy']:.3f}", interval, *numbers)
        console.print(table)
    for (game,), rows in plays.table(plays.load(loaded), ("game", "agent")).group_by("game", maintain_order=True):
        table = Table(f"{game}, played", "episodes", "won", "95 %", "over fewest", "illegal", box=box.SIMPLE_HEAD)
        for row in rows.sort("success", descending=True).iter_rows(named=True):
            interval = f"{row['success_low']:.3f}-{row['success_high']:.3f}"
            over = "–" if row["over"] is None else f"{row['over']:.2f}"
            played = (f"{row['episodes']:,}", f"{row['success']:.3f}", interval, over, f"{row['illegal']:.2f}")
            table.add_row(escape(row["agent"]), *played)
        console.print(table)


@app.command(epilog="Example:  nextstate response configs/response/quickstart.yaml prompts=8 --out runs/response")
def response(
    config: Annotated[str, typer.Argument(help="A YAML file, or a packaged config (see `nextstate list configs`).")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/NAME.")] = None,
) -> None:
    """Push single tokens weakly and see what answers: window, induction, games; the same command again resumes it."""
    from nextstate import responding
    from nextstate.agents.config import read_config

    read = read_config(config, overrides or [], responding.ResponseConfig)
    folder = out or Path("runs") / read.name
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console) as bar:
        page = responding.run(read, folder, Drawn(bar), " ".join(["nextstate", *sys.argv[1:]]))
    _windows(folder)
    console.print(f"Report: [bold]{escape(str(page))}[/]", soft_wrap=True)


def _windows(folder: Path) -> None:
    from nextstate.analysis import response_report, response_tables

    told = response_report.headline(response_tables.load(folder))
    table = Table("precision", "window", "layers", box=box.SIMPLE_HEAD)
    for x in told["windows"]:
        edges = "none" if x["low"] is None else f"{x['low']:.2g} to {x['high']:.2g}"
        table.add_row(x["dtype"], edges, f"{x['layers']} of {x['of']}")
    console.print(table)


@app.command(epilog="Example:  nextstate grammar configs/grammar/quickstart.yaml training.steps=300 --out runs/grammar")
def grammar(
    config: Annotated[str, typer.Argument(help="A YAML file, or a packaged config (see `nextstate list configs`).")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/NAME.")] = None,
) -> None:
    """Train models on a grammar; see what they write, hold and attend to; the same command again resumes it.

    On several GPUs: torchrun --nproc-per-node 8 -m nextstate.cli grammar CONFIG
    """
    from nextstate import grammars
    from nextstate.agents.config import read_config

    read = read_config(config, overrides or [], grammars.GrammarConfig)
    folder = out or Path("runs") / read.name
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console) as bar:
        page = grammars.run(read, folder, Drawn(bar), " ".join(["nextstate", *sys.argv[1:]]))
    if not int(os.environ.get("RANK", "0")):
        _written(folder)
        console.print(f"Report: [bold]{escape(str(page))}[/]", soft_wrap=True)


def _written(folder: Path) -> None:
    import polars as pl

    path = folder / "generation.parquet"
    if not path.exists():
        return
    rows = pl.read_parquet(path)
    rows = rows.filter((pl.col("temperature") - 1).abs() == (pl.col("temperature") - 1).abs().min())
    found = {(row["name"], row["prefix"]): row for row in rows.iter_rows(named=True)}
    kinds = list(dict.fromkeys(rows["prefix"]))
    words = {"nothing": "from nothing", "clean": "after a prefix", "corrupted": "after a corrupted one"}
    table = Table("model", *[words[kind] for kind in kinds], box=box.SIMPLE_HEAD)
    for name in dict.fromkeys(rows["name"]):
        mine = [found[name, kind] for kind in kinds]
        table.add_row(escape(name), *[f"{row['accuracy']:.3f} ({row['low']:.3f}-{row['high']:.3f})" for row in mine])
    temperature, strings = rows["temperature"][0], rows["strings"][0]
    console.print(f"Share of {strings:,} strings that are in the grammar (95 %), at temperature {temperature:g}:")
    console.print(table)


@app.command(epilog="Example:  nextstate report runs/quickstart")
def report(folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")]) -> None:
    """Write the report page of a run again."""
    if (folder / "sweeps").is_dir():
        from nextstate.analysis import heads_report

        written = heads_report.write(folder)
    elif (folder / "response").is_dir():
        from nextstate.analysis import response_report

        written = response_report.write(folder)
    elif (folder / "models.parquet").is_file():
        from nextstate.analysis import grammar_report

        written = grammar_report.write(folder)
    else:
        from nextstate.analysis import report as page

        written = page.write(folder)
    console.print(f"Report: [bold]{escape(str(written))}[/]", soft_wrap=True)


@app.command(
    epilog="Examples:  nextstate play Box   |   nextstate play DFA states=3 --commands --questions   |   "
    "nextstate play DFA --agent walkthrough"
)
def play(
    game: Annotated[str, typer.Argument(help="A game (see `nextstate list games`).")],
    settings: Annotated[list[str] | None, typer.Argument(help="Its settings.", metavar="[KEY=VALUE]...")] = None,
    agent: Annotated[
        str,
        typer.Option(
            help="human or a language model; predicting also ideal, chance, shortcut:NAME; commanding also random, "
            "walkthrough."
        ),
    ] = "human",
    steps: Annotated[int | None, typer.Option(help="Number of questions, or of commands at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which episode; by default a new one each time.")] = None,
    commands: Annotated[
        bool | None,
        typer.Option(
            "--commands/--predictions",
            help="Give the commands, or predict what comes next; by default commands where the game has an objective.",
        ),
    ] = None,
    questions: Annotated[bool, typer.Option("--questions", help="Give commands; be asked what they lead to.")] = False,
) -> None:
    """Play a game: predict what comes next, or give the commands; or watch an agent do so."""
    import secrets

    import yaml

    from nextstate import terminal
    from nextstate.envs.games import make_game

    given = dict(s.partition("=")[::2] for s in settings or [])
    made = make_game(game, **{k: yaml.safe_load(v) for k, v in given.items()})
    chosen = secrets.randbelow(10**6) if seed is None else seed
    if questions and commands is False:
        raise typer.BadParameter("--questions are asked beside commands; leave out --predictions")
    if commands is None:
        commands = questions or agent in terminal.PLAYERS or terminal.has_objective(made, chosen)
    here = terminal.Terminal(console)
    try:
        if commands:
            length = terminal.command(here, made, agent, steps, chosen, questions)
        else:
            length = terminal.predict(here, made, agent, steps, chosen)
    except KeyboardInterrupt:  # before the game began
        console.print("\nStopped.")
        raise typer.Exit(130) from None
    how = (["--commands"] if commands else []) + (["--questions"] if questions else [])
    again = " ".join(["nextstate play", game, *(settings or []), *how, f"--steps {length} --seed {chosen}"])
    here.say(f"The same episode again: {again}")


@app.command(epilog="Example:  nextstate train configs/train/tiny.yaml --out checkpoints/tiny")
def train(
    config: Annotated[str, typer.Argument(help="A training config.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints and the model; by default checkpoints/NAME.")
    ] = None,
) -> None:
    """Train a small model on fresh episodes of the games; the same command again goes on from the last checkpoint."""
    from nextstate.agents.config import read_config
    from nextstate.agents.training import TrainConfig
    from nextstate.agents.training import train as run_training

    read = read_config(config, overrides or [], TrainConfig)
    final = run_training(read, out or Path("checkpoints") / read.name)
    console.print(f"Model: [bold]{escape(str(final))}[/] (use it as an agent by this path)", soft_wrap=True)


@app.command("list", epilog="Example:  nextstate list games")
def list_(what: Annotated[str, typer.Argument(help="games, models or configs")]) -> None:
    """List what there is."""
    if what == "games":
        _games()
    elif what == "models":
        from nextstate.agents.language import BUILT_IN

        for name, folder in BUILT_IN.items():
            console.print(f"[bold]{name}[/]  built in, {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB")
        console.print("Also: any causal language model by its name on the hub or its folder, ideal, chance, shortcuts.")
    elif what == "configs":
        from nextstate.agents.config import find_config, packaged_configs

        for name in packaged_configs():
            first, second = (find_config(name).read_text(encoding="utf-8") + "\n\n").splitlines()[:2]
            console.print(f"[bold]{first.lstrip('# ')}[/]\n    {escape(second.lstrip('# '))}", soft_wrap=True)
    else:
        raise typer.BadParameter(f"{what!r}: expected games, models or configs")


def _games() -> None:
    from nextstate.envs.games import load_games
    from nextstate.envs.settings import listed

    games, problems = load_games()
    for name, cls in games.items():
        about = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
        console.print(f"[bold]{name}[/]  predict nextstate/{name}-v0, play nextstate/{name}Play-v0", soft_wrap=True)
        console.print(Padding(Text(about), (0, 0, 0, 4), expand=False))
        console.print(Padding(Text(f"shortcuts: {', '.join(cls.shortcuts) or 'none'}"), (0, 0, 0, 4), expand=False))
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for x in listed(cls):
            default = "" if x.default is None else f" = {json.dumps(x.default)}"
            told = Text.assemble((f"{x.legal}: " if x.legal else "", "cyan"), x.meaning)
            table.add_row(Text(x.name, style="bold"), Text(x.type + default), told)
        console.print(Padding(table, (0, 0, 1, 4), expand=False))
    console.print("After each setting: type = default, what is legal while the others are at their defaults, meaning.")
    for problem in problems.values():
        errors.print(Text(f"cannot be used: {problem}", style="yellow"), soft_wrap=True)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def main() -> None:
    """Run the command line; errors are one message, not a traceback, unless `--debug` is given."""
    from nextstate.agents.agent import AgentError
    from nextstate.agents.config import ConfigError
    from nextstate.agents.failures import Broken, PathError, guarded, of_a_path, one_line, path_error
    from nextstate.analysis.tables import RunError
    from nextstate.envs.game import GameError
    from nextstate.folder import ExperimentError, ModelFailed

    known = (AgentError, ConfigError, ExperimentError, GameError, PathError, RunError)

    def paths_named() -> None:
        try:
            app()
        except OSError as error:
            if of_a_path(error):
                raise path_error(error) from error
            raise

    try:
        guarded(
            paths_named, lambda error: f"{one_line(error)} (unforeseen; `nextstate --debug ...` shows where)", known
        )
    except known as error:
        if options.debug:
            errors.print(Text(_traceback(error)), soft_wrap=True)
        errors.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        sys.exit(1 if isinstance(error, (Broken, ModelFailed)) else 2)


if __name__ == "__main__":
    main()
