"""The claims of `claims.yaml`, with what is run for each and how its numbers are read off the run's summary."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import yaml
from pydantic import Field, ValidationError, model_validator

from nextstate.agents.config import ConfigError, Strict, find_config
from nextstate.analysis.findings.verdict import Check, Number
from nextstate.envs.files import digest

CLAIMS = Path(__file__).with_name("claims.yaml")
SUSTAINED = {"bfloat16": 40e12, "float32": 10e12}  # operations a second of a GPU that a cost assumes
SOURCES = {
    "abstract": "the paper's abstract",
    "paper": "figures and text of the paper",
    "code": "the authors' code",
    "second hand": "a summary by others",
    "implied": "implied by the study, not stated",
}
Source = Literal["abstract", "paper", "code", "second hand", "implied"]


class StudyEntry(Strict):
    """A published study."""

    title: str = Field(min_length=1, description="of the paper")
    arxiv: str = Field(pattern=r"^\d{4}\.\d{4,5}$", description="its number on arXiv")


class Cost(Strict):
    """How much work a run is for a GPU, as operations of its forward and backward passes."""

    parameters: float = Field(gt=0, description="of the model, or the sum over models")
    tokens: float = Field(gt=0, description="that each model reads")
    training: bool = Field(default=False, description="whether it learns from them, which costs three times as much")
    precision: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="of the passes")
    how: str = Field(min_length=1, description="where the number of tokens comes from")

    @property
    def hours(self) -> float:
        """GPU hours: 2 operations for each parameter and token forward, 4 more backward, at `SUSTAINED`."""
        return (6 if self.training else 2) * self.parameters * self.tokens / SUSTAINED[self.precision] / 3600

    def __str__(self) -> str:
        if self.hours >= 1.5:
            return f"about {self.hours:,.0f} GPU hours"
        return f"about {max(2, round(self.hours * 60))} GPU minutes"


class RunEntry(Strict):
    """A run that claims are measured on."""

    study: str = Field(description="the study of nextstate, which is also the command")
    config: str = Field(description="a packaged config")
    overrides: list[str] = Field(default=[], description="changes to the config, as key=value")
    what: str = Field(min_length=1, description="the model or agents, and how they differ from the published ones")
    time: str = Field(default="", description="how long it took here, on two cores")
    needs: str = Field(default="", description="what it needs besides a CPU; by default nothing")
    cost: Cost | None = Field(default=None, description="of a run that has not been made here")

    @model_validator(mode="after")
    def _time_or_cost(self) -> RunEntry:
        if bool(self.time) == (self.cost is not None):
            raise ValueError("expected either time (for a run that was made here) or cost (for one that was not)")
        if bool(self.needs) != (self.cost is not None):
            raise ValueError("expected both needs and cost, or neither")
        return self

    @property
    def command(self) -> str:
        """The command that makes it without `nextstate reproduce`."""
        return " ".join(["nextstate", self.study, self.config, *(f"'{override}'" for override in self.overrides)])

    def definition(self) -> str:
        """Return a digest of what the run measures: its config as written, and the overrides."""
        config = yaml.safe_load(find_config(self.config).read_text(encoding="utf-8"))
        return digest(json.dumps([self.study, config, self.overrides], sort_keys=True))


class Range(Strict):
    """A condition on a column: numbers between two bounds, both included, or text that matches a pattern."""

    at_least: float | None = Field(default=None, description="least number")
    at_most: float | None = Field(default=None, description="largest number")
    matches: str | None = Field(default=None, description="regular expression for the whole text")


class Reading(Strict):
    """How a number is read off a table of a run's `summary/`."""

    table: str = Field(description="name of the table")
    where: dict[str, str | bool | int | float | list[str | int | float] | Range] = Field(
        default={},
        description="which rows: a value, a list of values, {at_least, at_most} or {matches} for each column",
    )
    pick: Literal["only", "highest", "lowest", "count"] = Field(
        default="only", description="the only row, that with the highest or lowest value, or the number of rows"
    )
    value: str = Field(default="", description="column of the value; none for a count")
    low: str = Field(default="", description="column of the lower end; by default the value has no interval")
    high: str = Field(default="", description="column of the upper end")
    n: str = Field(default="", description="column with the number of units")
    units: str = Field(default="", description="what the units are, in the plural, or the rows of a count")

    @model_validator(mode="after")
    def _columns(self) -> Reading:
        if (self.pick == "count") == bool(self.value):
            raise ValueError("a reading has a value column, except for a count, which has none")
        if bool(self.low) != bool(self.high):
            raise ValueError(f"the interval of {self.value!r} needs both low and high")
        return self

    @property
    def columns(self) -> list[str]:
        """All columns that it names."""
        return [*self.where, *filter(None, (self.value, self.low, self.high, self.n))]

    def read(self, summaries: Mapping[str, pl.DataFrame]) -> Number:
        """Return the number.

        What keeps it from being read (no such table, column or row, a null) is its `missing`, so that a run in which
        a model was left out still gives the other numbers.
        """
        if self.table not in summaries:
            return Number(missing=f"the run has no table {self.table!r}")
        table = summaries[self.table]
        if unknown := [column for column in self.columns if column not in table.columns]:
            return Number(missing=f"the table {self.table!r} has no column {unknown[0]!r}")
        rows = table.filter(*(_condition(column, wanted) for column, wanted in self.where.items()))
        if self.pick == "count":
            return Number(value=float(len(rows)), units=self.units)
        known = rows.drop_nulls(self.value).filter(pl.col(self.value).cast(pl.Float64).is_finite())
        if known.is_empty():
            return Number(missing=f"the table {self.table!r} has no {self.value} in {self._rows()}")
        if self.pick == "only" and len(rows) > 1:
            return Number(missing=f"the table {self.table!r} has {len(rows)} rows with {self._rows()}, expected one")
        sign = -1 if self.pick == "lowest" else 1
        return self._one(known.row(int(np.argmax(sign * known[self.value].cast(pl.Float64).to_numpy())), named=True))

    def _one(self, row: Mapping[str, Any]) -> Number:
        ends = [row[column] for column in (self.low, self.high) if column]
        value, n, units = float(row[self.value]), int(row[self.n]) if self.n else None, self.units
        if any(end is None or not np.isfinite(end) for end in ends):
            return Number(value=value, n=n, units=units, missing=f"{self.value} has no interval (too few units)")
        low, high = map(float, ends) if ends else (None, None)
        return Number(value=value, low=low, high=high, n=n, units=units)

    def _rows(self) -> str:
        given = {k: v.model_dump(exclude_none=True) if isinstance(v, Range) else v
                 for k, v in self.where.items()}  # fmt: skip
        return ", ".join(f"{column}={wanted}" for column, wanted in given.items()) or "any row"


