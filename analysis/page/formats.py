"""Number formats of the pages; a missing or infinite value is written as a dash."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

MINUS = str.maketrans("-", "−")
RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def raised(power: int) -> str:
    """Return an exponent as superscript digits."""
    return str(power).translate(RAISED)


def percent(value: float | None) -> str:
    """Return a share with at most one decimal, such as "87.3 %"."""
    return "–" if value is None else f"{100 * value:.1f}".removesuffix(".0") + "\u202f%"


def percents(value: float | None) -> str:
    """Return a share with enough decimals that only exact values read "0 %" or "100 %"."""
    if value is None or not math.isfinite(value):
        return "–"
    digits = 1 if value in (0.0, 1.0) or 0.0005 <= value < 0.9995 else 3
    text = f"{100 * value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}\u202f%"


def two(value: float | None) -> str:
    """Return a number with two decimals."""
    return "–" if value is None or not math.isfinite(value) else f"{round(value, 2) + 0.0:.2f}".translate(MINUS)


def bits(value: float | None) -> str:
    """Return a number with one decimal."""
    return "–" if value is None else f"{value:.1f}"


def thousandths(value: float | None) -> str:
    """Return a number in thousandths, with one decimal."""
    return "–" if value is None else f"{round(1000 * value, 1) + 0.0:.1f}".translate(MINUS)


def exponent(value: float) -> str:
    """Return a number in scientific notation with two digits, such as "2.6e-04"; zero is "0"."""
    return f"{value:.1e}" if value else "0"


def short(value: float | None) -> str:
    """Return a number with two significant digits, as a power of ten where it is below a thousandth."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}".translate(MINUS)
    if not value or abs(value) >= 1e-3:
        return f"{value:.2g}".translate(MINUS)
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')} × 10{raised(int(power))}".translate(MINUS)


def big(value: float | str | None) -> str:
    """Return a count: up to six digits in full, longer ones as a power of ten. Text holds integers of any size."""
    if value is None:
        return "–"
    digits = value.lstrip("0") or "0" if isinstance(value, str) else f"{value:.0f}"
    if len(digits) <= 6:
        return f"{int(digits):,}"
    first, power = f"{Decimal(digits):.1e}".split("e")
    return f"{first} × 10{raised(int(power))}"


def cell(value: Any) -> str:
    """Return any value as a cell of a table: whole numbers in full, other numbers with three decimals, lists joined."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".translate(MINUS)
    if isinstance(value, float):
        plain = value == 0 or 1e-3 <= abs(value) < 1e6
        return f"{value:,.3f}".translate(MINUS) if math.isfinite(value) and plain else short(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return "–" if value is None else str(value)


FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent, "percents": percents, "two": two, "bits": bits, "thousandths": thousandths,
    "exponent": exponent, "short": short, "big": big, "cell": cell, "number": lambda n: f"{n:,}",
}  # fmt: skip
