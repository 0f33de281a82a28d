"""Verdicts: whether measured numbers agree with a claim, by a rule that the claim states beforehand.

A claim is a list of checks. A check says in which open interval a number, or the difference of two numbers, lies. It
*agrees* if the 95 % interval of the number lies within, *contradicts* if the two have no point in common, and *cannot
be said* otherwise: the data allow both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from pydantic import Field, model_validator

from nextstate.agents.config import Strict
from nextstate.analysis.stats import difference_interval


class Verdict(StrEnum):
    """The outcome of a check or a claim."""

    AGREES = "agrees"
    CONTRADICTS = "contradicts"
    OPEN = "cannot be said"


class Number(Strict):
    """A measured number with its 95 % interval.

    The interval of a number that has no sampling error, such as a count, is the number itself. `missing` says why there
    is no number or no interval.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    units: str = ""
    missing: str = ""


class Check(Strict):
    """What a claim says of one number: that it lies between two bounds."""

    of: str = Field(
        pattern=r"^[a-z0-9_]+( [-/] [a-z0-9_]+)?$", description="a reading, or two, as `one - other` or `one / other`"
    )
    above: float | None = Field(default=None, description="lower bound, which is not included; by default none")
    below: float | None = Field(default=None, description="upper bound, which is not included; by default none")

    @model_validator(mode="after")
    def _bounds(self) -> Check:
        if self.above is None and self.below is None:
            raise ValueError(f"the check of {self.of!r} has no bound: give above, below, or both")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError(f"the check of {self.of!r} is above {self.above} and below {self.below}: nothing is both")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the readings."""
        return tuple(self.of.split(" ")[::2])

    def number(self, numbers: Mapping[str, Number]) -> Number:
        """Return what is compared with the bounds, or a number that is missing."""
        found = [numbers[name] for name in self.names]
        if len(found) == 1:
            return found[0]
        if missing := next((number.missing for number in found if number.missing), ""):
            return Number(missing=missing)
        return ratio(*found) if "/" in self.of else difference(*found)

    def __str__(self) -> str:
        bounds = (("above", self.above), ("below", self.below))
        return f"{self.of} " + " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


class Judged(NamedTuple):
    """A verdict with its reason; `number` is what a check compared."""

    verdict: Verdict
    because: str
    number: Number = Number()


def judge(check: Check, numbers: Mapping[str, Number]) -> Judged:
    """Return the verdict of one check.

    Args:
        check: the check.
        numbers: the numbers by the names of their readings.
    """
    number = check.number(numbers)
    if number.missing:
        return Judged(Verdict.OPEN, number.missing, number)
    low, high = _ends(number)
    above = -math.inf if check.above is None else check.above
    below = math.inf if check.below is None else check.below
    if above < low and high < below:
        return Judged(Verdict.AGREES, f"{check}", number)
    if high <= above or below <= low:
        return Judged(Verdict.CONTRADICTS, f"not {check}", number)
    return Judged(Verdict.OPEN, f"the interval of {check.of} allows both: {check}, and not", number)


def difference(one: Number, other: Number) -> Number:
    """Return one - other, with the interval of a difference of two independent estimates."""
    a, b = ((_value(x), *_ends(x)) for x in (one, other))
    low, high = difference_interval(a, b).tolist()
    n = min((x.n for x in (one, other) if x.n is not None), default=None)
    return Number(value=a[0] - b[0], low=low, high=high, n=n, units=one.units or other.units)


def ratio(one: Number, other: Number) -> Number:
    """Return one / other, where other is known exactly, or missing where it is not or is not above 0."""
    value, (low, high) = _value(other), _ends(other)
    if not low == high == value > 0:
        return Number(missing="a ratio needs a denominator that is above 0 and known exactly")
    found, ends = _value(one), _ends(one)
    return Number(value=found / value, low=ends[0] / value, high=ends[1] / value, n=one.n, units=one.units)


def combined(found: Sequence[Judged]) -> Judged:
    """Return the verdict of all checks of a claim.

    It contradicts if one check does, agrees if all do, and cannot be said otherwise.
    """
    for verdict in (Verdict.CONTRADICTS, Verdict.OPEN):
        if reasons := [x.because for x in found if x.verdict == verdict]:
            return Judged(verdict, "; ".join(dict.fromkeys(reasons)))
    return Judged(Verdict.AGREES, "; ".join(x.because for x in found))


def _value(number: Number) -> float:
    assert number.value is not None
    return number.value


def _ends(number: Number) -> tuple[float, float]:
    value = _value(number)
    return (value if number.low is None else number.low), (value if number.high is None else number.high)