def _condition(column: str, wanted: Any) -> pl.Expr:
    if isinstance(wanted, list):
        return pl.col(column).is_in(wanted)
    if not isinstance(wanted, Range):
        return pl.col(column).eq(wanted)
    found = pl.lit(True)
    if wanted.matches is not None:
        found &= pl.col(column).str.contains(f"^(?:{wanted.matches})$")
    if wanted.at_least is not None:
        found &= pl.col(column) >= wanted.at_least
    if wanted.at_most is not None:
        found &= pl.col(column) <= wanted.at_most
    return found


class Claim(Strict):
    """A claim of a published study, and how it is checked."""

    name: str = Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$", description="on the command line and in the page")
    study: str = Field(description="the published study, a key of `studies`")
    result: int | None = Field(default=None, ge=1, description="its number in the paper, if it has one")
    title: str = Field(min_length=1, description="the claim in a few words")
    says: str = Field(min_length=1, description="the claim in our own words")
    published: str = Field(min_length=1, description="the published values")
    source: Source = Field(description="where the published values come from")
    runs: list[str] = Field(default=[], description="runs that it is measured on, the smallest first")
    readings: dict[str, Reading] = Field(default={}, description="numbers by name")
    checks: list[Check] = Field(default=[], description="what the claim says of them; all must hold")
    note: str = Field(default="", description="what to keep in mind")
    because: str = Field(default="", description="why nothing can be measured; only without runs")

    def definition(self) -> str:
        """Return a digest of how its numbers are read."""
        return digest(json.dumps({name: one.model_dump() for name, one in self.readings.items()}, sort_keys=True))

    @model_validator(mode="after")
    def _complete(self) -> Claim:
        if bool(self.runs) == bool(self.because):
            raise ValueError(f"{self.name}: expected runs, or because (the reason why there are none)")
        if bool(self.runs) != bool(self.checks):
            raise ValueError(f"{self.name}: a claim that is measured has checks, and no other has")
        for check in self.checks:
            if unknown := set(check.names) - self.readings.keys():
                raise ValueError(f"{self.name}: the check {check.of!r} has no reading {', '.join(sorted(unknown))}")
        return self


class Ledger(Strict):
    """All claims, and the runs and studies that they name."""

    studies: dict[str, StudyEntry] = Field(description="published studies")
    runs: dict[str, RunEntry] = Field(description="runs by name")
    claims: list[Claim] = Field(min_length=1, description="in the order of the page")

    @model_validator(mode="after")
    def _names(self) -> Ledger:
        names = [claim.name for claim in self.claims] + [*self.runs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} is the name of two claims or runs: names must be unique")
        for claim in self.claims:
            if claim.study not in self.studies:
                raise ValueError(f"{claim.name}: there is no study {claim.study!r}")
            if unknown := set(claim.runs) - self.runs.keys():
                raise ValueError(f"{claim.name}: there is no run {', '.join(sorted(unknown))}")
        if unused := self.runs.keys() - {run for claim in self.claims for run in claim.runs}:
            raise ValueError(f"no claim is measured on the run {', '.join(sorted(unused))}")
        if wrong := [name for name in self.runs if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)]:
            raise ValueError(f"{wrong[0]} is not the name of a run: use lower-case letters, digits and hyphens")
        return self

    def on(self, run: str) -> list[Claim]:
        """Return the claims that are measured on a run."""
        return [claim for claim in self.claims if run in claim.runs]

    def find(self, name: str) -> tuple[str, list[Claim]]:
        """Return the run of a claim and the claim, or a run and all claims that are measured on it.

        The run is "" if nothing is run for the claim.

        Raises:
            ConfigError: there is neither a claim nor a run of that name.
        """
        if name in self.runs:
            return name, self.on(name)
        for claim in self.claims:
            if claim.name == name:
                return next(iter(claim.runs), ""), [claim]
        known = [*(claim.name for claim in self.claims), *self.runs]
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`nextstate reproduce` lists the claims"
        raise ConfigError(f"there is no claim and no run {name!r}; {hint}")


def read_claims(path: Path | None = None) -> Ledger:
    """Read a file of claims, by default that of this package.

    Raises:
        ConfigError: it is not valid; the message names the file, the place and what was expected.
    """
    path = path or CLAIMS
    try:
        return Ledger.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise ConfigError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from error
