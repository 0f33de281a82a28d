"""Strings as a game: its words read back as strings, states counted, draws and beliefs against the grammar's."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nextstate.envs import Automaton, GameError, make_game, unroll
from nextstate.envs.games.grammar import CFG
from nextstate.envs.grammar.inside import log_probabilities, member, next_tokens
from nextstate.envs.grammar.sizes import length_moments, n_derivations, n_states
from nextstate.envs.grammar.sources import PUBLISHED, published

GAMES = (
    {},
    {"grammar": "cfg3f"},
    {"levels": 3, "length_max": 2},
    {"levels": 2},
    {"levels": 3, "vocabulary": 7, "overlap": True, "skewed": True},
)


def game_of(**settings: object) -> CFG:
    game = make_game("CFG", **settings)
    assert isinstance(game, CFG)
    return game


def strings_in(text: str) -> list[list[str]]:
    """Return the words of each string in a transcript; the last one is open."""
    return [part.split() for part in re.sub(r"^.*Strings:", "", text, flags=re.S).split(" end")]


@pytest.mark.parametrize("style", CFG.styles)
@pytest.mark.parametrize("settings", GAMES)
def test_transcripts_are_strings_and_beliefs_follow_from_them(settings: dict[str, object], style: str) -> None:
    game = game_of(style=style, **settings)
    rules = game.rules
    steps = 60 if game.grammar else 150
    for seed in range(3):
        episode = unroll(game, seed, steps, ask="all")
        *whole, last = [rules.encode(s) for s in strings_in(episode.transcripts[-1])]
        assert not whole or member(rules, whole).all()
        assert bool(whole) == (not game.grammar)
        expected = [row for x in whole for row in next_tokens(rules, [x])[0].p]
        expected += next_tokens(rules, [last])[0].p.tolist()
        beliefs = episode.beliefs("ideal")
        for t, (step, row) in enumerate(zip(episode.steps, beliefs, strict=True)):
            now = expected[t + 1]
            question, belief = step.questions[0], row[0]
            assert question.choices == tuple([f" {word}" for word in (*rules.terminals, "end")])
            assert belief == pytest.approx(now, abs=1e-12)
            assert question.accepted == tuple([i for i, p in enumerate(belief) if p > 0])
            assert episode.prompt(t) == episode.transcripts[t] + step.narration  # what comes next is the answer
            if not step.next_state:
                assert (step.narration, len(step.questions)) == (" end", 1)
                continue
            assert step.questions[-1].answer == ("yes" if now[-1] > 0 else "no")
            kinds = [f"{kind} {level}" for kind in ("level", "end") for level in range(2, len(rules.levels))]
            assert [q.variable for q in step.questions] == ["next", *kinds, "complete"]
            values = game.values(step.next_state)
            assert [values[q.variable] for q in step.questions] == [q.answer for q in step.questions]
            truths = [belief[q.truth] for q, belief in zip(step.questions, row, strict=True)]
            assert min(truths) > 0


def test_the_words() -> None:
    game = game_of(levels=3, style="rules", length_max=2, distinct_symbols=True, symbols=3, rules_max=2)
    episode = unroll(game, 0, 2, ask="all")
    opening = f"Rules, from level 1 down:\n{game.rules}Strings are made of 1, 2, 3, and closed by end.\nStrings:"
    assert episode.opening == opening
    first, second = (game.rules.terminals[t] for t in game.tokens(episode.steps[-1].next_state))
    asked = [q.variable for q in episode.steps[1].questions]
    assert episode.prompt(1, asked.index("next")) == f"{opening} {first} {second}"
    told = f"{opening} {first} {second}\n"
    assert episode.prompt(1, asked.index("level 2")) == f"{told}At level 2 that is within"
    assert episode.prompt(1, asked.index("end 2")) == f"{told}A part of level 2 ends here:"
    assert episode.prompt(1, asked.index("complete")) == f"{told}That can be a whole string:"
    assert game.opening(episode.steps[-1].next_state) == f"{opening} {first} {second}"


@pytest.mark.parametrize("settings", [{"levels": 2}, {"levels": 3}, {"levels": 3, "symbols": 2, "length_max": 2}])
def test_there_are_as_many_states_as_it_says(settings: dict[str, object]) -> None:
    for seed in range(4):
        game = game_of(game_seed=seed, distinct_bodies=False, **settings)
        automaton = Automaton.explore(game)
        assert game.size_of(()) == automaton.n_states == n_states(game.rules)
        over = [s for s, legal in zip(automaton.states, automaton.legal, strict=True) if legal == ((),)]
        assert len(over) == n_derivations(game.rules)


def test_sizes_that_no_table_holds_are_not_given() -> None:
    for name in PUBLISHED:
        game = game_of(grammar=name)
        assert game.size_of(()) is None
        assert n_states(game.rules) > 2**63
    assert game_of(levels=4).size_of(()) == n_states(game_of(levels=4).rules)


def test_strings_are_as_likely_as_the_grammar_has_them() -> None:
    game, n = game_of(levels=3, rules_min=1, rules_max=3, length_min=1, game_seed=5), 4000
    # One long episode: how often each string comes, of all that come.
    mean, _ = length_moments(game.rules)
    steps = unroll(game, 0, int(n * (mean + 1)), ask=1).steps
    told = Counter(tuple(s) for s in strings_in("Strings:" + "".join(s.narration for s in steps))[:-1])
    total = sum(told.values())
    assert total > n / 2
    p = np.exp(log_probabilities(game.rules, [game.rules.encode(s) for s in told]))
    assert p.sum() == pytest.approx(1, abs=0.02)
    for found, expected in zip(told.values(), p.tolist(), strict=True):
        assert abs(found - total * expected) <= 5 * math.sqrt(total * expected) + 2


def test_shortcuts_know_what_is_frequent() -> None:
    game = game_of(grammar="cfg3b")
    episodes = [unroll(game, seed, 300, ask="all") for seed in range(6)]
    sums = dict.fromkeys(("chance", *game.shortcuts, "ideal"), 0.0)
    for episode in episodes:
        rows = {name: episode.beliefs(name) for name in sums}
        for t, step in enumerate(episode.steps):
            for i, question in enumerate(step.questions):
                if question.variable.startswith("level"):
                    for name in sums:
                        sums[name] += math.log(max(rows[name][t][i][question.truth], 1e-300))
    assert sums["chance"] < sums["most_frequent"] < sums["bigram"] < sums["ideal"]


def test_a_grammar_of_yours(tmp_path: Path) -> None:
    path = tmp_path / "mine.cfg"
    path.write_text("S -> A B | B A A\nA -> x y\nB -> y | x x x (2)\n")
    game = game_of(file=str(path))
    assert (game.levels, game.rules.terminals) == (3, ("x", "y"))
    assert game == make_game("CFG", **game.settings)
    assert game.opening(()) == "Strings are made of x, y, and closed by end.\nStrings:"
    assert unroll(game, 0, 5) == unroll(make_game("CFG", **game.settings), 0, 5)


def test_published_ones_are_named() -> None:
    game = game_of(grammar="cfg3b")
    assert game.rules == published("cfg3b")
    assert (game.levels, game.max_choices, game.symbols) == (7, 4, None)
    assert game == make_game("CFG", **game.settings) == game_of(grammar="cfg3b", levels=7)
    assert len(game.actions(())) == 64
    assert game_of(grammar="cfg3b", vocabulary=300).max_choices == 301


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grammar": "cfg3"}, "grammar='cfg3' is not possible: expected one of cfg3b, cfg3i"),
        ({"grammar": "cfg3b", "levels": 6}, "levels=6 is not possible: expected None or 7 with grammar='cfg3b'"),
        ({"grammar": "cfg3b", "symbols": 3}, "symbols=3 is not possible: expected None with grammar='cfg3b'"),
        ({"grammar": "cfg3b", "file": "x"}, "file='x' is not possible: expected '' with grammar='cfg3b'"),
        ({"file": "no such file"}, "file='no such file' cannot be read"),
        ({"levels": 1}, "levels=1 is not possible: expected a whole number from 2 to 12"),
        ({"levels": 13}, "levels=13"),
        ({"symbols": 0}, "symbols=0 is not possible"),
        ({"rules_min": 3}, "rules_max=2 is not possible: expected a whole number from 3"),
        ({"length_min": 4}, "length_max=3 is not possible: expected a whole number from 4"),
        ({"rules_max": 40}, "rules_max=40 is not possible: expected at most 12, since there are 36 different bodies"),
        ({"distinct_bodies": 1}, "distinct_bodies=1 is not possible: expected true or false"),
        ({"game_seed": -1}, "game_seed=-1"),
        ({"levels": 10, "length_max": 10}, "levels=10 is not possible: expected fewer, or shorter rules"),
        ({"levels": 12, "rules_max": 12, "rules_min": 12, "length_max": 3}, "expected fewer, or fewer rules"),
        ({"overlap": True}, "overlap=True is not possible: expected false without a vocabulary"),
        ({"skewed": True}, "skewed=True"),
        ({"vocabulary": 2}, "vocabulary=2 is not possible: expected a whole number from 3"),
        ({"feedback": "inline"}, "feedback='inline' is not possible: expected one of branch"),
        ({"style": "paper"}, "style='paper' is not possible: expected one of plain, rules"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(GameError, match=message):
        make_game("CFG", **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [("S -> a end", "terminal='end' is not possible: expected another word"), ("S -> ä", "symbol='ä' is not possible")],
)
def test_words_that_it_cannot_tell_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.cfg"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(GameError, match=message):
        make_game("CFG", file=str(path))
