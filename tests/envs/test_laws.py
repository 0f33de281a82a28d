"""What holds for every game in the registry."""

from __future__ import annotations

import math
import pickle
import re
from collections import defaultdict

import numpy as np
import pytest
from every_game import SMALL, label, variants
from hypothesis import given, settings
from hypothesis import strategies as st

from nextstate.envs import GAMES, Automaton, Episode, Game, Step, make_game, score, unroll
from nextstate.envs.game import Distribution, split

ALMOST_ONE = math.nextafter(1.0, 0.0)
units = st.floats(0, ALMOST_ONE)


@st.composite
def any_game(draw: st.DrawFn) -> Game:
    name = draw(st.sampled_from(sorted(GAMES)))
    cls = GAMES[name]
    size, style = draw(st.integers(2, 12)), draw(st.sampled_from(cls.styles))
    more = dict(SMALL.get(name, {}))
    if name == "DFA":
        kinds, densities = ["state-action", "state-state"], ["min", "middle", "max"]
        more = {"kind": draw(st.sampled_from(kinds)), "density": draw(st.sampled_from(densities))}
    if name == "Box":
        more = {"objects": draw(st.integers(1, 10))}
    return make_game(name, **{cls.size: size}, style=style, feedback=draw(st.sampled_from(cls.feedbacks)), **more)


def length(game: Game, steps: int) -> int:
    return min(steps, game.max_steps or steps)


@given(u=units, n=st.integers(1, 10**6))
def test_split_stays_below_n_and_leaves_a_draw(u: float, n: int) -> None:
    index, left = split(u, n)
    assert 0 <= index < n
    assert 0 <= left < 1


@given(n=st.integers(1, 10**6))
def test_split_of_the_largest_draw_is_the_last(n: int) -> None:
    assert split(ALMOST_ONE, n)[0] == n - 1


@settings(max_examples=60, deadline=None)
@given(game=any_game(), seed=st.integers(0, 2**32), draws=st.lists(units, min_size=1, max_size=6))
def test_the_policy_is_legal_and_transitions_are_pure(game: Game, seed: int, draws: list[float]) -> None:
    state = game.initial(np.random.default_rng(seed))
    for u in draws[: game.max_steps]:
        legal = game.actions(state)
        action = game.policy(state, u)
        assert action in legal
        assert game.policy(state, ALMOST_ONE) in legal
        before = hash(state), repr(state)
        after = game.transition(state, action)
        assert after == game.transition(state, action)
        assert (hash(state), repr(state)) == before
        state = after


@settings(max_examples=60, deadline=None)
@given(game=any_game(), seed=st.integers(0, 2**32))
def test_readers_believe_distributions_and_never_rule_out_what_is_right(game: Game, seed: int) -> None:
    episode = unroll(game, seed, length(game, 12), ask="all")
    for name in ("ideal", "chance", *game.shortcuts):
        for step, row in zip(episode.steps, episode.beliefs(name), strict=True):
            for question, belief in zip(step.questions, row, strict=True):
                assert len(belief) == len(question.choices) <= game.max_choices
                assert min(belief) >= 0
                assert math.isclose(sum(belief), 1)
                assert 0 <= score(belief, question.accepted) <= 1
                if name == "ideal":
                    assert sum(belief[i] for i in question.accepted) > 0


@settings(max_examples=60, deadline=None)
@given(game=any_game(), seed=st.integers(0, 2**32), ask=st.sampled_from([1, 2, "all"]))
def test_questions_and_transcripts_fit_together(game: Game, seed: int, ask: int) -> None:
    episode = unroll(game, seed, length(game, 8), ask=ask)
    transcripts = episode.transcripts
    assert len(transcripts) == len(episode.steps) + 1
    assert transcripts[0] == episode.opening
    for t, step in enumerate(episode.steps):
        possible = game.questions(step.state, step.action, step.next_state)
        assert step.questions
        assert set(step.questions) <= set(possible)
        assert len(step.questions) == (len(possible) if ask == "all" else min(ask, len(possible)))
        for i, question in enumerate(step.questions):
            assert question.truth in question.accepted
            assert question.accepted == tuple(sorted(set(question.accepted)))
            assert len(set(question.choices)) == len(question.choices)
            assert question.accepts(question.answer)
            assert question.accepts(question.choices[question.truth])
            assert not question.accepts("no such thing")
            prompt = episode.prompt(t, i)
            assert prompt.startswith(transcripts[t] + step.narration)
            assert prompt.endswith(question.stem)
            if game.feedback == "inline":
                assert transcripts[t + 1].startswith(prompt + question.choices[question.truth])


@settings(max_examples=30, deadline=None)
@given(game=any_game(), seed=st.integers(0, 2**32), steps=st.integers(1, 10))
def test_an_episode_is_its_seed_and_a_longer_one_begins_the_same(game: Game, seed: int, steps: int) -> None:
    steps = length(game, steps)
    episode = unroll(game, seed, steps)
    assert episode == unroll(game, seed, steps) == unroll(make_game(game.name, **game.settings), seed, steps)
    assert episode == pickle.loads(pickle.dumps(episode))
    for shorter in range(1, steps):
        assert episode.steps[:shorter] == unroll(game, seed, shorter).steps


