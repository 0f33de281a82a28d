"""Registration of all games as Gymnasium environments."""

from __future__ import annotations

import gymnasium as gym

from nextstate.envs.games import game_names


def register_environments() -> None:
    """Register `nextstate/{game}-v0` (prediction) and `nextstate/{game}Play-v0` for every game not yet registered.

    Games of other packages are imported when one of their environments is created.
    """
    for name in game_names():
        predict, play = f"nextstate/{name}-v0", f"nextstate/{name}Play-v0"
        if predict not in gym.registry:
            gym.register(
                predict,
                entry_point="nextstate.envs.environments:PredictionEnv",
                vector_entry_point="nextstate.envs.vector:PredictionVectorEnv",
                kwargs={"game": name},
            )
        if play not in gym.registry:
            gym.register(play, entry_point="nextstate.envs.environments:PlayEnv", kwargs={"game": name})
