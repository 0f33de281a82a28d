"""Runs with the real games: ideal reader, chance and shortcuts answer as they believe, a made-up model noisily."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from nextstate.analysis.tables import ROWS
from nextstate.envs.game import Distribution, Episode, Game, Question, score, unroll
from nextstate.envs.games import GAMES, make_game
from nextstate.experiment import transcript

MODEL = "nextstate/tiny"
EVIL = "</script><img src=x onerror=\"document.title='owned'\">"
Spec = tuple[str, dict[str, Any], str, int]  # game, settings, variant, steps


def specs(
    boxes: Sequence[int], states: Sequence[int], periods: Sequence[int], people: Sequence[int], steps: int
) -> list[Spec]:
    out: list[Spec] = [("Box", {"boxes": n}, "", min(steps, 10)) for n in boxes]
    for density in ("min", "middle"):
        out += [("DFA", {"states": n, "density": density}, f"density={density}", steps) for n in states]
    out += [("Cycle", {"period": n}, "", steps) for n in periods]
    return out + [("FruitStore", {"people": n}, "", n - 1) for n in people]


SMALL = specs((2, 4), (3, 5), (3, 5), (3, 4), 6)
LARGE = specs((2, 3, 4, 6, 8), (3, 5, 8, 10, 15), (2, 3, 5, 8, 12), (3, 4, 6, 8, 10), 20)


def model_belief(ideal: Distribution, size: int, step: int, rng: np.random.Generator) -> Distribution:
    """The ideal reader's belief, blurred the more the larger and the longer the game."""
    blur = min(0.9, 0.05 * size + 0.02 * step + 0.3 * float(rng.random()))
    noise = rng.dirichlet(np.ones(len(ideal)))
    mixed = (1 - blur) * np.array(ideal) + blur * noise
    return tuple((mixed / mixed.sum()).tolist())


def row(
    agent: str, game: Game, slug: str, variant: str, seed: int, step: int, index: int, q: Question,
    belief: Distribution, ideal: Distribution, rng: np.random.Generator, greedy: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    p = np.array(belief)
    best = np.flatnonzero(p >= p.max() - 1e-12)
    pick = int(rng.choice(best))
    with np.errstate(divide="ignore"):
        logs = np.log(p)
    top = max(p[list(q.accepted)])
    written = q.choices[pick].strip() if greedy is None else greedy
    ceiling = score(ideal, q.accepted)
    return {
        "agent": agent, "game": game.name, "setting": slug, "size": getattr(game, game.size), "variant": variant,
        "episode": seed, "step": step + 1, "question": index, "variable": q.variable, "stem": q.stem,
        "choices": list(q.choices), "truth": q.answer, "accepted": [q.choices[i].strip() for i in q.accepted],
        "greedy": written, "greedy_correct": q.accepts(written), "choice": q.choices[pick].strip(),
        "choice_correct": pick in q.accepted, "choice_token_correct": pick in q.accepted,
        "choice_byte_correct": pick in q.accepted, "logprobs": logs.tolist(),
        "p_accepted": float(p[list(q.accepted)].sum()),
        "rank": 1 + int((p > top + 1e-12).sum()), "ceiling": ceiling, "chance": q.chance,
        "determined": ceiling > 1 - 1e-9,
        "prompt_tokens": 10 * (step + 1) if agent == MODEL else None,
    }  # fmt: skip


def episode_rows(
    agent: str, episode: Episode, slug: str, variant: str, rng: np.random.Generator
) -> Iterable[dict[str, Any]]:
    name = agent.removeprefix("shortcut:")
    ideals = episode.beliefs("ideal")
    beliefs = ideals if agent == MODEL else episode.beliefs(name)
    size = getattr(episode.game, episode.game.size)
    for t, step in enumerate(episode.steps):
        for i, question in enumerate(step.questions):
            belief, greedy = beliefs[t][i], None
            if agent == MODEL:
                belief = model_belief(belief, size, t + 1, rng)
                greedy = EVIL if rng.random() < 0.03 else None
            yield row(
                agent, episode.game, slug, variant, episode.seed, t, i, question, belief, ideals[t][i], rng, greedy
            )


def make_run(
    path: Path, chosen: Sequence[Spec] = SMALL, episodes: int = 6, ask: Any = 1, name: str = "quickstart"
) -> Path:
    """Write a whole run folder, as `nextstate run` does."""
    settings, agents = [], dict.fromkeys([MODEL, "ideal", "chance"])
    for game_name, kwargs, variant, steps in chosen:
        game = make_game(game_name, **kwargs)
        slug = "-".join([game_name, *(f"{k}={v}" for k, v in kwargs.items())])
        size = getattr(game, game.size)
        settings.append(
            {"slug": slug, "game": game_name, "settings": game.settings, "size_name": game.size, "size": size,
             "variant": variant, "steps": steps, "episodes": episodes}
        )  # fmt: skip
        played = [e for e in (unroll(game, seed, steps, ask) for seed in range(episodes)) if e.steps]
        (path / "transcripts").mkdir(parents=True, exist_ok=True)
        pl.DataFrame([transcript(e) for e in played]).write_parquet(path / "transcripts" / f"{slug}.parquet")
        names = [MODEL, "ideal", "chance", *(f"shortcut:{s}" for s in GAMES[game_name].shortcuts)]
        agents.update(dict.fromkeys(names))
        for agent in names:
            rng = np.random.default_rng([len(agent), size, steps])
            rows = [r for e in played for r in episode_rows(agent, e, slug, variant, rng)]
            folder = path / "rows" / agent.replace("/", "-").replace(":", "-")
            folder.mkdir(parents=True, exist_ok=True)
            pl.DataFrame(rows, schema=ROWS, orient="row").write_parquet(folder / f"{slug}.parquet")
    proved = {"error": 1.2e-05, "tolerance": 0.00026, "depth": 1253, "columns": 1277, "attention": "sdpa"}
    certificates = [
        {"road": "fork", "live": False, **proved, "seconds": 0.29, "tried": {"tree": f"off by 3.1 nats: {EVIL}"}},
        {"road": "step", "live": True, **proved, "seconds": 12.0, "tried": {}},
    ]
    about = {"parameters": 912_000, "dtype": "float32", "revision": "built-in", "hash": "sha256:1f9a"}
    about |= {"certificates": certificates}
    info = {
        "name": name, "config": {"name": name, "seed": 0, "agents": [MODEL], "note": EVIL},
        "config_hash": "9f2c01d4a7b3", "seed": 0,
        "command": "nextstate run configs/quickstart.yaml", "started": "2025-11-20T10:00:00+00:00",
        "finished": "2025-11-20T10:03:12+00:00", "seconds": 192.4,
        "versions": {"nextstate": "0.1.0", "torch": "2.9.0", "python": "3.11.2"},
        "hardware": {"cpu": "AMD EPYC", "cores": 2, "memory_gb": 8, "gpu": None},
        "agents": [
            {"name": a, "kind": "model" if a == MODEL else "reference", "device": "cpu"}
            | dict.fromkeys(("parameters", "dtype", "revision", "hash"))
            | (about if a == MODEL else {})
            for a in agents
        ],
        "settings": settings,
        "left_out": [{"agent": MODEL, "setting": "DFA-states=600", "reason": "26 of its symbols are not one token"}],
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(info))
    return path


@pytest.fixture(scope="session")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="session")
def many_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several questions a step, so that questions of an episode hang together."""
    return make_run(tmp_path_factory.mktemp("runs") / "many", specs((3, 5), (3,), (3,), (4,), 4), episodes=8, ask="all")
