"""A package of another author, with one game in one file: three cups, one ball, and swaps."""

from __future__ import annotations

from pathlib import Path

GAME = '''
"""A ball under one of several cups that are swapped."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

from nextstate.envs.game import Game, Question, require_whole

LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Cups(Game):
    """A ball lies under one of the cups; each step swaps the contents of two cups.

    Args:
        cups: number of cups, 2 to 8.
    """

    name: ClassVar[str] = "Cups"
    size: ClassVar[str] = "cups"
    sizes: ClassVar[range] = range(2, 9)

    cups: int = 3

    def __post_init__(self):
        super().__post_init__()
        require_whole("cups", self.cups, 2, len(LETTERS))

    @property
    def max_choices(self):
        return self.cups

    def initial(self, rng):
        return int(rng.integers(self.cups))

    def actions(self, state):
        return list(combinations(range(self.cups), 2))

    def transition(self, state, action):
        one, two = action
        return two if state == one else one if state == two else state

    def values(self, state):
        return {"ball": LETTERS[state]}

    def opening(self, state):
        return f"The ball is under cup {LETTERS[state]}."

    def narrate(self, state, action, next_state):
        one, two = action
        return f" Swap cup {LETTERS[one]} and cup {LETTERS[two]}."

    def questions(self, state, action, next_state):
        choices = tuple(f" {letter}" for letter in LETTERS[: self.cups])
        return (Question("ball", " The ball is under cup", choices, next_state, (next_state,)),)
'''


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
