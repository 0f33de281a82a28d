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

    from nextstate.analysis.findings.claims import Claim, Ledger
    from nextstate.analysis.findings.record import Record, Status
    from nextstate.analysis.run import Run, RunConfig
    from nextstate.analysis.study import Study

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
        executor: Annotated[
            str | None, typer.Option(help="Where the jobs are done: serial, local (processes) or ray (a cluster).")
        ] = None,
        workers: Annotated[int | None, typer.Option(help="Jobs at a time, with --executor local or ray.")] = None,
    ) -> None:
        changes = [*(overrides or []), *_executor(config, overrides or [], executor, workers)]
        _run_study(name, config, changes, out, accept_mixed, wait)

    app.command(name, help=help_, epilog=f"Example:  {example}" if example else None)(command)


def _add_studies() -> None:
    for name, listed in STUDIES.items():
        _add_study(name, f"{listed.help} Run the same command again to resume.", listed.example)
    for name, entry in plugins.names(GROUP).items():
        if name not in STUDIES:
            _add_study(name, f"A study from the package {entry.dist.name if entry.dist else entry.value}.", "")


_add_studies()


def _executor(config: str, overrides: list[str], kind: str | None, workers: int | None) -> list[str]:
    """Return the options --executor and --workers as overrides; another kind replaces all keys of `executor`."""
    from nextstate.agents.config import read_value

    given = read_value(config, overrides, "executor") or "serial"
    found = given if isinstance(given, dict) else {"kind": given}
    if kind is not None:
        found = found | {"kind": kind} if found.get("kind", kind) == kind else {"kind": kind}
    if workers is not None:
        found = found | {"workers": workers}
    return [] if found == given or (kind, workers) == (None, None) else [f"executor={json.dumps(found)}"]


def _run_study(name: str, config: str, overrides: list[str], out: Path | None, accept_mixed: bool, wait: bool) -> None:
    from nextstate.agents.config import read_config, read_value
    from nextstate.analysis.study import find_study

    given = read_value(config, overrides, "study") or name
    if name not in (given, "run"):
        raise typer.BadParameter(f"{config} is a config of the study {given!r}: use `nextstate {given}`")
    study = find_study(given)
    read = read_config(config, overrides, study.config)
    folder = out or Path("runs") / read.name
    if int(os.environ.get("RANK", "0")):  # a torchrun worker: only rank 0 writes tables and the report
        study.worker(read, folder)
        return
    run = _go(study, read, folder, accept_mixed, wait)
    _show(study.headline(run))
    console.print(f"Report: [bold]{escape(str(folder / 'report.html'))}[/]", soft_wrap=True)
    _report_left_out(run.record)


def _go(study: Study[Any], config: RunConfig, folder: Path, accept_mixed: bool = False, wait: bool = False) -> Run[Any]:
    """Run a study with a progress bar."""
    from nextstate.analysis.study import go

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console) as bar:
        command = " ".join(["nextstate", *sys.argv[1:]])
        return go(
            study, config, folder, progress=RichProgress(bar), command=command, accept_mixed=accept_mixed, wait=wait
        )


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
        console.print("The headline has no rows: see the page for the reason.")
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
    epilog="Examples:  nextstate reproduce   |   nextstate reproduce response-window   |   "
    "nextstate reproduce heads-quickstart --record"
)
def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="A claim, or a run that claims are measured on; by default list all claims.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/findings/RUN.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the numbers of the run, from which the list and the page are made.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option(help="Write the claims and verdicts as a Markdown page, such as docs/findings.md.")
    ] = None,
) -> None:
    """Check the claims of the published studies: list them with their verdicts, or measure one again.

    A claim is measured by running a config as its study does. What is finished is not run again, and claims of one run
    share its tables.
    """
    from nextstate.analysis.findings.claims import read_claims
    from nextstate.analysis.findings.document import document
    from nextstate.analysis.findings.record import read_records, record_of, write_record
    from nextstate.envs.files import write_text

    found = read_claims()
    if name is None and (out or record):
        raise typer.BadParameter("--out and --record go with a claim or a run: nextstate reproduce NAME")
    if name is not None:
        chosen, claims = found.find(name)
        if not chosen:
            _claim(claims[0], found, read_records())
        elif (run := _reproduced(found, chosen, out or Path("runs") / "findings" / chosen)) is not None:
            made = record_of(found, chosen, run)
            for claim in claims:
                _claim(claim, found, {chosen: made})
            console.print(f"Report: [bold]{escape(str(run.path / 'report.html'))}[/]", soft_wrap=True)
            if record:
                console.print(f"Recorded: [bold]{escape(str(write_record(made)))}[/]", soft_wrap=True)
            _report_left_out(run.record)
    if page is not None:
        write_text(page, document(found, read_records()))
        console.print(f"Page: [bold]{escape(str(page))}[/]", soft_wrap=True)
    elif name is None:
        _claims(found, read_records())


