"""Worlds compiled from TextWorld games do what TextWorld does: same commands, same facts, same sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextstate.envs import Automaton, make_game, unroll
from nextstate.envs.game import Reader
from nextstate.envs.textworld.generate import GenerationError, Recipe, make
from nextstate.envs.textworld.story import compile_story
from nextstate.envs.textworld.world import Fact, World

FIXED = (  # small enough to walk through by hand
    Recipe(rooms=1, objects=2, quest=2),
    Recipe(rooms=2, objects=2, quest=2),
    Recipe(rooms=2, objects=3, quest=2),
    Recipe(rooms=3, objects=3, quest=3),
    Recipe(challenge="coin_collector", level=3),
)


def recipes(rng: np.random.Generator) -> Iterator[tuple[Recipe, int]]:
    """Yield random recipes and seeds of all kinds of games, without end."""
    while True:
        seed = int(rng.integers(10_000))
        kind = rng.choice(["", "", "", "", "coin_collector", "treasure_hunter", "cooking", "simple"])
        if kind == "":
            rooms, objects = int(rng.integers(1, 6)), int(rng.integers(1, 9))
            theme = str(rng.choice(["house", "basic"]))
            yield Recipe(rooms=rooms, objects=objects, quest=int(rng.integers(1, 5)), theme=theme), seed
        elif kind == "cooking":
            skills = str(rng.choice(["", "cook", "cut", "open", "cook+cut+open"]))
            rooms, level = int(rng.choice([1, 6])), int(rng.integers(1, 4))
            yield Recipe(challenge=kind, rooms=rooms, level=level, skills=skills), seed
        elif kind == "simple":
            yield Recipe(challenge=kind), seed
        else:
            yield Recipe(challenge=kind, level=int(rng.integers(1, 8))), seed


def games(seed: int, count: int) -> Iterator[Any]:
    made = 0
    for recipe, number in recipes(np.random.default_rng(seed)):
        try:
            yield make(recipe, number)
        except GenerationError:
            continue  # some sizes cannot hold some quests
        made += 1
        if made == count:
            return


def plain(propositions: Any) -> set[Fact]:
    return {(p.name, *(v.name for v in p.arguments)) for p in propositions}


def facts_of(world: World, facts: int) -> set[Fact]:
    return {*world.fixed, *world.describe(facts)}


def walk_beside(game: Any, steps: int, rng: np.random.Generator) -> None:
    """Give the same random commands to a compiled world and to TextWorld's own logic, and compare after each."""
    from textworld.generator.game import GameProgression
    from textworld.generator.inform7 import Inform7Game

    world, progress, words = World.compile(game), GameProgression(game), Inform7Game(game)
    facts, done = world.start, 0
    for _ in range(steps):
        said = words.gen_commands_from_actions(progress.valid_actions)
        assert plain(progress.state.facts) == facts_of(world, facts)
        legal = world.legal(facts)
        assert sorted(world.commands[i].words for i in legal) == sorted(set(said))
        chosen = legal[int(rng.integers(len(legal)))]
        progress.update(progress.valid_actions[said.index(world.commands[chosen].words)])
        facts = world.after(facts, chosen)
        done = world.settle(facts, done)
        wins = sum(1 << k for k, q in enumerate(progress.quest_progressions) if q.completed)
        if not any(q.failed for q in progress.quest_progressions):
            assert done & ~(1 << len(world.quests)) == wins
            assert world.points(done) == progress.score
    assert plain(progress.state.facts) == facts_of(world, facts)


def test_random_games_have_textworlds_own_facts_and_commands() -> None:
    rng = np.random.default_rng(1)
    for game in games(seed=0, count=8):
        walk_beside(game, 50, rng)


@pytest.mark.slow
def test_a_hundred_random_games_have_textworlds_own_facts_and_commands() -> None:
    rng = np.random.default_rng(2)
    for game in games(seed=1, count=100):
        walk_beside(game, 50, rng)


