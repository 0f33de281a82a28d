"""A finished run that is started again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nextstate.analysis.run import RunConfig
from nextstate.analysis.study import Study

HEAVY = ("torch", "plotly", "transformers")


def start_again(study: type[Study], config: RunConfig, folder: Path) -> list[str]:  # type: ignore[type-arg]
    """Start a finished run again in a process of its own; return the heavy packages that it imports."""
    code = (
        "import sys; from pathlib import Path; from nextstate.analysis.study import go\n"
        f"from {study.__module__} import {study.__name__} as Again\n"
        f"config = Again.config.model_validate_json({config.model_dump_json()!r})\n"
        f"go(Again(), config, Path({str(folder)!r}))\n"
        f"print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def times(folder: Path) -> dict[Path, int]:
    """Return when each file of a run was last written, except the lock."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "lock" not in p.name}
