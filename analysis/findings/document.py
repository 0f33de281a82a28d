"""The claims as a page of the documentation, in Markdown: docs/findings.md is made by it and by nothing else."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from nextstate.analysis.findings.claims import SOURCES, Claim, Ledger, RunEntry
from nextstate.analysis.findings.record import Record, Status, statuses, verdict_of
from nextstate.analysis.findings.verdict import Number, Verdict, judge

INTRODUCTION = """\
# Findings

What three published studies claim, what was measured here, and whether the two agree. This page is made by
`nextstate reproduce --page docs/findings.md` from the claims in `analysis/findings/claims.yaml` and the records in
`analysis/findings/records/`; nothing on it is written by hand.

    nextstate reproduce                       # list the claims with their verdicts
    nextstate reproduce response-window       # measure one claim again
    nextstate reproduce response-quickstart   # measure all claims of one run again

A **verdict** is made by the rule that stands with each claim: bounds for a number, or for a difference of two.

- **agrees**: the 95 % interval lies within the bounds.
- **contradicts**: the interval and the bounds have no point in common.
- **cannot be said**: the interval reaches across a bound, a number is missing, or nothing has been run.

A claim with several checks agrees if all of them do, and is contradicted by any one of them. The interval of a
difference is that of two independent estimates (Zou & Donner 2008), so it is too wide where both come from the same
strings or episodes. Where a model was trained several times, the interval is over trainings; that of a single training
leaves out how much trainings differ. A verdict holds for what was run, and each run says how that differs from what was
published. GPU times are estimates: 2 operations for
each weight and token that is read (6 in training), 40 trillion of them a second in bfloat16 and 10 trillion in float32.
"""


def document(found: Ledger, records: Mapping[str, Record]) -> str:
    """Return the page.

    Args:
        found: the claims.
        records: the records of runs, by name.
    """
    return "\n".join([INTRODUCTION, *_blocks(found, records)])


def _blocks(found: Ledger, records: Mapping[str, Record]) -> Iterator[str]:
    """Yield the blocks of the page, each of which ends in a new line."""
    for key, study in found.studies.items():
        claims = [claim for claim in found.claims if claim.study == key]
        known = [statuses(claim, found, records) for claim in claims]
        made = [verdict_of(claim, one) for claim, one in zip(claims, known, strict=True)]
        yield f"## {plain(study.title)}\n"
        yield f"[arXiv {study.arxiv}](https://arxiv.org/abs/{study.arxiv}): {counted(j.verdict for j, _ in made)}.\n"
        on = [
            f"`{run}`" if run else "not run" if claim.runs else "–"
            for claim, (_, run) in zip(claims, made, strict=True)
        ]  # fmt: skip
        titles = [f"[{plain(claim.title)}](#{claim.name})" for claim in claims]
        yield _table(("claim", "verdict", "measured on"), zip(titles, (j.verdict for j, _ in made), on, strict=True))
        for claim, one in zip(claims, known, strict=True):
            yield from _section(claim, found, one)
    yield "## Runs\n"
    how = {name: f" ({run.cost.how})" if run.cost else "" for name, run in found.runs.items()}
    yield _table(("run", "what is run", "time"), (
        (f"`{name}`: `{run.command}`", plain(run.what), plain(time_of(run) + how[name]))
        for name, run in found.runs.items()
    ))  # fmt: skip


def _section(claim: Claim, found: Ledger, known: list[Status]) -> Iterator[str]:
    number = f"Result {claim.result}. " if claim.result else ""
    yield f"### {claim.name}\n"
    yield f"**{number}{plain(claim.title)}.** {plain(claim.says)}\n"
    yield f"Published: {plain(claim.published)} ({SOURCES[claim.source]}).\n"
    if claim.checks:
        yield (
            "Agrees if "
            + " and ".join(f"`{check}`" for check in claim.checks)
            + f". {plain(claim.note)}".rstrip()
            + "\n"
        )
    if claim.because:
        yield f"**{_first_upper(Verdict.OPEN)}**, because {plain(claim.because)}.\n"
    for status in known:
        if status.record is not None:
            yield from _made(claim, found.runs[status.run], status, status.record)
    waiting = [status.run for status in known if status.record is None]
    if waiting and len(waiting) == len(known):
        yield f"**{_first_upper(Verdict.OPEN)}**, because it was not run.\n"
    if waiting:
        yield "".join(f"- {_waiting(name, found.runs[name])}\n" for name in waiting)


def _made(claim: Claim, run: RunEntry, status: Status, record: Record) -> Iterator[str]:
    why = f", because {plain(status.judged.because)}" if status.judged.verdict == Verdict.OPEN else ""
    yield f"**{_first_upper(status.judged.verdict)}**{why}. Measured on `{status.run}`: {plain(run.what)}.\n"
    rows = [(plain(name.replace("_", " ")), plain(shown(number))) for name, number in status.numbers.items()]
    for check in claim.checks:
        if len(check.names) > 1:
            judged = judge(check, status.numbers)
            rows.append((plain(check.of.replace("_", " ")), plain(shown(judged.number))))
    yield _table(("number", "value (95 % interval)"), rows)
    made = f"{record.date[:10]}, nextstate {record.versions.get('nextstate', '?')}"
    made += f", commit {record.commit}" if record.commit else ""
    changed = " Its config, or how its numbers are read, has changed since." if status.stale else ""
    yield f"`nextstate reproduce {status.run}` ({plain(made)}).{changed}\n"


def _waiting(name: str, run: RunEntry) -> str:
    needs = f" It needs {plain(run.needs)}: {plain(time_of(run))}." if run.needs else f" It takes {plain(run.time)}."
    return f"`nextstate reproduce {name}` was not run ({plain(run.what)}).{needs}"


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def time_of(run: RunEntry) -> str:
    """Return how long a run takes, measured on two cores or estimated for a GPU."""
    return f"{run.time} on two cores" if run.cost is None else str(run.cost)


def counted(verdicts: Iterable[Verdict]) -> str:
    """Return how many claims have each verdict, in words."""
    found = Counter(verdicts)
    return f"{found.total()} claims: " + ", ".join(f"{verdict} {found[verdict]}" for verdict in Verdict)


def shown(number: Number) -> str:
    """Return a number with its interval and its number of units, in three significant digits."""
    if number.value is None:
        return f"– ({number.missing})"
    text = digits(number.value)
    if number.low is not None and number.high is not None and number.low < number.high:
        text += f" ({digits(number.low)} to {digits(number.high)})"
    if number.n is not None:
        text += f", n = {number.n:,} {number.units.removesuffix('s') if number.n == 1 else number.units}".rstrip()
    elif number.units:
        text += f" {number.units}"
    return f"{text}; {number.missing}" if number.missing else text


def digits(value: float) -> str:
    """Return a number in three significant digits, without an exponent where it is between 0.0001 and a million."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        places = 0 if value == int(value) else max(0, 2 - _magnitude(value))
        return f"{value:,.{places}f}"
    return f"{value:.3g}"


def _magnitude(value: float) -> int:
    return int(f"{abs(value):e}".partition("e")[2])


def plain(text: str) -> str:
    """Return text that stands in Markdown as it is: on one line, and without marks or HTML of its own."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*_\[\]|]", lambda found: f"\\{found.group()}", escaped)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
