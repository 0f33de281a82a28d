"""Stepping environments: our vector environment against NumPy tables and Gymnasium's `SyncVectorEnv`.

    python -m benchmarks.stepping [--quick] [--out FILE]

All play the same episodes with the same answers; observations and rewards must agree. `SyncVectorEnv` steps our own
single environments. The tables do less than an environment: automata, start states and random numbers are given, and
there are no ceilings and no `info`; ours draws all this at `reset`, which is part of its time. The time to import the
package and make an environment is compared with Gymnasium alone and CartPole.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import gymnasium as gym
import numpy as np

import nextstate  # noqa: F401 - registers the environments
from benchmarks.common import Peer, Result, compare, finish, parse
from benchmarks.peers import tables
from benchmarks.peers.tables import Played
from nextstate.envs.game import Game
from nextstate.envs.games import make_game
from nextstate.envs.games.box import OBJECTS, Box
from nextstate.envs.games.machine import Place

STEPS = 100
NUM_ENVS = 64
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Box", {}),
    ("Box", {"boxes": 10}),
    ("DFA", {}),
    ("DFA", {"states": 10}),
    ("Cycle", {}),
)


def label(name: str, settings: dict[str, Any], answer: str) -> str:
    """Name a case."""
    return f"{name}{''.join(f' {key}={value}' for key, value in settings.items())}, answers as {answer}"


def one_answer(name: str, answer: str) -> Any:
    """Return an answer that is sometimes right."""
    return 0 if answer == "choice" else ("A" if name == "Box" else "a")


def play(env: gym.vector.VectorEnv[Any, Any, Any], action: Any, steps: int) -> Played:
    """Play one episode in each environment."""
    shown, _ = env.reset(seed=0)
    observations, rewards = [shown], []
    for _ in range(steps):
        shown, reward, *_ = env.step(action)
        observations.append(shown)
        rewards.append(reward)
    return Played(observations[:-1], np.stack(rewards))


def tabulated(game: Game, episodes: int, steps: int) -> Callable[[], Played]:
    """Return the job of the tables; what they are given is drawn here, as episodes of the seeds 0, 1, ... draw it."""
    generators = [np.random.default_rng(seed) for seed in range(episodes)]
    starts: list[Any] = [game.initial(rng) for rng in generators]
    draws = np.stack([rng.random((steps, 2)) for rng in generators])
    openings = [game.opening(start) for start in starts]
    if isinstance(game, Box):
        places, nouns = np.array(starts), OBJECTS[: game.objects]
        return lambda: tables.play_box(places, game.boxes, nouns, openings, draws, 0)
    automata = automata_of(starts)
    return lambda: tables.play_dfa(automata, openings, draws, 0)


def automata_of(starts: list[Place]) -> tables.Automata:
    """Return the automata of walks as arrays."""
    machines = [start.machine for start in starts]
    edges = max(len(row) for machine in machines for row in machine.table)
    padded = [[[*row, *[(0, 0)] * (edges - len(row))] for row in machine.table] for machine in machines]
    action, target = np.moveaxis(np.array(padded), -1, 0)
    degree = np.array([[len(row) for row in machine.table] for machine in machines])
    names = [m.states for m in machines], [m.actions for m in machines]
    return tables.Automata(target, action, degree, np.array([start.at for start in starts]), *names)


def difference(mine: Played, theirs: Played) -> float:
    """Return the largest difference of a reward; infinite where an observation differs."""
    return float("inf") if mine.shown != theirs.shown else float(np.abs(mine.rewards - theirs.rewards).max())


def compared(name: str, settings: dict[str, Any], answer: str, repeats: int) -> list[Result]:
    """Compare a vector environment with its peers."""
    kwargs = {"num_envs": NUM_ENVS, "steps": STEPS, "answer": answer, **settings}
    mine = gym.make_vec(f"nextstate/{name}-v0", **kwargs)
    sync = gym.make_vec(f"nextstate/{name}-v0", vectorization_mode="sync", **kwargs)
    each = one_answer(name, answer)
    action = np.full(NUM_ENVS, each) if answer == "choice" else (each,) * NUM_ENVS
    peers: list[Peer[Any]] = [Peer("Gymnasium's SyncVectorEnv", "usual", lambda: play(sync, action, STEPS))]
    if answer == "choice" and name in ("Box", "DFA"):
        work = tabulated(make_game(name, **settings), NUM_ENVS, STEPS)
        peers.insert(0, Peer("NumPy tables, automata and draws given", "strongest", work))
    return compare(label(name, settings, answer), lambda: play(mine, action, STEPS), peers, difference, repeats)


def single_rate(name: str, settings: dict[str, Any], answer: str, repeats: int) -> float:
    """Return steps a second of CPU time of what `gym.make` returns, its wrappers and all resets included."""
    env = gym.make(f"nextstate/{name}-v0", steps=STEPS, answer=answer, **settings)
    action, taken = one_answer(name, answer), []
    for _ in range(repeats):
        begun = process_time()
        for seed in range(20):
            env.reset(seed=seed)
            done = False
            while not done:
                done = env.step(action)[2]
        taken.append(process_time() - begun)
    return 20 * STEPS / median(taken)


def fresh(code: str) -> Callable[[], int]:
    """Return a job that runs `code` in a new Python."""
    return lambda: subprocess.run([sys.executable, "-c", code], check=True).returncode


def main() -> None:
    """Measure and print."""
    args = parse(__doc__ or "")
    repeats = 3 * args.repeats  # each takes a tenth of a second
    rates: dict[str, float] = {}
    results: list[Result] = []
    for name, settings in CASES:
        for answer in ("text", "choice"):
            what = label(name, settings, answer)
            results += compared(name, settings, answer, repeats)
            rates[f"{what}: vector steps/s"] = NUM_ENVS * STEPS / results[-1].ours_s
            rates[f"{what}: single steps/s"] = single_rate(name, settings, answer, repeats)
    ours = fresh("import nextstate; import gymnasium as gym; gym.make('nextstate/Box-v0')")
    theirs = fresh("import gymnasium as gym; gym.make('CartPole-v1')")
    cart_pole: Peer[int] = Peer("Gymnasium's CartPole", "usual", theirs)
    results += compare("import and make", ours, [cart_pole], lambda a, b: float(a != b), args.repeats)
    finish(args, "stepping", results, ("gymnasium", "numpy"), rates)


if __name__ == "__main__":
    main()
