"""TextWorld games: our tables and our logic against TextWorld's own environments, on the same commands.

    python -m benchmarks.textworld [--quick] [--out FILE]

Peers: `textworld.start` on the game's .json (its logic in Python) and on its .z8 (the compiled game through the
Z-machine, with facts tracked). Every state that the commands lead to is compared, fact by fact. A table step is one
command of an explored game; a replayed step also makes the words and every question. Memory is that of this process.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import textworld

import nextstate  # noqa: F401 - registers the environments
from benchmarks.common import Peer, compare, finish, parse
from nextstate.envs import Automaton, make_game, unroll
from nextstate.envs.game import Episode
from nextstate.envs.games.textworld import TextWorld
from nextstate.envs.textworld.generate import Recipe, make
from nextstate.envs.textworld.story import compile_story

STEPS = 50
Facts = list[frozenset[tuple[str, ...]]]  # those that can change, after each command


def resident() -> float:
    """Return the memory of this process in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def differing(ours: Facts, peers: Facts) -> float:
    """Return in how many states the facts differ."""
    return float(sum(a != b for a, b in zip(ours, peers, strict=True)))


def by_table(automaton: Automaton, episodes: Sequence[Episode]) -> list[int]:
    """Give every episode's commands to the table; return the states."""
    out, step = [], automaton.transition
    for episode in episodes:
        at: Any = 0
        for now in episode.steps:
            at = step(at, now.action)
            out.append(at)
    return out


def by_textworld(env: Any, commands: Sequence[Sequence[str]], changing: frozenset[tuple[str, ...]]) -> Facts:
    """Give every episode's commands to one of TextWorld's environments."""
    out: Facts = []
    for episode in commands:
        env.reset()
        for command in episode:
            state, _, _ = env.step(command)
            facts = frozenset((f.name, *(v.name for v in f.arguments)) for f in state["_facts"])
            out.append(facts & changing)
    return out


def main() -> None:
    """Run the comparisons."""
    args = parse(__doc__ or "")
    warnings.filterwarnings("ignore")
    count = 2 if args.quick else 10
    game = make_game("TextWorld", states=400, games=1)
    assert isinstance(game, TextWorld)
    world = game.worlds[0]
    automaton = Automaton.explore(game, start=game.start(0))
    episodes = [unroll(game, seed, STEPS) for seed in range(count)]
    commands = [[game.command(s.state, s.action) for s in e.steps] for e in episodes]
    changing = frozenset(world.facts)
    told = [frozenset(world.describe(s.facts)) for s in automaton.states]  # type: ignore[attr-defined]
    story = compile_story(Recipe(**world.recipe), world.seed)
    logic_file = story.with_suffix(".peer.json")
    make(Recipe(**world.recipe), world.seed).save(str(logic_file))
    infos = textworld.EnvInfos(facts=True, admissible_commands=True)
    logic, machine = (textworld.start(str(path), infos) for path in (logic_file, story))
    peers = [
        Peer("TextWorld's logic", "usual", lambda: by_textworld(logic, commands, changing)),
        Peer("TextWorld's environment (Z-machine)", "usual", lambda: by_textworld(machine, commands, changing)),
    ]

    def with_words() -> Facts:
        return [
            frozenset(world.describe(s.next_state.facts))  # type: ignore[attr-defined]
            for seed in range(count)
            for s in unroll(game, seed, STEPS, ask="all").steps
        ]

    results = [
        *compare("TextWorld, commands by table", lambda: [told[at] for at in by_table(automaton, episodes)], peers,
                 differing, args.repeats),
        *compare("TextWorld, commands with words and all questions", with_words, peers, differing, args.repeats),
    ]  # fmt: skip
    for peer in (logic, machine):
        peer.close()
    env = gym.make("nextstate/TextWorld-v0", rooms=3, objects=5, quest=4, games=20, disable_env_checker=True)
    for seed in range(500):
        env.reset(seed=seed)
    before = resident()
    for seed in range(500, 2500):
        env.reset(seed=seed)
    grown = resident() - before
    rates = {
        "TextWorld, memory grown over 2,000 resets, MB": grown,
        "TextWorld, commands by table: steps/s": count * STEPS / results[0].ours_s,
        "TextWorld, commands with words and all questions: steps/s": count * STEPS / results[-1].ours_s,
    }
    finish(args, "textworld", results, ("textworld", "gymnasium"), rates)


if __name__ == "__main__":
    main()
