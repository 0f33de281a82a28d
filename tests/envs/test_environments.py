"""The Gymnasium environments: their contract, their words and their numbers, for every game."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from corridor import register
from gymnasium.utils.env_checker import check_env

import nextstate
from nextstate.envs import (
    GAMES,
    GameError,
    PlayEnv,
    PredictionEnv,
    make_game,
    own_accuracy,
    register_environments,
    unroll,
)
from nextstate.envs.aims import Aim, draw_goal, leads, plan, reply, shortest, words
from nextstate.envs.settings import listed

ROOT = Path(nextstate.__file__).parent.parent
HEAVY = ("torch", "transformers", "nnsight", "polars", "plotly", "wandb", "scipy", "sklearn")
SETTINGS = {"Box": {"boxes": 3, "feedback": "inline"}, "DFA": {"kind": "state-state"}, "Cycle": {}, "FruitStore": {}}


def prediction(name: str, **kwargs: object) -> PredictionEnv:
    env = gym.make(f"nextstate/{name}-v0", **kwargs).unwrapped
    assert isinstance(env, PredictionEnv)
    return env


def play(name: str, **kwargs: object) -> PlayEnv:
    env = gym.make(f"nextstate/{name}Play-v0", **kwargs).unwrapped
    assert isinstance(env, PlayEnv)
    return env


def run(code: str, **environment: str) -> str:
    """Run `code` in a fresh Python and return what it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("kwargs", [{}, {"answer": "choice"}, {"steps": 1, "render_mode": "ansi"}])
def test_check_env_is_silent_for_prediction(name: str, kwargs: dict[str, object]) -> None:
    check(f"nextstate/{name}-v0", kwargs)
    check(f"nextstate/{name}-v0", {**kwargs, **SETTINGS.get(name, {})})


def test_check_env_is_silent_for_play(name: str) -> None:
    check(f"nextstate/{name}Play-v0", {})
    check(f"nextstate/{name}Play-v0", {"render_mode": "ansi", **SETTINGS.get(name, {})})


def check(env_id: str, kwargs: dict[str, object]) -> None:
    env = gym.make(env_id, **kwargs)
    assert gym.spec(gym.spec(env_id).id)
    again = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    assert again.kwargs == env.spec.kwargs == json.loads(json.dumps(env.spec.kwargs))
    assert gym.make(again).reset(seed=4)[0] == env.reset(seed=4)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


def test_every_game_is_registered_once_and_again_is_no_harm() -> None:
    ids = {f"nextstate/{name}{kind}-v0" for name in GAMES for kind in ("", "Play")}
    assert {i for i in gym.registry if i.startswith("nextstate/")} == ids
    register_environments()


def test_an_episode_is_the_unrolled_one(name: str) -> None:
    env = prediction(name)
    rng = np.random.default_rng(0)
    for seed in range(5):
        shown, info = env.reset(seed=seed)
        episode = unroll(make_game(name), seed, env.steps)
        assert env.episode == episode
        lookup, ceilings = episode.beliefs("lookup"), episode.ceilings
        for t, step in enumerate(episode.steps):
            question = step.questions[0]
            assert shown == episode.prompt(t)
            assert info["choices"] == question.choices
            assert info["step"] == t
            index = int(rng.integers(len(question.choices)))
            shown, reward, terminated, truncated, info = env.step(question.choices[index])
            assert reward == float(index in question.accepted) == float(info["correct"])
            assert (terminated, truncated) == (t == env.steps - 1, False)
            assert info["answer"] == question.answer
            assert info["accepted"] == question.accepted
            assert info["state"] == dict(env.game.values(step.next_state))
            assert info["lookup"] == own_accuracy(lookup[t][0], question.accepted) <= info["ceiling"] + 1e-9
            assert info["ceiling"] == ceilings[t][0]
            assert info["determined"] == (info["ceiling"] == 1)
            assert info["chance"] == len(question.accepted) / len(question.choices)
            assert not info["illegal"]
        assert shown == episode.transcripts[-1]
        assert (info["step"], info["choices"]) == (env.steps, ())


def test_text_and_choice_are_graded_alike_and_answers_change_nothing(name: str) -> None:
    words, index = prediction(name), prediction(name, answer="choice")
    rng = np.random.default_rng(1)
    _, info = words.reset(seed=7)
    assert index.reset(seed=7)[1] == info
    done = False
    while not done:
        i = int(rng.integers(len(info["choices"])))
        shown, reward, done, _, info = words.step(f" {info['choices'][i]}\n")
        assert index.step(np.int64(i)) == (shown, reward, done, False, info)


