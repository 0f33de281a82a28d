"""The published settings (arXiv 2505.14892): what prompts of `generator="paper"` are like, measured on their words.

The expected numbers are those of prompts drawn by the authors' code. Only regular expressions read the prompts here, so
that nothing of what draws them is trusted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise, product
from math import perm, prod

import numpy as np
import pytest

from nextstate.envs import Episode, GameError, make_game, unroll
from nextstate.envs.contrast import Pair, problems, shortcuts
from nextstate.envs.games.machine import Place

# states, density, E, steps; then edges (but the sink's), dup, det, lookup, act, vis, fwd, ret, sink
ROWS = """
 2 min      2   5    1 0     1.000 1.000 .955  2.00 .498 .400 1.000
 3 middle   3  10    2 0     1.000 1.000 .950  2.24 .531 .451  .733
 5 min      5  10    4 0     1.000 1.000 .933  2.80 .586 .317  .542
 5 middle   8   5    7 .149   .613  .709 .583  3.04 .594 .271  .619
 5 middle   8  10    7 .145   .865  .898 .808  3.46 .579 .312  .708
 5 middle   8  20    7 .149   .966  .974 .893  3.64 .572 .315  .751
 5 max     11  20    9 .399   .908  .931 .826  4.08 .569 .317  .842
10 min     10  20    9 0     1.000 1.000 .922  3.78 .643 .193  .361
10 middle  28  10   26 .545   .434  .497 .395  5.61 .637 .169  .570
10 middle  28  20   26 .561   .673  .710 .590  6.84 .629 .178  .711
10 middle  28  50   26 .572   .907  .918 .723  7.63 .622 .178  .763
10 max     46  50   42 2.53   .760  .787 .567  8.88 .603 .179  .920
15 middle  60  30   56 1.34   .555  .587 .433 10.44 .654 .122  .701
15 middle  60  50   56 1.27   .722  .742 .500 11.55 .653 .123  .774
20 min     20  30   19 0     1.000 1.000 .895  5.00 .695 .112  .253
20 middle 105  20  100 1.92   .273  .311 .236 10.83 .669 .091  .536
20 middle 105 100  100 1.90   .758  .771 .414 16.50 .665 .096  .828
20 max    191 100  182 11.8   .500  .526 .219 18.58 .624 .094  .934
"""
COLUMNS = ("edges", "dup", "det", "lookup", "act", "vis", "fwd", "ret", "sink")
# states, density, steps; then accepted, det, lookup
STATE_STATE = """
 5 middle  10  1.42 .965 .976
