"""The agent of docs/extending.md, and a way to install a package in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.documents import file

NGRAM = file("ngrams.py")


def write_package(folder: Path, name: str, source: str, group: str, entries: Mapping[str, str]) -> None:
    """Write an installed package of one module, with its entry points, into a folder of `sys.path`."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"[{group}]", *(f"{key} = {target}" for key, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
