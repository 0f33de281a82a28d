"""The command line: one command for each study, and `report`, `verify`, `play`, `train` and `list`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
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
from nextstate.analysis.progress import Progress
from nextstate.analysis.studies import GROUP, STUDIES
from nextstate.envs import plugins

if TYPE_CHECKING:
    import polars as pl

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
    """The options that stand before the command name."""

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
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Measure whether language models track the state of a system: games, agents, and a report page for each run."""
    options.debug = debug


class RichProgress(Progress):
    """Shows progress as a bar with the estimated time left."""

    def __init__(self, bar: Bar) -> None:
        self.bar, self.task = bar, bar.add_task("start")

    def begin(self, total: int) -> None:
        self.bar.update(self.task, total=total)

    def on(self, what: str) -> None:
        self.bar.update(self.task, description=escape(what))

    def advance(self, done: int) -> None:
        self.bar.advance(self.task, done)

    def warn(self, message: str) -> None:
        self.bar.console.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)

    def failed(self, error: BaseException) -> None:
        if options.debug:
            self.bar.console.print(Text(_traceback(error)), soft_wrap=True)


def _add_study(name: str, help_: str, example: str) -> None:
    """Register the command that runs a study."""

    def command(
        config: Annotated[
            str, typer.Argument(help="A YAML file, or a packaged config (see `nextstate list configs`).")
        ],
        overrides: Overrides = None,
        out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/NAME.")] = None,
        accept_mixed: Annotated[
            bool,
            typer.Option("--accept-mixed", help="Reuse finished tables of another model, version or device."),
        ] = False,
        wait: Annotated[
            bool, typer.Option("--wait", help="If another process is using the folder, wait until it is done.")
        ] = False,
    ) -> None:
        _run_study(name, config, overrides or [], out, accept_mixed, wait)

    app.command(name, help=help_, epilog=f"Example:  {example}" if example else None)(command)


def _add_studies() -> None:
    for name, listed in STUDIES.items():
        _add_study(name, f"{listed.help} Run the same command again to resume.", listed.example)
    for name, entry in plugins.names(GROUP).items():
        if name not in STUDIES:
            _add_study(name, f"A study from the package {entry.dist.name if entry.dist else entry.value}.", "")


_add_studies()


def _run_study(name: str, config: str, overrides: list[str], out: Path | None, accept_mixed: bool, wait: bool) -> None:
    from nextstate.agents.config import read_config, read_value
    from nextstate.analysis.study import find_study, go

    given = read_value(config, overrides, "study") or name
    if name not in (given, "run"):
        raise typer.BadParameter(f"{config} is a config of the study {given!r}: use `nextstate {given}`")
    study = find_study(given)
    read = read_config(config, overrides, study.config)
    folder = out or Path("runs") / read.name
    if int(os.environ.get("RANK", "0")):  # a torchrun worker: only rank 0 writes tables and the report
        study.worker(read, folder)
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console) as bar:
        command = " ".join(["nextstate", *sys.argv[1:]])
        run = go(study, read, folder, progress=RichProgress(bar), command=command, accept_mixed=accept_mixed, wait=wait)
    _show(study.headline(run))
    console.print(f"Report: [bold]{escape(str(folder / 'report.html'))}[/]", soft_wrap=True)
    _report_left_out(run.record)