10 middle  20  2.50 .933 .953
10 middle  50  2.50 .991 .993
10 max     50  3.86 .982 .991
20 middle 100  4.69 .978 .984
"""


def rows_of(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


def read(words: str) -> tuple[list[str], list[str], list[str]]:
    """Return the states listed, the states visited, and the actions (none where they are not shown)."""
    listed = re.match(r"States: \{([a-z,]+)\}\n", words)[1].split(",")
    visited = re.findall(r"(?:Start at|go to|Go to) state ([a-z]+)", words)
    return listed, visited, re.findall(r"Take action ([A-Z]+),", words)


def forward(listed: Sequence[str], visited: Sequence[str]) -> float:
    """Return the share of moves to a state that is listed later."""
    return float(np.mean([listed.index(b) > listed.index(a) for a, b in pairwise(visited)]))


def table_of(episode: Episode) -> dict[str, list[str]]:
    """Return where each state of the automaton leads, from the words of every possible step."""
    game, start = episode.game, episode.start
    assert isinstance(start, Place)
    out: dict[str, list[str]] = {}
    for place in start.machine.places:
        _, (at,), _ = read(game.opening(place))
        after = [(action, game.transition(place, action)) for action in game.actions(place)]
        out[at] = [game.questions(place, action, there)[0].answer for action, there in after]
    return out


def sinks(listed: Sequence[str], start: str, table: Mapping[str, list[str]], edges: int) -> dict[str, float]:
    """Return how likely each state is the sink, given all edges: a minimal automaton does not show which one it is.

    A state of d edges with L later ones is dealt one of the L choose d sets of targets, if d <= L; else all later ones
    and d - L draws from the n - 1 others, shuffled.
    """
    n, weights = len(listed), {}
    for sink in [s for s in listed if s != start and table[s] == [start]]:
        weight = 1.0
        for k, state in enumerate(s for s in listed if s != sink):
            later = listed[listed.index(state) + 1 :]
            d, counts = 1 + (edges - n) // n + (k < (edges - n) % n), Counter(table[state])
            if len(table[state]) != d:
                weight = 0
            elif d <= len(later):
                weight *= (counts.keys() <= {*later} and max(counts.values()) == 1) / perm(len(later), d)
            else:
                weight *= prod(counts[t] for t in later) / perm(d, len(later)) / (n - 1) ** (d - len(later))
        weights[sink] = weight
    return {s: w / sum(weights.values()) for s, w in weights.items()}


def measure(episode: Episode, edges: int) -> dict[str, float]:
    """Return the columns of a row for one prompt. All moves but the last are shown before the question."""
    words = episode.transcripts[-1]
    assert words.startswith(episode.prompt(len(episode.steps) - 1))
    listed, visited, actions = read(words)
    capitals = re.search(r"\nActions:\{([A-Z,]+)\}\n", words)[1].split(",")
    assert sorted(capitals) == [chr(c) for c in range(ord("A"), ord("Z") + 1)]
    moves = [*zip(visited, actions, visited[1:], strict=False)]
    shown = {(at, action): target for at, action, target in moves[:-1]}
    assert all(at != target for at, _, target in moves)
    assert all(shown.get((at, action), target) == target for at, action, target in moves)  # never contradicted
    n, start, table = len(listed), visited[0], table_of(episode)
    likely = sinks(listed, start, table, edges)
    known = moves[-1][:2] in shown
    return {
        "edges": sum(map(len, table.values())) - 1,
        "dup": sum(len(targets) - len(set(targets)) for targets in table.values()),
        "det": known,
        "lookup": known or 1 / (n - 1),
        "act": {a: target for _, a, target in moves[:-1]}.get(actions[-1]) == visited[-1],
        "vis": len(set(visited[:-1])),
        "fwd": forward(listed, visited),
        "ret": np.mean([target == start for target in visited[1:]]),
        "sink": sum(p for state, p in likely.items() if state in visited[:-1]),
        "start": listed.index(start) / (n - 1),
        "sink's place": sum(p * listed.index(state) for state, p in likely.items()) / (n - 1),
    }


def bound(values: np.ndarray, printed: str, theirs: int) -> float:
    """Return 3 standard errors of the mean, plus 3 of the printed one, plus half a unit of its last digit."""
    error = values.std(ddof=1) * (len(values) ** -0.5 + theirs**-0.5)
    return float(3 * error + 0.5 * 10.0 ** -len(printed.partition(".")[2]) * ("." in printed))


def check_row(row: list[str], prompts: int) -> None:
    states, density, edges, steps, *printed = row
    game = make_game("DFA", states=int(states), density=density, generator="paper")
    first = 10_000 * rows_of(ROWS).index(row)
    found = [measure(unroll(game, first + i, int(steps)), int(edges)) for i in range(prompts)]
    expected = dict(zip(COLUMNS, printed, strict=True)) | {"start": "0.500", "sink's place": "0.500"}
    for column, value in expected.items():
        values = np.array([one[column] for one in found], float)
        assert abs(values.mean() - float(value)) <= bound(values, value, 2000), column
    fwd = np.array([one["fwd"] for one in found])
    error = fwd.std() / prompts**0.5
    assert int(states) < 5 or 0.57 - 3 * error <= fwd.mean() <= 0.70 + 3 * error


@pytest.mark.parametrize("row", [rows_of(ROWS)[i] for i in (0, 3, 6, 7, 9, 14)], ids=lambda row: "-".join(row[:4]))
def test_some_rows_are_those_of_published_prompts(row: list[str]) -> None:
    check_row(row, 300)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows_of(ROWS), ids=lambda row: "-".join(row[:4]))
def test_every_row_is_that_of_published_prompts(row: list[str]) -> None:
    check_row(row, 2000)


@pytest.mark.parametrize("row", [row for row in rows_of(ROWS) if int(row[0]) >= 5], ids=lambda row: "-".join(row[:4]))
def test_our_default_generator_is_another_one(row: list[str]) -> None:
    """Half of its moves go down the list, and no two edges of a state lead to the same state."""
    game = make_game("DFA", states=int(row[0]), density=row[1])
    episodes = [unroll(game, seed, int(row[3])) for seed in range(200)]
    fwd = np.array([forward(*read(episode.transcripts[-1])[:2]) for episode in episodes])
    assert abs(fwd.mean() - 0.5) < 3 * fwd.std() / len(fwd) ** 0.5
    assert abs(fwd.mean() - float(row[4 + COLUMNS.index("fwd")])) > bound(fwd, ".000", 2000)
    assert all(len(set(targets)) == len(targets) for e in episodes[:20] for targets in table_of(e).values())


def check_state_state(row: list[str], prompts: int) -> None:
    states, density, steps, *printed = row
    game = make_game("DFA", states=int(states), density=density, kind="state-state", generator="paper")
    found = []
    for seed in range(prompts):
        episode = unroll(game, seed, int(steps))
        listed, visited, actions = read(episode.transcripts[-1])
        assert not actions
        table, asked = table_of(episode), episode.steps[-1].questions[0]
        successors = table[visited[-2]]
        assert {asked.choices[i].strip() for i in asked.accepted} == set(successors)
        assert all(len(set(targets)) == len(targets) for targets in table.values())
        known = visited[-2] in visited[:-2]
        found.append((len(successors), known, known or len(successors) / (len(listed) - 1)))
    for values, value in zip(np.array(found, float).T, printed, strict=True):
        assert abs(values.mean() - float(value)) <= bound(values, value, 1500)


def test_a_row_without_actions_is_that_of_published_prompts() -> None:
    check_state_state(rows_of(STATE_STATE)[0], 400)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows_of(STATE_STATE), ids=lambda row: "-".join(row[:3]))
def test_every_row_without_actions_is_that_of_published_prompts(row: list[str]) -> None:
    check_state_state(row, 1500)


def test_start_and_sink_are_anywhere_in_the_list() -> None:
    game, prompts = make_game("DFA", states=5, generator="paper"), 1000
    starts, places = np.zeros(5), np.zeros(5)
    for seed in range(prompts):
        episode = unroll(game, seed, 1)
        listed, (start, _), _ = read(episode.transcripts[-1])
        starts[listed.index(start)] += 1
        for state, p in sinks(listed, start, table_of(episode), 8).items():
            places[listed.index(state)] += p
    error = (0.2 * 0.8 / prompts) ** 0.5
    assert np.abs(starts / prompts - 0.2).max() < 3 * error
    assert np.abs(places / prompts - 0.2).max() < 3 * error


def test_published_pairs_of_letters_list_400_actions() -> None:
    game = make_game("DFA", states=100, symbols="pairs", actions_listed=400, generator="paper")
    words = unroll(game, 0, 3).transcripts[-1]
    listed, visited, actions = read(words)
    assert len(set(listed)) == 100
    assert len({*re.search(r"\nActions:\{([A-Z,]+)\}", words)[1].split(",")}) == 400
    assert {len(word) for word in (*listed, *visited, *actions)} == {2}


# The people and fruits of the published prompts, in the order of their lists.
PEOPLE = "Dean Sarah Jack Kate Ryan Bob Jill Mary Peter Luke John Sean Elle Neil Tom Jerry Joan Blake Seth Beth Kelly"
FRUITS = (
    "apple pear peach grape mango banana kiwi orange lemon melon cherry plum fig apricot durian honeydew cantaloupe "
    "papaya persimmon lemon lime"
)
Clue = tuple[str, str, str]  # giver (or ""), person, fruit


def read_store(words: str) -> tuple[list[str], list[str], list[Clue]]:
    """Return the people and the fruits listed, and the clues."""
    opening = r"(.*) walk into a fruit store\. There are only (\d+) fruits (.*?)\. Each person gets a different fruit\."
    people, number, fruits = re.match(opening, words).groups()
    assert len(people.split(", ")) == len(fruits.split(", ")) == int(number)
    told = re.findall(r"(?:(\w+) gives )?(\w+) (?:gets )?the (\w+)\.", words)
    return people.split(", "), fruits.split(", "), told


@cache
def facts(generator: str) -> dict[str, list[bool]]:
    """Return the three facts, clue by clue, of complete puzzles of 2 to 21 people."""
    out: dict[str, list[bool]] = {"same place": [], "given": [], "giver has a fruit": []}
    for people, seed in product(range(2, 22), range(10)):
        game = make_game("FruitStore", people=people, generator=generator)
        names, fruits, clues = read_store(unroll(game, seed, people - 1).transcripts[-1])
        served: list[str] = []
        assert len(clues) == people - 1
        for giver, person, fruit in clues:
            out["same place"].append(fruits[names.index(person)] == fruit)
            out["given"].append(bool(giver))
            if giver:
                assert giver in names
                assert giver != person
                out["giver has a fruit"].append(giver in served)
            assert person not in served
            served.append(person)
    return out


def test_published_clues_keep_to_the_places_of_the_lists() -> None:
    found = facts("paper")
    assert all(found["same place"])
    assert not any(found["giver has a fruit"])
    assert abs(np.mean(found["given"]) - 0.5) < 3 * (0.25 / len(found["given"])) ** 0.5


def test_our_default_clues_do_not() -> None:
    found = facts("default")
    assert np.mean(found["same place"]) < 0.5
    assert np.mean(found["giver has a fruit"]) > 0.25
    assert abs(np.mean(found["given"]) - 0.5) < 3 * (0.25 / len(found["given"])) ** 0.5


def test_published_stores_have_the_first_people_and_fruits() -> None:
    game, orders = make_game("FruitStore", people=6, generator="paper"), set()
    for seed in range(60):
        people, fruits, _ = read_store(unroll(game, seed, 1).transcripts[-1])
        assert sorted(people) == sorted(PEOPLE.split()[:6])
        assert sorted(fruits) == sorted(FRUITS.split()[:6])
        orders |= {tuple(people), tuple(fruits)}
    assert len(orders) > 100  # each list is shuffled


def test_receivers_and_givers_are_drawn_evenly() -> None:
    game, prompts = make_game("FruitStore", people=5, generator="paper"), 1500
    receivers, givers = Counter[str](), Counter[tuple[int, int]]()
    for seed in range(prompts):
        people, _, ((_, first, _), (giver, person, _)) = read_store(unroll(game, seed, 2).transcripts[-1])
        receivers[str(people.index(first))] += 1
        if giver:
            others = [name for name in people if name not in (first, person)]
            givers[len(others), others.index(giver)] += 1
    for counts, n in ((receivers, 5), (givers, 3)):
        total = sum(counts.values())
        assert len(counts) == n
        assert all(abs(k / total - 1 / n) < 3 * ((n - 1) / n**2 / total) ** 0.5 for k in counts.values())


@pytest.mark.parametrize("people", [4, 20, 21])
def test_every_fruit_left_is_accepted_and_a_fruit_listed_twice_can_be_given_twice(people: int) -> None:
    game = make_game("FruitStore", people=people, generator="paper")
    both = set()
    for seed in range(30):
        episode = unroll(game, seed, people - 1, ask="all")
        for t, step in enumerate(episode.steps):
            names, fruits, clues = read_store(episode.prompt(t))
            left = Counter(fruits)
            left.subtract(fruit for _, _, fruit in clues)
            waiting = [name for name in names if name not in {person for _, person, _ in clues}]
            assert [question.variable for question in step.questions] == waiting
            for question in step.questions:
                assert [c.strip() for c in question.choices] == [*dict.fromkeys(fruits)]
                accepted = {question.choices[i].strip() for i in question.accepted}
                assert accepted == {fruit for fruit, number in left.items() if number > 0}
                assert question.answer == fruits[names.index(question.variable)]
            both.add((fruits.count("lemon"), left["lemon"]))
    assert both == ({(2, 0), (2, 1), (2, 2)} if people > 19 else {(0, 0)})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("DFA", {"generator": "papre"}, "generator='papre'.*expected one of default, paper"),
        ("DFA", {"generator": "paper", "actions_listed": 8}, "actions_listed=8.*expected 26, since the published"),
        ("DFA", {"generator": "paper", "symbols": "pairs"}, "actions_listed=26.*expected 400, since the published"),
        ("DFA", {"generator": "paper", "states": 1}, "states=1.*from 2 to 26"),
        ("DFA", {"generator": "paper", "states": 5, "edges": 12}, "edges=12.*from 5 to 11"),
        ("FruitStore", {"generator": "ours"}, "generator='ours'.*expected one of default, paper"),
    ],
)
def test_settings_that_were_not_published_are_refused(name: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(GameError, match=message):
        make_game(name, **given)


def test_published_clues_make_no_minimal_pairs() -> None:
    for kind in ("state", "action", "name", "noop"):
        with pytest.raises(GameError, match=r"generator='paper'.*expected default for minimal pairs"):
            make_game("FruitStore", generator="paper").contrast(np.random.default_rng(0), kind)


def drawn_pairs(kind: str, length: int) -> list[Pair]:
    argument = {"state": "steps", "noop": "distance"}[kind]
    rng = np.random.default_rng(length)
    return [make_game("DFA", states=12).contrast(rng, kind, "paper", **{argument: length}) for _ in range(100)]


def prompts(pair: Pair) -> tuple[str, str]:
    clean, corrupted = (side.prompt(len(side.steps) - 1) for side in pair.sides)
    return clean, corrupted


def found_letters(prompt: str) -> tuple[list[str], list[str]]:
    """Return the states and the actions of a prompt, in the order in which they are first named."""
    return [*dict.fromkeys(re.findall(r"\b[a-z]\b", prompt))], [*dict.fromkeys(re.findall(r"\b[A-Z]\b", prompt))]


@pytest.mark.parametrize("length", [6, 10, 14, 18, 22, 26, 30])
def test_pairs_of_another_state_are_the_published_ones(length: int) -> None:
    letters, pairs = set(), drawn_pairs("state", length)
    for pair in pairs:
        clean, corrupted = prompts(pair)
        (x1, x3, x2, x4), (a1, a2, a3) = found_letters(clean)
        parts = (
            f" Take action {a1}, go to state {x3}. Take action {a2}, go to state {x1}.",
            f" Take action {a1}, go to state {x3}. Take action {a3}, go to state {x2}.",
            f" Take action {a1}, go to state {x4}. Take action {a2}, go to state {x2}.",
            f" Take action {a1}, go to state {x4}. Take action {a3}, go to state {x1}.",
        )
        words = f"Start at state {x1}." + "".join(parts[i % 4] for i in range(length // 2))
        words += f" Take action {a1}, go to state"
        assert clean == words
        assert corrupted == re.sub(rf"\b{x4}\b", x3, re.sub(rf"\b{x2}\b", x1, words))
        assert pair.answers == (f" {x4 if length % 8 == 6 else x3}", f" {x3}")
        same = [f"both sides have the answer {x3}"] if length in (10, 18, 26) else []
        assert [*problems(pair)] == same
        assert shortcuts(pair)["action_only"] == 1  # a weakness: what the same action led to last is the answer
        letters.add((x1, x2, x3, x4, a1, a2, a3))
    assert len(letters) == len(pairs)  # drawn anew for each pair
    assert len({each[0] for each in letters}) > 20
    assert len({each[4] for each in letters}) > 20


@pytest.mark.parametrize(("length", "loops"), [(1, 0), (5, 2), (10, 7), (20, 17), (40, 37)])
def test_noop_pairs_are_the_published_ones(length: int, loops: int) -> None:
    letters, pairs = set(), drawn_pairs("noop", length)
    for pair in pairs:
        clean, corrupted = prompts(pair)
        (x1, x2), (a1, a2, *rest) = found_letters(clean)
        loop = rest[0] if rest else ""
        pieces = (
            f"Start at state {x1}. Take action {a1}, go to state {x2}. Take action {a2}, go to state {x1}. "
            f"Take action {a1}, go to state {x2}.",
            " ".join([f"Take action {loop}, go to state {x2}."] * (length - 3)),
            f"Take action {a2}, go to state",
        )
        words = " ".join(pieces)
        assert ("  " in words) == (length == 1)
        assert len(re.findall(rf"action {loop},", clean)) == loops or not rest
        other = found_letters(corrupted)[0][0]
        assert other not in (x1, x2)
        assert clean == words
        assert corrupted == re.sub(rf"\b{x1}\b", other, words)
        assert pair.answers == (f" {x1}", f" {other}")
        assert problems(pair) == ()
        letters.add((x1, x2, other, a1, a2))
    assert len(letters) == len(pairs)


def test_published_pairs_without_arguments_are_of_the_first_lengths() -> None:
    game = make_game("DFA")
    for kind, given in (("state", {"steps": 6}), ("noop", {"distance": 5})):
        one, two = (game.contrast(np.random.default_rng(1), kind, "paper", **each) for each in ({}, given))
        assert prompts(one) == prompts(two)
