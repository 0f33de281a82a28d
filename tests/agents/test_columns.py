"""Questions and answers in columns, against rows made one by one from the episodes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import polars as pl
import pytest

from nextstate.agents.agent import Agent, ContextError, Prediction, Predictions, Prompt, from_belief
from nextstate.agents.columns import Asked, answer_frame, question_frame
from nextstate.agents.reference import Reference
from nextstate.agents.rollout import episodes_of, live, replay
from nextstate.analysis.predict.tables import ANSWERS, QUESTIONS
from nextstate.envs import make_game
from nextstate.envs.game import Distribution, Episode, Game, uniform
from nextstate.envs.rules import own_accuracy

GAMES: list[tuple[str, dict[str, Any], int, Any]] = [
    ("Box", {"boxes": 3}, 5, 1),
    ("Box", {"boxes": 4, "feedback": "inline", "style": "plain"}, 4, 2),
    ("DFA", {"states": 5}, 9, 1),
    ("DFA", {"states": 6, "kind": "state-state", "generator": "paper"}, 9, 1),
    ("Cycle", {"period": 4}, 9, 1),
    ("FruitStore", {"people": 5}, 4, "all"),
    ("FruitStore", {"people": 4, "feedback": "inline", "generator": "paper"}, 3, 1),
    ("TextWorld", {"rooms": 2, "objects": 2, "games": 2}, 4, "all"),
]


@pytest.fixture(params=GAMES, ids=lambda g: f"{g[0]}-{'-'.join(map(str, g[1].values()))}-{g[3]}")
def played(request: pytest.FixtureRequest) -> tuple[Game, list[Episode]]:
    name, settings, steps, ask = request.param
    game = make_game(name, **settings)
    return game, episodes_of(game, range(40, 52), steps, ask)


def belief_of(episode: Episode, name: str, step: int, question: int) -> Distribution:
    """Read an episode for one question alone."""
    asked = episode.steps[step].questions[question]
    if name == "chance":
        return uniform(len(asked.choices))
    reader = episode.game.reader(episode.start)
    for t in range(step + 1):
        reader.observe(episode.steps[t].action)
        if episode.game.feedback == "inline":
            for q in episode.steps[t].questions[: question if t == step else None]:
                reader.observe_answer(q.truth)
    return reader.lookup(asked) if name == "lookup" else reader.guess(name, asked)


def ceiling_of(episode: Episode, step: int, question: int) -> float:
    reader = episode.game.reader(episode.start)
    for t in range(step + 1):
        reader.observe(episode.steps[t].action)
        if episode.game.feedback == "inline":
            for q in episode.steps[t].questions[: question if t == step else None]:
                reader.observe_answer(q.truth)
    return reader.ceiling(episode.steps[step].questions[question])


def places(episodes: Sequence[Episode]) -> Iterator[tuple[Episode, int, int]]:
    for episode in episodes:
        for t, step in enumerate(episode.steps):
            for q in range(len(step.questions)):
                yield episode, t, q


def question_row(episode: Episode, t: int, q: int) -> dict[str, Any]:
    step = episode.steps[t]
    asked = step.questions[q]
    ceiling = ceiling_of(episode, t, q)
    return {
        "episode": episode.seed, "step": t + 1, "question": q, "variable": asked.variable, "stem": asked.stem,
        "choices": list(asked.choices), "truth": asked.choices[asked.truth].strip(),
        "accepted": [asked.choices[i].strip() for i in asked.accepted],
        "lookup": own_accuracy(belief_of(episode, "lookup", t, q), asked.accepted), "ceiling": ceiling,
        "determined": ceiling == 1, "chance": len(asked.accepted) / len(asked.choices),
        "states": episode.game.size_of(episode.start), "prompt": episode.prompt(t, q), "narration": step.narration,
        "closing": asked.closing, "outcome": step.outcome,
    }  # fmt: skip


def answer_row(episode: Episode, t: int, q: int, found: Prediction) -> dict[str, Any]:
    asked = episode.steps[t].questions[q]
    best = max(found.logprobs[i] for i in asked.accepted)
    return {
        "episode": episode.seed, "step": t + 1, "question": q, "greedy": found.answer,
        "greedy_correct": found.greedy in asked.accepted, "choice": asked.choices[found.choice].strip(),
        "choice_correct": found.choice in asked.accepted, "choice_token_correct": found.choice_token in asked.accepted,
        "choice_byte_correct": found.choice_byte in asked.accepted,
        "logprobs": np.array(found.logprobs, dtype=np.float32).tolist(),
        "p_accepted": pytest.approx(min(1.0, sum(math.exp(found.logprobs[i]) for i in asked.accepted)), rel=1e-14),
        "rank": 1 + sum(x > best for x in found.logprobs), "prompt_tokens": found.prompt_tokens,
    }  # fmt: skip


def without_agent(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: kind for name, kind in schema.items() if name not in ("agent", "incomplete")}


def same_schema(frame: pl.DataFrame, schema: dict[str, Any]) -> None:
    assert frame.schema == pl.Schema(schema)


def test_questions_are_those_of_the_episodes_one_by_one(played: tuple[Game, list[Episode]]) -> None:
    _, episodes = played
    frame = question_frame(Asked.all_of(episodes), ("ideal", "chance"))
    same_schema(frame, QUESTIONS)
    assert frame.rows(named=True) == [question_row(*place) for place in places(episodes)]


def test_reference_agents_answer_as_their_beliefs_say_one_by_one(played: tuple[Game, list[Episode]]) -> None:
    game, episodes = played
    shared = Asked.all_of(episodes)
    ties = 0
    for name in ("ideal", "lookup", "chance", *game.shortcuts):
        expected = []
        for episode, t, q in places(episodes):
            belief = belief_of(episode, name, t, q)
            tie = crc32(f"{name} {episode.seed} {t} {q}".encode()) / 2**32
            found = from_belief(belief, episode.steps[t].questions[q], tie)
            expected.append(answer_row(episode, t, q, found))
            ties += belief.count(max(belief)) > 1
        frame = replay(Reference(name), shared).frame
        same_schema(frame, without_agent(ANSWERS))
        assert frame.rows(named=True) == expected
    assert ties > 20


def test_the_last_step_alone_is_asked_about_in_cells() -> None:
    episodes = episodes_of(make_game("Box", boxes=3), range(5), 4, "all")
    asked = Asked.all_of(episodes, "cells")
    assert [(p.episode.seed, p.step, p.question) for p in asked] == [(s, 3, q) for s in range(5) for q in range(3)]
    assert replay(Reference("ideal"), episodes, "cells").frame.equals(replay(Reference("ideal"), asked).frame)


def test_no_questions_make_tables_without_rows() -> None:
    none = Asked([])
    same_schema(question_frame(none), QUESTIONS)
    same_schema(answer_frame(none, Predictions.of(none, [])), without_agent(ANSWERS))
    same_schema(replay(Reference("ideal"), []).frame, without_agent(ANSWERS))


class Forgetful(Agent):
    """Writes what it likes; its context holds only questions of the first `steps` steps."""

    name = kind = "forgetful"

    def __init__(self, steps: int, told: bool) -> None:
        self.steps, self.told = steps, told

    def predict(self, prompts: Sequence[Prompt]) -> list[Prediction]:
        if late := tuple(i for i, p in enumerate(prompts) if p.step >= self.steps):
            raise ContextError(f"{len(late)} prompts are too long", late)
        return [self._answer(p) for p in prompts]

    def _answer(self, prompt: Prompt) -> Prediction:
        rng = np.random.default_rng([prompt.episode.seed, prompt.step, prompt.question])
        n = len(prompt.asked.choices)
        logprobs = tuple(np.log(rng.dirichlet(np.ones(n))).tolist())
        greedy, *choices = (int(rng.integers(-1, n)), *rng.integers(0, n, 3).tolist())
        answer = prompt.asked.choices[greedy].strip() if greedy >= 0 else "who knows"
        return Prediction(answer, greedy, *choices, logprobs, 7 * prompt.step if self.told else None)


@pytest.mark.parametrize("told", [True, False])
def test_answers_as_a_list_make_the_same_rows_and_what_is_too_long_is_left_out(
    played: tuple[Game, list[Episode]], told: bool
) -> None:
    _, episodes = played
    agent = Forgetful(2, told)
    found = replay(agent, episodes)
    kept = [place for place in places(episodes) if place[1] < 2]
    assert found.left_out.endswith("prompts are too long")
    assert found.rows == [answer_row(*place, agent._answer(Prompt(*place))) for place in kept]
    nothing = replay(Forgetful(0, told), episodes)
    assert (len(nothing.frame), nothing.left_out != "") == (0, True)
    same_schema(nothing.frame, without_agent(ANSWERS))


def test_some_written_answers_beside_those_that_are_choices() -> None:
    asked = Asked.all_of(episodes_of(make_game("DFA", states=4), range(3), 5))
    found = Reference("ideal").predict(asked)
    greedy = found.greedy.copy()
    greedy[[2, 7]] = -1
    mixed = Predictions(asked.questions, greedy, found.choice, found.choice_token, found.choice_byte, found.logprobs,
                        {2: "nowhere", 7: " a"})  # fmt: skip
    frame = answer_frame(asked, mixed)
    assert frame["greedy"].to_list() == [p.answer for p in mixed]
    assert frame["greedy"][2] == "nowhere"
    assert frame["greedy_correct"].to_list() == [
        p.greedy in q.accepted for p, q in zip(mixed, asked.questions, strict=True)
    ]


def test_live_answers_are_those_of_replay() -> None:
    for name, settings, steps in (
        ("DFA", {"states": 4}, 6),
        ("Box", {"boxes": 3}, 4),
        ("FruitStore", {"people": 4}, 3),
    ):
        game = make_game(name, **settings)
        for belief in ("ideal", "chance"):
            lived = live(Reference(belief), game, range(7, 15), steps)
            assert lived.frame.equals(replay(Reference(belief), episodes_of(game, range(7, 15), steps)).frame)


def test_beliefs_read_together_are_those_read_alone(played: tuple[Game, list[Episode]]) -> None:
    game, episodes = played
    for episode in episodes[:4]:
        episode.read(("lookup", "ideal", *game.shortcuts), ceilings=True)
        alone = Episode(game, episode.seed, episode.start, episode.opening, episode.steps)
        for name in ("ideal", "lookup", *game.shortcuts):
            assert episode.beliefs(name) == alone.beliefs(name)
        assert episode.ceilings == alone.ceilings
        prompts = [[episode.prompt(t, q) for q in range(len(s.questions))] for t, s in enumerate(episode.steps)]
        assert episode.prompts() == prompts