def walk_beside_the_compiled_game(recipe: Recipe, seed: int, steps: int, rng: np.random.Generator) -> None:
    """Give the same random commands to a compiled world and to the Z-machine, whose facts TextWorld tracks."""
    import textworld

    game = make(recipe, seed)
    story, world = compile_story(recipe, seed), World.compile(game)
    game.save(str(story.with_suffix(".json")))  # TextWorld looks for its metadata there
    env = textworld.start(str(story), textworld.EnvInfos(facts=True, admissible_commands=True, score=True))
    try:
        state, facts, done = env.reset(), world.start, 0
        for _ in range(steps):
            assert plain(state["_facts"]) == facts_of(world, facts)
            legal = world.legal(facts)
            assert sorted({world.commands[i].words for i in legal}) == state["admissible_commands"]
            chosen = legal[int(rng.integers(len(legal)))]
            state, score, over = env.step(world.commands[chosen].words)
            facts = world.after(facts, chosen)
            done = world.settle(facts, done)
            assert (score, over) == (world.points(done), world.won(done) or world.lost(done)), world.commands[chosen]
            if over:
                break
        assert plain(state["_facts"]) == facts_of(world, facts)
    finally:
        env.close()


@pytest.mark.filterwarnings("ignore:Game .* is not fully supported")
def test_the_compiled_game_has_the_same_facts_commands_and_score() -> None:
    rng = np.random.default_rng(3)
    for recipe in (Recipe(rooms=2, objects=3, quest=2), Recipe(challenge="cooking", rooms=1, level=1)):
        walk_beside_the_compiled_game(recipe, 1, 50, rng)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Game .* is not fully supported")
def test_a_hundred_compiled_games_have_the_same_facts_commands_and_score() -> None:
    rng, made = np.random.default_rng(4), 0
    for recipe, seed in recipes(np.random.default_rng(5)):
        try:
            make(recipe, seed)
        except GenerationError:
            continue
        walk_beside_the_compiled_game(recipe, seed, 50, rng)
        made += 1
        if made == 100:
            return


def enumerate_by_hand(game: Any) -> tuple[int, int]:
    """Count states and transitions over sets of TextWorld's own facts, with its own rules and events."""
    from textworld.generator.inform7 import Inform7Game

    rules, constants = list(game.kb.rules.values()), game.kb.types.constants_mapping
    words = Inform7Game(game)
    first = game.world.state.copy()
    seen, queue, transitions = {(frozenset(first.facts), frozenset[int]())}, [(first, frozenset[int]())], 0
    goal = {k for k, q in enumerate(game.quests) if q.win_events and not q.optional}
    while queue:
        state, done = queue.pop()
        if -1 in done or (goal and goal <= done):
            continue
        given = set()
        for action in state.all_applicable_actions(rules, constants):
            (command,) = words.gen_commands_from_actions([action])
            if command in given:
                continue
            given.add(command)
            transitions += 1
            after = state.copy()
            after.apply(action)
            then = set(done)
            if set(after.facts) != set(state.facts):
                for k, quest in enumerate(game.quests):
                    if k in done:
                        continue
                    if any(e.is_triggering(after) for e in quest.fail_events):
                        then.add(-1)
                    elif any(e.is_triggering(after) for e in quest.win_events):
                        then.add(k)
            key = (frozenset(after.facts), frozenset(then))
            if key not in seen:
                seen.add(key)
                queue.append((after, frozenset(then)))
    return len(seen), transitions


@pytest.mark.parametrize("recipe", FIXED, ids=lambda r: f"{r.challenge or 'made'}-{r.rooms}-{r.objects}")
def test_sizes_are_those_of_an_independent_enumeration(recipe: Recipe) -> None:
    game = make(recipe, 3)
    world = World.compile(game)
    assert world.size() == enumerate_by_hand(game)