@pytest.mark.parametrize("answer", ["", " ", "no such thing", "ä\n", "A" * 1000, 3, None])
def test_an_answer_that_is_no_choice_is_recorded(name: str, answer: object) -> None:
    env = prediction(name)
    env.reset(seed=0)
    _, reward, _, _, info = env.step(answer)
    assert (reward, info["correct"], info["illegal"], info["step"]) == (0.0, False, True, 1)


@pytest.mark.parametrize("answer", [-1, 99, " A", None, 1.0])
def test_an_index_out_of_range_is_recorded(name: str, answer: object) -> None:
    env = prediction(name, answer="choice")
    env.reset(seed=0)
    _, reward, _, _, info = env.step(answer)
    assert (reward, info["correct"], info["illegal"], info["step"]) == (0.0, False, True, 1)


def test_a_reset_without_a_seed_draws_a_new_episode_that_can_be_named(name: str) -> None:
    env, twin = prediction(name), prediction(name)
    env.reset(seed=3)
    twin.reset(seed=3)
    seen = set()
    for _ in range(4):
        shown, _ = env.reset()
        assert twin.reset()[0] == shown
        assert env.episode == unroll(env.game, env.episode.seed, env.steps)
        seen.add(env.episode.seed)
    assert len(seen) == 4


def test_steps_and_resets_have_an_order() -> None:
    for env in (prediction("Box", steps=1), play("Box", steps=1)):
        with pytest.raises(gym.error.ResetNeeded):
            env.step("A")
        env.reset(seed=0)
        env.step("A")
        with pytest.raises(gym.error.ResetNeeded):
            env.step("A")


def test_render_shows_the_observation() -> None:
    for env in (prediction("Box", render_mode="ansi"), play("Box", render_mode="ansi")):
        shown, _ = env.reset(seed=0)
        assert env.render() == shown
        shown, *_ = env.step("A")
        assert env.render() == shown
    assert prediction("Box").render() is None


def test_spaces_admit_what_is_said(name: str) -> None:
    for env in (prediction(name, steps=None), play(name)):
        assert env.action_space.contains("Any printable ASCII: ~ !")
        assert env.action_space.contains("")
        assert env.observation_space.contains(env.reset(seed=0)[0])
    assert prediction(name, answer="choice").action_space.n == make_game(name).max_choices
    steps = make_game(name).max_steps or 200
    long = unroll(make_game(name), 0, steps)
    assert prediction(name, steps=steps).observation_space.contains(long.transcripts[-1])


