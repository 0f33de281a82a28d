"""Records: the numbers of one run, kept in `records/RUN.json` and committed, from which verdicts and page are made."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import polars as pl
from pydantic import Field, ValidationError

from nextstate.agents.config import ConfigError, Strict
from nextstate.analysis.findings.claims import Claim, Ledger
from nextstate.analysis.findings.verdict import Judged, Number, Verdict, combined, judge
from nextstate.analysis.run import Run, now
from nextstate.analysis.table import code_digest
from nextstate.envs.files import write_json

RECORDS = Path(__file__).with_name("records")
NOT_RUN = "not run"


class ClaimRecord(Strict):
    """The numbers of one claim in a run."""

    definition: str = Field(description="digest of its readings")
    numbers: dict[str, Number] = Field(description="by the names of its readings")
    verdict: Verdict = Field(description="made by the checks of the claim")
    because: str = Field(description="the reason")


class Record(Strict):
    """The numbers that were read off one run."""

    run: str = Field(description="name of the run")
    command: str = Field(description="the command that makes it again")
    definition: str = Field(description="digest of config and overrides")
    date: str = Field(description="when it was recorded, in UTC")
    seconds: float = Field(description="time that the run took")
    commit: str = Field(description="of the checkout, with -dirty if it was changed; empty without one")
    code: str = Field(description="digest of the code that computes results")
    versions: dict[str, str] = Field(description="of Python and packages")
    claims: dict[str, ClaimRecord] = Field(description="by name")


class Status(NamedTuple):
    """What is known of a claim on one run; `record` is None where it has not been run."""

    run: str
    judged: Judged
    numbers: dict[str, Number]
    record: Record | None = None
    stale: bool = False  # the config, its overrides or the readings were changed since


def measure(claim: Claim, summaries: Mapping[str, pl.DataFrame]) -> tuple[dict[str, Number], Judged]:
    """Return the numbers of a claim, read off the summary of a run, and the verdict."""
    numbers = {name: reading.read(summaries) for name, reading in claim.readings.items()}
    return numbers, combined([judge(check, numbers) for check in claim.checks])


def record_of(found: Ledger, name: str, run: Run[object]) -> Record:  # type: ignore[type-var]
    """Return the record of a finished run: the numbers and verdicts of all claims that are measured on it."""
    summaries, claims = run.summaries(), {}
    for claim in found.on(name):
        numbers, judged = measure(claim, summaries)
        claims[claim.name] = ClaimRecord(
            definition=claim.definition(), numbers=numbers, verdict=judged.verdict, because=judged.because
        )
    record = run.record
    return Record(
        run=name, command=f"nextstate reproduce {name} --record", definition=found.runs[name].definition(), date=now(),
        seconds=record["seconds"], commit=commit(), code=code_digest(), versions=record["versions"], claims=claims,
    )  # fmt: skip


def write_record(record: Record, folder: Path | None = None) -> Path:
    """Write a record to a folder, by default that of this package; return its file.

    Raises:
        PathError: it cannot be written.
    """
    path = (folder or RECORDS) / f"{record.run}.json"
    write_json(path, record.model_dump(mode="json"))
    return path


def read_records(folder: Path | None = None) -> dict[str, Record]:
    """Return all records of a folder, by default that of this package, by the names of their runs.

    Raises:
        ConfigError: a file is not a record.
    """
    found = {}
    for path in sorted((folder or RECORDS).glob("*.json")):
        try:
            record = Record.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(
                f"{path} is not a record of `nextstate reproduce` ({error}); make it again with --record"
            ) from error
        found[record.run] = record
    return found


def statuses(claim: Claim, found: Ledger, records: Mapping[str, Record]) -> list[Status]:
    """Return what is known of a claim on each of its runs, in their order; verdicts are made anew from the numbers."""
    out = []
    for name in claim.runs:
        record = records.get(name)
        kept = record.claims.get(claim.name) if record else None
        if record is None or kept is None or kept.numbers.keys() != claim.readings.keys():
            needs = found.runs[name].needs
            why = f"{NOT_RUN}: needs {needs}" if needs else NOT_RUN
            out.append(Status(name, Judged(Verdict.OPEN, why), {}))
            continue
        judged = combined([judge(check, kept.numbers) for check in claim.checks])
        stale = (record.definition, kept.definition) != (found.runs[name].definition(), claim.definition())
        out.append(Status(name, judged, kept.numbers, record, stale))
    return out


def verdict_of(claim: Claim, known: list[Status]) -> tuple[Judged, str]:
    """Return the verdict of a claim and the run that it rests on, "" if none was made.

    It is the last one that was made: runs are listed from the smallest to that of the published size.
    """
    if not claim.runs:
        return Judged(Verdict.OPEN, claim.because), ""
    made = next((status for status in reversed(known) if status.record is not None), None)
    return (known[0].judged, "") if made is None else (made.judged, made.run)


def commit() -> str:
    """Return the commit of the checkout that this package lies in, with -dirty if files differ; "" without one."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
