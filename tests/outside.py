"""The game of docs/extending.md, and a package of another author that has it."""

from __future__ import annotations

from pathlib import Path

from tests.documents import file

GAME = file("cups.py")


def write_package(
    folder: Path, game: str = GAME, distribution: str = "cups-pkg", package: str = "cups_pkg", name: str = "Cups"
) -> Path:
    """Write a package as an installer would: its module, and the metadata that names its game; return `folder`.

    Args:
        folder: to be put on `sys.path`.
        game: the text of the module `package.game`, whose class is called Cups.
        distribution: name of the package as installers know it.
        package: name to import.
        name: name of the entry point.
    """
    (folder / package).mkdir(parents=True, exist_ok=True)
    (folder / package / "__init__.py").write_text("")
    (folder / package / "game.py").write_text(game)
    metadata = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[nextstate.games]\n{name} = {package}.game:Cups\n")
    return folder