def _reproduced(found: Ledger, name: str, folder: Path) -> Run[Any] | None:
    """Make a run that claims are measured on, or finish it.

    Returns:
        the run; None for a training of many GPU hours that has not been begun.
    """
    from nextstate.agents.config import read_config
    from nextstate.analysis.study import find_study

    entry = found.runs[name]
    study, command = find_study(entry.study), f"{entry.command} --out {folder}"
    console.print(Text.assemble((name, "bold"), f": {entry.what}"), soft_wrap=True)
    if entry.cost is not None:
        needs = f"Needs {entry.needs}; {entry.cost} ({entry.cost.how})."
        console.print(Text(needs, style="yellow"), soft_wrap=True)
        if entry.cost.training and not (folder / "run.json").exists():
            console.print(Text(f"Not started. Train with the command below, then give this one again.\n{command}"))
            return None
    console.print(Text(command, style="cyan"), soft_wrap=True)
    return _go(study, read_config(entry.config, entry.overrides, study.config), folder)


STYLES = {"agrees": "green", "contradicts": "red", "cannot be said": "yellow"}


def _claims(found: Ledger, records: dict[str, Record]) -> None:
    """List all claims with their verdicts, a table for each study."""
    from nextstate.analysis.findings.document import counted
    from nextstate.analysis.findings.record import statuses, verdict_of

    for key, study in found.studies.items():
        claims = [claim for claim in found.claims if claim.study == key]
        table = Table(title=Text(f"{study.title} (arXiv {study.arxiv})"), box=box.SIMPLE_HEAD, title_justify="left")
        for column in ("name", "claim", "verdict", "run"):
            table.add_column(column, overflow="fold", no_wrap=column == "name")
        verdicts = []
        for claim in claims:
            judged, run = verdict_of(claim, statuses(claim, found, records))
            verdicts.append(judged.verdict)
            verdict = Text(judged.verdict, style=STYLES[judged.verdict])
            table.add_row(claim.name, Text(claim.title), verdict, run or ("not run" if claim.runs else "none"))
        console.print(table)
        console.print(f"{counted(verdicts)}.\n")


def _claim(claim: Claim, found: Ledger, records: dict[str, Record]) -> None:
    """Print one claim: what was published, what was measured, and the verdict."""
    from nextstate.analysis.findings.claims import SOURCES
    from nextstate.analysis.findings.record import statuses

    number = f" (Result {claim.result})" if claim.result else ""
    console.print(Text.assemble("\n", (claim.name, "bold"), f": {claim.title}{number}"), soft_wrap=True)
    console.print(Text(f"Claim: {claim.says}"))
    console.print(Text(f"Published: {claim.published} ({SOURCES[claim.source]})"))
    if claim.note:
        console.print(Text(f"Note: {claim.note}"))
    if claim.because:
        console.print(Text.assemble(("cannot be said", STYLES["cannot be said"]), f", because {claim.because}"))
    for status in statuses(claim, found, records):
        if status.record is not None:
            _measured(claim, status)


def _measured(claim: Claim, status: Status) -> None:
    """Print the numbers of a claim and their verdict."""
    from nextstate.analysis.findings.document import shown
    from nextstate.analysis.findings.verdict import judge

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("number", "value (95 %)", "check"):
        table.add_column(column, overflow="fold")
    checks = {check.of: check for check in claim.checks}
    for name in [*status.numbers, *(of for of in checks if of not in status.numbers)]:
        judged = judge(checks[name], status.numbers) if name in checks else None
        number = judged.number if judged else status.numbers[name]
        check = Text.assemble(f"{checks[name]}: ", (judged.verdict, STYLES[judged.verdict])) if judged else ""
        table.add_row(Text(name), Text(shown(number)), check)
    console.print(table)
    verdict = status.judged
    console.print(Text.assemble((verdict.verdict, f"bold {STYLES[verdict.verdict]}"), f": {verdict.because}"))


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
