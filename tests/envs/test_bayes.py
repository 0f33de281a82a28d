"""The ideal reader of automata against enumeration of everything that the words of a prompt leave open."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import permutations, product

import numpy as np
import pytest

from nextstate.envs import Episode, GameError, expected_accuracy, make_game, own_accuracy, unroll

Row = tuple[int, ...]  # the targets of a state, as places in the list of states
KINDS = ("state-action", "state-state")
DENSITIES = ("min", "middle", "max")
SMALL = list(product(("default", "paper"), KINDS, (3, 4, 5, 6), DENSITIES))


def parse(prompt: str) -> tuple[list[str], int, list[tuple[int, str, int]], str]:
    """Return the states listed, the first state, each move as (state, action, next state), and the last action."""
    states = re.match(r"States: \{([a-z,]+)\}\n", prompt)[1].split(",")
    at = start = states.index(re.search(r"Start at state ([a-z])\.", prompt)[1])
    moves = []
    for action, target in re.findall(r"(?:Take action ([A-Z]), g|G)o to state ([a-z])\.", prompt):
        moves.append((at, action, states.index(target)))
        at = moves[-1][2]
    found = re.search(r"Take action ([A-Z]), go to state$", prompt)
    return states, start, moves, found[1] if found else ""


def edges_in_all(states: int, density: str) -> int:
    most = states * (states - 1) // 2 + 1
    return {"min": states, "middle": (states + most) // 2, "max": most}[density]


def our_automata(n: int, density: str, start: int) -> Iterator[tuple[float, dict[int, dict[Row, float]]]]:
    """Yield for each order of the states its probability and the possible lists of targets of each state."""
    each, more = divmod(edges_in_all(n, density) - 1, n - 1)
    others = [s for s in range(n) if s != start]
    for rest in permutations(others):
        order, tables = (start, *rest), {}
        for i, state in enumerate(order[:-1]):
            degree, later = each + (i < more), order[i + 1 :]
            sets = (
                [frozenset(c) for c in permutations(later, degree)]
                if degree <= len(later)
                else [frozenset(later + c) for c in permutations(order[:i], degree - len(later))]
            )
            tables[state] = even([row for targets in set(sets) for row in permutations(sorted(targets))])
        tables[order[-1]] = {(start,): 1.0}
        yield 1 / math.factorial(n - 1), tables


def published_automata(n: int, density: str, start: int) -> Iterator[tuple[float, dict[int, dict[Row, float]]]]:
    """Yield for each possible sink the same."""
    edges = edges_in_all(n, density)
    slots = [len(range(k, edges, n)) for k in range(n)]  # dealt round and round
    for sink in range(n):
        if sink != start:
            others = [s for s in range(n) if s != sink]
            tables = {state: published_rows(n, state, slot) for state, slot in zip(others, slots[:-1], strict=True)}
            yield 1 / (n - 1), tables | {sink: {(start,): 1.0}}


@cache
def published_rows(n: int, state: int, slot: int) -> dict[Row, float]:
    later, elsewhere = range(state + 1, n), [s for s in range(n) if s != state]
    if slot <= len(later):
        return even(list(permutations(later, slot)))
    drawn = [(*later, *extra) for extra in product(elsewhere, repeat=slot - len(later))]
    return even([row for targets in drawn for row in permutations(targets)])


def even(rows: list[Row]) -> dict[Row, float]:
    return {row: count / len(rows) for row, count in Counter(rows).items()}


def enumerate_answers(prompt: str, generator: str, density: str) -> np.ndarray:
    """Return the probability of each state to be the next (or a successor).

    The first action of a state that the text names is its first edge, and so on: rows are in random order. A walk takes
    an edge of a row of d with probability 1 / d.
    """
    states, start, moves, action = parse(prompt)
    n, told = len(states), "Actions:" in prompt
    at = moves[-1][2] if moves else start
    right, whole = np.zeros(n), 0.0
    for prior, tables in (our_automata if generator == "default" else published_automata)(n, density, start):
        weight, asked = prior, dict[Row, float]()
        for state, rows in tables.items():
            mine = [(a, t) for s, a, t in moves if s == state]
            named = list(dict.fromkeys(a for a, _ in mine))
            rows = rows if told else sets_of(rows)
            fits = {
                row: p * math.perm(len(row), len(named) if told else 0) / len(row) ** len(mine)
                for row, p in rows.items()
                if (len(named) <= len(row) and all(row[named.index(a)] == t for a, t in mine) if told
                    else all(t in row for _, t in mine))
            }  # fmt: skip
            if state == at:
                asked, known = fits, named
            else:
                weight *= sum(fits.values())
        for row, p in asked.items():
            if not told:
                right[list(row)] += weight * p
                whole += weight * p
            elif action in known:
                right[row[known.index(action)]] += weight * p / len(row)
                whole += weight * p / len(row)
            elif len(known) < len(row):  # another edge
                right[row[len(known)]] += weight * p * (len(row) - len(known)) / len(row)
                whole += weight * p * (len(row) - len(known)) / len(row)
    return right / whole


def sets_of(rows: dict[Row, float]) -> dict[Row, float]:
    """Return the different targets of each row: what a walk without actions draws from."""
    found: dict[Row, float] = {}
    for row, p in rows.items():
        key = tuple(sorted(set(row)))
        found[key] = found.get(key, 0.0) + p
    return found


@pytest.mark.parametrize(("generator", "kind", "states", "density"), SMALL)
def test_beliefs_are_those_of_enumeration(generator: str, kind: str, states: int, density: str) -> None:
    """Five prompts of each of 48 settings, of several lengths."""
    game = make_game("DFA", states=states, density=density, kind=kind, generator=generator)
    for seed in range(5):
        episode = unroll(game, seed, 2 + 2 * seed)
        prompt, belief, ceiling = episode.prompt(-1), episode.beliefs("ideal")[-1][0], episode.ceilings[-1][0]
        right = enumerate_answers(prompt, generator, density)
        _, start, moves, _ = parse(prompt)
        at = moves[-1][2] if moves else start
        if kind == "state-state" and any(s == at for s, _, _ in moves):  # the reader names a successor shown
            assert [right[s] for s, p in enumerate(belief) if p] == pytest.approx([1.0] * np.count_nonzero(belief))
        else:
            np.testing.assert_allclose(belief, right / right.sum(), rtol=0, atol=1e-12)
        assert ceiling == pytest.approx(right.max(), abs=1e-12)


# States, density, steps, then the accuracy of lookup and of Bayes' rule, each with its standard error, for published
# automata and for ours. Another program simulated them, with 1,500 prompts a row of published ones; of ours 600, 250
# (15 states) and 60 (20 states).
ACCURACIES = [
    (5, "middle", 5, (0.709, 0.009, 0.842, 0.007), (0.620, 0.015, 0.773, 0.011)),
    (5, "middle", 10, (0.901, 0.007, 0.951, 0.004), (0.894, 0.011, 0.940, 0.007)),
    (5, "max", 20, (0.942, 0.005, 0.967, 0.004), (0.911, 0.010, 0.959, 0.005)),
    (10, "middle", 10, (0.504, 0.011, 0.619, 0.010), (0.493, 0.018, 0.592, 0.015)),
    (10, "middle", 20, (0.729, 0.011, 0.808, 0.008), (0.727, 0.017, 0.787, 0.014)),
    (10, "max", 50, (0.801, 0.010, 0.851, 0.008), (0.739, 0.017, 0.796, 0.013)),
    (15, "middle", 30, (0.552, 0.012, 0.644, 0.010), (0.573, 0.029, 0.638, 0.025)),
    (20, "middle", 20, (0.322, 0.011, 0.413, 0.010), (0.400, 0.059, 0.454, 0.054)),
    (20, "middle", 100, (0.754, 0.011, 0.803, 0.009), (0.732, 0.055, 0.765, 0.049)),
]
ROWS = [
    (generator, states, density, steps, row[which])
    for states, density, steps, *row in ACCURACIES
    for which, generator in enumerate(("paper", "default"))
]


def last_of(episode: Episode) -> tuple[float, float, float]:
    """Return lookup, ceiling, and the accuracy of the ideal reader's answer on the last question."""
    question = episode.steps[-1].questions[0]
    reader = episode.game.reader(episode.start)
    for step in episode.steps[:-1]:  # without beliefs about the questions before
        reader.observe(step.action)
        reader.observe_answer(step.questions[0].truth)
    reader.observe(episode.steps[-1].action)
    lookup = own_accuracy(reader.lookup(question), question.accepted)
    return lookup, reader.ceiling(question), expected_accuracy(reader.guess("ideal", question), question.accepted)


