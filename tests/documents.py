"""Reads the documentation: its pages, and the code in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    p for p in (ROOT / "docs").rglob("*.md") if p.name not in ("index.md", "contributing.md", "changelog.md")
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    """Return the code blocks of a page that are in one language and have no title."""
    return [code for kind, title, code in _BLOCK.findall(read(path)) if kind == language and not title]


def files(path: Path) -> dict[str, str]:
    """Return the code blocks of a page that are files, by name."""
    return {title: code for _, title, code in _BLOCK.findall(read(path)) if title}


def file(name: str) -> str:
    """Return a file of the page about extensions."""
    return files(ROOT / "docs" / "extending.md")[name]
