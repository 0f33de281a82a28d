"""An agent in a package of its own, as a user would write it, and a way to install such a package in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

NGRAM = '''"""A word n-gram model as an agent of nextstate."""

import re
from collections import Counter

from nextstate.agents.agent import Agent, from_belief


class NGram(Agent):
    """Counts which words followed the last n - 1 words earlier in the transcript, and answers what followed most.

    Args:
        n: words that are counted together, the answer included.
        smoothing: added to each count.
    """

    def __init__(self, n: int = 2, smoothing: float = 0.5) -> None:
        self.n, self.smoothing = n, smoothing

    def predict(self, prompts):
        return [self._answer(p) for p in prompts]

    def _answer(self, prompt):
        words = re.findall(r"\\w+", prompt.episode.prompt(prompt.step, prompt.question))
        last = words[len(words) - self.n + 1 :]
        starts = [i for i in range(self.n - 1, len(words)) if words[i - self.n + 1 : i] == last]
        choices = [re.findall(r"\\w+", choice) for choice in prompt.asked.choices]
        counts = [self.smoothing + sum(words[i : i + len(c)] == c for i in starts) for c in choices]
        return from_belief(tuple(count / sum(counts) for count in counts), prompt.asked, 0.0)
'''


def write_package(folder: Path, name: str, source: str, group: str, entries: Mapping[str, str]) -> None:
    """Write an installed package of one module, with its entry points, into a folder of `sys.path`."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"[{group}]", *(f"{key} = {target}" for key, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
