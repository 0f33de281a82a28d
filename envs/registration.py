"""Gymnasium ids for every game in the registry."""

from __future__ import annotations

import gymnasium as gym

from nextstate.envs.games import GAMES


def register_environments() -> None:
    """Register `nextstate/{game}-v0` (prediction) and `nextstate/{game}Play-v0` for every game; again is no harm."""
    for name in GAMES:
        if f"nextstate/{name}-v0" not in gym.registry:
            gym.register(
                f"nextstate/{name}-v0",
                entry_point="nextstate.envs.environments:PredictionEnv",
                vector_entry_point="nextstate.envs.vector:PredictionVectorEnv",
                kwargs={"game": name},
            )
        if f"nextstate/{name}Play-v0" not in gym.registry:
            gym.register(
                f"nextstate/{name}Play-v0", entry_point="nextstate.envs.environments:PlayEnv", kwargs={"game": name}
            )