def _report_left_out(record: dict[str, Any]) -> None:
    """Print what was left out of the run; exit with code 1 if a model failed."""
    left_out = record["left_out"]
    if left_out:
        errors.print(
            Text(f"{len(left_out)} jobs were left out or done in part; the report lists them.", style="yellow")
        )
    failed = [x for x in left_out if x.get("failed")]
    for line in dict.fromkeys(
        x["reason"] if x["agent"] in x["reason"] else f"{x['agent']}: {x['reason']}" for x in failed
    ):
        errors.print(Text(line, style="red"), soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _show(frame: pl.DataFrame) -> None:
    """Print a headline: columns x_low and x_high become the interval of column x.

    Where two columns hold text, there is one table for each value of the first.
    """
    if frame.is_empty():
        console.print("The headline has no rows: nothing is significant.")
        return
    text = [name for name, kind in frame.schema.items() if not kind.is_numeric()]
    groups = frame.partition_by(text[0], maintain_order=True) if len(text) > 1 else [frame]
    ends = {f"{name}_{end}" for name in frame.columns for end in ("low", "high")} & set(frame.columns)
    for group in groups:
        shown = [name for name in frame.columns if name not in ends and not (len(text) > 1 and name == text[0])]
        shown = [name for name in shown if group[name].null_count() < len(group)]
        table = Table(
            title=str(group[text[0]][0]) if len(text) > 1 else None, box=box.SIMPLE_HEAD, title_justify="left"
        )
        for name in shown:
            title = name.replace("_", " ") + (" (95 %)" if f"{name}_low" in ends else "")
            table.add_column(title, justify="left" if name in text else "right", overflow="fold")
        for row in group.iter_rows(named=True):
            table.add_row(*(escape(_cell(group, name, row)) for name in shown))
        console.print(table)


def _cell(frame: pl.DataFrame, name: str, row: dict[str, Any]) -> str:
    """Return a cell of a headline, with its interval where there is one."""
    small = frame.schema[name].is_float() and not (frame[name].abs().max() or 0) >= 0.01  # type: ignore[operator]
    value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if low is None or high is None:
        return _number(value, small)
    between = "–" if low >= 0 else " to "
    return f"{_number(value, small)} ({_number(low, small)}{between}{_number(high, small)})"


def _number(value: Any, small: bool) -> str:
    """Format a number for a table; `small` means that all numbers in its column are below 0.01."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2g}" if small else f"{round(value, 3) + 0.0:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@app.command(epilog="Example:  nextstate report runs/quickstart")
def report(folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")]) -> None:
    """Rebuild the report page and the figures of a run from its summary."""
    from nextstate.analysis.study import open_run, write_page

    write_page(*open_run(folder))
    console.print(f"Report: [bold]{escape(str(folder / 'report.html'))}[/]", soft_wrap=True)


@app.command(epilog="Example:  nextstate verify runs/quickstart --jobs 20 --seed 1")
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    jobs: Annotated[int, typer.Option(help="Maximum number of tables to recompute.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Random seed that selects the tables.", min=0)] = 0,
    tolerance: Annotated[
        float,
        typer.Option(help="Allowed difference, relative to the largest number in the column (at least 1).", min=0),
    ] = 1e-4,
) -> None:
    """Recompute a random sample of a run's tables and compare; changes nothing. Exit code 1 if a table differs."""
    from nextstate.analysis.study import verify as check

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console) as bar:
        found = check(folder, jobs, seed, tolerance, RichProgress(bar))
    for x in found:
        style = "red" if x.found else "green"
        console.print(
            Text.assemble((f"{'differs' if x.found else 'equal'}  ", style), x.key, f"  {x.found}"), soft_wrap=True
        )
        if x.made:
            console.print(Text(f"    {x.made}", style="yellow"), soft_wrap=True)
    wrong = sum(bool(x.found) for x in found)
    console.print(f"{len(found) - wrong} of {len(found)} tables equal the recomputed ones.")
    if wrong:
        raise typer.Exit(1)


@app.command(
    epilog="Examples:  nextstate play Box   |   nextstate play DFA states=3 --commands --questions   |   "
    "nextstate play DFA --agent walkthrough"
)
def play(
    game: Annotated[str, typer.Argument(help="A game (see `nextstate list games`).")],
    settings: Annotated[list[str] | None, typer.Argument(help="Game arguments.", metavar="[KEY=VALUE]...")] = None,
    agent: Annotated[
        str,
        typer.Option(
            help="human or a language model; predictions: also ideal, lookup, chance, shortcut:NAME; commands: also "
            "random, walkthrough."
        ),
    ] = "human",
    steps: Annotated[int | None, typer.Option(help="Number of questions, or maximum number of commands.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the episode; random by default.")] = None,
    commands: Annotated[
        bool | None,
        typer.Option(
            "--commands/--predictions",
            help="Give commands, or predict what comes next. Default: commands if the game has an objective.",
        ),
    ] = None,
    questions: Annotated[
        bool, typer.Option("--questions", help="Give commands, and answer a question about the effect of each.")
    ] = False,
) -> None:
    """Play a game in the terminal, by predicting what comes next or by giving commands; or watch an agent play."""
    import secrets

    import yaml

    from nextstate import terminal
    from nextstate.agents.registry import PLAYERS
    from nextstate.envs.games import make_game

    given = dict(s.partition("=")[::2] for s in settings or [])
    made = make_game(game, **{k: yaml.safe_load(v) for k, v in given.items()})
    chosen = secrets.randbelow(10**6) if seed is None else seed
    if questions and commands is False:
        raise typer.BadParameter("--questions and --predictions cannot be combined; leave one out")
    if commands is None:
        commands = questions or agent in PLAYERS or terminal.has_objective(made, chosen)
    here = terminal.Terminal(console)
    try:
        if commands:
            length = terminal.command(here, made, agent, steps, chosen, questions)
        else:
            length = terminal.predict(here, made, agent, steps, chosen)
    except KeyboardInterrupt:  # interrupted before the game started
        console.print("\nStopped.")
        raise typer.Exit(130) from None
    how = (["--commands"] if commands else []) + (["--questions"] if questions else [])
    again = " ".join(["nextstate play", game, *(settings or []), *how, f"--steps {length} --seed {chosen}"])
    here.say(f"To play this episode again: {again}")