@settings(max_examples=60, deadline=None)
@given(game=any_game(), seed=st.integers(0, 2**32), draws=st.lists(units, min_size=2, max_size=16))
def test_a_games_own_way_to_step_is_the_common_one(game: Game, seed: int, draws: list[float]) -> None:
    state = game.initial(np.random.default_rng(seed))
    for ask in (1, 2, 10**6):
        now = state
        for u, v in list(zip(draws, reversed(draws), strict=True))[: game.max_steps]:
            step = game.step(now, u, v, ask)
            assert step == Game.step(game, now, u, v, ask)
            assert type(step) is Step
            now = step.next_state


def test_all_reachable_states_keep_the_laws(small: Game) -> None:
    automaton = Automaton.explore(small, max_states=20_000)
    assert len(set(automaton.states)) == automaton.n_states
    for state, legal, targets in zip(automaton.states, automaton.legal, automaton.targets, strict=True):
        assert tuple(small.actions(state)) == legal  # the same order each time
        assert bool(legal) or small.max_steps is not None or small.objective(state)
        assert len(set(legal)) == len(legal)
        commands = [small.command(state, action) for action in legal]
        assert len({c.casefold() for c in commands}) == len(commands)
        assert all(c.isprintable() and c == " ".join(c.split()) for c in commands)
        copy = pickle.loads(pickle.dumps(state))
        assert copy == state
        assert hash(copy) == hash(state)
        for action, target in zip(legal, targets, strict=True):
            assert small.transition(copy, action) == automaton.states[target]
        if legal:
            assert all(small.policy(state, u) in legal for u in (0.0, 0.123, 0.5, 0.987, ALMOST_ONE))


def test_variables_are_those_of_the_start(small: Game) -> None:
    automaton = Automaton.explore(small, max_states=20_000)
    names = list(small.values(automaton.states[0]))
    assert all(list(small.values(state)) == names for state in automaton.states)
    for state, legal in zip(automaton.states, automaton.legal, strict=True):
        for action in legal:
            for question in small.questions(state, action, small.transition(state, action)):
                assert question.variable in names


# Elsewhere narrations tell the state, and the question is whether that is remembered.
@pytest.mark.parametrize("game", [g for g in variants(5) if g.feedbacks[0] == "inline"], ids=label)
def test_narration_keeps_the_answer_of_a_question_about_it(game: Game) -> None:
    for seed in range(50):
        for step in unroll(game, seed, 20).steps:
            words = step.narration.replace(",", " ").replace(".", " ").split()
            assert all(q.answer not in words for q in step.questions)


def test_the_ideal_reader_knows_the_transcript_only(small: Game) -> None:
    beliefs: dict[str, set[Distribution]] = defaultdict(set)
    together = 0
    game = small if small.name != "DFA" else make_game("DFA", states=3, actions_listed=2, kind=small.settings["kind"])
    for seed in range(2000):
        episode = unroll(game, seed, 2)
        for t, row in enumerate(episode.beliefs("ideal")):
            prompt = episode.prompt(t)
            if game.name == "DFA":  # which letters it drew is no matter, as long as they are told apart
                order = {letter: str(i) for i, letter in enumerate(dict.fromkeys(re.findall(r"\b[a-zA-Z]\b", prompt)))}
                prompt = re.sub(r"\b[a-zA-Z]\b", lambda found, to=order: to[found[0]], prompt)
            together += prompt in beliefs
            beliefs[prompt].add(row[0])
    if game.name != "FruitStore":  # names and fruits make too many openings there
        assert together > 500
    assert all(len(each) == 1 for each in beliefs.values())


def test_the_ideal_reader_scores_its_ceiling(game: Game) -> None:
    rng = np.random.default_rng(0)
    differences = []
    for seed in range(400):
        episode = unroll(game, seed, length(game, 12))
        rows = list(zip(episode.beliefs("ideal"), episode.steps, strict=True))
        ceiling = np.mean([score(belief[0], step.questions[0].accepted) for belief, step in rows])
        # The one choice that such a reader names: noise far below any real difference breaks ties.
        named = [int(np.argmax(np.array(belief[0]) + 1e-9 * rng.random(len(belief[0])))) for belief, _ in rows]
        hits = np.mean([i in step.questions[0].accepted for i, (_, step) in zip(named, rows, strict=True)])
        differences.append(hits - ceiling)
    error = np.std(differences) / math.sqrt(len(differences))
    assert abs(np.mean(differences)) <= 4 * error


def test_shortcuts_never_beat_the_ideal_reader(game: Game) -> None:
    episodes = [unroll(game, seed, length(game, 12)) for seed in range(300)]
    best = mean_score(episodes, "ideal")
    for name in ("chance", *game.shortcuts):
        assert mean_score(episodes, name) <= best + 0.02


def mean_score(episodes: list[Episode], name: str) -> float:
    return float(
        np.mean(
            [
                score(row[0], step.questions[0].accepted)
                for episode in episodes
                for row, step in zip(episode.beliefs(name), episode.steps, strict=True)
            ]
        )
    )