@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        ("Box-v0", {"boxes": 27}, r"boxes=27 is not possible: expected a whole number from 2 to 26"),
        ("Box-v0", {"boxes": 4.0}, r"boxes=4\.0 .* whole number"),
        ("Box-v0", {"objects": 11}, r"objects=11 .* 1 to 10"),
        ("Box-v0", {"style": "verse"}, r"style='verse' .* paper, plain"),
        ("Box-v0", {"boxs": 3}, r"unknown setting 'boxs' of Box: .*did you mean 'boxes'"),
        ("Box-v0", {"steps": 0}, r"steps=0 is not possible: expected a whole number from 1 to"),
        ("Box-v0", {"steps": True}, r"steps=True"),
        ("Box-v0", {"answer": "speech"}, r"answer='speech' is not possible: expected one of text, choice"),
        ("Box-v0", {"feedback": "none"}, r"feedback='none' .* branch, inline"),
        ("DFA-v0", {"states": 27}, r"states=27 is not possible: expected a whole number from 2 to 26"),
        ("DFA-v0", {"states": 5, "edges": 12}, r"edges=12 is not possible: expected a whole number from 5 to 11"),
        ("DFA-v0", {"states": 5, "edges": 4}, r"edges=4 .* 5 to 11"),
        ("DFA-v0", {"states": 9, "actions_listed": 2}, r"actions_listed=2 .* at least"),
        ("DFA-v0", {"density": "high"}, r"density='high' .* min, middle, max"),
        ("DFA-v0", {"feedback": "branch"}, r"feedback='branch' .* inline"),
        ("Cycle-v0", {"period": 1}, r"period=1 .* 2 to 26"),
        ("FruitStore-v0", {"people": 4, "steps": 4}, r"steps=4 is not possible: expected a whole number from 1 to 3"),
        ("FruitStorePlay-v0", {"people": 22}, r"people=22 .* 2 to 21"),
        ("BoxPlay-v0", {"steps": -1}, r"steps=-1"),
    ],
)
def test_bad_input_is_named(env_id: str, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(GameError, match=message):
        gym.make(f"nextstate/{env_id}", **kwargs)
    if "Play" not in env_id:
        with pytest.raises(GameError, match=message):
            gym.make_vec(f"nextstate/{env_id}", num_envs=2, **kwargs)


def test_unknown_game_and_render_mode_are_named() -> None:
    with pytest.raises(GameError, match=r"there is no game 'Bx'; did you mean 'Box'"):
        PredictionEnv("Bx")
    with pytest.raises(GameError, match=r"render_mode='human' is not possible"):
        PredictionEnv("Box", render_mode="human")


def test_play_follows_the_game(name: str) -> None:
    env = play(name)
    rng = np.random.default_rng(0)
    for seed in range(5):
        shown, info = env.reset(seed=seed)
        state = env.state
        own = env.game.objective(state)
        assert shown.startswith(own or "Goal: ")
        assert shown.endswith("\n\n" + env.game.opening(state))
        for t in range(env.steps):
            legal = env.game.actions(state)
            assert info["admissible_commands"] == [env.game.command(state, a) for a in legal]
            i = int(rng.integers(len(legal)))
            after = env.game.transition(state, legal[i])
            typed = info["admissible_commands"][i]
            shown, reward, terminated, truncated, info = env.step(f"  {typed.upper().replace(' ', '   ')} ")
            assert env.state == after
            assert shown.startswith(env.game.narrate(state, legal[i], after))
            assert not info["illegal"]
            if own:
                reached = env.game.won(after)
                assert reward == env.game.points(after) - env.game.points(state)
            else:
                reached = env.game.values(after)[info["goal"][0]] == info["goal"][1]
                assert reward == float(reached)
            assert terminated == (reached or not env.game.actions(after))
            assert truncated == (not terminated and t == env.steps - 1)
            state = after
            if terminated or truncated:
                break


def test_play_tells_answers_where_feedback_is_inline() -> None:
    env = play("DFA", steps=5)
    _, info = env.reset(seed=1)
    told, _, _, _, after = env.step(info["admissible_commands"][0])
    action = info["admissible_commands"][0].removeprefix("take action ")
    assert told == f" Take action {action}, go to state {after['state']['state']}."


@pytest.mark.parametrize("command", ["", "dance", "move the hat", "ä"])
def test_an_illegal_command_changes_nothing_but_time(command: str) -> None:
    env = play("Box", steps=2)
    _, first = env.reset(seed=0)
    shown, reward, terminated, truncated, info = env.step(command)
    assert (shown, reward, terminated, truncated) == (" Nothing happens.", 0.0, False, False)
    assert info == {**first, "illegal": True}
    assert env.step(command)[3]


def test_the_goal_can_be_reached_in_time_and_is_told(name: str) -> None:
    game = make_game(name)
    steps = min(6, game.max_steps or 6)
    env = play(name, steps=steps)
    for seed in range(20):
        shown, info = env.reset(seed=seed)
        variable, value = info["goal"]
        assert value in shown.split("\n")[0]
        if not variable:  # an aim of its own, which takes as long as it takes
            assert leads(env.aim, plan(env.aim))
            continue
        assert info["state"][variable] != value
        # Breadth first, but only as far as the episode goes.
        frontier, found = {env.state}, False
        for _ in range(steps):
            frontier = {game.transition(s, a) for s in frontier for a in game.actions(s)}
            if any(game.values(s)[variable] == value for s in frontier):
                found = True
                break
            if len(frontier) > 2000:
                break
        assert found or len(frontier) > 2000


def test_play_sums_up_what_it_scores(name: str) -> None:
    env = play(name)
    rng = np.random.default_rng(2)
    for seed in range(4):
        _, info = env.reset(seed=seed)
        most = env.game.most_points(env.state) if env.game.objective(env.state) else 1.0
        assert (info["score"], info["max_score"], info["won"]) == (0.0, most, False)
        total, done = 0.0, False
        while not done:
            commands = info["admissible_commands"]
            _, reward, terminated, truncated, info = env.step(commands[int(rng.integers(len(commands)))])
            total, done = total + reward, terminated or truncated
            assert info["score"] == total
            assert info["won"] == (total == most)
        told = "".join(words(step) for step in env.episode.steps)
        assert env.episode.transcripts[-1] == env.episode.opening + told
        assert env.episode.seed == seed


def test_a_game_with_an_objective_is_played_for_its_points(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    env = PlayEnv("Corridor", steps=30, rooms=5)
    with pytest.raises(gym.error.ResetNeeded):
        _ = env.episode
    shown, info = env.reset(seed=0)
    start = env.state
    assert shown == f"Take both treasures.\n\n{env.game.opening(start)}"
    assert info["goal"] == ("", "Take both treasures.")
    assert (info["score"], info["max_score"], info["won"]) == (0.0, 2.0, False)
    scored = []
    for action in plan(env.aim):
        shown, reward, terminated, truncated, info = env.step(env.game.command(env.state, action))
        assert (reward == 1) == (action == "take")
        assert info["won"] == terminated == (not info["admissible_commands"])
        assert not truncated
        scored.append(reward)
    assert (sum(scored), info["score"], info["won"]) == (2.0, 2.0, True)
    with pytest.raises(gym.error.ResetNeeded):
        env.step("go east")


def test_a_game_with_an_objective_can_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    env = PlayEnv("Corridor", steps=30, rooms=3)
    env.reset(seed=0)
    terminated = False
    while not terminated:
        _, reward, terminated, _, info = env.step("go east")
    assert (reward, info["score"], info["won"], info["admissible_commands"]) == (0.0, 0.0, False, [])


def test_a_plan_is_as_short_as_can_be_and_only_a_walkthrough_that_wins_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch)
    for rooms, helpful in ((5, False), (5, True)):
        env = PlayEnv("Corridor", rooms=rooms, helpful=helpful)
        for seed in range(6):
            env.reset(seed=seed)
            fewest = shortest(env.aim)
            at = env.aim.start.at
            assert len(fewest) == 4 + min(abs(at - 1), abs(at - 3))  # to the nearer treasure, then to the other
            found = plan(env.aim)
            assert leads(env.aim, found)
            assert len(found) == (at + 5 if helpful else len(fewest))
            assert not leads(env.aim, found[:-1])
            assert not leads(env.aim, (*found, "west"))
            assert not leads(env.aim, ("take", *found))
    nowhere = Aim(env.game, env.aim.start, ("player", "Z"), "Goal: room Z")
    assert shortest(nowhere) is None
    with pytest.raises(GameError, match="no commands lead to 'Goal: room Z'"):
        plan(nowhere)


def test_a_reply_is_without_the_command_that_it_repeats() -> None:
    assert reply("take whisk", "\n\n> take whisk\nTaken.") == "Taken."
    assert reply("take whisk", "\n\n> Take whisk\n") == ""
    assert reply("next", " next door") == "next door"
    assert reply("take whisk", " Take whisk twice.") == "Take whisk twice."


def test_goals_are_in_the_games_own_words() -> None:
    said = {name: play(name).reset(seed=1)[0].split("\n")[0] for name in ("Box", "DFA", "Cycle", "FruitStore")}
    assert said == {
        "Box": "Goal: Ball is in the Box A.",
        "DFA": "Goal: go to state u.",
        "Cycle": "Goal: h",
        "FruitStore": "Goal: Dean can have the lime.",
    }


def test_where_nothing_can_differ_the_goal_is_what_is() -> None:
    class Still:
        """Never changes."""

        feedback = "branch"

        def actions(self, state: int) -> tuple[str, ...]:
            return ("wait",)

        def policy(self, state: int, u: float) -> str:
            return "wait"

        def transition(self, state: int, action: str) -> int:
            return state

        def values(self, state: int) -> dict[str, str]:
            return {"light": "on"}

        def questions(self, state: int, action: str, after: int) -> tuple[()]:
            return ()

    assert draw_goal(Still(), 0, 3, np.random.default_rng(0)) == (("light", "on"), "light: on")


DIGEST = """
import hashlib, gymnasium as gym, nextstate
from nextstate.envs import GAMES
said = []
for name in GAMES:
    for kind in ("", "Play"):
        env = gym.make(f"nextstate/{name}{kind}-v0")
        for seed in (0, 1, 2**40):
            said.append(repr(env.reset(seed=seed)))
            said.append(repr(env.reset()))
            said.append(repr(env.step("A")))
print(hashlib.sha256("".join(said).encode()).hexdigest())
"""


def test_seeds_hold_in_another_process() -> None:
    first = run(DIGEST, PYTHONHASHSEED="1")
    assert first == run(DIGEST, PYTHONHASHSEED="2")
    assert len(first.strip()) == hashlib.sha256().digest_size * 2


def test_importing_and_making_is_light() -> None:
    code = (
        "import sys, time; begun = time.perf_counter(); import nextstate; import gymnasium as gym; "
        "gym.make('nextstate/Box-v0'); print(time.perf_counter() - begun); "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    runs = [run(code).splitlines() for _ in range(3)]
    assert all(loaded == "[]" for _, loaded in runs)
    assert min(float(seconds) for seconds, _ in runs) < 0.7


def test_the_version_is_that_of_the_package() -> None:
    assert f'version = "{nextstate.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", GAMES)
def test_each_setting_is_told_with_its_range_and_its_meaning(name: str) -> None:
    for x in listed(GAMES[name]):
        assert x.meaning, x
        assert x.default is None or type(x.default).__name__ == x.type
        if whole := re.fullmatch(r"(\d+) to (\d+)", x.legal):
            for beyond in (int(whole[1]) - 1, int(whole[2]) + 1):
                with pytest.raises(GameError, match=f"{x.name}={beyond} is not possible"):
                    make_game(name, **{x.name: beyond})
        elif x.type == "int":
            assert x.name == "level"  # which only challenges have