def test_the_automaton_of_a_game_has_its_size_and_plays_its_episodes(tmp_path: Path) -> None:
    game = make_game("TextWorld", rooms=2, objects=3, quest=2, games=2)
    for index, world in enumerate(game.worlds):
        automaton = Automaton.explore(game, start=game.start(index))
        assert (automaton.n_states, automaton.n_transitions) == world.size() == (world.n_states, world.n_transitions)
        automaton.save(tmp_path / "table.json")
        again = Automaton.load(tmp_path / "table.json")
        assert (again.states, again.legal, again.targets) == (automaton.states, automaton.legal, automaton.targets)
        small = automaton.minimal()
        assert small.n_states <= automaton.n_states
        small.save(tmp_path / "minimal.json")
        assert Automaton.load(tmp_path / "minimal.json").targets == small.targets
        for seed in range(40):
            if game.initial(np.random.default_rng(seed)).world is world:
                one, two = unroll(game, seed, 12, ask="all"), unroll(automaton, seed, 12, ask="all")
                assert one.transcripts == two.transcripts
                assert one.beliefs("ideal") == two.beliefs("ideal")


def test_worlds_survive_json() -> None:
    for game in games(seed=5, count=4):
        world = World.compile(game)
        again = World.from_json(json.loads(json.dumps(world.to_json())))
        for name in ("facts", "fixed", "start", "commands", "variables", "quests", "walkthrough", "names", "types"):
            assert getattr(again, name) == getattr(world, name), name


def test_variables_have_one_value_each_and_tell_states_apart() -> None:
    rng = np.random.default_rng(3)
    for game in games(seed=7, count=5):
        world = World.compile(game)
        facts = world.start
        for _ in range(60):
            full = world.full(facts)
            for variable in world.variables:
                assert (full & variable.mask).bit_count() == 1, variable
                assert full >> variable.bits[world.value(variable, facts)] & 1
            legal = world.legal(facts)
            facts = world.after(facts, legal[int(rng.integers(len(legal)))])


@pytest.mark.parametrize("settings", [{"rooms": 2, "objects": 4}, {"rooms": 4, "objects": 6}, {"challenge": "cooking"}])
def test_the_reader_knows_what_was_told_and_never_rules_out_the_truth(settings: dict[str, Any]) -> None:
    game = make_game("TextWorld", **settings, games=3)
    for seed in range(25):
        episode = unroll(game, seed, 20, ask="all")
        for step, beliefs in zip(episode.steps, episode.beliefs("ideal"), strict=True):
            for question, belief in zip(step.questions, beliefs, strict=True):
                assert belief[question.truth] > 0, (seed, step.action, question)
                assert sum(belief) == pytest.approx(1)


def test_what_stands_in_the_outcome_is_determined_afterwards() -> None:
    """Every sentence of an outcome is one that the reader can complete: words and knowledge are of one piece."""
    game = make_game("TextWorld", rooms=3, objects=6, games=6)
    for seed in range(30):
        episode = unroll(game, seed, 15, ask="all")
        reader: Reader = game.reader(episode.start)
        for now, then in zip(episode.steps, episode.steps[1:], strict=False):
            reader.observe(now.action)
            if game.command(then.state, then.action) not in ("look", "inventory"):
                continue
            ahead: Reader = game.reader(episode.start)
            for step in episode.steps[: episode.steps.index(then) + 1]:
                ahead.observe(step.action)
            for question in then.questions:
                sentence = f"{question.stem}{question.choices[question.truth]}."
                if sentence in now.outcome:
                    assert ahead.guess("ideal", question)[question.truth] == 1, (seed, sentence)


def test_a_way_not_taken_is_guessed_among_rooms_not_ruled_out() -> None:
    game = make_game("TextWorld", rooms=5, objects=2, quest=1, games=8)
    chances = set()
    for seed in range(60):
        episode = unroll(game, seed, 12, ask="all")
        for step, beliefs in zip(episode.steps, episode.beliefs("ideal"), strict=True):
            if game.command(step.state, step.action).startswith("go "):
                chances.add(round(max(beliefs[0]), 3))
    assert {0.25, 1.0} <= chances <= {0.25, round(1 / 3, 3), 0.5, 1.0}  # five rooms: 4, 3, 2 or 1 are left
