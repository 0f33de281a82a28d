"""Steps a second: our vector environment against Gymnasium's SyncVectorEnv over the same episodes, and single ones.

Peers: `gymnasium.vector.SyncVectorEnv` over our own single environments (the same observations and rewards, checked),
and, for the time to import and make, Gymnasium alone with CartPole. Ratios are of wall-clock time, rates of processor
time, so that whatever else runs on the machine moves them little.
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
from benchmarks.common import Result, compare, finish, parse

STEPS = 100
NUM_ENVS = 64
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Box", {}),
    ("Box", {"boxes": 10}),
    ("DFA", {}),
    ("DFA", {"states": 10}),
    ("Cycle", {}),
)
Answers = tuple[float, int]  # sum of rewards, and of the lengths of all observations


def label(name: str, settings: dict[str, Any], answer: str) -> str:
    """Name a case."""
    told = "".join(f" {key}={value}" for key, value in settings.items())
    return f"{name}{told} {answer}"


def one_answer(name: str, answer: str) -> Any:
    """Return an answer that is sometimes right."""
    return 0 if answer == "choice" else ("A" if name == "Box" else "a")


def vector_run(env: gym.vector.VectorEnv[Any, Any, Any], action: Any, episodes: int) -> Answers:
    """Play `episodes` whole episodes in each environment; the step that starts a new one is not counted as a step."""
    env.reset(seed=0)
    rewards, length = 0.0, 0
    for t in range(episodes * (STEPS + 1) - 1):
        shown, reward, _, _, _ = env.step(action)
        rewards += float(reward.sum())
        if t % 25 == 0:  # enough to tell a difference, too little to count
            length += sum(map(len, shown))
    return rewards, length


def against_sync(name: str, settings: dict[str, Any], answer: str, episodes: int, repeats: int) -> tuple[Result, float]:
    """Compare the two vector forms over the same episodes; also return our steps a second of processor time."""
    kwargs = {"num_envs": NUM_ENVS, "steps": STEPS, "answer": answer, **settings}
    mine = gym.make_vec(f"nextstate/{name}-v0", **kwargs)
    theirs = gym.make_vec(f"nextstate/{name}-v0", vectorization_mode="sync", **kwargs)
    each = one_answer(name, answer)
    action = np.full(NUM_ENVS, each) if answer == "choice" else (each,) * NUM_ENVS
    taken = []

    def ours() -> Answers:
        begun = process_time()
        answers = vector_run(mine, action, episodes)
        taken.append(process_time() - begun)
        return answers

    result = compare(
        f"{label(name, settings, answer)}, against SyncVectorEnv",
        ours,
        lambda: vector_run(theirs, action, episodes),
        lambda a, b: max(abs(a[0] - b[0]), abs(a[1] - b[1])),
        repeats,
    )
    return result, NUM_ENVS * STEPS * episodes / median(taken)


def single_rate(name: str, settings: dict[str, Any], answer: str, repeats: int) -> float:
    """Return steps a second of processor time of what `gym.make` returns, its wrappers and all resets included."""
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
    quick = parse(__doc__ or "").quick
    episodes, repeats = (1, 5) if quick else (3, 15)
    rates: dict[str, float] = {}
    results = []
    for name, settings in CASES:
        for answer in ("text", "choice"):
            what = label(name, settings, answer)
            result, rates[f"{what}: vector steps/s a core"] = against_sync(name, settings, answer, episodes, repeats)
            results.append(result)
            rates[f"{what}: single steps/s a core"] = single_rate(name, settings, answer, repeats)
    ours = "import nextstate; import gymnasium as gym; gym.make('nextstate/Box-v0')"
    theirs = "import gymnasium as gym; gym.make('CartPole-v1')"
    what = "import and make, against Gymnasium's CartPole"
    results.append(compare(what, fresh(ours), fresh(theirs), lambda a, b: float(a != b), repeats))
    rates["import and make: seconds"] = results[-1].ours_s
    finish("Stepping", results, ("gymnasium", "numpy"), rates)


if __name__ == "__main__":
    main()
