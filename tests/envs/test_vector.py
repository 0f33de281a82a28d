"""The batched environment is the single one, many times."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import nextstate  # noqa: F401 - registers the environments
from nextstate.envs import GameError, PredictionVectorEnv, make_game, unroll

N = 5


def actions(answer: str, infos: dict[str, object], rng: np.random.Generator) -> object:
    """Return one answer each: mostly a choice, sometimes none."""
    choices = [each or ("x",) for each in infos["choices"]]
    index = [int(rng.integers(len(each))) for each in choices]
    if answer == "choice":
        return np.array([i if rng.random() < 0.9 else 1 for i in index])
    return tuple(each[i] if rng.random() < 0.9 else "nonsense" for i, each in zip(index, choices, strict=True))


@pytest.mark.parametrize("answer", ["text", "choice"])
@pytest.mark.parametrize("settings", [{}, {"style": 1}, {"feedback": 1}])
def test_it_is_what_gymnasium_makes_of_single_environments(name: str, answer: str, settings: dict[str, int]) -> None:
    cls = type(make_game(name))
    kwargs = {key: getattr(cls, f"{key}s")[-1] for key in settings}
    steps = min(4, make_game(name).max_steps or 4)
    mine = gym.make_vec(f"nextstate/{name}-v0", num_envs=N, steps=steps, answer=answer, **kwargs)
    theirs = gym.make_vec(
        f"nextstate/{name}-v0", num_envs=N, vectorization_mode="sync", steps=steps, answer=answer, **kwargs
    )
    assert isinstance(mine, PredictionVectorEnv)
    assert isinstance(theirs, SyncVectorEnv)
    assert mine.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert mine.observation_space == theirs.observation_space
    assert mine.action_space == theirs.action_space
    rng = np.random.default_rng(0)
    for seed in (11, None, [4, 3, None, 1, 0]):
        got, expected = mine.reset(seed=seed), theirs.reset(seed=seed)
        same(got, expected)
        for _ in range(3 * (steps + 1)):  # three episodes, and the resets between them
            chosen = actions(answer, got[-1], rng)
            got, expected = mine.step(chosen), theirs.step(chosen)
            same(got, expected)
            assert all(mine.observation_space.spaces[i].contains(text) for i, text in enumerate(got[0]))
    mine.close()
    theirs.close()


def same(got: tuple[object, ...], expected: tuple[object, ...]) -> None:
    assert got[0] == expected[0]
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        assert data_equivalence(mine, theirs, exact=True), f"{mine}\n{theirs}"


def test_environment_i_has_seed_s_plus_i() -> None:
    env = gym.make_vec("nextstate/DFA-v0", num_envs=4, steps=6)
    shown, info = env.reset(seed=20)
    expected = [unroll(make_game("DFA"), 20 + i, 6) for i in range(4)]
    assert list(env.unwrapped.episodes) == expected
    assert shown == tuple(e.prompt(0) for e in expected)
    assert info["_choices"].all()


def test_what_is_returned_is_not_used_again() -> None:
    env = gym.make_vec("nextstate/Box-v0", num_envs=2, steps=3)
    env.reset(seed=0)
    _, rewards, ended, cut, info = env.step(("A", "A"))
    kept = rewards.copy(), ended.copy(), cut.copy(), info["ceiling"].copy(), info["_step"].copy()
    for array in (rewards, ended, cut, info["ceiling"], info["_step"]):
        array.fill(7)
    env.step(("A", "A"))
    env.reset(seed=0)
    again = env.step(("A", "A"))
    for old, new in zip(kept, (*again[1:4], again[4]["ceiling"], again[4]["_step"]), strict=True):
        assert np.array_equal(old, new)


def test_render_and_bad_input() -> None:
    env = gym.make_vec("nextstate/Box-v0", num_envs=2, render_mode="ansi")
    with pytest.raises(gym.error.ResetNeeded):
        env.step(("A", "A"))
    shown, _ = env.reset(seed=0)
    assert env.render() == shown
    with pytest.raises(GameError, match=r"actions=\('A',\) is not possible: expected 2 answers"):
        env.step(("A",))
    with pytest.raises(GameError, match=r"seed=\[1, 2, 3\] .* a list of 2"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(GameError, match=r"num_envs=0"):
        gym.make_vec("nextstate/Box-v0", num_envs=0)
    with pytest.raises(GameError, match="reset_mask"):
        env.reset(options={"reset_mask": np.array([True, False])})
    choice = gym.make_vec("nextstate/Box-v0", num_envs=2, answer="choice")
    choice.reset(seed=0)
    with pytest.raises(GameError, match="whole numbers"):
        choice.step(("A", "A"))
    assert choice.step(np.array([-1, 99]))[4]["illegal"].all()


def test_play_has_gymnasiums_own_vector_form(name: str) -> None:
    env = gym.make_vec(f"nextstate/{name}Play-v0", num_envs=3, steps=1)
    shown, info = env.reset(seed=0)
    assert all(text.startswith("Goal: ") or name == "TextWorld" for text in shown)  # which tells its own objective
    _, _, terminated, truncated, _ = env.step(tuple(commands[0] for commands in info["admissible_commands"]))
    assert (terminated | truncated).all()
    assert env.step(("", "", ""))[0] != shown
    env.close()
