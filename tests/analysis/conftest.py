"""Runs with the real games: ideal reader, chance and shortcuts answer as they believe, an agent of ours noisily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextstate.agents.agent import Agent, Prediction, Prompt, from_belief
from tests.runs import make

MODEL = "tests.analysis.conftest:Noisy"
EVIL = "</script><img src=x onerror=\"document.title='owned'\">"
Spec = tuple[str, dict[str, Any], int]  # game, settings, steps


class Noisy(Agent):
    """The ideal reader, blurred the more the larger and the longer the game; some of its answers are hostile."""

    def predict(self, prompts: Sequence[Prompt]) -> list[Prediction]:
        return [self._answer(p) for p in prompts]

    def _answer(self, prompt: Prompt) -> Prediction:
        episode = prompt.episode
        rng = np.random.default_rng([episode.seed, prompt.step, prompt.question])
        size = getattr(episode.game, episode.game.size)
        blur = min(0.9, 0.05 * size + 0.02 * (prompt.step + 1) + 0.3 * float(rng.random()))
        ideal = np.array(episode.beliefs("ideal")[prompt.step][prompt.question])
        mixed = (1 - blur) * ideal + blur * rng.dirichlet(np.ones(len(ideal)))
        found = from_belief(tuple((mixed / mixed.sum()).tolist()), prompt.asked, float(rng.random()))
        found = replace(found, prompt_tokens=10 * (prompt.step + 1))
        return replace(found, answer=EVIL, greedy=-1) if rng.random() < 0.03 else found

    def describe(self) -> dict[str, Any]:
        """What a language model would say of itself."""
        proved = {"error": 1.2e-05, "tolerance": 0.00026, "depth": 1253, "columns": 1277, "attention": "sdpa"}
        tried = {"tree": f"off by 3.1 nats: {EVIL}"}
        certificates = [
            {"road": "fork", "live": False, **proved, "seconds": 0.29, "tried": tried},
            {"road": "step", "live": True, **proved, "seconds": 12.0, "tried": {}},
        ]
        about = {"kind": "model", "parameters": 912_000, "dtype": "float32", "device": "cpu", "revision": "built-in"}
        return super().describe() | about | {"hash": "sha256:1f9a", "certificates": certificates}


def specs(
    boxes: Sequence[int], states: Sequence[int], periods: Sequence[int], people: Sequence[int], steps: int
) -> list[Spec]:
    out: list[Spec] = [("Box", {"boxes": n}, min(steps, 10)) for n in boxes]
    for density in ("min", "middle"):
        out += [("DFA", {"states": n, "density": density}, steps) for n in states]
    out += [("Cycle", {"period": n}, steps) for n in periods]
    return out + [("FruitStore", {"people": n}, n - 1) for n in people]


SMALL = specs((2, 4), (3, 5), (3, 5), (3, 4), 6)


def make_run(path: Path, chosen: Sequence[Spec] = SMALL, episodes: int = 6, ask: Any = 1, **more: Any) -> Path:
    """Run the study of predictions in a folder."""
    games = [
        {"game": g, "game_args": s, "steps": t, "episodes": episodes, "questions_per_step": ask} for g, s, t in chosen
    ]
    config = {"name": "quickstart", "agents": [MODEL, "ideal", "chance", "shortcuts"], "games": games}
    make({"wandb": "disabled"} | config | more, path)
    return path


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="session")
def many_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several questions a step, so that questions of an episode hang together."""
    return make_run(tmp_path_factory.mktemp("runs") / "many", specs((3, 5), (3,), (3,), (4,), 4), episodes=8, ask="all")
