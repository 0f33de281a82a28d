"""The tables of `docs/benchmarks.md`, made from the newest records in `benchmarks/results/`.

    python -m benchmarks.page

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, where NAME is "strongest", "usual", "before",
"rates" or "machine"; everything else on the page is written by hand. A test holds the page equal to its records.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"
# Benchmarks in the order of the tables; other records in the folder are those of trainings and studies.
ORDER = ("replay", "patching", "response", "stepping", "textworld", "grammar", "roads", "training", "pipeline")
Record = Mapping[str, Any]


def newest(folder: Path) -> dict[str, Record]:
    """Return the newest record of each benchmark that has one, by name."""
    found: dict[str, Record] = {}
    for name in ORDER:
        for path in sorted(folder.glob(f"????-??-??-{name}.json"), reverse=True)[:1]:
            record = json.loads(path.read_text())
            if "load" in record:  # records before November 22nd, 2026 are of wall-clock time
                found[name] = record
    return found


def comparisons(records: Mapping[str, Record], kind: str) -> str:
    """Return a table of all comparisons with one kind of peer; the job is named in the first of its rows."""
    rows, last = [], None
    for record in records.values():
        for r in record["results"]:
            if r["kind"] == kind:
                job = (r["name"], r["shape"])
                rows.append((*(job if job != last else ("", "")), r["peer"], number(r["ratio"]),
                             f"{number(r['ours_s'])} / {number(r['peer_s'])}"))  # fmt: skip
                last = job
    return table(("job", "model", "peer", "ratio", "seconds, ours / peer"), rows)


def rates(records: Mapping[str, Record]) -> str:
    """Return a table of the further numbers."""
    rows = [(name, number(value)) for record in records.values() for name, value in record["rates"].items()]
    return table(("what", "measured"), rows)


def machine(records: Mapping[str, Record]) -> str:
    """Return a table of when, on what and with what load each record was made."""
    rows = []
    for record in records.values():
        installed = ", ".join(f"{k} {v}" for k, v in record["versions"].items() if k not in ("python", "nextstate"))
        load = " to ".join(number(record["load"][when]) for when in ("before", "after"))
        hardware = f"{record['hardware']['cpu']}, {record['hardware']['cores']} cores"
        rows.append((f"`{record['command']}`", record["date"], hardware, load, installed))
    return table(("command", "date", "machine", "load", "versions"), rows)


def number(value: float) -> str:
    """Return a number with 3 digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, or a sentence if it has no rows."""
    if not rows:
        return "No record yet: `make bench` makes one."
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def render(page: str, records: Mapping[str, Record]) -> str:
    """Return the page with its tables replaced."""
    tables = {kind: comparisons(records, kind) for kind in ("strongest", "usual", "before")}
    tables |= {"rates": rates(records), "machine": machine(records)}
    for name, text in tables.items():
        page = re.sub(
            rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)",
            lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}",  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
    return page


def main() -> None:
    """Write the tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(render(PAGE.read_text(), newest(RESULTS)))


if __name__ == "__main__":
    main()
