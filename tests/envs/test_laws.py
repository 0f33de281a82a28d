"""What holds for every game in the registry."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from every_game import SMALL, label, variants
from hypothesis import given, settings
from hypothesis import strategies as st
from outside import GAME, write_game

from nextstate.envs import GAMES, Game, LawError, check_game, make_game, unroll
from nextstate.envs.game import Distribution, split_uniform
from nextstate.envs.laws import LAWS_OF_MANY_EPISODES, Case

ALMOST_ONE = math.nextafter(1.0, 0.0)


@st.composite
def any_game(draw: st.DrawFn) -> Game:
    name = draw(st.sampled_from(sorted(GAMES)))
    cls = GAMES[name]
    size, style = draw(st.sampled_from(cls.sizes)), draw(st.sampled_from(cls.styles))
    more = dict(SMALL.get(name, {}))
    if name == "DFA":
        kinds, densities = ["state-action", "state-state"], ["min", "middle", "max"]
        more = {"kind": draw(st.sampled_from(kinds)), "density": draw(st.sampled_from(densities))}
    if name == "Box":
        more = {"objects": draw(st.integers(1, 10))}
    return make_game(name, **{cls.size: size}, style=style, feedback=draw(st.sampled_from(cls.feedbacks)), **more)


@given(u=st.floats(0, ALMOST_ONE), n=st.integers(1, 10**6))
def test_split_stays_below_n_and_leaves_a_draw(u: float, n: int) -> None:
    index, left = split_uniform(u, n)
    assert 0 <= index < n
    assert 0 <= left < 1


@given(n=st.integers(1, 10**6))
def test_split_of_the_largest_draw_is_the_last(n: int) -> None:
    assert split_uniform(ALMOST_ONE, n)[0] == n - 1


# Elsewhere narrations tell the state, and the question is whether that is remembered.
@pytest.mark.parametrize("game", [g for g in variants(5) if g.feedbacks[0] == "inline"], ids=label)
def test_narration_keeps_the_answer_of_a_question_about_it(game: Game) -> None:
    for seed in range(50):
        for step in unroll(game, seed, 20).steps:
            words = step.narration.replace(",", " ").replace(".", " ").split()
            assert all(q.answer not in words for q in step.questions)


@settings(max_examples=15, deadline=None)
@given(game=any_game(), seed=st.integers(0, 2**32), steps=st.integers(1, 16))
def test_any_game_keeps_the_laws(game: Game, seed: int, steps: int) -> None:
    check_game(game, seeds=[seed], steps=steps, states=10)


def test_all_states_of_small_games_keep_the_laws(small: Game) -> None:
    check_game(small, seeds=range(10), states=20_000)


def test_averages_over_many_episodes_keep_the_laws(game: Game) -> None:
    for law in LAWS_OF_MANY_EPISODES:
        assert next(law(Case(game, range(300), min(12, game.max_steps or 12), 0)), None) is None


@pytest.mark.parametrize("kind", ["state-action", "state-state"])
def test_the_reader_of_automata_knows_only_the_text(kind: str) -> None:
    """Texts with other letters are the same text: the beliefs are about places in the list of states."""
    beliefs: dict[str, set[Distribution]] = defaultdict(set)
    prompts = 0
    game = make_game("DFA", states=3, actions_listed=2, kind=kind)
    for seed in range(2000):
        episode = unroll(game, seed, 2)
        for t, row in enumerate(episode.beliefs("ideal")):
            prompt = episode.prompt(t)
            order = {letter: str(i) for i, letter in enumerate(dict.fromkeys(re.findall(r"\b[a-zA-Z]\b", prompt)))}
            beliefs[re.sub(r"\b[a-zA-Z]\b", lambda found, to=order: to[found[0]], prompt)].add(row[0])
            prompts += 1
    assert prompts - len(beliefs) > 500
    assert all(len(each) == 1 for each in beliefs.values())


@pytest.mark.parametrize(("name", "given"), [(n, SMALL.get(n, {})) for n in GAMES])
def test_a_game_is_checked_by_its_name(name: str, given: dict[str, Any]) -> None:
    check_game(name, seeds=range(2), steps=4, states=5, **given)


# Each: what is wrong, a text of the game of three cups, what stands there instead, and the law that finds it.
DEFECTS = {
    "a state that cannot be hashed": (
        "return int(rng.integers(self.cups))",
        "return [int(rng.integers(self.cups))]",
        "states are values",
    ),
    "an action that is listed twice": (
        "return list(combinations(range(self.cups), 2))",
        "return 2 * list(combinations(range(self.cups), 2))",
        "actions are legal",
    ),
    "a policy that draws what is not legal": (
        "    def values",
        "    def policy(self, state, u):\n        return (0, 0)\n\n    def values",
        "actions are legal",
    ),
    "a transition that is drawn anew each time": (
        "return two if state == one else one if state == two else state",
        "import random; return random.randrange(self.cups)",
        "transitions are pure",
    ),
    "commands that are the same": (
        "    def values",
        '    def command(self, state, action):\n        return "swap"\n\n    def values',
        "commands are distinct",
    ),
    "a variable that comes and goes": (
        'return {"ball": LETTERS[state]}',
        'return {"ball" if state else "nothing": LETTERS[state]}',
        "variables stay the same",
    ),
    "a truth that is not accepted": (
        "choices, next_state, (next_state,)",
        "choices, next_state, ((next_state + 1) % self.cups,)",
        "questions can be answered",
    ),
    "two choices alike": (
        "for letter in LETTERS[: self.cups])",
        'for letter in "AA" + LETTERS[2 : self.cups])',
        "questions can be answered",
    ),
    "a text that is not ASCII": (
        "The ball is under cup {LETTERS[state]}.",
        "The ball \u2014 cup {LETTERS[state]}.",
        "text is exact",
    ),
    "a start that no seed decides": (
        "return int(rng.integers(self.cups))",
        "import random; return random.randrange(self.cups)",
        "seeds decide",
    ),
    "a step of its own that is another": (
        "    def values",
        "    def step(self, state, u, v, ask):\n        return super().step(state, 1 - u if u else u, v, ask)\n\n"
        "    def values",
        "steps are the common ones",
    ),
    "a reader that is sure of what is wrong": (
        "    def values",
        "    def reader(self, state):\n        return super().reader((state + 1) % self.cups)\n\n    def values",
        "beliefs are distributions",
    ),
    "a reader that knows what the text does not say": (
        'return f"The ball is under cup {LETTERS[state]}."',
        'return "The ball is under a cup."',
        "readers know only the text",
    ),
    "training episodes that are too long": (
        "    @property\n    def max_choices",
        "    @property\n    def max_steps(self):\n        return 3\n\n    @classmethod\n"
        "    def sample(cls, rng, size, level):\n        return Sample(cls(), 4, 1)\n\n"
        "    @property\n    def max_choices",
        "samples can be played",
    ),
    "a pair whose sides have one answer": (
        "    def values",
        "    def draw_pair(self, rng, kind, *given):\n        pair = super().draw_pair(rng, kind, *given)\n"
        "        return replace(pair, corrupted=pair.clean)\n\n    def values",
        "pairs are sound",
    ),
    "a shortcut that is better than the ideal reader": (
        "    def values",
        '    shortcuts: ClassVar = ("lucky",)\n\n    def reader(self, state):\n        return Blind(self, state)\n\n'
        "    def values",
        "no reader beats the ideal one",
    ),
    "a reader that is too sure of itself": (
        "    def values",
        "    def reader(self, state):\n        return Bold(self, state)\n\n    def values",
        "the ideal reader scores what it expects",
    ),
}
MORE = """
from dataclasses import replace

from nextstate.envs.game import Sample
from nextstate.envs.rules import FullReader, uniform


class Blind(FullReader):
    def guess(self, name, question):
        return super().guess("ideal", question) if name == "lucky" else uniform(len(question.choices))


class Bold(FullReader):
    def guess(self, name, question):
        n = len(question.choices)
        return tuple(0.9 if i == 0 else 0.1 / (n - 1) for i in range(n))
"""


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_broken_game_is_caught(defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, law = DEFECTS[defect]
    assert GAME.count(old) == 1
    package = f"broken_{list(DEFECTS).index(defect)}"
    monkeypatch.syspath_prepend(write_game(tmp_path, GAME.replace(old, new) + MORE, package=package))
    cls = import_module(f"{package}.game").Cups
    with pytest.raises(LawError, match=rf"law {law!r} is broken by Cups\(.*cups=\d\), seeds? \d+.*expected "):
        check_game(cls, seeds=range(40))