def accuracies(episode: Episode, name: str) -> list[float]:
    rows = zip(episode.beliefs(name), episode.steps, strict=True)
    return [expected_accuracy(row[0], step.questions[0].accepted) for row, step in rows]


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


@pytest.mark.slow
@pytest.mark.parametrize(("generator", "states", "density", "steps", "expected"), ROWS)
def test_accuracies_are_those_of_other_code(
    generator: str, states: int, density: str, steps: int, expected: tuple[float, float, float, float]
) -> None:
    game, n = make_game("DFA", states=states, density=density, generator=generator), 2000
    found = np.array([last_of(unroll(game, seed, steps)) for seed in range(n)])
    lookup, ceiling, hits = found.T
    for mine, (theirs, error) in ((lookup, expected[:2]), (ceiling, expected[2:])):
        assert abs(mine.mean() - theirs) < 3 * math.hypot(standard_error(mine), error)
    # What the reader expects is what it achieves. (18 rows: 2 standard errors would fail in one of them by chance.)
    assert abs((hits - ceiling).mean()) < 3 * standard_error(hits - ceiling) + 1e-12
    assert (lookup <= ceiling + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generator", ["default", "paper"])
def test_no_reader_beats_the_ceiling(generator: str, kind: str) -> None:
    game, n = make_game("DFA", states=6, kind=kind, generator=generator), 1000
    episodes = [unroll(game, seed, 8) for seed in range(n)]
    ceilings = np.array([[row[0] for row in episode.ceilings] for episode in episodes])
    for name in ("ideal", "lookup", "chance", *game.shortcuts):
        hits = np.array([accuracies(episode, name) for episode in episodes])
        excess = (hits - ceilings).mean(axis=1)
        assert excess.mean() < 3 * standard_error(excess)
        assert name != "ideal" or excess.mean() > -3 * standard_error(excess)


@pytest.mark.parametrize(("generator", "kind"), product(["default", "paper"], KINDS))
def test_without_a_choice_everything_is_determined(generator: str, kind: str) -> None:
    episode = unroll(make_game("DFA", states=2, generator=generator, kind=kind), 0, 6)
    assert episode.ceilings == [[1.0]] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_walks_of_any_length_are_read(kind: str) -> None:
    """A state that was left thousands of times in one way is the sink, however small the numbers become."""
    for generator, seed in product(("default", "paper"), range(3)):
        episode = unroll(make_game("DFA", states=5, density="max", kind=kind, generator=generator), seed, 3000)
        assert [row[0] for row in episode.ceilings[-100:]] == [1.0] * 100
        for step, belief, ceiling in zip(episode.steps, episode.beliefs("ideal"), episode.ceilings, strict=True):
            assert sum(belief[0][i] for i in step.questions[0].accepted) > 0
            assert 0 < ceiling[0] <= 1


def test_automata_that_are_too_large_are_refused_when_they_are_made() -> None:
    with pytest.raises(GameError, match=r"^states=21 is not possible: expected 2 to 20.*ideal='lookup'[^\n]*$"):
        make_game("DFA", states=21)
    for given in ({"ideal": "lookup"}, {"generator": "paper"}):
        episode = unroll(make_game("DFA", states=26, **given), 0, 40)
        assert len(episode.ceilings) == 40
    lookup = unroll(make_game("DFA", states=26, ideal="lookup"), 0, 40)
    assert lookup.beliefs("ideal") == lookup.beliefs("lookup")


def test_published_automata_of_all_sizes_are_read() -> None:
    episode = unroll(make_game("DFA", states=100, symbols="pairs", actions_listed=400, generator="paper"), 0, 60)
    ceilings = [row[0] for row in episode.ceilings]
    rows = zip(episode.beliefs("lookup"), episode.steps, strict=True)
    lookup = [own_accuracy(row[0], step.questions[0].accepted) for row, step in rows]
    assert min(ceilings) > 0
    assert all(low <= high + 1e-9 for low, high in zip(lookup, ceilings, strict=True))