@app.command(epilog="Example:  nextstate train configs/train/tiny.yaml --out checkpoints/tiny")
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or a packaged training config.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints and the model; by default checkpoints/NAME.")
    ] = None,
) -> None:
    """Train a small model on fresh episodes of the games. Run the same command again to resume from a checkpoint."""
    from nextstate.agents.config import read_config
    from nextstate.agents.training import TrainConfig
    from nextstate.agents.training import train as run_training

    read = read_config(config, overrides or [], TrainConfig)
    final = run_training(read, out or Path("checkpoints") / read.name)
    console.print(f"Model: [bold]{escape(str(final))}[/] (to use it as an agent, give this path)", soft_wrap=True)


@app.command("list", epilog="Example:  nextstate list games")
def list_(what: Annotated[str, typer.Argument(help="games, models, studies or configs")]) -> None:
    """List the available games, models, studies or configs."""
    if what == "games":
        _games()
    elif what == "models":
        from nextstate.agents.identity import BUILT_IN

        for name, folder in BUILT_IN.items():
            console.print(f"[bold]{name}[/]  built in, {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB")
        console.print("Also: any causal language model by its hub name or folder; ideal, lookup, chance and shortcuts.")
    elif what == "studies":
        for name, listed in STUDIES.items():
            console.print(f"[bold]{name}[/]  {escape(listed.help)}", soft_wrap=True)
        for name, entry in plugins.names(GROUP).items():
            console.print(f"[bold]{escape(name)}[/]  {escape(entry.value)}", soft_wrap=True)
    elif what == "configs":
        from nextstate.agents.config import find_config, packaged_configs

        for name in packaged_configs():
            first, second = (find_config(name).read_text(encoding="utf-8") + "\n\n").splitlines()[:2]
            console.print(f"[bold]{first.lstrip('# ')}[/]\n    {escape(second.lstrip('# '))}", soft_wrap=True)
    else:
        raise typer.BadParameter(f"{what!r}: expected games, models, studies or configs")


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
            description = Text.assemble((f"{x.legal}: " if x.legal else "", "cyan"), x.meaning)
            table.add_row(Text(x.name, style="bold"), Text(x.type + default), description)
        console.print(Padding(table, (0, 0, 1, 4), expand=False))
    console.print("Each setting: name, type = default, legal values (while the others are at their defaults), meaning.")
    for problem in problems.values():
        errors.print(Text(f"cannot be used: {problem}", style="yellow"), soft_wrap=True)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def main() -> None:
    """Run the command line. Errors are printed as one line, with a traceback only if `--debug` is given."""
    from nextstate.agents.agent import AgentError
    from nextstate.agents.config import ConfigError
    from nextstate.agents.failures import Broken, guarded, one_line
    from nextstate.analysis.run import ModelFailed, RunError
    from nextstate.envs.files import PathError, is_path_error, path_error
    from nextstate.envs.game import GameError

    known = (AgentError, ConfigError, GameError, PathError, RunError)

    def paths_named() -> None:
        try:
            app()
        except OSError as error:
            if is_path_error(error):
                raise path_error(error) from error
            raise

    try:
        guarded(
            paths_named,
            lambda error: f"{one_line(error)} (unexpected; run `nextstate --debug ...` to see the traceback)",
            known,
        )
    except known as error:
        if options.debug:
            errors.print(Text(_traceback(error)), soft_wrap=True)
        errors.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        sys.exit(1 if isinstance(error, (Broken, ModelFailed)) else 2)


if __name__ == "__main__":
    main()
